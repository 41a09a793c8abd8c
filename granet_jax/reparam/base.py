"""The contract of reparameterisations, and what those with thresholds share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from granet_jax import scores, trees
from granet_jax.masks import apply_masks, ones
from granet_jax.types import PyTree


class Reparameterisation(NamedTuple):
    """Weights as a function of trained parameters and of extra ones: pure functions.

    The network uses ``effective(params, extra)``. Which weights are left out follows from values in
    every step; there are no events.

    Attributes:
      init: ``params -> extra``, a pytree of float arrays to train beside ``params``. Accepts
        ``ShapeDtypeStruct`` leaves and a tree without leaves.
      effective: ``(params, extra) -> params``, to be called inside the loss; leaves that are not
        prunable pass through.
      masks: ``(params, extra) -> masks`` at these values, total: what reports count and
        :func:`export` keeps.
      penalty: ``extra -> float32`` scalar, the regulariser without its coefficient.
      reset: ``(params, extra) -> extra``, to be called after every step, outside the gradient.
      advance: ``extra -> extra``, where ``extra`` is counted and not trained: what it is after a
        step, whatever the optimizer made of it; None = it is trained, and reset.
      prunable: the path rules that it was made with, for counts and reports.
    """

    init: Callable[[PyTree], PyTree]
    effective: Callable[[PyTree, PyTree], PyTree]
    masks: Callable[[PyTree, PyTree], PyTree]
    penalty: Callable[[PyTree], jax.Array]
    reset: Callable[[PyTree, PyTree], PyTree]
    prunable: trees.Rules = ()
    advance: Callable[[PyTree], PyTree] | None = None


def export(method: Reparameterisation, params: PyTree, extra: PyTree) -> tuple[PyTree, PyTree]:
    """Plain sparse parameters and their masks, which need the method no longer.

    Args:
      method: the reparameterisation that was trained.
      params: its parameters.
      extra: its extra parameters.

    Returns:
      The effective parameters with +0 where masked, and the masks: ready for inference, or for
      training on with ``granet_jax.sparsify(optimizer, granet_jax.static(masks=masks))``.

    Example:
      >>> import granet_jax as gj, jax.numpy as jnp
      >>> params = {"kernel": jnp.array([[1.0, 2.0], [-3.0, -4.0]])}
      >>> params, masks = export(gj.reparam.dst(), params, {"kernel": jnp.array([0.0, 2.5])})
      >>> params["kernel"].tolist()
      [[1.0, 0.0], [-3.0, -4.0]]
    """
    masks = method.masks(params, extra)
    return apply_masks(method.effective(params, extra), masks), masks


def from_thresholds(
    *,
    initial: Callable[[trees.Leaf], jax.Array],
    threshold: Callable[[jax.Array, trees.Leaf], jax.Array],
    gate: Callable[[jax.Array, jax.Array], jax.Array],
    penalty: Callable[[jax.Array], jax.Array],
    prunable: trees.Rules,
) -> Reparameterisation:
    """Each prunable weight becomes ``gate(w, |w| - threshold)``; kept is ``|w| - threshold > 0``.

    The extra parameters are a dict ``{path: array}`` with one entry for each prunable leaf, so
    they are the same for any kind of params tree. They and the thresholds are float32 where weights
    are narrower, because they move by less than bfloat16 resolves, and float64 where weights are.

    Args:
      initial: a leaf -> its extra parameters at the start.
      threshold: ``(extra parameters of a leaf, leaf) -> thresholds`` that broadcast against its
        weights as ``(layers, *layer_shape)``.
      gate: ``(w, |w| - threshold) -> effective w``, both float32 or wider; w may be complex.
      penalty: extra parameters of a leaf -> array; the penalty is the sum over all.
      prunable: path rules.

    Returns:
      A reparameterisation whose ``reset`` does nothing.
    """

    def init(params: PyTree) -> dict[str, jax.Array]:
        leaves = trees.describe(params, prunable)
        if structured := [x.path for x in leaves if x.structure is not None]:
            raise ValueError(
                f"A rule gives {', '.join(structured)} a structure; trained thresholds have none. "
                "Take a mask method (granet, rigl, ...), or leave the structure out."
            )
        weights = zip(leaves, jax.tree.leaves(params), strict=True)
        return {
            x.path: initial(x).astype(jax.eval_shape(scores.size, w).dtype)
            for x, w in weights
            if x.prunable
        }

    def excess(params: PyTree, extra: dict[str, jax.Array]) -> tuple[Any, ...]:
        leaves = trees.describe(params, prunable)
        pruned = [x for x in leaves if x.prunable]
        if missing := [x.path for x in pruned if x.path not in extra]:
            raise ValueError(
                f"No thresholds for {', '.join(missing)}; there are some for {list(extra)}. "
                "Make them for these parameters: extra = method.init(params)."
            )
        weights = trees.split(params, leaves)
        thresholds = [threshold(extra[x.path], x) for x in pruned]
        over = [scores.size(w) - t for w, t in zip(weights, thresholds, strict=True)]
        return leaves, weights, over

    def effective(params: PyTree, extra: dict[str, jax.Array]) -> PyTree:
        leaves, weights, over = excess(params, extra)
        wide = [w.astype(scores.at_least_float32(w.dtype)) for w in weights]
        gated = [gate(v, x).astype(w.dtype) for v, x, w in zip(wide, over, weights, strict=True)]
        return trees.join(gated, params, leaves)

    def masks(params: PyTree, extra: dict[str, jax.Array]) -> PyTree:
        leaves, _, over = excess(params, extra)
        return trees.join([x > 0 for x in over], ones(params), leaves)

    def total_penalty(extra: dict[str, jax.Array]) -> jax.Array:
        sums = (jnp.sum(penalty(x)).astype(jnp.float32) for x in extra.values())
        return sum(sums, start=jnp.float32(0))

    return Reparameterisation(
        init, effective, masks, total_penalty, lambda params, extra: extra, prunable
    )
