"""The block-sparse product beside the dense one; on a GPU, for elsewhere it is but simulated."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import granet_jax as gj
from experiments.benchmarks import timing
from experiments.benchmarks.tables import Table

SPARSITIES = (0.5, 0.75, 0.9, 0.95)
BLOCK = (64, 64)


def tables(quick: bool) -> list[Table]:
    """Rows for each sparsity, forward alone and with both gradients."""
    on_gpu = jax.default_backend() == "gpu"
    size, rows_of_x, block = (4096, 4096, BLOCK) if on_gpu else (32, 16, (4, 4))
    rows = []
    for sparsity in SPARSITIES:
        for what in ("forward", "forward and gradients"):
            row = {"sparsity": f"{sparsity:.2f}", "what": what}
            if on_gpu or quick:
                row |= _measured(sparsity, what, size, rows_of_x, block, not on_gpu)
            else:
                row |= dict.fromkeys(_COLUMNS, "not measured")
            rows.append(row)
    note = (
        f"bfloat16, {rows_of_x:,} x {size:,} times {size:,} x {size:,}, blocks of "
        f"{block[0]} x {block[1]}, those that are on drawn at random. `kernels.block_matmul` needs "
        "a GPU; without one its tests run it simulated."
    )
    return [Table("Block-sparse product", rows, note)]


_COLUMNS = ("dense (ms)", "sparse (ms)", "times faster", "quartiles", "largest error")


def _measured(
    sparsity: float,
    what: str,
    size: int,
    num_rows: int,
    block: tuple[int, int],
    interpret: bool,
) -> dict[str, str]:
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (num_rows, size), jnp.bfloat16)
    kernel = jax.random.normal(keys[1], (size, size), jnp.bfloat16)
    rules = [("", gj.structures.block(block))]
    mask = gj.random_masks(keys[2], {"k": kernel}, sparsity, gj.uniform, rules)["k"]
    kernel = jnp.where(mask, kernel, 0)

    def sparse(x: jax.Array, kernel: jax.Array, mask: jax.Array) -> jax.Array:
        return gj.kernels.block_matmul(x, kernel, mask, block, interpret=interpret)

    def dense(x: jax.Array, kernel: jax.Array, mask: jax.Array) -> jax.Array:
        return x @ kernel

    wrap = jax.jit if what == "forward" else _with_gradients
    runs = {
        name: functools.partial(wrap(product), x, kernel, mask)
        for name, product in (("dense", dense), ("sparse", sparse))
    }
    times = timing.in_turns(runs, rounds=2 if interpret else 30)
    wanted, got = (jax.tree.leaves(times[name].result)[0] for name in ("dense", "sparse"))
    error = jnp.abs(wanted.astype(jnp.float32) - got.astype(jnp.float32)).max()
    figures = (
        timing.ms(times["dense"].median),
        timing.ms(times["sparse"].median),
        f"{times['dense'].median / times['sparse'].median:.2f}",
        timing.quartiles(timing.ratios(times["dense"], times["sparse"])),
        f"{float(error / jnp.abs(wanted).max()):.1e}",
    )
    return dict(zip(_COLUMNS, figures, strict=True))


def _with_gradients(product: Callable[..., jax.Array]) -> Callable[..., Any]:
    def step(x: jax.Array, kernel: jax.Array, mask: jax.Array) -> Any:
        y, pull = jax.vjp(lambda x, kernel: product(x, kernel, mask), x, kernel)
        return y, pull(y)

    return jax.jit(step)
