"""SET: sparse training that grows at random."""

from typing import Any

import jax

from granet_jax import distributions, schedules, scores, trees
from granet_jax.composition import compose, start_from
from granet_jax.masks import regenerate
from granet_jax.types import Distribution, Method, PyTree, ScoreFn


def set_(
    *,
    sparsity: Any,
    update_every: int,
    total_steps: int,
    key: jax.Array,
    begin_step: int = 0,
    last_step: int | None = None,
    initial_fraction: Any = 0.3,
    final_fraction: Any = 0.0,
    start: Distribution = distributions.erk,
    drop: ScoreFn = scores.magnitude,
    by_sign: bool = False,
    masks: PyTree | None = None,
    prunable: trees.Rules = (),
) -> Method:
    """Trains at a fixed sparsity; at events it drops small weights and grows random ones.

    As :func:`granet_jax.rigl`, but growth is uniformly random among the weights that are off.

    Source: Mocanu et al. 2018, "Scalable training of artificial neural networks with adaptive
    sparse connectivity inspired by network science". The defaults are those of Evci et al. 2020,
    who compare it with RigL (magnitude drop, cosine). The original is ``by_sign=True`` with
    ``final_fraction=initial_fraction``, ``last_step=total_steps`` and an event each epoch. MEST
    (Yuan et al. 2021) with a constant number of weights is
    ``drop=granet_jax.scores.magnitude_and_gradient(0.01)``.

    Args:
      sparsity: fraction of zeros among prunable weights, in [0, 1), constant.
      update_every: updates between events.
      total_steps: updates in all; it only sets the default of ``last_step``.
      key: typed key, for the start and for growth.
      begin_step: no event before it.
      last_step: last event, and end of the cosine; None = 3/4 of ``total_steps``.
      initial_fraction: fraction exchanged at step 0, in [0, 1].
      final_fraction: fraction exchanged at ``last_step``, in [0, 1].
      start: how the sparsity is spread over layers.
      drop: the weights with the lowest score are dropped.
      by_sign: as the original does, drop the fraction of the positive weights and of the negative
        weights separately, those nearest to 0.
      masks: start from these instead of random ones (bool, tree of params).
      prunable: path rules, see :func:`granet_jax.trees.describe`.

    Returns:
      A method for :func:`granet_jax.sparsify`.

    Raises:
      ValueError: as :func:`granet_jax.rigl`.

    Differs from the original code in that a weight just dropped may come back at once, ERK masks
    have exact counts, and ``by_sign`` drops an exact number, where theirs drops by a threshold.
    MEST's elastic mutation (more weights at first) and its blocks are not implemented.

    Example:
      >>> import granet_jax as gj, jax, optax
      >>> tx = gj.sparsify(
      ...     optax.sgd(0.1),
      ...     gj.set_(sparsity=0.9, update_every=100, total_steps=1000, key=jax.random.key(0)),
      ... )
    """
    schedules.check_steps(total_steps=total_steps)
    last = 3 * total_steps // 4 if last_step is None else last_step
    return compose(
        start_from(masks, sparsity, start, prunable, key),
        regenerate(
            schedules.cosine(initial_fraction, final_fraction, last),
            drop=drop,
            grow=scores.random,
            by_sign=by_sign,
            prunable=prunable,
        ),
        is_update_step=schedules.every(update_every, begin_step, last),
        key=key,
        name="set_",
    )
