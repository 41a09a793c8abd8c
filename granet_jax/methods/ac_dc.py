"""AC/DC: training that alternates between dense and compressed phases."""

from typing import Any

import jax
import jax.numpy as jnp

from granet_jax import distributions, schedules, scores, trees
from granet_jax.composition import compose, start_from
from granet_jax.masks import prune_to, revive
from granet_jax.types import Distribution, Event, Method, PyTree, ScoreFn


def ac_dc(
    *,
    sparsity: Any,
    warmup_steps: int,
    phase_steps: int,
    last_dense_step: int,
    last_sparse_step: int,
    scope: Distribution = distributions.global_ranking,
    score: ScoreFn = scores.magnitude,
    prunable: trees.Rules = (),
) -> Method:
    """Trains dense, then sparse and dense by turns, and sparse at the end.

    After ``warmup_steps`` the network is pruned to ``sparsity``, ranking the weights of all layers
    together. After ``phase_steps`` more, all weights come back, at 0 with zero moments. The phases
    alternate until ``last_dense_step``, from which the network is dense; from ``last_sparse_step``
    to the end it is sparse. In dense phases, weights that were pruned too early can return.
    Training yields two networks: the last dense one and the last sparse one.

    Source: Peste et al. 2021, "AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural
    Networks", algorithm 1; ResNet-50, 100 epochs: warm-up 10, phases of 5, last dense from 75, last
    sparse from 85.

    Args:
      sparsity: fraction of zeros among prunable weights in the sparse phases, in [0, 1).
      warmup_steps: updates before the first sparse phase, >= 1.
      phase_steps: updates of each phase after that, >= 1.
      last_dense_step: the update from which the network is dense until ``last_sparse_step``.
      last_sparse_step: the update from which it is sparse, to the end.
      scope: what is ranked together: ``global_ranking``, or ``uniform`` or ``erk`` by layer.
      score: the weights that score highest are kept.
      prunable: path rules, see :func:`granet_jax.trees.describe`.

    Returns:
      A method for :func:`granet_jax.sparsify`.

    Raises:
      ValueError: a sparsity outside [0, 1), or steps that are not in this order.

    Differs from the paper's code in that weights come back with moments of 0, as all grown weights
    do here; theirs come back with the moments that they had before the prune.

    Example: sparse from step 4 to 7, dense from 8 to 11, sparse from 12 on.
      >>> import jax.numpy as jnp
      >>> method = ac_dc(
      ...     sparsity=0.5, warmup_steps=4, phase_steps=4, last_dense_step=8, last_sparse_step=12
      ... )
      >>> [step for step in range(1, 20) if method.is_update_step(jnp.int32(step))]
      [4, 8, 12]
    """
    distributions.check_sparsity("sparsity", sparsity)
    schedules.check_steps(
        warmup_steps=warmup_steps,
        phase_steps=phase_steps,
        last_dense_step=last_dense_step,
        last_sparse_step=last_sparse_step,
    )
    if not 1 <= warmup_steps <= last_dense_step < last_sparse_step or phase_steps < 1:
        raise ValueError(
            "AC/DC is dense for warmup_steps, alternates, and ends dense, then sparse: 1 <= "
            f"warmup_steps <= last_dense_step < last_sparse_step and phase_steps >= 1; got "
            f"{warmup_steps=}, {phase_steps=}, {last_dense_step=}, {last_sparse_step=}."
        )

    def is_sparse(step: Any) -> jax.Array:
        step = jnp.asarray(step)
        alternates = (step >= warmup_steps) & (step < last_dense_step)
        in_turn = (step - warmup_steps) // phase_steps % 2 == 0
        return (alternates & in_turn) | (step >= last_sparse_step)

    prune = prune_to(lambda shapes, step: scope(shapes, sparsity), score=score, prunable=prunable)

    def switch(masks: PyTree, keep: PyTree, event: Event) -> tuple[PyTree, PyTree]:
        def to(step: Any) -> Any:
            return lambda pair: step(*pair, event)

        return jax.lax.cond(is_sparse(event.step), to(prune), to(revive), (masks, keep))

    return compose(
        start_from(None, 0.0, scope, prunable, None, (scope, sparsity)),
        switch,
        is_update_step=lambda step: is_sparse(step) != is_sparse(step - 1),
        name="ac_dc",
    )
