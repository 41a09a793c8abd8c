"""Products with a kernel of which only the live blocks are stored."""

import math

import jax
import jax.numpy as jnp

from granet_jax.kernels.backend import Backend
from granet_jax.kernels.block import padded
from granet_jax.kernels.lists import packed


def multiply(
    backend: Backend,
    values: jax.Array,
    index: jax.Array,
    grid: tuple[int, int],
    block: tuple[int, ...],
    x: jax.Array,
    *,
    transposed: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """``x @ w``, or ``x @ w.T`` if transposed.

    Args:
      backend: see :func:`granet_jax.kernels.block_matmul`.
      values: ``(slots * rows * columns of a block,)``; a slot holds a block, row by row.
      index: int32 ``(slots,)``, the row-major number of each block in the grid; the number of
        blocks in the grid marks a dead slot.
      grid: rows and columns of blocks.
      block: rows and columns of one.
      x: ``(n, inputs)`` in the dtype of ``values``, one of the backend's.
      transposed: multiply by ``w.T``; then ``x`` is ``(n, outputs)``.
      interpret: see :func:`granet_jax.kernels.block_matmul`.

    Returns:
      ``(n, outputs)``, or ``(n, inputs)`` if transposed, in the dtype of ``x``.

    Example: one block of four.
      >>> import jax.numpy as jnp
      >>> from granet_jax.kernels import tpu
      >>> values, index = jnp.ones(4), jnp.array([1])
      >>> x = jnp.array([[1.0, 2.0, 3.0, 4.0]])
      >>> multiply(tpu, values, index, (2, 2), (2, 2), x, interpret=True).tolist()
      [[0.0, 0.0, 3.0, 3.0]]
    """
    rows, columns = block
    if not len(x):
        return jnp.zeros((0, grid[0] * rows if transposed else grid[1] * columns), x.dtype)
    y = backend.times(
        padded(x, (backend.rows, 1)),
        values.reshape(-1, columns),
        packed(index, grid, transposed),
        (rows, columns),
        transposed,
        interpret,
    )
    return y[: len(x)]


def sample(
    backend: Backend,
    index: jax.Array,
    grid: tuple[int, int],
    block: tuple[int, ...],
    x: jax.Array,
    y: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """The entries of ``x.T @ y`` in the slots, ``(slots * size of a block,)``; 0 in dead ones."""
    rows, columns = block
    if not len(x):
        return jnp.zeros(len(index) * rows * columns, x.dtype)
    x, y = (padded(z, (backend.rows, 1)) for z in (x, y))
    made = backend.outer(x, y, packed(index, grid), (rows, columns), len(index), interpret)
    live = index < math.prod(grid)
    return jnp.where(live[:, None], made.reshape(len(index), -1), 0).reshape(-1)
