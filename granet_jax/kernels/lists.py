"""Lists of the live blocks that a product has to visit. They are data, so masks may change.

A kernel is either dense, ``(inputs, outputs)``, or *packed*: a stack of blocks, ``(blocks * rows of
a block, columns of a block)``, and a list of where each block belongs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Lists(NamedTuple):
    """The live blocks of each column of blocks."""

    order: jax.Array  # int32 (columns, rows): the rows of live blocks in order; 0 after the last
    num_live: jax.Array  # int32 (columns,)
    slots: jax.Array | None = None  # int32 (columns, rows): their places in a packed kernel


def lists(live: jax.Array) -> Lists:
    """The lists of bool ``(rows, columns)``. Not by a sort, which is slower for so few blocks.

    Example:
      >>> import jax.numpy as jnp
      >>> found = lists(jnp.array([[0, 0], [1, 0], [1, 1]], bool))
      >>> found.order.tolist(), found.num_live.tolist()
      ([[1, 2, 0], [2, 0, 0]], [2, 1])
    """
    num_rows = len(live)
    ends = jnp.cumsum(live.T, axis=1, dtype=jnp.int32)
    place = jnp.where(live.T, ends - 1, num_rows)  # in the list; past the end for dead blocks
    row = jax.lax.broadcasted_iota(jnp.int32, (1, 1, num_rows), 2)
    here = place[:, None] == jax.lax.broadcasted_iota(jnp.int32, (1, num_rows, 1), 1)
    return Lists(jnp.sum(jnp.where(here, row, 0), axis=2, dtype=jnp.int32), ends[:, -1])


def packed(index: jax.Array, grid: tuple[int, int], transposed: bool = False) -> Lists:
    """The lists of packed blocks.

    Args:
      index: int32 ``(slots,)``, the row-major number of each block in the grid; the number of
        blocks in the grid marks a dead slot.
      grid: rows and columns of blocks.
      transposed: for ``y @ w.T`` instead of ``x @ w``.

    Example: the blocks of the last row, and a dead slot.
      >>> import jax.numpy as jnp
      >>> found = packed(jnp.array([3, 4, 2]), (2, 2))
      >>> found.order.tolist(), found.slots.tolist()
      ([[1, 0], [1, 0]], [[2, 0], [0, 0]])
      >>> found = packed(jnp.array([3, 4, 2]), (2, 2), transposed=True)
      >>> found.order.tolist(), found.slots.tolist()
      ([[0, 0], [0, 1]], [[0, 0], [2, 0]])
    """
    empty, number = jnp.zeros(grid[0] * grid[1], jnp.int32), jnp.arange(1, len(index) + 1)
    slot = empty.at[index].set(number.astype(jnp.int32), mode="drop").reshape(grid)  # 0 = dead
    slot = slot.T if transposed else slot
    found = lists(slot > 0)
    slots = jnp.take_along_axis(slot.T, found.order, axis=1) - 1
    used = jnp.arange(len(slot))[None] < found.num_live[:, None]
    return found._replace(slots=jnp.where(used, slots, 0))


def arrays(lists: Lists) -> tuple[jax.Array, ...]:
    """All three arrays; if there are no slots, an array in their place that nothing reads."""
    slots = lists.order if lists.slots is None else lists.slots
    return lists.order, lists.num_live, slots
