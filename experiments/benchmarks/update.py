"""Mask updates of a whole network, beside the same made with jnp.argsort."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import granet_jax as gj
from experiments.benchmarks import timing, weights
from experiments.benchmarks.selection import mask_by_argsort
from experiments.benchmarks.tables import Table
from granet_jax.masks import ceil_of_share

SPARSITY = 0.9
STEP = 40  # of 100, at which the update is made


def granet_update_by_argsort(
    masks: Any, params: Any, grads: Any, num_keep: jax.Array, fraction: jax.Array
) -> Any:
    """Global prune, then regeneration by layer, each selection by argsort."""
    flat = [jnp.where(m, jnp.abs(p), -1).ravel() for m, p in _pairs(masks, params)]
    kept = mask_by_argsort(jnp.concatenate(flat), num_keep)
    pieces = jnp.split(kept, np.cumsum([x.size for x in flat])[:-1])
    new = []
    for mask, (p, g) in zip(pieces, _pairs(params, grads), strict=True):
        live = jnp.sum(mask)
        exchanged = ceil_of_share(fraction, live)
        scores = jnp.where(mask.reshape(p.shape), jnp.abs(p), -1)
        survivors = mask_by_argsort(scores, live - exchanged)
        grown = mask_by_argsort(jnp.where(survivors, -1, jnp.abs(g)), exchanged)
        new.append(survivors | grown)
    return jax.tree.unflatten(jax.tree.structure(masks), new)


def tables(quick: bool) -> list[Table]:
    """Each of our updates is compared with argsort's result."""
    shapes = weights.shapes(quick)
    params, grads = weights.random_tree(shapes, 0), weights.random_tree(shapes, 1)
    stream = jax.jit(lambda tree: sum(jnp.sum(jnp.abs(p)) for p in jax.tree.leaves(tree)))
    one_pass, pairs = "one pass, sum(|x|)", _updates(params, grads)
    ours = {name: mine for name, (mine, _) in pairs.items()}
    measured = timing.in_turns({one_pass: lambda: stream(params), **ours}, rounds=9)
    theirs = {name: by_argsort for name, (_, by_argsort) in pairs.items()}
    by_argsort = timing.in_turns(theirs, rounds=2)
    rows = []
    for name, m in measured.items():
        row = {
            "update": name,
            "ms": timing.ms(m.median),
            "quartiles": timing.quartiles(m.seconds, timing.ms),
            "passes": timing.figure(m.median / measured[one_pass].median),
        }
        other = by_argsort.get(name)
        if other is None:
            rows.append(row | dict.fromkeys(("argsort (ms)", "times faster", "same masks"), ""))
            continue
        same = bool(jnp.array_equal(_flat(m.result), _flat(other.result)))
        rows.append(
            row
            | {
                "argsort (ms)": timing.ms(other.median),
                "times faster": f"{other.median / m.median:.1f}",
                "same masks": str(same),
            }
        )
    note = (
        f"{weights.described(shapes)}, sparsity {SPARSITY:.0%}. Updates take turns with a pass "
        "over the same arrays; argsort's are measured twice."
    )
    return [Table("Mask updates of ResNet-50", rows, note)]


def _updates(params: Any, grads: Any) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Ours and that by argsort, by name."""
    leaves = gj.trees.describe(params)
    layers = gj.trees.layer_shapes(leaves)
    counts = jnp.array(gj.erk(layers, SPARSITY))
    num_keep = jnp.int32(gj.global_ranking(layers, SPARSITY))
    method = gj.granet(
        initial_sparsity=0.5,
        final_sparsity=SPARSITY,
        end_step=80,
        update_every=10,
        total_steps=100,
        key=jax.random.key(2),
    )
    state = method.init(params)
    step = jnp.int32(STEP)
    fraction = gj.cosine(0.5, 0.005, 100)(step)
    scheduled = gj.gradual_num_keep(gj.global_ranking, 0.5, SPARSITY, 0, 80)(layers, step)

    @jax.jit
    def ranked(params: Any, num_keep: jax.Array) -> Any:
        scores = [jnp.abs(x) for x in gj.trees.split(params, leaves)]
        return gj.trees.join(gj.top_k(scores, num_keep), params, leaves)

    @jax.jit
    def by_layer_argsort(params: Any, counts: jax.Array) -> Any:
        flat = zip(jax.tree.leaves(params), counts, strict=True)
        return [mask_by_argsort(jnp.abs(p), k) for p, k in flat]

    @jax.jit
    def over_all_argsort(params: Any, k: jax.Array) -> Any:
        return mask_by_argsort(_flat(jax.tree.map(jnp.abs, params)), k)

    update, update_argsort = jax.jit(method.update), jax.jit(granet_update_by_argsort)
    return {
        "by layer (ERK)": (
            lambda: ranked(params, counts),
            lambda: by_layer_argsort(params, counts),
        ),
        "over all weights": (
            lambda: ranked(params, num_keep),
            lambda: over_all_argsort(params, num_keep),
        ),
        "GraNet update (3 selections)": (
            lambda: update(state, gj.Event(params, grads, step=step))[0].masks,
            lambda: update_argsort(state.masks, params, grads, scheduled, fraction),
        ),
    }


def _pairs(first: Any, second: Any) -> Any:
    return zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)


def _flat(tree: Any) -> jax.Array:
    return jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)])
