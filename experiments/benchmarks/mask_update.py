"""What sparsity costs in the optimizer, on the 54 weight shapes of ResNet-50 (25.5 M weights).

Example:
  python -m experiments.benchmarks.mask_update

Prints times and, what counts, ratios measured in one run: exact top-k masks and whole GraNet
updates beside the same made with jnp.argsort, and optimizer steps without mask update beside the
dense optimizer's. One streaming pass, jnp.sum(jnp.abs(x)) over the same weights, is the yardstick
of memory speed; a dense step beside itself is the noise.
"""

import functools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from rich.console import Console

import granet_jax as gj
from experiments import output
from granet_jax.masks import ceil_of_share

flags.DEFINE_integer("repeats", 5, "measurements of each mask update", lower_bound=1)
flags.DEFINE_integer("steps", 50, "measurements of each optimizer step", lower_bound=3)
flags.DEFINE_float("sparsity", 0.9, "of the masks that are made and trained under")


def resnet50_shapes() -> list[tuple[int, ...]]:
    """Kernels of ResNet-50, (height, width, in, out), and its classifier."""
    shapes: list[tuple[int, ...]] = [(7, 7, 3, 64)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(1, 1, channels, width), (3, 3, width, width), (1, 1, width, 4 * width)]
            shapes += [(1, 1, channels, 4 * width)] if block == 0 else []
            channels = 4 * width
    return [*shapes, (2048, 1000)]


def random_tree(seed: int) -> dict[str, jax.Array]:
    """Normal values in the shapes of ResNet-50."""
    return {
        f"{i:02}/kernel": jax.random.normal(jax.random.fold_in(jax.random.key(seed), i), shape)
        for i, shape in enumerate(resnet50_shapes())
    }


def top_k_by_argsort(scores: jax.Array, k: jax.Array) -> jax.Array:
    """The usual way: sort all, scatter ones to the first k."""
    order = jnp.argsort(-scores.ravel(), stable=True)
    mask = jnp.zeros(scores.size, bool).at[order].set(jnp.arange(scores.size) < k)
    return mask.reshape(scores.shape)


def granet_update_by_argsort(
    masks: Any, params: Any, grads: Any, num_keep: jax.Array, fraction: jax.Array
) -> Any:
    """Global prune, then regeneration by layer, each selection by argsort."""
    leaves = jax.tree.leaves
    flat = jnp.concatenate(
        [
            jnp.where(m, jnp.abs(p), -1).ravel()
            for m, p in zip(leaves(masks), leaves(params), strict=True)
        ]
    )
    kept = top_k_by_argsort(flat, num_keep)
    ends = np.cumsum([p.size for p in leaves(params)])[:-1]
    new = []
    for mask, p, g in zip(jnp.split(kept, ends), leaves(params), leaves(grads), strict=True):
        live = jnp.sum(mask)
        exchanged = ceil_of_share(fraction, live)
        scores = jnp.where(mask.reshape(p.shape), jnp.abs(p), -1)
        survivors = top_k_by_argsort(scores, live - exchanged)
        grown = top_k_by_argsort(jnp.where(survivors, -1, jnp.abs(g)), exchanged)
        new.append(survivors | grown)
    return jax.tree.unflatten(jax.tree.structure(masks), new)


