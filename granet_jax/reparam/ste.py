"""Masks computed from the weights at every step, while masked weights are trained as well."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from granet_jax import distributions, groups, schedules, scores, structures, trees
from granet_jax.masks import ones, prune_to
from granet_jax.reparam.base import Reparameterisation
from granet_jax.types import Distribution, Event, NumKeep, PyTree, ScoreFn


def ste(
    *,
    sparsity: Any,
    end_step: int = 1,
    begin_step: int = 0,
    curve: Callable[[Any, Any, int, int], optax.Schedule] = schedules.cubic,
    decay: float = 0.0,
    scope: Distribution = distributions.uniform,
    score: ScoreFn = scores.magnitude,
    prunable: trees.Rules = (),
) -> Reparameterisation:
    """The network uses the largest weights of this step; all weights get gradients.

    Gradients ignore the masks (straight-through). Stored weights stay dense, so a masked weight
    comes back in any step in which it is large enough. The sparsity rises on a curve, by default
    the cubic of :func:`granet_jax.gmp`, until ``end_step``; with ``end_step=1``, the default, it is
    there from the first step. With ``decay`` the gradient of a masked weight is ``g + decay * w``,
    so that masked weights shrink and masks settle: SR-STE.

    Source: Bengio et al. 2013 for the estimator; Lee et al. 2024 (JaxPruner), whose best method on
    a vision transformer it is. SR-STE: Zhou et al. 2021, "Learning N:M fine-grained structured
    sparse neural networks from scratch", section 3.2.

    Args:
      sparsity: fraction of zeros among prunable weights at the end, in [0, 1).
      end_step: the update at which it is reached.
      begin_step: the update at which the curve begins.
      curve: as in :func:`granet_jax.gradual_num_keep`.
      decay: of masked weights, >= 0; see :func:`sr_ste`.
      scope: what is ranked together: ``uniform`` or ``erk`` by layer, or ``global_ranking``.
      score: the weights that score highest are kept; it can read parameters only.
      prunable: path rules, see :func:`granet_jax.trees.describe`; masks follow their structures
        (``granet_jax.structures.n_of_m(4)`` at .5).

    Returns:
      A reparameterisation; ``extra`` counts steps. Train it with ``penalise(inner, method, 0.0)``;
      :func:`export` gives plain weights and masks.

    Raises:
      ValueError: a sparsity outside [0, 1), ``end_step <= begin_step``, or a negative ``decay``;
        with the parameters, a sparsity that the layers or structures cannot have.

    Differs from JaxPruner in that masks are computed from this step's weights in each forward pass,
    with exact counts.

    Example: the gradient ignores the mask.
      >>> import granet_jax as gj, jax, jax.numpy as jnp
      >>> method = gj.reparam.ste(sparsity=0.5)
      >>> params = {"kernel": jnp.array([[3.0, 1.0], [-2.0, 0.5]])}
      >>> extra = method.init(params)
      >>> method.effective(params, extra)["kernel"].tolist()
      [[3.0, 0.0], [-2.0, 0.0]]
      >>> jax.grad(lambda p: method.effective(p, extra)["kernel"].sum())(params)["kernel"].tolist()
      [[1.0, 1.0], [1.0, 1.0]]
    """
    if decay < 0:
        raise ValueError(f"decay must be >= 0, a share of each weight that is off; got {decay}.")
    num_keep = schedules.gradual_num_keep(scope, 0.0, sparsity, begin_step, end_step, curve)

    def use(step: jax.Array, w: jax.Array, mask: jax.Array) -> jax.Array:
        return _masked(decay, w, mask)

    return _masks_of_each_step(use, num_keep, (scope, sparsity), score, prunable)


def sr_ste(
    *,
    sparsity: Any,
    decay: float = 2e-4,
    scope: Distribution = distributions.uniform,
    prunable: trees.Rules = (),
) -> Reparameterisation:
    """N:M from scratch: :func:`ste` at full sparsity from the first step, with decay.

    Source: Zhou et al. 2021, section 3.2; decay 2e-4 under SGD.

    Args:
      sparsity: that of the structure, .5 for 2:4.
      decay: of masked weights, >= 0: the share of each weight that is added to its gradient.
      scope: as in :func:`ste`.
      prunable: path rules that give the structure, ``[("", granet_jax.structures.n_of_m(4))]``.

    Returns:
      A reparameterisation, as :func:`ste`.

    Raises:
      ValueError: as :func:`ste`.

    Differs from the paper's code in that no group continues in the next row.

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


