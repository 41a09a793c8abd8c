"""The contract of reparameterisations, and the common part of those with thresholds."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from granet_jax import scores, trees
from granet_jax.masks import apply_masks, ones
from granet_jax.types import PyTree


class Reparameterisation(NamedTuple):
    """Weights as a function of trained parameters and of extra ones: pure functions.

    The network uses ``effective(params, extra)``. In every step, masks follow from the current
    values; there are no events.

    Attributes:
      init: ``params -> extra``, a pytree of float arrays to train beside ``params``. Accepts
        ``ShapeDtypeStruct`` leaves and a tree without leaves.
      effective: ``(params, extra) -> params``, for use inside the loss; leaves that are not
        prunable do not change.
      masks: ``(params, extra) -> masks`` at these values, total. Reports count them and
        :func:`export` applies them.
      penalty: ``extra -> float32`` scalar, the regulariser without its coefficient.
      reset: ``(params, extra) -> extra``, called after every step, outside the gradient.
      prunable: the path rules of the method, for counts and reports.
      advance: ``extra -> extra`` after a step, for an ``extra`` that is a counter and not trained;
        None = ``extra`` is trained, and ``reset`` is called.

    Example:
      >>> import granet_jax as gj, jax.numpy as jnp
      >>> method = gj.reparam.str_(initial=0.0)
      >>> params = {"kernel": jnp.array([[1.0, -0.25]])}
      >>> method.effective(params, method.init(params))["kernel"].tolist()
      [[0.5, -0.0]]
    """

    init: Callable[[PyTree], PyTree]
    effective: Callable[[PyTree, PyTree], PyTree]
    masks: Callable[[PyTree, PyTree], PyTree]
    penalty: Callable[[PyTree], jax.Array]
    reset: Callable[[PyTree, PyTree], PyTree]
    prunable: trees.Rules = ()
    advance: Callable[[PyTree], PyTree] | None = None


def export(method: Reparameterisation, params: PyTree, extra: PyTree) -> tuple[PyTree, PyTree]:
    """Plain sparse parameters and their masks, for use without the method.

    Args:
      method: the reparameterisation that was trained.
      params: its parameters.
      extra: its extra parameters.

    Returns:
      The effective parameters, +0 where masked, and the masks. Use them for inference, or train on
      with ``granet_jax.sparsify(optimizer, granet_jax.static(masks=masks))``.

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
    """Each prunable weight becomes ``gate(w, |w| - threshold)``, and is kept if that is above 0.

    The extra parameters are a dict ``{path: array}`` with one entry for each prunable leaf, the
    same for any kind of params tree. They and the thresholds are float32, because their steps are
    too small for bfloat16, or float64 for float64 weights.

    Args:
      initial: ``leaf -> extra parameters`` of the leaf at the start.
      threshold: ``(extra parameters of a leaf, leaf) -> thresholds`` that broadcast against its
        weights as ``(layers, *layer_shape)``.
      gate: ``(w, |w| - threshold) -> effective w``, both float32 or wider; w may be complex.
      penalty: ``extra parameters of a leaf -> array``; the penalty is the sum over all leaves.
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
        for x in pruned:
            shape = jax.eval_shape(functools.partial(initial, x)).shape
            if (got := jnp.shape(extra[x.path])) != shape:
                raise ValueError(
                    f"The thresholds of {x.path} have shape {got}, expected {shape}. "
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
