"""What a kind of device brings: two products, and what they take."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from granet_jax.kernels.lists import Lists


class Backend(NamedTuple):
    """The products by which :func:`granet_jax.kernels.block_matmul` works on a kind of device.

    ``times(x, kernel, lists, block, flipped, interpret)`` multiplies ``x`` by the blocks of a
    kernel, dense or packed (see :mod:`granet_jax.kernels.lists`), or of its transpose if flipped;
    the lists are those of what ``x`` is multiplied by. ``outer(x, dy, lists, block, num_slots,
    interpret)`` is ``x.T @ dy`` in the blocks of the lists, dense or packed as these are, and
    anything in the others. Sizes are multiples of the blocks' and of ``rows``.
    """

    times: Callable[[jax.Array, jax.Array, Lists, tuple[int, int], bool, bool], jax.Array]
    outer: Callable[[jax.Array, jax.Array, Lists, tuple[int, int], int, bool], jax.Array]
    takes: Callable[[tuple[int, ...], bool], bool]  # blocks of this shape, interpreted or not?
    sides: str  # the same in words
    dtypes: tuple[Any, ...]  # of x and kernel; others are multiplied as if dense
    rows: int  # x is padded to multiples of it


def like_kernel(
    x: jax.Array, dy: jax.Array, lists: Lists, block: tuple[int, int], num_slots: int
) -> jax.ShapeDtypeStruct:
    """The shape of ``x.T @ dy``, dense or packed as the lists are."""
    shape = x.shape[1], dy.shape[1]
    if lists.slots is not None:
        shape = num_slots * block[0], block[1]
    return jax.ShapeDtypeStruct(shape, x.dtype)
