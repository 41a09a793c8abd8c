"""Masks as trees: making them, applying them, and the two changes that all methods are made of.

:func:`prune_to` and :func:`regenerate` build *mask steps*, pure functions
``(masks, keep, event) -> (masks, keep)``.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from granet_jax import blocks, distributions, groups, scores, scoring, selection, structures, trees
from granet_jax.types import (
    Counts,
    Distribution,
    Event,
    MaskStep,
    NumKeep,
    PyTree,
    Redistribution,
    ScoreFn,
    check_callable,
)


def ones(params: PyTree) -> PyTree:
    """All-True masks with the shapes and the sharding of ``params``.

    Args:
      params: tree of arrays or ``ShapeDtypeStruct``.

    Returns:
      bool tree of params.

    Example:
      >>> import jax.numpy as jnp
      >>> ones({"bias": jnp.zeros(2)})["bias"].tolist()
      [True, True]
    """
    return jax.tree.map(lambda p: jnp.ones_like(p, dtype=bool), params)


def random_masks(
    key: jax.Array,
    params: PyTree,
    sparsity: float,
    distribution: Distribution = distributions.erk,
    prunable: trees.Rules = (),
) -> PyTree:
    """Random masks with exactly the counts of ``distribution``.

    Args:
      key: a typed key.
      params: tree of arrays or ``ShapeDtypeStruct``.
      sparsity: fraction of zeros among the prunable weights, in [0, 1).
      distribution: how the sparsity is spread over layers.
      prunable: path rules, see :func:`granet_jax.trees.describe`.

    Returns:
      bool tree of params; leaves that are not prunable are all True.

    Raises:
      ValueError: as ``distribution``; or a sparsity that the structures cannot have.

    Differs from the reference code of SET and GraNet, which draws each entry independently, so that
    counts are right only on average.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> masks = random_masks(jax.random.key(0), {"kernel": jnp.zeros((10, 10))}, 0.9)
      >>> int(masks["kernel"].sum())
      10
    """
    leaves = trees.describe(params, prunable)
    num_keep = distribution(structures.shapes(leaves), sparsity)
    groups.check_counts(leaves, num_keep, sparsity)
    dense = ones(params)  # has the sharding of params, which the draws have not
    draws = scoring.of_units(scores.random, Event(params, key=key), leaves, lambda: dense)
    layout = structures.lay_out(leaves)
    best = _best(draws, None, num_keep, layout, leaves)
    return _and(dense, _join(best, dense, layout, leaves))


def apply_masks(params: PyTree, masks: PyTree) -> PyTree:
    """Sets the weights whose mask is False to exactly +0, even if they are NaN.

    Args:
      params: tree of arrays.
      masks: bool tree. Masks and parameters are matched by path, so that a pure dict and a Flax
        ``nnx.State`` may be mixed. Parameters without a mask (``optax.partition`` or
        ``optax.masked`` hid them from ``sparsify``) pass through.

    Returns:
      New parameters of the same structure and dtypes.

    Raises:
      ValueError: a mask has no parameter, or one of another shape.

    Example:
      >>> import jax.numpy as jnp
      >>> apply_masks({"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([True, False])})["w"].tolist()
      [1.0, 0.0]
    """
    flat_params, flat_masks = trees.by_path(params), trees.by_path(masks)
    for path, mask in flat_masks.items():
        if path not in flat_params or flat_params[path].shape != mask.shape:
            shape = flat_params[path].shape if path in flat_params else "none"
            raise ValueError(
                f"The masks are of another tree: the mask of {'/'.join(path)} has shape "
                f"{mask.shape}, its parameter {shape}. Take them from the optimizer state of this "
                "model, granet_jax.get_masks(opt_state)."
            )
    new = [
        jnp.where(flat_masks[path], p, jnp.zeros_like(p)) if path in flat_masks else p
        for path, p in flat_params.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(params), new)


def prune_to(
    num_keep: NumKeep,
    *,
    score: ScoreFn = scores.magnitude,
    prunable: trees.Rules = (),
) -> MaskStep:
    """Keeps the ``min(num_keep, live)`` best of the live weights; it never revives a weight.

    Removed weights leave ``keep`` as well: if a later step of the same event regrows one, it starts
    at 0 with zero moments.

    Args:
      num_keep: ``(shapes, step) -> counts``: a scalar ranks the whole tree as one, a vector ranks
        each layer by itself.
      score: the weights that score highest are kept.
      prunable: path rules, see :func:`granet_jax.trees.describe`.

    Returns:
      A mask step, for :func:`granet_jax.compose`.

    Example: keep the two largest of the three live weights.
      >>> import jax.numpy as jnp
      >>> step = prune_to(lambda shapes, step: 2)
      >>> masks = {"kernel": jnp.array([[True, True], [True, False]])}
      >>> params = {"kernel": jnp.array([[-3.0, 1.0], [2.0, 0.0]])}
      >>> masks, keep = step(masks, masks, Event(params))
      >>> masks["kernel"].tolist()
      [[True, False], [True, False]]
    """
    check_callable(num_keep=num_keep, score=score)

    def mask_step(masks: PyTree, keep: PyTree, event: Event) -> tuple[PyTree, PyTree]:
        leaves = trees.describe(event.params, prunable)
        layout = structures.lay_out(leaves)
        live = _live(masks, layout, leaves)
        ranked = scoring.of_units(score, event, leaves, lambda: masks)
        counts = num_keep(structures.shapes(leaves), event.step)
        fewer = _join(_best(ranked, live, counts, layout, leaves), masks, layout, leaves)
        if any(x.structure is not None for x in leaves):
            fewer = _and(masks, fewer)  # given masks may hold parts of units
        return fewer, fewer if keep is masks else _and(keep, fewer)

    return mask_step


def revive(masks: PyTree, keep: PyTree, event: Event) -> tuple[PyTree, PyTree]:
    """A mask step that switches every weight on; weights that were off start at 0.

    Args:
      masks: bool tree of params.
      keep: bool tree of params.
      event: not read.

    Returns:
      All-True masks, and ``keep`` as it was.

    Example:
      >>> import jax.numpy as jnp
      >>> masks = {"kernel": jnp.array([[True, False]])}
      >>> new, keep = revive(masks, masks, Event({"kernel": jnp.ones((1, 2))}))
      >>> new["kernel"].tolist(), keep["kernel"].tolist()
      ([[True, True]], [[True, False]])
    """
    return jax.tree.map(jnp.ones_like, masks), keep


def regenerate(
    fraction: optax.Schedule,
    *,
    drop: ScoreFn = scores.magnitude,
    grow: ScoreFn = scores.gradient,
    by_sign: bool = False,
    redistribute: Redistribution | None = None,
    prunable: trees.Rules = (),
) -> MaskStep:
    """Drops ``ceil(fraction * live)`` weights in each layer and grows the same number.

    It drops the live weights with the lowest ``drop`` score. Then it grows the weights with the
    highest ``grow`` score among all that are off, including those just dropped. A weight that is
    dropped and regrown in one event stays in ``keep``, with its value and moments. A layer keeps
    its number of live weights (unless ``redistribute`` moves them, or ``structures.fan_in`` ablates
    outputs). A dense layer does not change.

    Args:
      fraction: schedule of the fraction of live weights exchanged, in [0, 1].
      drop: the weights that score lowest are dropped.
      grow: the weights that score highest are grown.
      by_sign: apply the fraction to the negative weights and to the others (zeros included)
        separately; not with structures or complex weights.
      redistribute: decides how many weights each layer grows; None = as many as it dropped; not
        with structures.
      prunable: path rules, see :func:`granet_jax.trees.describe`.

    Returns:
      A mask step, for :func:`granet_jax.compose`. It raises a ValueError if ``by_sign`` or
      ``redistribute`` meets a structure, or ``by_sign`` or a score complex numbers.

    Source: Evci et al. 2020, section 3; GraNet, section 4.2 (zero-cost neuroregeneration).

    Example: of the two live weights the smaller is dropped; of the three that are then off, the one
    with the largest gradient is grown.
      >>> import jax.numpy as jnp
      >>> step = regenerate(lambda step: 0.5)
      >>> masks = {"kernel": jnp.array([[True, True], [False, False]])}
      >>> params = {"kernel": jnp.array([[-3.0, 1.0], [0.0, 0.0]])}
      >>> grads = {"kernel": jnp.array([[9.0, 0.1], [0.2, -0.3]])}
      >>> masks, keep = step(masks, masks, Event(params, grads))
      >>> masks["kernel"].tolist(), keep["kernel"].tolist()
      ([[True, False], [False, True]], [[True, False], [False, False]])
    """
    check_callable(fraction=fraction, drop=drop, grow=grow)

    def mask_step(masks: PyTree, keep: PyTree, event: Event) -> tuple[PyTree, PyTree]:
        leaves = trees.describe(event.params, prunable)
        if by_sign or redistribute is not None:
            _refuse_structures("by_sign and redistribute", leaves)
        layout = structures.lay_out(leaves)
        live = _live(masks, layout, leaves)
        parts = _by_sign(live, event.params, layout, leaves) if by_sign else [live]
        num_live = [blocks.count(part, layout) for part in parts]
        num_dropped = [ceil_of_share(fraction(event.step), num) for num in num_live]
        # Growth has the event's own key, and the drop another, where both of them draw.
        seen = event._replace(key=None if event.key is None else jax.random.fold_in(event.key, 1))
        drop_scores = scoring.of_units(drop, seen, leaves, lambda: masks)
        kept = [
            selection.top_k_of(drop_scores, num - dropped, layout, part)
            for part, num, dropped in zip(parts, num_live, num_dropped, strict=True)
        ]
        survivors = [functools.reduce(jnp.logical_or, block) for block in zip(*kept, strict=True)]
        num_grown = sum(num_dropped, start=jnp.int32(0))

        def growth_of(survivors: list[jax.Array]) -> list[selection.Scores]:
            return scoring.of_units(
                grow, event, leaves, lambda: _join(survivors, masks, layout, leaves)
            )

        if redistribute is not None:
            growth = [x.computed() for x in growth_of(survivors)]
            num_grown = redistribute(num_grown, growth, blocks.to_stacks(live, layout))

        def regrow(survivors: list[jax.Array]) -> list[jax.Array]:
            growth = growth_of(survivors)
            grown = selection.top_k_of(growth, num_grown, layout, blocks.but(survivors, layout))
            regrown = [s | g for s, g in zip(survivors, grown, strict=True)]
            if not any(map(structures.is_grouped, leaves)):
                return regrown
            after, stay, before = (blocks.to_stacks(x, layout) for x in (regrown, survivors, live))
            drops, grows = ([x.computed() for x in each] for each in (drop_scores, growth))
            fitted = groups.fit_groups(after, stay, before, drops, grows, leaves)
            return blocks.to_blocks(fitted, layout)

        # Not begun before the weights have been ranked, so that memory is needed for one at a time.
        regrown = jax.lax.cond(jnp.any(num_grown > 0), regrow, lambda x: x, survivors)
        masks = _join(regrown, masks, layout, leaves)
        return masks, _and(keep, masks)

    return mask_step


def _by_sign(
    live: list[jax.Array], params: PyTree, layout: blocks.Layout, leaves: tuple[trees.Leaf, ...]
) -> list[list[jax.Array]]:
    """Blocks of live weights: first the negative ones, then the others."""
    weights = trees.split(params, leaves)
    scoring.refuse_complex("What by_sign splits", weights, leaves)
    negative = blocks.to_blocks([w < 0 for w in weights], layout)
    pairs = list(zip(live, negative, strict=True))
    return [[x & y for x, y in pairs], [x & ~y for x, y in pairs]]


def _live(masks: PyTree, layout: blocks.Layout, leaves: tuple[trees.Leaf, ...]) -> list[jax.Array]:
    """Bool blocks of units, True for those that are on."""
    units = structures.live_units(trees.split(masks, leaves), leaves)
    return blocks.to_blocks(units, layout)


def _join(
    units: list[jax.Array], masks: PyTree, layout: blocks.Layout, leaves: tuple[trees.Leaf, ...]
) -> PyTree:
    """``masks``, with the masks of prunable leaves taken from blocks of units."""
    stacks = blocks.to_stacks(units, layout)
    return trees.join(structures.spread(stacks, leaves), masks, leaves)


def _best(
    scores: list[selection.Scores],
    live: list[jax.Array] | None,
    num_keep: Counts,
    layout: blocks.Layout,
    leaves: tuple[trees.Leaf, ...],
) -> list[jax.Array]:
    """Blocks of the best live units; of groups, the best of each. ``live=None`` = all are live."""
    first = structures.first_leaves(leaves)
    grouped = [structures.is_grouped(x) for x in first]
    if not any(grouped):
        return selection.top_k_of(scores, num_keep, layout, live)
    num_keep = jnp.asarray(num_keep, jnp.int32)
    if num_keep.ndim == 0:
        raise ValueError(
            "Groups (N:M, constant fan-in) need a count for each layer, and global_ranking gives "
            "one for all: pass scope=granet_jax.uniform or erk (lottery.prune: by_layer=True)."
        )
    stacks = [x.computed() for x in scores]
    on = [jnp.ones_like(x, bool) for x in stacks]
    on = on if live is None else blocks.to_stacks(live, layout)
    counts = jnp.split(num_keep, np.cumsum([len(x) for x in stacks])[:-1])
    alone = [i for i, is_grouped in enumerate(grouped) if not is_grouped]
    best = {}
    if alone:
        counted = jnp.concatenate([counts[i] for i in alone])
        ranked = selection.top_k([stacks[i] for i in alone], counted, [on[i] for i in alone])
        best = dict(zip(alone, ranked, strict=True))
    for i, x in enumerate(stacks):
        if grouped[i]:
            best[i] = groups.best_in_groups(x, counts[i], on[i], groups.is_fixed(first[i]))
    return blocks.to_blocks([best[i] for i in range(len(stacks))], layout)


def _refuse_structures(what: str, leaves: tuple[trees.Leaf, ...]) -> None:
    if structured := [x.path for x in leaves if x.structure is not None]:
        raise ValueError(
            f"{what} are for single weights; a rule gives {', '.join(structured)} a structure."
        )


def ceil_of_share(fraction: Any, num_live: jax.Array) -> jax.Array:
    """``ceil(fraction * num_live)`` within ``[0, num_live]``, int32.

    Always computed in float32. A product that rounding may have lifted above an integer (by one
    part in 2^23) counts as that integer: .3 of 10 is 3. So it may be too small by one part in 2^22.
    """
    share = jnp.asarray(fraction, jnp.float32) * num_live.astype(jnp.float32)
    return jnp.clip(jnp.ceil(share * (1 - 2.0**-23)).astype(jnp.int32), 0, num_live)


def _and(a: PyTree, b: PyTree) -> PyTree:
    return jax.tree.map(jnp.logical_and, a, b)


def masks_from_zeros(params: PyTree, prunable: trees.Rules = ()) -> PyTree:
    """The masks of parameters that are already sparse: False where a prunable weight is 0.

    Args:
      params: tree of arrays; NaN counts as not 0.
      prunable: path rules, see :func:`granet_jax.trees.describe`.

    Returns:
      bool tree of params; leaves that are not prunable are all True, even where they are 0.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jnp.array([[1.0, 0.0]]*2), "bias": jnp.zeros(2)}
      >>> masks = masks_from_zeros(params)
      >>> masks["kernel"].tolist(), masks["bias"].tolist()
      ([[True, False], [True, False]], [True, True])
    """
    leaves = trees.describe(params, prunable)
    return trees.join([x != 0 for x in trees.split(params, leaves)], ones(params), leaves)


def collapsed(masks: PyTree, params: PyTree, prunable: trees.Rules = ()) -> list[str]:
    """The paths of prunable leaves, or of layers stacked in them, that have no weight left.

    Args:
      masks: bool tree of params, not traced.
      params: tree of arrays or ``ShapeDtypeStruct``.
      prunable: path rules, see :func:`granet_jax.trees.describe`.

    Returns:
      A list of paths; layers of a stack have their index, ``"path[0]"``.

    Example: the first of two stacked layers is empty.
      >>> import granet_jax as gj, jax.numpy as jnp
      >>> masks = {"kernel": jnp.array([[[False, False]], [[True, False]]])}
      >>> rules = [("kernel", gj.Stacked(1))]
      >>> gj.collapsed(masks, {"kernel": jnp.ones((2, 1, 2))}, rules)
      ['kernel[0]']
    """
    leaves = trees.describe(params, prunable)
    layers = [
        f"{leaf.path}{list(index) or ''}"
        for leaf in leaves
        if leaf.prunable
        for index in np.ndindex(leaf.shape[: leaf.stack_axes])
    ]
    num_live = np.asarray(selection.count(trees.split(masks, leaves)))
    return [layer for layer, num in zip(layers, num_live, strict=True) if num == 0]


def check_dense(masks: PyTree, leaves: tuple[trees.Leaf, ...]) -> None:
    """Refuses masks that switch off weights of leaves that are not prunable.

    Raises:
      ValueError: the message names the first such leaf. Traced masks are not checked.
    """
    found = trees.paths(masks)
    for leaf in leaves:
        mask = found[leaf.path]
        if leaf.prunable or not is_known(mask) or bool(jnp.all(mask)):
            continue
        raise ValueError(
            f"The mask of {leaf.path} switches off {int(jnp.sum(~mask))} of {leaf.size} weights, "
            f"but it is not prunable ({leaf.why}): they would never be trained. Make masks of "
            "weights that are 0 with granet_jax.masks_from_zeros(params, prunable), or name the "
            f"leaf by a rule, prunable=[('^{leaf.path}$', True), ...]."
        )


def is_known(mask: jax.Array) -> bool:
    """Whether the values of a mask can be read here: it is not traced, and all of it is local."""
    return not isinstance(mask, jax.core.Tracer) and getattr(mask, "is_fully_addressable", True)


def check_masks(masks: PyTree, params: PyTree) -> PyTree:
    """A copy of given masks, checked; a copy, so that donating a state keeps the caller's masks.

    Raises:
      ValueError: they are not bool, or have other leaves or shapes than ``params``.
    """
    given, wanted = trees.by_path(masks), trees.by_path(params)
    if given.keys() != wanted.keys():
        odd = sorted("/".join(path) for path in given.keys() ^ wanted.keys())
        raise ValueError(
            f"The masks are of another tree: {len(given)} leaves, but params have {len(wanted)}; "
            f"only one of the two has {', '.join(odd)}. Masks need a leaf for each parameter; "
            "start from granet_jax.ones(params)."
        )
    for path, p in wanted.items():
        mask = given[path]
        if jnp.shape(mask) != p.shape or jnp.result_type(mask) != jnp.bool_:
            raise ValueError(
                f"The mask of {'/'.join(path)} has shape {jnp.shape(mask)} and dtype "
                f"{jnp.result_type(mask)}; expected {p.shape} and bool."
            )
    in_order = jax.tree.unflatten(jax.tree.structure(params), [given[path] for path in wanted])
    return _and(ones(params), in_order)
