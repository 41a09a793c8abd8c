"""The block-sparse product beside the dense one; elsewhere than on a GPU or TPU it is simulated."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import granet_jax as gj
from experiments.benchmarks import timing
from experiments.benchmarks.tables import Table

SPARSITIES = (0.5, 0.75, 0.9, 0.95)
SIZE, ROWS, SIDES = 4096, 8192, (32, 64, 128)
CALLS = 10  # in a row, so that what it takes to start one is hidden


def tables(quick: bool) -> list[Table]:
    """Rows for each side of blocks and each sparsity, forward alone and with both gradients."""
    simulated = jax.default_backend() == "cpu"
    size, rows_of_x, sides = (32, 16, (4,)) if simulated else (SIZE, ROWS, SIDES)
    rows = []
    for side in sides:
        for sparsity in SPARSITIES[-1:] if quick else SPARSITIES:
            for what, wrap in (("forward", jax.jit), ("whole", _with_gradients)):
                row = {"blocks": f"{side} x {side}", "sparsity": f"{sparsity:.2f}", "what": what}
                if simulated and not quick:
                    row |= dict.fromkeys(_COLUMNS, "not measured")
                else:
                    row |= _measured(sparsity, wrap, size, rows_of_x, side, simulated)
                rows.append(row)
    note = (
        f"bfloat16, {rows_of_x:,} x {size:,} times {size:,} x {size:,}, blocks that are on drawn "
        f"at random; whole = forward and both gradients. {CALLS} calls in a row; the sparse ones "
        "make their lists of live blocks anew. `kernels.block_matmul` needs a GPU or a TPU; "
        "without one its tests run it simulated."
    )
    return [Table("Block-sparse product", rows, note)]


_COLUMNS = ("dense (ms)", "sparse (ms)", "times faster", "quartiles", "largest error")


def _measured(
    sparsity: float,
    wrap: Callable[..., Any],
    size: int,
    num_rows: int,
    side: int,
    interpret: bool,
) -> dict[str, str]:
    keys, block = jax.random.split(jax.random.key(0), 3), (side, side)
    x = jax.random.normal(keys[0], (num_rows, size), jnp.bfloat16)
    kernel = jax.random.normal(keys[1], (size, size), jnp.bfloat16)
    rules = [("", gj.structures.block(block))]
    mask = gj.random_masks(keys[2], {"k": kernel}, sparsity, gj.uniform, rules)["k"]
    kernel = jnp.where(mask, kernel, 0)

    def sparse(x: jax.Array, kernel: jax.Array, mask: jax.Array) -> jax.Array:
        return gj.kernels.block_matmul(x, kernel, mask, block, interpret=interpret)

    def dense(x: jax.Array, kernel: jax.Array, mask: jax.Array) -> jax.Array:
        return x @ kernel

    def in_a_row(product: Callable[..., Any]) -> Any:
        return [product(x, kernel, mask) for _ in range(CALLS)][-1]

    products = {"dense": wrap(dense), "sparse": wrap(sparse)}
    runs = {name: functools.partial(in_a_row, product) for name, product in products.items()}
    times = timing.in_turns(runs, rounds=2 if interpret else 10)
    wanted, got = (jax.tree.leaves(times[name].result)[0] for name in ("dense", "sparse"))
    error = jnp.abs(wanted.astype(jnp.float32) - got.astype(jnp.float32)).max()
    figures = (
        timing.ms(times["dense"].median / CALLS),
        timing.ms(times["sparse"].median / CALLS),
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
