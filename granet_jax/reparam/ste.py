"""Straight-through training: masks from the weights at every step, gradients to all of them."""

from typing import Any

import jax
import jax.numpy as jnp

from granet_jax import distributions, schedules, scores, structures, trees
from granet_jax.masks import ones, prune_to
from granet_jax.reparam.base import Reparameterisation
from granet_jax.types import Distribution, Event, PyTree, ScoreFn


def ste(
    *,
    sparsity: Any,
    end_step: int = 1,
    begin_step: int = 0,
    decay: float = 0.0,
    scope: Distribution = distributions.uniform,
    score: ScoreFn = scores.magnitude,
    prunable: trees.Rules = (),
) -> Reparameterisation:
    """The network uses the largest weights of this step; gradients go to all as if none were off.

    Stored weights stay dense, so that one that was off may come back in any step, when another has
    become smaller. The sparsity rises on the cubic of :func:`granet_jax.gmp` until ``end_step``; at
    1, the default, it is there from the first step. With ``decay`` the gradient of a weight that is
    off is ``g + decay * w``, so that it shrinks and masks settle: SR-STE.

    Source: Bengio et al. 2013 for the estimator; Lee et al. 2024 (JaxPruner), where of all its
    methods it does best on a vision transformer. SR-STE: Zhou et al. 2021, "Learning N:M
    fine-grained structured sparse neural networks from scratch", section 3.2.

    Args:
      sparsity: fraction of zeros among prunable weights at the end, in [0, 1).
      end_step: the update at which it is met.
      begin_step: where the cubic begins.
      decay: of the weights that are off; see :func:`sr_ste`.
      scope: what is ranked together: ``uniform`` or ``erk`` by layer, or ``global_ranking``.
      score: the highest are kept; of the parameters alone.
      prunable: path rules, see :func:`granet_jax.trees.describe`; masks keep to their structures
        (``granet_jax.structures.n_of_m(4)`` at .5).

    Returns:
      A reparameterisation; ``extra`` counts steps. Train it with ``penalise(inner, method, 0.0)``;
      :func:`export` gives plain weights and masks.

    Raises:
      ValueError: a sparsity outside [0, 1), or ``end_step <= begin_step``; with the parameters, a
        sparsity that layers or structures do not have.

    Differs from JaxPruner in that: masks follow from this step's weights at each forward pass, with
    exact counts.

    Example: the gradient passes the mask.
      >>> import granet_jax as gj, jax, jax.numpy as jnp
      >>> method = gj.reparam.ste(sparsity=0.5)
      >>> params = {"kernel": jnp.array([[3.0, 1.0], [-2.0, 0.5]])}
      >>> extra = method.init(params)
      >>> method.effective(params, extra)["kernel"].tolist()
      [[3.0, 0.0], [-2.0, 0.0]]
      >>> jax.grad(lambda p: method.effective(p, extra)["kernel"].sum())(params)["kernel"].tolist()
      [[1.0, 1.0], [1.0, 1.0]]
    """
    num_keep = schedules.gradual_num_keep(scope, 0.0, sparsity, begin_step, end_step)
    if decay < 0:
        raise ValueError(f"decay must be >= 0, a share of each weight that is off; got {decay}.")
    prune = prune_to(num_keep, score=score, prunable=prunable)

    def init(params: PyTree) -> dict[str, jax.Array]:
        leaves = trees.describe(params, prunable)
        if leaves:
            counts = scope(structures.shapes(leaves), sparsity)
            structures.check_counts(leaves, counts, sparsity)
        return {"step": jnp.zeros([], jnp.float32)}  # exact up to 2^24

    def masks(params: PyTree, extra: dict[str, jax.Array]) -> PyTree:
        step = extra["step"].astype(jnp.int32) + 1  # the one now being taken
        fixed = jax.lax.stop_gradient(params)
        on = ones(fixed)
        return prune(on, on, Event(fixed, None, on, step))[0]

    def effective(params: PyTree, extra: dict[str, jax.Array]) -> PyTree:
        leaves = trees.describe(params, prunable)
        pairs = zip(
            trees.split(params, leaves), trees.split(masks(params, extra), leaves), strict=True
        )
        return trees.join([_masked(decay, w, mask) for w, mask in pairs], params, leaves)

    def advance(extra: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {"step": extra["step"] + 1}

    return Reparameterisation(
        init,
        effective,
        masks,
        lambda extra: jnp.float32(0),
        lambda params, extra: extra,
        prunable,
        advance,
    )


def sr_ste(
    *,
    sparsity: Any,
    decay: float = 2e-4,
    scope: Distribution = distributions.uniform,
    prunable: trees.Rules = (),
) -> Reparameterisation:
    """N:M from scratch: :func:`ste` at its sparsity from the first step, with decay of what is off.

    Source: Zhou et al. 2021, section 3.2; decay 2e-4 under SGD.

    Args:
      sparsity: of the structure, .5 for 2:4.
      decay: of the weights that are off.
      scope: as in :func:`ste`.
      prunable: path rules that give the structure, ``[("", granet_jax.structures.n_of_m(4))]``.

    Raises:
      ValueError: as :func:`ste`.

    Differs from the paper's code in that no group runs over the end of a row.

    Example:
      >>> import granet_jax as gj, jax, jax.numpy as jnp
      >>> rules = [("", gj.structures.n_of_m(2))]
      >>> method = gj.reparam.sr_ste(sparsity=0.5, decay=0.25, prunable=rules)
      >>> params = {"kernel": jnp.array([[3.0], [1.0], [-2.0], [4.0]])}
      >>> grads = jax.grad(lambda p: method.effective(p, method.init(p))["kernel"].sum())(params)
      >>> grads["kernel"].ravel().tolist()
      [1.0, 1.25, 0.5, 1.0]
    """
    return ste(sparsity=sparsity, decay=decay, scope=scope, prunable=prunable)


@jax.custom_vjp
def _masked(decay: float, w: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.where(mask, w, jnp.zeros_like(w))


def _forward(decay: float, w: jax.Array, mask: jax.Array) -> tuple[jax.Array, Any]:
    return _masked(decay, w, mask), (decay, w, mask)


def _backward(kept: Any, g: jax.Array) -> tuple[Any, ...]:
    decay, w, mask = kept
    return None, g + (decay * jnp.where(mask, jnp.zeros_like(w), w)).astype(g.dtype), None


_masked.defvjp(_forward, _backward)