def seconds(call: Callable[[], Any], repeats: int) -> list[float]:
    """Times of a call that has been run once before."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - started)
    return times


def compare_updates(repeats: int, sparsity: float) -> list[list[str]]:
    """Rows on mask updates; each of ours is checked against argsort's result."""
    params, grads = random_tree(0), random_tree(1)
    leaves = gj.trees.describe(params)
    counts = jnp.array(gj.erk(gj.trees.layer_shapes(leaves), sparsity))
    total = gj.trees.num_prunable(leaves)
    num_keep = jnp.int32(gj.global_ranking(gj.trees.layer_shapes(leaves), sparsity))
    step = jnp.int32(40)
    method = gj.granet(
        initial_sparsity=0.5,
        final_sparsity=sparsity,
        end_step=80,
        update_every=10,
        total_steps=100,
        key=jax.random.key(2),
    )
    state = method.init(params)
    fraction = gj.cosine(0.5, 0.005, 100)(step)
    scheduled = gj.gradual_num_keep(gj.global_ranking, 0.5, sparsity, 0, 80)
    scheduled_keep = scheduled(gj.trees.layer_shapes(leaves), step)

    @jax.jit
    def by_layer(params: Any, counts: jax.Array) -> Any:
        scores = [jnp.abs(x) for x in gj.trees.split(params, leaves)]
        return gj.trees.join(gj.top_k(scores, counts), params, leaves)

    @jax.jit
    def by_layer_argsort(params: Any, counts: jax.Array) -> Any:
        flat = jax.tree.leaves(params)
        masks = [top_k_by_argsort(jnp.abs(p), k) for p, k in zip(flat, counts, strict=True)]
        return jax.tree.unflatten(jax.tree.structure(params), masks)

    @jax.jit
    def over_all_argsort(params: Any, k: jax.Array) -> Any:
        return top_k_by_argsort(
            jnp.concatenate([jnp.abs(p).ravel() for p in jax.tree.leaves(params)]), k
        )

    update = jax.jit(method.update)
    update_argsort = jax.jit(granet_update_by_argsort)
    pairs: list[tuple[str, Callable[[], Any], Callable[[], Any]]] = [
        (
            "top-k masks by layer (ERK)",
            lambda: by_layer(params, counts),
            lambda: by_layer_argsort(params, counts),
        ),
        (
            "top-k masks over all weights",
            lambda: by_layer(params, num_keep),
            lambda: over_all_argsort(params, num_keep),
        ),
        (
            "GraNet update (3 selections)",
            lambda: update(state, params, grads, step)[0].masks,
            lambda: update_argsort(state.masks, params, grads, scheduled_keep, fraction),
        ),
    ]
    stream = jax.jit(lambda tree: sum(jnp.sum(jnp.abs(p)) for p in jax.tree.leaves(tree)))
    jax.block_until_ready(stream(params))
    one_pass = statistics.median(seconds(lambda: stream(params), 5 * repeats))
    rows = [["one pass, sum(|x|)", _ms(one_pass), "1", "", "", ""]]
    for name, ours, theirs in pairs:
        flat = [
            np.concatenate([np.ravel(m) for m in jax.tree.leaves(call())])
            for call in (ours, theirs)  # the first calls, which compile
        ]
        same = bool(np.array_equal(flat[0], flat[1]))
        assert flat[0].size == total
        mine, argsort = seconds(ours, repeats), seconds(theirs, min(2, repeats))
        t, s = statistics.median(mine), statistics.median(argsort)
        rows.append([name, _ms(t), f"{t / one_pass:.0f}", _ms(s), f"{s / t:.1f}", str(same)])
    return rows


def compare_steps(steps: int, sparsity: float) -> list[list[str]]:
    """Rows on donated optimizer steps without mask update, variants taking turns."""
    rows = []
    for name, inner in (
        ("SGD, momentum", optax.sgd(0.1, momentum=0.9)),
        ("AdamW", optax.adamw(1e-3)),
    ):
        method = gj.granet(
            initial_sparsity=sparsity,
            final_sparsity=sparsity,
            end_step=10**6,
            update_every=10**6,
            total_steps=10**6,
            key=jax.random.key(2),
        )
        variants = {"dense": inner, "dense again": inner, "sparse": gj.sparsify(inner, method)}
        grads = random_tree(1)
        run = {key: _stepper(tx, grads) for key, tx in variants.items()}
        times: dict[str, list[float]] = {key: [] for key in variants}
        for _ in range(steps):
            for key in variants:
                times[key] += seconds(run[key], 1)
        medians = {key: statistics.median(values) for key, values in times.items()}
        quartiles = statistics.quantiles(
            [s / d for s, d in zip(times["sparse"], times["dense"], strict=True)], n=4
        )
        rows.append(
            [
                name,
                _ms(medians["dense"]),
                _ms(medians["sparse"]),
                f"{medians['sparse'] / medians['dense']:.2f}",
                f"{quartiles[0]:.2f}-{quartiles[2]:.2f}",
                f"{medians['dense again'] / medians['dense']:.2f}",
            ]
        )
    return rows


def _stepper(tx: optax.GradientTransformation, grads: Any) -> Callable[[], Any]:
    """A call that does one donated step and keeps the state for the next."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = random_tree(0)
    carry = [step(params, tx.init(params), grads)]

    def run() -> Any:
        carry[0] = step(*carry[0], grads)
        return carry[0]

    return run


def _ms(value: float) -> str:
    return f"{1000 * value:,.1f}"


def main(argv: list[str]) -> None:
    """Runs both comparisons and prints two tables."""
    if len(argv) > 1:
        sys.exit(f"error: {argv[1]!r} is no flag. See --help.")
    console = Console()
    total = sum(int(np.prod(s)) for s in resnet50_shapes())
    where = f"{jax.device_count()} {jax.devices()[0].device_kind} device, jax {jax.__version__}"
    print(f"ResNet-50: {len(resnet50_shapes())} shapes, {total:,} weights; {where}")
    columns = ("update", "ms", "passes", "argsort ms", "times faster", "same masks")
    sparsity = flags.FLAGS.sparsity
    rows = compare_updates(flags.FLAGS.repeats, sparsity)
    output.print_table(
        console, "Mask updates", [dict(zip(columns, row, strict=True)) for row in rows]
    )
    columns = ("step without update", "dense ms", "sparse ms", "ratio", "quartiles", "dense/dense")
    rows = compare_steps(flags.FLAGS.steps, sparsity)
    title = "Optimizer steps, donated"
    output.print_table(console, title, [dict(zip(columns, row, strict=True)) for row in rows])


if __name__ == "__main__":
    app.run(main)
