"""GraNet: gradual pruning with zero-cost neuroregeneration."""

from typing import Any

import jax

from granet_jax import distributions, schedules, scores, trees
from granet_jax.composition import compose, start_from
from granet_jax.masks import prune_to, regenerate
from granet_jax.types import Distribution, Method, PyTree, ScoreFn


def granet(
    *,
    final_sparsity: Any,
    end_step: int,
    update_every: int,
    total_steps: int,
    initial_sparsity: Any = 0.0,
    begin_step: int = 0,
    initial_fraction: Any = 0.5,
    final_fraction: Any = 0.005,
    scope: Distribution = distributions.global_ranking,
    start: Distribution = distributions.erk,
    drop: ScoreFn = scores.magnitude,
    grow: ScoreFn = scores.gradient,
    masks: PyTree | None = None,
    prunable: trees.Rules = (),
    key: jax.Array | None = None,
) -> Method:
    """Prunes gradually by magnitude and, at the same events, exchanges connections.

    Every ``update_every`` steps it (1) prunes to the cubic schedule
    ``s_t = s_f + (s_i - s_f)(1 - (t - t_0)/(t_f - t_0))^3``, ranking the weights of all layers
    together; then (2) in each layer it drops the ``ceil(p_t * live)`` smallest weights and grows
    the same number where the gradient is largest. ``p_t`` falls on a cosine from .5 to .005.
    Pruning ends at ``end_step``; regeneration goes on until ``total_steps``.

    Dense-to-sparse GraNet is ``initial_sparsity=0``; sparse-to-sparse (GraNet-ST in the first
    version of the paper) is ``initial_sparsity=0.5``, from random ERK masks.

    Source: Liu et al., "Sparse Training via Boosting Pruning Plasticity with Neuroregeneration",
    NeurIPS 2021, section 4 and algorithm 1; defaults are those of the paper.

    Args:
      final_sparsity: fraction of zeros among prunable weights at the end, in [0, 1).
      end_step: end of the cubic (t_f), in updates; the first event at or after it reaches the
        final sparsity. In the paper half of training on CIFAR, 30 of 100 epochs on ImageNet.
      update_every: updates between events (Delta T; 1000 on CIFAR, 4000 on ImageNet).
      total_steps: updates in all; the cosine's length and the last regeneration.
      initial_sparsity: sparsity of the start, in [0, 1).
      begin_step: no event before it (t_0).
      initial_fraction: p at step 0, in [0, 1].
      final_fraction: p at ``total_steps``, in [0, 1].
      scope: what the gradual pruning ranks together; ``global_ranking`` is the paper's,
        ``uniform`` and ``erk`` give each layer its own count.
      start: how a sparse start is spread over layers.
      drop: regeneration drops the weights with the lowest score.
      grow: regeneration grows the weights with the highest score.
      masks: start from these instead (bool, tree of params).
      prunable: path rules, see :func:`granet_jax.trees.describe`.
      key: typed key; needed for a random start and for a ``grow`` that draws.

    Returns:
      A method for :func:`granet_jax.sparsify`.

    Raises:
      ValueError: a sparsity outside [0, 1), a schedule without events, or no event left between
        ``end_step`` and ``total_steps`` to reach the final sparsity.

    Differs from the paper's code in that: exactly the scheduled number of weights is kept (theirs
    keeps one fewer, by a strict comparison with the threshold, or all weights when the threshold
    is 0); the schedule reaches ``final_sparsity`` (theirs makes its last prune one event before the
    end and stays ``(s_f - s_i) / (number of events)^3`` short); ties are settled by index, so that
    no layer drops more than its count; a random start has exact counts; nothing depends on epochs.
    Their GraNet_uniform is ``scope=uniform``, but theirs also holds the classifier at a density of
    .2 once the sparsity passes .8. For their growth by momentum, put
    :func:`granet_jax.average_gradients` around this method.

    Example:
      >>> import granet_jax as gj, jax, optax
      >>> tx = gj.sparsify(
      ...     optax.sgd(0.1, momentum=0.9),
      ...     gj.granet(initial_sparsity=0.5, final_sparsity=0.9, end_step=500, update_every=100,
      ...               total_steps=1000, key=jax.random.key(0)),
      ... )
    """
    is_update_step = schedules.every(update_every, begin_step, total_steps)
    num_keep = schedules.gradual_num_keep(
        scope, initial_sparsity, final_sparsity, begin_step, end_step
    )
    schedules.check_end(update_every, end_step, total_steps)
    return compose(
        start_from(masks, initial_sparsity, start, prunable, key, (scope, final_sparsity)),
        prune_to(num_keep, prunable=prunable),
        regenerate(
            schedules.cosine(initial_fraction, final_fraction, total_steps),
            drop=drop,
            grow=grow,
            prunable=prunable,
        ),
        is_update_step=is_update_step,
        key=key,
        name="granet",
    )
