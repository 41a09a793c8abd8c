"""The block-sparse products on TPUs: lists of live blocks are fetched before the blocks."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from granet_jax.kernels.backend import Backend, like_kernel
from granet_jax.kernels.lists import Lists, arrays

_ROWS = 256  # of x that one program multiplies


def _times(
    x: jax.Array,
    kernel: jax.Array,
    lists: Lists,
    block: tuple[int, int],
    flipped: bool,
    interpret: bool,
) -> jax.Array:
    """Steps ``(m, n, i)`` add the i-th live block of column n to a tile of the output."""
    size_k, size_n = block[::-1] if flipped else block
    num_columns, packed = len(lists.num_live), lists.slots is not None
    contracted = (1,), (1 if flipped else 0,)

    def program(
        order: Any, num_live: Any, slots: Any, x: Any, kernel: Any, out: Any, total: Any
    ) -> None:
        n, i = pl.program_id(1), pl.program_id(2)

        @pl.when(i == 0)
        def _() -> None:
            total[...] = jnp.zeros(total.shape, jnp.float32)

        @pl.when(i < num_live[n])
        def _() -> None:
            total[...] += _product(x[...], kernel[...], contracted)

        @pl.when(i == jnp.maximum(num_live[n] - 1, 0))  # num_programs is wrong under vmap
        def _() -> None:
            out[...] = total[...].astype(out.dtype)

    def kernel_at(m: Any, n: Any, i: Any, order: Any, num_live: Any, slots: Any) -> Any:
        if packed:
            return slots[n, i], 0
        return (n, order[n, i]) if flipped else (order[n, i], n)

    return _call(
        program,
        grid=(len(x) // _ROWS, num_columns, jnp.maximum(lists.num_live.max(), 1)),
        in_specs=[
            pl.BlockSpec((_ROWS, size_k), lambda m, n, i, order, *_: (m, order[n, i])),
            pl.BlockSpec(block, kernel_at),
        ],
        out_block=(_ROWS, size_n),
        out_index=lambda m, n, i, *_: (m, n),
        out=jax.ShapeDtypeStruct((len(x), num_columns * size_n), x.dtype),
        interpret=interpret,
    )(*arrays(lists), x, kernel)


def _outer(
    x: jax.Array,
    dy: jax.Array,
    lists: Lists,
    block: tuple[int, int],
    num_slots: int,
    interpret: bool,
) -> jax.Array:
    """Steps ``(n, i, m)`` add rows m to the i-th live block of column n."""
    num_tiles = len(x) // _ROWS

    def program(
        order: Any, num_live: Any, slots: Any, x: Any, dy: Any, out: Any, total: Any
    ) -> None:
        n, i, m, last = pl.program_id(0), pl.program_id(1), pl.program_id(2), num_tiles - 1

        @pl.when(i < num_live[n])
        def _() -> None:
            before = jnp.where(m == 0, 0, total[...])
            total[...] = before + _product(x[...], dy[...], ((0,), (0,)))

            @pl.when(m == last)
            def _() -> None:
                out[...] = total[...].astype(out.dtype)

    # After the last live block of a column the same blocks are read and written again. A column
    # without live blocks writes to a place that nothing reads: a dead block, or the slot past all.
    def tile(n: Any, i: Any, m: Any, num_live: Any) -> Any:
        return jnp.where(i < num_live[n], m, num_tiles - 1)

    def place(i: Any, num_live: Any) -> Any:
        return jnp.clip(i, 0, jnp.maximum(num_live - 1, 0))

    def out_at(n: Any, i: Any, m: Any, order: Any, num_live: Any, slots: Any) -> Any:
        at = place(i, num_live[n])
        if lists.slots is None:
            return order[n, at], n
        return jnp.where(num_live[n] > 0, slots[n, at], num_slots), 0

    def x_at(n: Any, i: Any, m: Any, order: Any, num_live: Any, slots: Any) -> Any:
        return tile(n, i, m, num_live), order[n, place(i, num_live[n])]

    def dy_at(n: Any, i: Any, m: Any, order: Any, num_live: Any, slots: Any) -> Any:
        return tile(n, i, m, num_live), n

    out = like_kernel(x, dy, lists, block, num_slots + 1)
    made = _call(
        program,
        grid=(len(lists.num_live), jnp.maximum(lists.num_live.max(), 1), num_tiles),
        in_specs=[pl.BlockSpec((_ROWS, block[0]), x_at), pl.BlockSpec((_ROWS, block[1]), dy_at)],
        out_block=block,
        out_index=out_at,
        out=out,
        interpret=interpret,
    )(*arrays(lists), x, dy)
    return made if lists.slots is None else made[: num_slots * block[0]]


def _product(a: jax.Array, b: jax.Array, contracted: Any) -> jax.Array:
    return lax.dot_general(a, b, (contracted, ((), ())), preferred_element_type=jnp.float32)


def _call(
    program: Callable[..., None],
    grid: tuple[Any, ...],
    in_specs: list[pl.BlockSpec],
    out_block: tuple[int, int],
    out_index: Callable[..., Any],
    out: jax.ShapeDtypeStruct,
    interpret: bool,
) -> Callable[..., jax.Array]:
    """A call whose program gets three lists, the operands, and a float32 tile for the sum."""
    from jax.experimental.pallas import tpu

    spec = tpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=grid,
        in_specs=in_specs,
        out_specs=pl.BlockSpec(out_block, out_index),
        scratch_shapes=[tpu.VMEM(out_block, jnp.float32)],
    )
    return pl.pallas_call(program, grid_spec=spec, out_shape=out, interpret=interpret)


tpu = Backend(
    _times,
    _outer,
    lambda block, interpret: interpret or all(side % 128 == 0 for side in block),
    "multiples of 128",
    (jnp.bfloat16, jnp.float32),
    _ROWS,
)
