"""The block-sparse products on GPUs, by Mosaic GPU: ``wgmma`` on Hopper, ``mma`` on the others.

Blocks are loaded while earlier ones are multiplied. Which blocks to load is read from lists in
memory.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from granet_jax.kernels.backend import Backend, like_kernel
from granet_jax.kernels.lists import Lists, arrays

_ROWS = 128  # of x that one program multiplies
_LINE = 128  # bytes that are swizzled together
_LOADS = 4  # loads at a time in the gradient of weights


def _times(
    x: jax.Array,
    kernel: jax.Array,
    lists: Lists,
    block: tuple[int, int],
    flipped: bool,
    interpret: bool,
    sum_up: Callable[..., Callable[..., jax.Array]],
) -> jax.Array:
    """Each program makes a tile of the output from the live blocks of one column."""
    gpu, itemsize, packed = _mosaic(), x.dtype.itemsize, lists.slots is not None
    if itemsize == 4 and not flipped:  # of 32 bits wgmma wants the summed axis last
        if packed:
            kernel = kernel.reshape(-1, *block).swapaxes(1, 2).reshape(-1, block[0])
        else:
            kernel = kernel.T
        block, flipped = block[::-1], True
    sides = block[::-1] if flipped else block
    size_k, size_n = math.gcd(sides[0], _LINE // itemsize), math.gcd(sides[1], 128)
    splits, parts = sides[0] // size_k, sides[1] // size_n
    tiled = _tiled(gpu, math.gcd(size_k, size_n, _LINE // itemsize), itemsize)

    def program(
        order: Any, num_live: Any, slots: Any, x: Any, kernel: Any, out: Any, tile: Any
    ) -> None:
        m, n = lax.axis_index("m"), lax.axis_index("n")

        def x_at(i: jax.Array) -> tuple[Any, Any]:
            return m, order[n // parts, i // splits] * splits + _rem(i, splits)

        def kernel_at(i: jax.Array) -> tuple[Any, Any]:
            place = x_at(i)[1], n
            if packed:
                slot, k_in, n_in = slots[n // parts, i // splits], _rem(i, splits), n % parts
                place = (k_in, slot * parts + n_in) if flipped else (slot * splits + k_in, n_in)
            return place[::-1] if flipped else place

        a = (_ROWS, size_k), x_at
        b = (size_n, size_k) if flipped else (size_k, size_n), kernel_at
        num_steps = num_live[n // parts] * splits
        turned = False, flipped
        total = sum_up(gpu, num_steps, (a, b), turned, tiled, (_ROWS, size_n))(x, kernel)
        _store(gpu, total, tile, [out.at[pl.ds(m * _ROWS, _ROWS), pl.ds(n * size_n, size_n)]])

    width = len(lists.num_live) * sides[1]
    return gpu.kernel(
        program,
        out_type=jax.ShapeDtypeStruct((len(x), width), x.dtype),
        scratch_types=[gpu.SMEM((_ROWS, size_n), x.dtype, transforms=tiled)],
        grid=(len(x) // _ROWS, width // size_n),
        grid_names=("m", "n"),
        **_options(gpu, interpret),
    )(*arrays(lists), x, kernel)


def _by_wgmma(
    gpu: Any, num_steps: Any, specs: Any, turned: Any, tiled: Any, shape: tuple[int, int]
) -> Callable[..., jax.Array]:
    """A sum of products of tiles, (indices -> place) for each operand, turned or not."""
    in_specs = [gpu.BlockSpec(*spec, transforms=tiled, delay_release=1) for spec in specs]

    def sum_up(*operands: Any) -> Any:
        def add_up(total: Any) -> Any:
            def step(_: Any, *tiles: Any) -> None:
                gpu.wgmma(total, *(_turned(*pair) for pair in zip(tiles, turned, strict=True)))

            pipeline = gpu.emit_pipeline(
                step, grid=(num_steps,), in_specs=in_specs, max_concurrent_steps=2
            )
            pl.when(num_steps > 0)(lambda: pipeline(*operands))
            return total[...]

        return pl.run_scoped(add_up, gpu.ACC(shape, jnp.float32))

    return sum_up


def _by_mma(
    gpu: Any, num_steps: Any, specs: Any, turned: Any, tiled: Any, shape: tuple[int, int]
) -> Callable[..., jax.Array]:
    """The same sum by ``mma``, through registers."""
    in_specs = [gpu.BlockSpec(*spec, transforms=tiled) for spec in specs]
    layout = gpu.Layout.MMA_ACC(jnp.float32, m_warps=min(4, shape[0] // 16))

    def step(_: Any, *refs: Any) -> Any:
        *tiles, total = refs
        a, b = (_turned(*pair)[...] for pair in zip(tiles, turned, strict=True))
        return gpu.mma(total, a, b)

    def sum_up(*operands: Any) -> Any:
        zeros = gpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)
        pipeline = gpu.emit_pipeline(
            step, grid=(num_steps,), in_specs=in_specs, max_concurrent_steps=3, init_carry=zeros
        )
        return lax.cond(num_steps > 0, lambda: pipeline(*operands), lambda: zeros)

    return sum_up


def _outer_by_mma(
    x: jax.Array,
    dy: jax.Array,
    lists: Lists,
    block: tuple[int, int],
    num_slots: int,
    interpret: bool,
) -> jax.Array:
    """Each program makes a live block, or a part of a large one."""
    gpu, itemsize = _mosaic(), x.dtype.itemsize
    size_m = _LINE // itemsize
    size_k, size_n = math.gcd(block[0], 128), math.gcd(block[1], 128)
    splits, parts = block[0] // size_k, block[1] // size_n
    tiled = _tiled(gpu, math.gcd(size_k, size_n, size_m), itemsize)
    num_steps = len(x) // size_m

    def program(
        order: Any, num_live: Any, slots: Any, x: Any, dy: Any, out: Any, tile: Any
    ) -> None:
        i, n = lax.axis_index("i"), lax.axis_index("n")
        column, part = n // parts, _rem(i, splits)
        k = order[column, i // splits] * splits + part

        @pl.when(i // splits < num_live[column])
        def _() -> None:
            a = (size_m, size_k), lambda m: (m, k)
            b = (size_m, size_n), lambda m: (m, n)
            sum_up = _by_mma(gpu, jnp.int32(num_steps), (a, b), (True, False), tiled, tile.shape)
            total = sum_up(x, dy)
            place = k, n
            if lists.slots is not None:
                place = slots[column, i // splits] * splits + part, n % parts
            rows, columns = (pl.ds(at * n, n) for at, n in zip(place, tile.shape, strict=True))
            _store(gpu, total, tile, [out.at[rows, columns]])

    return gpu.kernel(
        program,
        out_type=like_kernel(x, dy, lists, block, num_slots),
        scratch_types=[gpu.SMEM((size_k, size_n), x.dtype, transforms=tiled)],
        grid=(lists.order.shape[1] * splits, len(lists.num_live) * parts),
        grid_names=("i", "n"),
        **_options(gpu, interpret),
    )(*arrays(lists), x, dy)


def _outer_by_wgmma(
    x: jax.Array,
    dy: jax.Array,
    lists: Lists,
    block: tuple[int, int],
    num_slots: int,
    interpret: bool,
) -> jax.Array:
    """As ``_outer_by_mma``, in tiles of 64 rows or more: small blocks of a column share a tile."""
    gpu, itemsize = _mosaic(), x.dtype.itemsize
    size_m = _LINE // itemsize
    size_k, size_n = max(math.gcd(block[0], 128), 64), math.gcd(block[1], 128)
    together = max(size_k // block[0], 1)
    rows, splits, parts = size_k // together, max(block[0] // size_k, 1), block[1] // size_n
    num_rows, out_type = lists.order.shape[1], like_kernel(x, dy, lists, block, num_slots)
    # Of 32 bits wgmma wants the summed axis last; blocks side by side must not share a line.
    turned = itemsize == 2 and together == 1, itemsize == 4
    x, dy = x if turned[0] else x.T, dy.T if turned[1] else dy
    num_steps = dy.shape[turned[1]] // size_m
    width = math.gcd(size_k if turned[0] else size_m, size_m if turned[1] else size_n, size_m)

    def program(*refs: Any) -> None:
        order, num_live, slots, x, dy, out, xs, dys, tile, here = refs
        group, n = lax.axis_index("group"), lax.axis_index("n")
        first = group // splits * together
        column, part = n // parts, _rem(group, splits)
        num = num_live[column]

        def make() -> None:
            at = [jnp.minimum(first + i, num_rows - 1) for i in range(together)]
            k = [order[column, i] * splits + part for i in at]
            k_out, n_out = k, n
            if lists.slots is not None:
                k_out, n_out = [slots[column, i] * splits + part for i in at], n % parts

            def load(step: Any) -> None:
                slot, m = _rem(step, _LOADS), pl.ds(step * size_m, size_m)
                columns = pl.ds(n * size_n, size_n)
                for i, block_row in enumerate(k):
                    place = pl.ds(block_row * rows, rows)
                    source = x.at[m, place] if turned[0] else x.at[place, m]
                    goal = xs.at[slot] if turned[0] else xs.at[slot, pl.ds(i * rows, rows), :]
                    gpu.copy_gmem_to_smem(source, goal, here.at[slot])
                source = dy.at[columns, m] if turned[1] else dy.at[m, columns]
                gpu.copy_gmem_to_smem(source, dys.at[slot], here.at[slot])

            total = _sum_in_turns(gpu, num_steps, load, (xs, dys), turned, here, tile.shape)
            columns = pl.ds(n_out * size_n, size_n)
            goals = [out.at[pl.ds(block_row * rows, rows), columns] for block_row in k_out]
            _store(gpu, total, tile, goals, [first + i < num for i in range(together)])

        pl.when(first < num)(make)

    tiled, out_width = _tiled(gpu, width, itemsize), math.gcd(size_n, size_m)
    return gpu.kernel(
        program,
        out_type=out_type,
        scratch_types=[
            gpu.SMEM((_LOADS, *_size(size_k, size_m, turned[0])), x.dtype, transforms=tiled),
            gpu.SMEM((_LOADS, *_size(size_m, size_n, turned[1])), x.dtype, transforms=tiled),
            gpu.SMEM((size_k, size_n), x.dtype, transforms=_tiled(gpu, out_width, itemsize)),
            gpu.Barrier(num_arrivals=1 + together, num_barriers=_LOADS),
        ],
        grid=(-(-num_rows // together) * splits, len(lists.num_live) * parts),
        grid_names=("group", "n"),
        **_options(gpu, interpret),
    )(*arrays(lists), x, dy)


def _sum_in_turns(
    gpu: Any, num_steps: int, load: Any, tiles: Any, turned: Any, here: Any, shape: tuple[int, int]
) -> jax.Array:
    """A sum of products of tiles, each loaded by ``load`` to a place of its own."""
    lax.fori_loop(jnp.int32(0), jnp.int32(min(_LOADS - 1, num_steps)), lambda i, _: load(i), None)

    def add_up(total: Any) -> Any:
        def add(step: Any, _: None) -> None:
            slot = _rem(step, _LOADS)
            gpu.barrier_wait(here.at[slot])
            pairs = zip(tiles, turned, strict=True)
            gpu.wgmma(total, *(_turned(refs.at[slot], turn) for refs, turn in pairs))
            gpu.wgmma_wait(1)  # the previous step is done, and its place is free
            ahead = step + _LOADS - 1
            pl.when(ahead < num_steps)(lambda: load(ahead))

        lax.fori_loop(jnp.int32(0), jnp.int32(num_steps), add, None)
        return total[...]

    return pl.run_scoped(add_up, gpu.ACC(shape, jnp.float32))


def _store(gpu: Any, total: Any, tile: Any, goals: list[Any], conditions: Any = (True,)) -> None:
    """Writes rows of a sum to their places by way of shared memory."""
    tile[...] = total.astype(tile.dtype)
    gpu.commit_smem()
    rows = tile.shape[0] // len(goals)
    for i, (goal, condition) in enumerate(zip(goals, conditions, strict=True)):
        copy = functools.partial(gpu.copy_smem_to_gmem, tile.at[pl.ds(i * rows, rows)], goal)
        pl.when(condition)(copy)
    gpu.wait_smem_to_gmem(0)


def _rem(i: Any, n: int) -> jax.Array:
    return lax.rem(i, jnp.int32(n))  # under jax_enable_x64, too


def _turned(ref: Any, turned: bool) -> Any:
    return ref.transpose((1, 0)) if turned else ref


def _size(rows: int, columns: int, turned: bool) -> tuple[int, int]:
    return (columns, rows) if turned else (rows, columns)


def _tiled(gpu: Any, width: int, itemsize: int) -> tuple[Any, Any]:
    """How tiles lie in shared memory: swizzled, as the matrix units read them."""
    return gpu.TilingTransform((8, width)), gpu.SwizzleTransform(width * itemsize)


def _options(gpu: Any, interpret: bool) -> dict[str, Any]:
    semantics = gpu.LoweringSemantics.Warpgroup
    return {
        "compiler_params": gpu.CompilerParams(lowering_semantics=semantics),
        "interpret": gpu.InterpretGPUParams() if interpret else None,
    }


def _mosaic() -> Any:
    """Mosaic GPU; it is imported here because not every platform has it."""
    if jax.__version_info__ < (0, 11, 2):
        raise RuntimeError(
            f"Block-sparse products on a GPU need jax 0.11.2 or later; this is {jax.__version__}. "
            "Update it, or multiply by the masked kernel: x @ jnp.where(mask, kernel, 0)."
        )
    from jax.experimental.pallas import mosaic_gpu

    return mosaic_gpu


def _takes(smallest: int) -> Callable[[tuple[int, ...], bool], bool]:
    return lambda block, interpret: all(n >= smallest and n & (n - 1) == 0 for n in block)


hopper = Backend(
    functools.partial(_times, sum_up=_by_wgmma),
    _outer_by_wgmma,
    _takes(16),
    "powers of two from 16 on, best 64 or 128",
    (jnp.bfloat16, jnp.float16, jnp.float32),
    _ROWS,
)
ampere = Backend(
    functools.partial(_times, sum_up=_by_mma),
    _outer_by_mma,
    _takes(32),
    "powers of two from 32 on, best 64 or 128",
    (jnp.bfloat16, jnp.float16),
    _ROWS,
)
