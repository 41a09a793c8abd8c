"""RigL: sparse training that grows by gradients."""

from typing import Any

import jax

from granet_jax import distributions, schedules, scores, trees
from granet_jax.composition import compose, start_from
from granet_jax.masks import regenerate
from granet_jax.types import Distribution, Method, PyTree, ScoreFn


def rigl(
    *,
    sparsity: Any,
    update_every: int,
    total_steps: int,
    begin_step: int = 0,
    last_step: int | None = None,
    initial_fraction: Any = 0.3,
    final_fraction: Any = 0.0,
    start: Distribution = distributions.erk,
    drop: ScoreFn = scores.magnitude,
    grow: ScoreFn = scores.gradient,
    masks: PyTree | None = None,
    prunable: trees.Rules = (),
    key: jax.Array | None = None,
) -> Method:
    """Trains at a fixed sparsity; at events it drops small weights and grows by gradient.

    At each event every layer drops its ``ceil(f_t * live)`` smallest weights and grows the same
    number where the gradient is largest. The fraction falls on a cosine,
    ``f_t = final + (initial - final)(1 + cos(pi t / last)) / 2``.

    Source: Evci et al. 2020, "Rigging the Lottery: Making All Tickets Winners", section 3 and
    algorithm 1. RigL-ITOP is :func:`granet_jax.rigl_itop`.

    Args:
      sparsity: fraction of zeros among prunable weights, in [0, 1), constant.
      update_every: updates between events (Delta T; 100 in the paper).
      total_steps: updates in all; it only sets the default of ``last_step``.
      begin_step: no event before it.
      last_step: last event, and end of the cosine; None = 3/4 of ``total_steps``.
      initial_fraction: f at step 0, in [0, 1].
      final_fraction: f at ``last_step``, in [0, 1].
      start: how the sparsity is spread over layers.
      drop: the weights with the lowest score are dropped.
      grow: the weights with the highest score are grown.
      masks: start from these instead of random ones (bool, tree of params).
      prunable: path rules, see :func:`granet_jax.trees.describe`.
      key: typed key for the random start, and for a ``grow`` that draws.

    Returns:
      A method for :func:`granet_jax.sparsify`.

    Raises:
      ValueError: a sparsity or fraction out of range, a random start without key, or a schedule
        without events.

    Differs from the paper's code, following the ITOP and GraNet code: the masks change after an
    optimizer step, not instead of one; ``ceil`` instead of ``floor``; the drop scores have no
    noise, and ties are settled by index.

    Example:
      >>> import granet_jax as gj, jax, optax
      >>> tx = gj.sparsify(
      ...     optax.sgd(0.1, momentum=0.9),
      ...     gj.rigl(sparsity=0.9, update_every=100, total_steps=1000, key=jax.random.key(0)),
      ... )
    """
    schedules.check_steps(total_steps=total_steps)
    last = 3 * total_steps // 4 if last_step is None else last_step
    return compose(
        start_from(masks, sparsity, start, prunable, key),
        regenerate(
            schedules.cosine(initial_fraction, final_fraction, last),
            drop=drop,
            grow=grow,
            prunable=prunable,
        ),
        is_update_step=schedules.every(update_every, begin_step, last),
        key=key,
        name="rigl",
    )