def mask_decay(
    *,
    sparsity: Any,
    end_step: int,
    begin_step: int = 0,
    num_stairs: int = 16,
    scope: Distribution = distributions.uniform,
    score: ScoreFn = scores.magnitude,
    prunable: trees.Rules = (),
) -> Reparameterisation:
    """Masked weights fade out: the network uses ``w * (mask + leak (1 - mask))``.

    The leak falls from 1 to 0 in equal steps. Gradients are those of this product: the gradient of
    a masked weight is multiplied by the leak, and is 0 from ``end_step`` on. Until then no weight
    is left out, and ``method.masks`` and :func:`export` give a dense network.

    Source: Kao et al. 2022 (arXiv 2209.07617), "Training recipe for N:M structured sparsity with
    decaying pruning mask"; Bambhaniya et al. 2024 (arXiv 2402.04744).

    Args:
      sparsity: fraction of prunable weights that fade out, in [0, 1).
      end_step: the update from which masked weights are 0.
      begin_step: the update of the first stair.
      num_stairs: in how many steps the leak falls, >= 1; at most 16 in the paper.
      scope: as in :func:`ste`.
      score: as in :func:`ste`.
      prunable: path rules, with a structure such as ``granet_jax.structures.n_of_m(4)``.

    Returns:
      A reparameterisation, as :func:`ste`.

    Raises:
      ValueError: as :func:`ste`; or ``num_stairs < 1``.

    Example: after the first of two stairs the leak is .5.
      >>> import granet_jax as gj, jax.numpy as jnp
      >>> method = gj.reparam.mask_decay(sparsity=0.5, end_step=9, num_stairs=2)
      >>> params = {"kernel": jnp.array([[3.0, 1.0], [-2.0, 0.5]])}
      >>> extra = {"step": jnp.float32(4)}
      >>> method.effective(params, extra)["kernel"].tolist()
      [[3.0, 0.5], [-2.0, 0.25]]
    """
    leak = schedules.stairs(num_stairs)(1.0, 0.0, begin_step, end_step)

    def use(step: jax.Array, w: jax.Array, mask: jax.Array) -> jax.Array:
        return jnp.where(mask, w, leak(step).astype(w.dtype) * w)

    num_keep = schedules.gradual_num_keep(scope, 0.0, sparsity, 0, 1)  # from the first step on
    return _masks_of_each_step(use, num_keep, (scope, sparsity), score, prunable, leak)


