"""GMP: gradual magnitude pruning."""

from typing import Any

import jax

from granet_jax import distributions, schedules, scores, trees
from granet_jax.composition import compose, start_from
from granet_jax.masks import prune_to
from granet_jax.types import Distribution, Method, PyTree, ScoreFn


def gmp(
    *,
    final_sparsity: Any,
    end_step: int,
    update_every: int,
    begin_step: int = 0,
    initial_sparsity: Any = 0.0,
    scope: Distribution = distributions.global_ranking,
    score: ScoreFn = scores.magnitude,
    masks: PyTree | None = None,
    prunable: trees.Rules = (),
    key: jax.Array | None = None,
) -> Method:
    """Prunes a dense network by magnitude on a cubic schedule; what is pruned stays pruned.

    At every ``update_every``-th step from ``begin_step`` on it prunes to
    ``s_t = s_f + (s_i - s_f)(1 - (t - t_0)/(t_f - t_0))^3``. The first event at or after
    ``end_step`` reaches the final sparsity, even if ``update_every`` does not divide ``end_step``.

    Source: Zhu & Gupta 2017, "To prune, or not to prune", section 3, for the schedule; they prune
    layer by layer (``scope=uniform``). The global ranking is that of the GMP runs in the GraNet
    paper.

    Args:
      final_sparsity: fraction of zeros among prunable weights at the end, in [0, 1).
      end_step: end of the cubic, in updates.
      update_every: updates between events.
      begin_step: start of the cubic; no event before it.
      initial_sparsity: value of the cubic at ``begin_step``, in [0, 1). Until the first event the
        masks are those of the start: dense, or ``masks``.
      scope: what is ranked together: ``global_ranking``, or ``uniform`` or ``erk`` by layer.
      score: the weights that score highest are kept.
      masks: start from these instead of dense (bool, tree of params).
      prunable: path rules, see :func:`granet_jax.trees.describe`.
      key: typed key; needed for a ``score`` that draws.

    Returns:
      A method for :func:`granet_jax.sparsify`.

    Raises:
      ValueError: a sparsity outside [0, 1) or falling, ``end_step <= begin_step``, or
        ``update_every < 1``. (The method does not know how long you train: choose ``end_step`` so
        that an event falls into ``[end_step, your last step]``.)

    Differs from Zhu & Gupta in that pruned weights cannot come back; and from the GraNet repository
    as :func:`granet_jax.granet` does: exact counts, and the final sparsity is reached.

    Example:
      >>> import granet_jax as gj, optax
      >>> tx = gj.sparsify(
      ...     optax.adam(1e-3), gj.gmp(final_sparsity=0.9, end_step=500, update_every=50)
      ... )
    """
    num_keep = schedules.gradual_num_keep(
        scope, initial_sparsity, final_sparsity, begin_step, end_step
    )
    return compose(
        start_from(masks, 0.0, scope, prunable, None, (scope, final_sparsity)),
        prune_to(num_keep, score=score, prunable=prunable),
        is_update_step=schedules.every(update_every, begin_step),
        key=key,
        name="gmp",
    )
