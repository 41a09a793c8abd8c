"""Groups of weights that keep the same number each: counts, pruning and regeneration in them."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from granet_jax import selection, structures
from granet_jax.trees import Leaf


def best_in_groups(
    scores: jax.Array, num_keep: jax.Array, live: jax.Array, fixed: bool = False
) -> jax.Array:
    """Divides a layer's count among its live groups and keeps the best live units of each.

    Args:
      scores: of units, ``(layers, *groups, units)``.
      num_keep: int32 ``(layers,)``; each live group keeps ``num_keep / live groups``, rounded
        (halves up), but at least 1.
      live: bool, shape of ``scores``.
      fixed: divide the count among all groups, live or not.
    """
    is_live = jnp.any(live, axis=-1) | fixed
    num_live = jnp.sum(is_live, axis=tuple(range(1, is_live.ndim)), dtype=jnp.int32)
    each = jnp.maximum((num_keep + num_live // 2) // jnp.maximum(num_live, 1), 1)
    each = jnp.broadcast_to(each.reshape(-1, *[1] * (is_live.ndim - 1)), is_live.shape)
    return selection.top_k_of_rows(scores, each, live)


def fit_groups(
    regrown: Sequence[jax.Array],
    survivors: Sequence[jax.Array],
    live: Sequence[jax.Array],
    drop_scores: Sequence[jax.Array],
    growth: Sequence[jax.Array],
    leaves: Sequence[Leaf],
) -> list[jax.Array]:
    """Grows in each group as many units as it lost, instead of the best of the layer.

    Args:
      regrown: bool units after regeneration by the layer's ranking; these are salient.
      survivors: bool units that were not dropped.
      live: bool units before the event.
      drop_scores: if an output gets fewer units than it has, those that score highest stay.
      growth: the units that score highest are grown.
      leaves: of the whole tree.

    Returns:
      bool stacks of units; ``regrown`` itself for leaves without groups.
    """
    fitted = list(regrown)
    for i, leaf in enumerate(structures.first_leaves(leaves)):
        if leaf.structure is None or not leaf.structure.grouped:
            continue
        full = _shares(jnp.sum(live[i], axis=-1, dtype=jnp.int32), leaf.structure.fixed)
        least = leaf.structure.ablation(leaf)
        if least > 0:
            salient = jnp.sum(regrown[i], axis=-1, dtype=jnp.int32)
            full = _after_ablation(full, salient, least, live[i].shape[-1])
        stay = selection.top_k_of_rows(drop_scores[i], full, survivors[i])
        missing = full - jnp.sum(stay, axis=-1, dtype=jnp.int32)
        fitted[i] = stay | selection.top_k_of_rows(growth[i], missing, ~stay)
    return fitted


def _shares(full: jax.Array, fixed: bool) -> jax.Array:
    """How many units each group gets, if it has ``full``, int32 ``(layers, *groups)``: as many.

    If one has more than an equal share of the layer, as given masks may, all get that share.
    """
    axes = tuple(range(1, full.ndim))
    takes_part = (full > 0) | fixed
    num = jnp.maximum(jnp.sum(takes_part, axis=axes, keepdims=True, dtype=jnp.int32), 1)
    share = -(-jnp.sum(full, axis=axes, keepdims=True, dtype=jnp.int32) // num)
    is_odd = jnp.max(full, axis=axes, keepdims=True) > share
    return jnp.where(is_odd & takes_part, share, full)


def _after_ablation(full: jax.Array, salient: jax.Array, least: float, inputs: int) -> jax.Array:
    """How many weights each output gets, ``(layers, outputs)``; 0 with too few salient ones.

    As many outputs stay as the layer's weights need, those with the most salient ones.
    """
    fan_in = jnp.max(full, axis=-1, keepdims=True)
    stays = salient.astype(jnp.float32) >= least * fan_in.astype(jnp.float32)
    budget = jnp.sum(full, axis=-1, keepdims=True, dtype=jnp.int32)
    needed = jnp.maximum(-(-budget // inputs), 1)[..., 0]
    stays |= selection.top_k_of_rows(salient.astype(jnp.float32), needed, full > 0)
    each = budget // jnp.sum(stays, axis=-1, keepdims=True, dtype=jnp.int32)
    return jnp.where(stays, each, 0)


def check_counts(leaves: Sequence[Leaf], counts: Any, sparsity: Any) -> None:
    """Refuses a sparsity for which the N of N:M is no whole number.

    Args:
      leaves: of the whole tree.
      counts: the distribution's counts for this sparsity, in layer order.
      sparsity: requested; only layers to which the distribution gives it are checked.

    Raises:
      ValueError: the message names the two nearest. A traced sparsity is not checked.
    """
    if isinstance(sparsity, jax.core.Tracer) or np.ndim(counts) == 0:
        return
    groups = [x for x in structures.first_leaves(leaves) for _ in range(x.num_layers)]
    for leaf, count in zip(groups, np.asarray(counts).tolist(), strict=True):
        if leaf.structure is None or not leaf.structure.fixed:
            continue
        size, m = math.prod(leaf.layer_shape), leaf.structure.grid(leaf)[-1]
        n = m * (1 - float(sparsity))
        if abs(count - size * (1 - sparsity)) <= 1 and abs(n - round(n)) > max(1e-6, m / size):
            near = sorted(sorted(range(1, m + 1), key=lambda k: abs(k - n))[:2])
            told = " and ".join(f"{1 - k / m:g} ({k}:{m})" for k in near)
            raise ValueError(
                f"{leaf.path} is pruned in groups of {m}, which have no sparsity of {sparsity:g}: "
                f"that is {n:g} of {m}. The two nearest are {told}."
            )


def is_fixed(leaf: Leaf) -> bool:
    """Whether a count is divided among all groups of the leaf, empty ones too."""
    return leaf.structure is not None and leaf.structure.fixed


def rounded_down(
    num_keep: jax.Array, units: Sequence[jax.Array], leaves: Sequence[Leaf]
) -> jax.Array:
    """Counts of layers, int32 ``(layers,)``, that their live groups can share equally.

    Args:
      num_keep: int32 ``(layers,)``.
      units: bool stacks of live units.
      leaves: of the whole tree.
    """
    counts = jnp.split(num_keep, np.cumsum([len(x) for x in units])[:-1])
    for i, leaf in enumerate(structures.first_leaves(leaves)):
        if structures.is_grouped(leaf):
            live = jnp.any(units[i], axis=-1) | is_fixed(leaf)
            num = jnp.maximum(jnp.sum(live.reshape(len(live), -1), axis=1, dtype=jnp.int32), 1)
            counts[i] = counts[i] // num * num
    return jnp.concatenate(counts)
