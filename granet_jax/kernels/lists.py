"""Lists of live blocks: which blocks a kernel has to visit. They are data, so masks may change."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Lists(NamedTuple):
    """The live blocks of each column of blocks."""

    order: jax.Array  # int32 (columns, rows): their rows in order; 0 after the last
    num_live: jax.Array  # int32 (columns,)


def lists(live: jax.Array) -> Lists:
    """Of bool ``(rows, columns)``, without a sort: few blocks are cheaper to compare with all.

    Example:
      >>> import jax.numpy as jnp
      >>> found = lists(jnp.array([[0, 0], [1, 0], [1, 1]], bool))
      >>> found.order.tolist(), found.num_live.tolist()
      ([[1, 2, 0], [2, 0, 0]], [2, 1])
    """
    num_rows = len(live)
    ends = jnp.cumsum(live.T, axis=1, dtype=jnp.int32)
    place = jnp.where(live.T, ends - 1, num_rows)  # in the list; of dead blocks none
    row = jax.lax.broadcasted_iota(jnp.int32, (1, 1, num_rows), 2)
    here = place[:, None] == jax.lax.broadcasted_iota(jnp.int32, (1, num_rows, 1), 1)
    return Lists(jnp.sum(jnp.where(here, row, 0), axis=2, dtype=jnp.int32), ends[:, -1])
