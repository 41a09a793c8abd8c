"""The contract of reparameterisations, and what those with thresholds share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from granet_jax import trees
from granet_jax.masks import apply_masks, ones
from granet_jax.types import PyTree


class Reparameterisation(NamedTuple):
    """Weights as a trainable function of params and of extra parameters: pure functions.

    What the network uses is ``effective(params, extra)``; which weights that leaves out follows
    from values that are trained, not from a rule applied now and then. Everything is safe under
    ``jit``, ``grad``, ``vmap`` and ``scan``.

    Attributes:
      init: ``params -> extra``, a pytree of float arrays to train beside ``params``. Accepts
        ``ShapeDtypeStruct`` leaves and a tree without leaves.
      effective: ``(params, extra) -> params``, called inside the loss; leaves that are not prunable
        pass through.
      masks: ``(params, extra) -> masks`` at these values: what reports count and export keeps.
      penalty: ``extra -> float32`` scalar, the regulariser without its coefficient.
      reset: ``(params, extra) -> extra``, after every step and outside the gradient.
      prunable: the path rules that it was made with, for counts and reports.
    """

    init: Callable[[PyTree], PyTree]
    effective: Callable[[PyTree, PyTree], PyTree]
    masks: Callable[[PyTree, PyTree], PyTree]
    penalty: Callable[[PyTree], jax.Array]
    reset: Callable[[PyTree, PyTree], PyTree]
    prunable: trees.Rules = ()


def export(method: Reparameterisation, params: PyTree, extra: PyTree) -> tuple[PyTree, PyTree]:
    """Plain sparse parameters and their masks, for use without the method.

    Args:
      method: the reparameterisation that was trained.
      params: its parameters.
      extra: its extra parameters.

    Returns:
      The effective parameters with exact zeros where masked, and the masks; ready for inference,
      or to be trained on by ``sparsify(..., static(masks=masks))``.

    Example:
      >>> import granet_jax as gj, jax.numpy as jnp
      >>> method = gj.reparam.dst()
      >>> extra = {"kernel": jnp.array([0.0, 2.5])}
      >>> params, masks = export(method, {"kernel": jnp.array([[1.0, 2.0], [-3.0, -4.0]])}, extra)
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
    """Weights ``gate(w, |w| - threshold)``, of which those with ``|w| > threshold`` are kept.

    Args:
      initial: a prunable leaf -> its extra parameters. The extra parameters of all are a dict by
        the leaves' paths, in float32 whatever the dtype of the weights.
      threshold: the extra parameters of a leaf -> thresholds that broadcast against its weights
        as ``(layers, *layer_shape)``.
      gate: ``(w, |w| - threshold) -> effective w``.
      penalty: the extra parameters of a leaf -> an array whose sum is the leaf's penalty.
      prunable: path rules.

    Returns:
      A reparameterisation whose ``reset`` does nothing.
    """

    def init(params: PyTree) -> dict[str, jax.Array]:
        return {x.path: initial(x) for x in trees.describe(params, prunable) if x.prunable}

    def excess(params: PyTree, extra: dict[str, jax.Array]) -> tuple[Any, list[Any], list[Any]]:
        leaves = trees.describe(params, prunable)
        weights = trees.split(params, leaves)
        thresholds = [threshold(extra[x.path], x) for x in leaves if x.prunable]
        over = [jnp.abs(w) - t for w, t in zip(weights, thresholds, strict=True)]
        return leaves, weights, over

    def effective(params: PyTree, extra: dict[str, jax.Array]) -> PyTree:
        leaves, weights, over = excess(params, extra)
        gated = [gate(w, x).astype(w.dtype) for w, x in zip(weights, over, strict=True)]
        return trees.join(gated, params, leaves)

    def masks(params: PyTree, extra: dict[str, jax.Array]) -> PyTree:
        leaves, _, over = excess(params, extra)
        return trees.join([x > 0 for x in over], ones(params), leaves)

    def total(extra: dict[str, jax.Array]) -> jax.Array:
        return sum((jnp.sum(penalty(x)) for x in extra.values()), start=jnp.zeros([], jnp.float32))

    return Reparameterisation(init, effective, masks, total, lambda _, extra: extra, prunable)
