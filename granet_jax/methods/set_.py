"""SET: sparse training that grows at random."""

from typing import Any

import jax

from granet_jax import distributions, scores, trees
from granet_jax.methods.rigl import rigl
from granet_jax.types import Distribution, Method, PyTree


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
    masks: PyTree | None = None,
    prunable: trees.Rules = (),
) -> Method:
    """Trains at a fixed sparsity; every so often drops small weights and grows random ones.

    As :func:`granet_jax.rigl`, with growth uniformly at random among all that are off.

    Source: Mocanu et al. 2018, "Scalable training of artificial neural networks with adaptive
    sparse connectivity inspired by network science", in the form in which Evci et al. 2020 compare
    it with RigL (magnitude drop, cosine).

    Args:
      sparsity: fraction of zeros among prunable weights, in [0, 1), kept throughout.
      update_every: updates between events.
      total_steps: updates in all.
      key: typed key, for the start and for growth.
      begin_step: no event before it.
      last_step: last event, and end of the cosine; None = 3/4 of ``total_steps``.
      initial_fraction: fraction exchanged at step 0.
      final_fraction: fraction exchanged at ``last_step``.
      start: how the sparsity is spread over layers.
      masks: start from these instead of random ones (bool, tree of params).
      prunable: path rules, see :func:`granet_jax.trees.describe`.

    Raises:
      ValueError: as :func:`granet_jax.rigl`.

    Differs from the original, which drops the smallest positive and the largest negative weights
    once an epoch, at a constant fraction, and may not regrow what it just dropped.

    Example:
      >>> import granet_jax as gj, jax, optax
      >>> tx = gj.sparsify(
      ...     optax.sgd(0.1),
      ...     gj.set_(sparsity=0.9, update_every=100, total_steps=1000, key=jax.random.key(0)),
      ... )
    """
    return rigl(
        sparsity=sparsity,
        update_every=update_every,
        total_steps=total_steps,
        begin_step=begin_step,
        last_step=last_step,
        initial_fraction=initial_fraction,
        final_fraction=final_fraction,
        start=start,
        grow=scores.random,
        masks=masks,
        prunable=prunable,
        key=key,
    )
