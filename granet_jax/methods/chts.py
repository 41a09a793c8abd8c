"""CHTs and CHTss: Cannistraci-Hebb training, which grows by the network's topology alone."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from granet_jax import distributions, schedules, scores, trees
from granet_jax.composition import compose, start_from
from granet_jax.masks import prune_to, regenerate
from granet_jax.types import Distribution, Method, PyTree


def chts(
    *,
    sparsity: Any,
    update_every: int,
    total_steps: int,
    key: jax.Array,
    initial_sparsity: Any = None,
    begin_step: int = 0,
    last_step: int | None = None,
    fraction: Any = 0.3,
    temperature: Any = None,
    scope: Distribution = distributions.uniform,
    masks: PyTree | None = None,
    prunable: trees.Rules = (),
) -> Method:
    """Drops at random by relative importance and grows by short paths; it needs no gradients.

    At each event every layer drops ``ceil(fraction * live)`` weights. The ones that stay are drawn
    with chances proportional to :func:`granet_jax.scores.relative_importance` to the power T, which
    rises from 1 to 3, so that the drop becomes less random. The layer grows the same number where
    :func:`granet_jax.scores.cannistraci_hebb` is highest. With ``initial_sparsity`` (.5 in the
    paper) it is CHTss: at each event the same kind of draw first prunes the layers along a sigmoid
    curve that ends at ``last_step``.

    Source: Zhang et al. 2024, "Epitopological learning and Cannistraci-Hebb network shape
    intelligence brain-inspired theory for ultra-sparse advantage in deep learning" (CHT), and 2025
    (CHTs, CHTss).

    Args:
      sparsity: fraction of zeros among prunable weights, in [0, 1); with ``initial_sparsity``, that
        at ``last_step``.
      update_every: updates between events.
      total_steps: updates in all; it only sets the default of ``last_step``.
      key: typed key, for the start and for the draws.
      initial_sparsity: sparsity of the start, in [0, 1); None = ``sparsity`` throughout.
      begin_step: no event before it.
      last_step: last event, and end of both curves; None = 3/4 of ``total_steps``.
      fraction: of live weights exchanged at each event; .3 in the paper, .1 for language models.
      temperature: T, a number or a schedule; None = from 1 at step 0 to 3 at ``last_step``.
      scope: how a sparsity is spread over layers, ``uniform`` or ``erk``.
      masks: start from these instead of random ones (bool, tree of params).
      prunable: path rules, see :func:`granet_jax.trees.describe`.

    Returns:
      A method for :func:`granet_jax.sparsify`.

    Raises:
      ValueError: a sparsity outside [0, 1) or falling, or a fraction outside [0, 1]; no event
        between ``begin_step`` and ``last_step``, or only one with ``initial_sparsity``.

    Differs from the paper's code in that: a neuron that has lost all its incoming or all its
    outgoing links keeps the others (a layer does not know the next one); starts are random, not by
    correlations of the inputs; a weight just dropped may come back at once; counts are exact. See
    also the two scores.

    Example:
      >>> import granet_jax as gj, jax, optax
      >>> key = jax.random.key(0)
      >>> method = gj.chts(sparsity=0.99, update_every=100, total_steps=1000, key=key)
      >>> chtss = gj.chts(
      ...     sparsity=0.99, initial_sparsity=0.5, update_every=100, total_steps=1000, key=key
      ... )
      >>> tx = gj.sparsify(optax.sgd(0.1), method)
    """
    schedules.check_steps(total_steps=total_steps)
    schedules.check_fractions(fraction)
    last = 3 * total_steps // 4 if last_step is None else last_step
    is_update_step = schedules.every(update_every, begin_step, last)
    last = last // update_every * update_every  # the last event itself
    initial = sparsity if initial_sparsity is None else initial_sparsity
    if temperature is None:
        temperature = optax.linear_schedule(1.0, 3.0, last)
    stay = scores.sampled(scores.relative_importance(prunable), temperature)
    regrow = regenerate(
        lambda step: jnp.float32(fraction),
        drop=stay,
        grow=scores.cannistraci_hebb(prunable),
        prunable=prunable,
    )
    steps = [regrow]
    if initial_sparsity is not None:
        curve = schedules.sigmoid
        num_keep = schedules.gradual_num_keep(scope, initial, sparsity, begin_step, last, curve)
        steps = [prune_to(num_keep, score=stay, prunable=prunable), regrow]
    return compose(
        start_from(masks, initial, scope, prunable, key, (scope, sparsity)),
        *steps,
        is_update_step=is_update_step,
        key=key,
        name="chts",
    )
