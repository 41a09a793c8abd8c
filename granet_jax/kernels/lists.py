"""Lists of live blocks: which blocks a product has to visit. They are data, so masks may change.

A kernel is either dense, ``(inputs, outputs)``, or *packed*: a stack of blocks, ``(blocks * rows of
one, columns of one)``, of which a list tells where each belongs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Lists(NamedTuple):
    """The live blocks of each column of blocks."""

    order: jax.Array  # int32 (columns, rows): their rows in order; 0 after the last
    num_live: jax.Array  # int32 (columns,)
    slots: jax.Array | None = None  # int32 (columns, rows): where they lie in a packed kernel


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


def packed(index: jax.Array, grid: tuple[int, int]) -> tuple[Lists, Lists]:
    """Of packed blocks, for ``x @ w`` and for ``y @ w.T``.

    Args:
      index: int32 ``(slots,)``, the row-major number of each block in the grid; its size tells
        that a slot is dead.
      grid: rows and columns of blocks.

    Example: the blocks of the last row, and a dead slot.
      >>> import jax.numpy as jnp
      >>> by_column, by_row = packed(jnp.array([3, 4, 2]), (2, 2))
      >>> by_column.order.tolist(), by_column.slots.tolist()
      ([[1, 0], [1, 0]], [[2, 0], [0, 0]])
      >>> by_row.order.tolist(), by_row.slots.tolist()
      ([[0, 0], [0, 1]], [[0, 0], [2, 0]])
    """
    size = grid[0] * grid[1]
    live = jnp.zeros(size, bool).at[index].set(True, mode="drop")
    slot = (
        jnp.zeros(size, jnp.int32)
        .at[index]
        .set(jnp.arange(len(index), dtype=jnp.int32), mode="drop")
    )
    live, slot = live.reshape(grid), slot.reshape(grid)

    def of(live: jax.Array, slot: jax.Array) -> Lists:
        found = lists(live)
        used = jnp.arange(len(live))[None] < found.num_live[:, None]
        slots = jnp.take_along_axis(slot.T, found.order, axis=1)
        return found._replace(slots=jnp.where(used, slots, 0))

    return of(live, slot), of(live.T, slot.T)


def three(lists: Lists) -> tuple[jax.Array, ...]:
    """The lists as arrays; without slots, others that nothing reads."""
    slots = lists.order if lists.slots is None else lists.slots
    return lists.order, lists.num_live, slots
