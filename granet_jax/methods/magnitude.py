"""One-shot magnitude pruning."""

from typing import Any

import jax

from granet_jax import distributions, schedules, scores, trees
from granet_jax.composition import compose, start_from
from granet_jax.masks import prune_to
from granet_jax.types import Distribution, Method, PyTree, ScoreFn


def magnitude(
    *,
    sparsity: Any,
    at: int,
    scope: Distribution = distributions.global_ranking,
    score: ScoreFn = scores.magnitude,
    masks: PyTree | None = None,
    prunable: trees.Rules = (),
    key: jax.Array | None = None,
) -> Method:
    """Trains dense, prunes once at step ``at``, and trains on under those masks.

    Source: Han et al. 2015, "Learning both weights and connections for efficient neural networks",
    section 3, in one round.

    Args:
      sparsity: fraction of zeros among prunable weights after the prune, in [0, 1).
      at: the step of the prune, >= 1; the weights are 0 from the end of that step.
      scope: what is ranked together: ``global_ranking``, or ``uniform`` or ``erk`` by layer.
      score: the weights that score highest are kept.
      masks: start from these instead of dense (bool, tree of params).
      prunable: path rules, see :func:`granet_jax.trees.describe`.
      key: typed key; needed for a ``score`` that draws.

    Returns:
      A method for :func:`granet_jax.sparsify`.

    Raises:
      ValueError: a sparsity outside [0, 1), or ``at < 1``.

    Example:
      >>> import granet_jax as gj, optax
      >>> tx = gj.sparsify(optax.sgd(0.1), gj.magnitude(sparsity=0.9, at=500))
    """
    distributions.check_sparsity("sparsity", sparsity)
    schedules.check_steps(at=at)
    if at < 1:
        raise ValueError(f"The prune happens at step at >= 1; got {at=}. Steps count from 1.")
    return compose(
        start_from(masks, 0.0, scope, prunable, None, (scope, sparsity)),
        prune_to(lambda shapes, step: scope(shapes, sparsity), score=score, prunable=prunable),
        is_update_step=lambda step: step == at,
        key=key,
        name="magnitude",
    )
