"""What a kind of device brings: two products, and what they take."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Backend(NamedTuple):
    """The products by which :func:`granet_jax.kernels.block_matmul` works on a kind of device.

    ``times(x, kernel, live, block, flipped, interpret)`` multiplies ``x`` by the live blocks of
    ``kernel`` or, if flipped, of its transpose. ``outer(x, dy, live, block, interpret)`` is ``x.T @
    dy`` in the live blocks and anything in the others. ``live`` is bool, one entry for each block;
    sizes are multiples of the blocks' and of ``rows``.
    """

    times: Callable[[jax.Array, jax.Array, jax.Array, tuple[int, int], bool, bool], jax.Array]
    outer: Callable[[jax.Array, jax.Array, jax.Array, tuple[int, int], bool], jax.Array]
    takes: Callable[[tuple[int, int], bool], bool]  # blocks of this shape, interpreted or not?
    sides: str  # the same in words
    dtypes: tuple[Any, ...]  # of x and kernel; others are multiplied as if dense
    rows: int  # x is padded to multiples of it
