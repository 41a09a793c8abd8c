"""The kernels of one kind of device: two products, and the blocks and dtypes that they accept."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from granet_jax.kernels.lists import Lists


class Backend(NamedTuple):
    """The kernels that :func:`granet_jax.kernels.block_matmul` uses on one kind of device.

    ``times(x, kernel, lists, block, flipped, interpret)`` multiplies ``x`` by the live blocks of a
    kernel, dense or packed (see :mod:`granet_jax.kernels.lists`), or of its transpose if
    ``flipped``. The lists are those of the matrix that ``x`` is multiplied by. ``outer(x, dy,
    lists, block, num_slots, interpret)`` computes the blocks of ``x.T @ dy`` that are in the lists,
    dense or packed as the lists say; other blocks are undefined. Sizes are multiples of the sides
    of blocks and of ``rows``.

    Example:
      >>> from granet_jax import kernels
      >>> kernels.hopper.sides
      'powers of two from 16 on, best 64 or 128'
    """

    times: Callable[[jax.Array, jax.Array, Lists, tuple[int, int], bool, bool], jax.Array]
    outer: Callable[[jax.Array, jax.Array, Lists, tuple[int, int], int, bool], jax.Array]
    takes: Callable[[tuple[int, ...], bool], bool]  # (block, interpret) -> is it accepted?
    sides: str  # the sides of blocks that it accepts, in words
    dtypes: tuple[Any, ...]  # of x and kernel; for others XLA multiplies by the masked kernel
    rows: int  # x is padded to multiples of it


def like_kernel(
    x: jax.Array, dy: jax.Array, lists: Lists, block: tuple[int, int], num_slots: int
) -> jax.ShapeDtypeStruct:
    """The shape of ``x.T @ dy``, dense or packed as the lists are."""
    shape = x.shape[1], dy.shape[1]
    if lists.slots is not None:
        shape = num_slots * block[0], block[1]
    return jax.ShapeDtypeStruct(shape, x.dtype)
