"""ITOP: methods that explore many weights over time, and the exploration rate."""

from typing import Any

import jax
import jax.numpy as jnp

from granet_jax import distributions, scores, trees
from granet_jax.methods.rigl import rigl
from granet_jax.types import Distribution, Event, MaskState, Method, PyTree, ScoreFn


def track_exploration(method: Method) -> Method:
    """The method, with a record in its state of the weights that were ever on (``explored``).

    The exploration rate R_s of ITOP is the density of this union of masks: for each leaf
    ``gj.metrics.densities(state.explored, params)``, in total
    ``1 - gj.metrics.sparsity(state.explored, params)``. It costs one byte for each weight, and time
    at events only.

    Source: Liu et al. 2021, "Do We Actually Need Dense Over-Parameterization?", section 3.

    Args:
      method: one whose state is a :class:`granet_jax.types.MaskState`.

    Returns:
      A method.

    Example:
      >>> import granet_jax as gj, jax, jax.numpy as jnp, optax
      >>> method = gj.rigl(sparsity=0.75, update_every=2, total_steps=8, key=jax.random.key(0))
      >>> tx = gj.sparsify(optax.sgd(0.1), gj.track_exploration(method))
      >>> params = {"kernel": jnp.ones((4, 4))}
      >>> explored = gj.get_method_state(tx.init(params)).explored
      >>> float(gj.metrics.densities(explored, params)["kernel"])
      0.25
    """

    def init(params: PyTree) -> MaskState:
        state = method.init(params)
        return state._replace(explored=jax.tree.map(jnp.copy, state.masks))

    def update(state: MaskState, event: Event) -> tuple[MaskState, PyTree]:
        state, keep = method.update(state, event)
        explored = jax.tree.map(jnp.logical_or, state.explored, state.masks)
        return state._replace(explored=explored), keep

    name = f"track_exploration({method.name})"
    return method._replace(init=init, update=update, name=name)


def rigl_itop(
    *,
    sparsity: Any,
    update_every: int,
    total_steps: int,
    grow: ScoreFn = scores.gradient,
    start: Distribution = distributions.erk,
    masks: PyTree | None = None,
    prunable: trees.Rules = (),
    key: jax.Array | None = None,
) -> Method:
    """RigL that explores more: it exchanges half of the weights at first, and until the end.

    It is :func:`granet_jax.rigl` with a fraction that falls on a cosine from .5 to .005 over the
    whole training, with :func:`track_exploration`. The paper advises rare events, so that each
    weight has time to grow, and long training in small batches.

    Source: Liu et al. 2021, "Do We Actually Need Dense Over-Parameterization? In-Time
    Over-Parameterization in Sparse Training", section 4; ``update_every`` 4000 on CIFAR (250
    epochs, batch 128) and on ImageNet.

    Args:
      sparsity: fraction of zeros among prunable weights, in [0, 1), kept throughout.
      update_every: updates between events (Delta T).
      total_steps: updates in all; the cosine's length and the last event.
      grow: the weights with the highest score are grown.
      start: how the sparsity is spread over layers.
      masks: start from these instead of random ones (bool, tree of params).
      prunable: path rules, see :func:`granet_jax.trees.describe`.
      key: typed key for the random start, and for a ``grow`` that draws.

    Returns:
      A method for :func:`granet_jax.sparsify`.

    Raises:
      ValueError: as :func:`granet_jax.rigl`.

    Differs from the paper's code in that random masks have exact counts, and ties are settled by
    index.

    Example:
      >>> import granet_jax as gj, jax, optax
      >>> tx = gj.sparsify(
      ...     optax.sgd(0.1, momentum=0.9),
      ...     gj.rigl_itop(sparsity=0.9, update_every=100, total_steps=1000, key=jax.random.key(0)),
      ... )
    """
    method = rigl(
        sparsity=sparsity,
        update_every=update_every,
        total_steps=total_steps,
        last_step=total_steps,
        initial_fraction=0.5,
        final_fraction=0.005,
        start=start,
        grow=grow,
        masks=masks,
        prunable=prunable,
        key=key,
    )
    return track_exploration(method)._replace(name="rigl_itop")


def set_itop(
    *,
    sparsity: Any,
    update_every: int,
    total_steps: int,
    key: jax.Array,
    unexplored_first: bool = False,
    start: Distribution = distributions.erk,
    masks: PyTree | None = None,
    prunable: trees.Rules = (),
) -> Method:
    """SET that explores more: :func:`rigl_itop` with random growth.

    Source: as :func:`rigl_itop`; ``update_every`` 1500 on CIFAR.

    Args:
      sparsity: fraction of zeros among prunable weights, in [0, 1), kept throughout.
      update_every: updates between events (Delta T).
      total_steps: updates in all; the cosine's length and the last event.
      key: typed key, for the start and for growth.
      unexplored_first: as long as a layer has weights that were never on, grow these ("random
        unfired" in the paper's code).
      start: how the sparsity is spread over layers.
      masks: start from these instead of random ones (bool, tree of params).
      prunable: path rules, see :func:`granet_jax.trees.describe`.

    Returns:
      A method for :func:`granet_jax.sparsify`.

    Raises:
      ValueError: as :func:`granet_jax.rigl`.

    Differs from the paper's code in that exactly as many weights are grown as were dropped; theirs
    draws each weight independently, so that the numbers agree only on average.

    Example:
      >>> import granet_jax as gj, jax, optax
      >>> tx = gj.sparsify(
      ...     optax.sgd(0.1, momentum=0.9),
      ...     gj.set_itop(sparsity=0.9, update_every=100, total_steps=1000, key=jax.random.key(0)),
      ... )
    """

    def growing_by(grow: ScoreFn) -> Method:
        return rigl_itop(
            sparsity=sparsity,
            update_every=update_every,
            total_steps=total_steps,
            grow=grow,
            start=start,
            masks=masks,
            prunable=prunable,
            key=key,
        )

    def update(state: MaskState, event: Event) -> tuple[MaskState, PyTree]:
        def grow(event: Event) -> PyTree:
            draws = scores.random(event)  # in [0, 1)
            return jax.tree.map(lambda draw, e: draw - e.astype(draw.dtype), draws, state.explored)

        return growing_by(grow).update(state, event)

    method = growing_by(scores.random)._replace(name="set_itop")
    return method._replace(update=update) if unexplored_first else method