def structure_decay(
    *,
    sparsity: Any,
    m: int,
    end_step: int,
    begin_step: int = 0,
    scope: Distribution = distributions.uniform,
    prunable: trees.Rules = (),
) -> Reparameterisation:
    """:func:`ste` that masks one more of each ``m`` weights at a time: M-1:M, M-2:M ... N:M.

    Source: Kao et al. 2022 (arXiv 2209.07617).

    Args:
      sparsity: that of the structure at the end, .5 for 2:4.
      m: weights of a group.
      end_step: the update from which it is N:M.
      begin_step: the update from which it is M-1:M; before, it is dense.
      scope: as in :func:`ste`.
      prunable: path rules that give the structure, ``[("", granet_jax.structures.n_of_m(4))]``.

    Returns:
      A reparameterisation, as :func:`ste`.

    Raises:
      ValueError: as :func:`ste`; or ``m * sparsity`` is not a whole number >= 1.

    Example:
      >>> import granet_jax as gj, jax.numpy as jnp
      >>> rules = [("", gj.structures.n_of_m(4))]
      >>> method = gj.reparam.structure_decay(sparsity=0.75, m=4, end_step=9, prunable=rules)
      >>> params = {"kernel": jnp.array([[4.0], [3.0], [2.0], [1.0]])}
      >>> [
      ...     int(method.masks(params, {"step": jnp.float32(step)})["kernel"].sum())
      ...     for step in (0, 4, 8)
      ... ]
      [3, 2, 1]
    """
    distributions.check_sparsity("sparsity", sparsity)
    num_stairs = round(m * float(sparsity))
    if num_stairs < 1 or abs(num_stairs - m * float(sparsity)) > 1e-6:
        raise ValueError(
            f"structure_decay takes one weight of each m={m} at a time, and a sparsity of "
            f"{float(sparsity):g} takes {m * float(sparsity):g}: give it k/m with a whole k >= 1."
        )
    return ste(
        sparsity=sparsity,
        end_step=end_step,
        begin_step=begin_step,
        curve=schedules.stairs(num_stairs),
        scope=scope,
        prunable=prunable,
    )


def _masks_of_each_step(
    use: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    num_keep: NumKeep,
    end: tuple[Distribution, Any],
    score: ScoreFn,
    prunable: trees.Rules,
    leak: optax.Schedule | None = None,
) -> Reparameterisation:
    """The network uses ``use(step, w, mask)``, with masks of this step's best weights.

    Args:
      use: for one leaf.
      num_keep: how many are kept at a step.
      end: distribution and sparsity at the end, which are only checked.
      score: of the parameters.
      prunable: path rules.
      leak: ``step -> share`` of their value that masked weights still have. Masks are all True
        while it is above 0; None = it is always 0.
    """
    prune = prune_to(num_keep, score=score, prunable=prunable)

    def init(params: PyTree) -> dict[str, jax.Array]:
        leaves = trees.describe(params, prunable)
        if leaves:
            scope, sparsity = end
            counts = scope(structures.shapes(leaves), sparsity)
            groups.check_counts(leaves, counts, sparsity)
        return {"step": jnp.zeros([], jnp.float32)}  # exact up to 2^24

    def this_step(extra: dict[str, jax.Array]) -> jax.Array:
        return extra["step"].astype(jnp.int32) + 1

    def best(params: PyTree, extra: dict[str, jax.Array]) -> PyTree:
        fixed = jax.lax.stop_gradient(params)
        on = ones(fixed)
        return prune(on, on, Event(fixed, None, on, this_step(extra)))[0]

    def masks(params: PyTree, extra: dict[str, jax.Array]) -> PyTree:
        if leak is None:
            return best(params, extra)
        leaks = leak(this_step(extra)) > 0
        return jax.tree.map(lambda mask: mask | leaks, best(params, extra))

    def effective(params: PyTree, extra: dict[str, jax.Array]) -> PyTree:
        leaves = trees.describe(params, prunable)
        pairs = zip(
            trees.split(params, leaves), trees.split(best(params, extra), leaves), strict=True
        )
        used = [use(this_step(extra), w, mask) for w, mask in pairs]
        return trees.join(used, params, leaves)

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


@jax.custom_vjp
def _masked(decay: float, w: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.where(mask, w, jnp.zeros_like(w))


def _forward(decay: float, w: jax.Array, mask: jax.Array) -> tuple[jax.Array, Any]:
    return _masked(decay, w, mask), (decay, w, mask)


def _backward(kept: Any, g: jax.Array) -> tuple[Any, ...]:
    decay, w, mask = kept
    return None, g + (decay * jnp.where(mask, jnp.zeros_like(w), jnp.conj(w))).astype(g.dtype), None


_masked.defvjp(_forward, _backward)
