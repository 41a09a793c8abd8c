"""Methods are composed: a start and mask steps, strung together."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from granet_jax import distributions, structures, trees
from granet_jax.masks import check_dense, check_masks, is_known, ones, random_masks
from granet_jax.types import Distribution, Event, MaskState, MaskStep, Method, PyTree


def start_from(
    masks: PyTree | None,
    sparsity: Any,
    distribution: Distribution,
    prunable: trees.Rules,
    key: jax.Array | None,
    end: tuple[Distribution, Any] | None = None,
) -> Callable[[PyTree], PyTree]:
    """``params -> masks`` at the start: the given masks, or random ones, or (sparsity 0) dense.

    Args:
      masks: bool tree of params, or None.
      sparsity: fraction of zeros among prunable weights that is asked for at the start, in [0, 1).
      distribution: how it is spread over layers.
      prunable: path rules.
      key: typed key for random masks.
      end: distribution and sparsity that gradual pruning ends with; for errors alone, which then
        come with the parameters and not when it gets there.

    Raises:
      ValueError: at once, a sparsity outside [0, 1), or random masks without a key; with the
        parameters, masks that do not fit them, have another sparsity than the one asked for (if
        that is not 0), or switch off weights of a leaf that is not prunable; a sparsity that the
        layers or their structures do not have.
    """
    distributions.check_sparsity("initial sparsity", sparsity)
    is_dense = not isinstance(sparsity, jax.core.Tracer) and float(sparsity) == 0.0
    if masks is None and not is_dense and key is None:
        raise ValueError(
            f"A start at sparsity {sparsity} draws random masks: pass key=jax.random.key(seed), "
            "or masks=..., or start dense."
        )

    def start(params: PyTree) -> PyTree:
        leaves = trees.describe(params, prunable)
        if not leaves:
            return ones(params)
        if end is not None:
            structures.check_counts(leaves, end[0](structures.shapes(leaves), end[1]), end[1])
        if masks is not None:
            given = check_masks(masks, params)
            check_dense(given, leaves)
            if not is_dense:
                _check_asked(given, sparsity, leaves)
            return given
        if is_dense:
            return ones(params)
        assert key is not None
        return random_masks(key, params, sparsity, distribution, prunable)

    return start


def compose(
    start: Callable[[PyTree], PyTree],
    *steps: MaskStep,
    is_update_step: Callable[[jax.Array], Any],
    key: jax.Array | None = None,
    name: str = "unnamed",
) -> Method:
    """A method that starts from ``start(params)`` and does ``steps`` in order at each event.

    Args:
      start: ``params -> masks``.
      *steps: mask steps; each gets a key of its own, folded from ``key``, the step and its place.
      is_update_step: which steps are events.
      key: a typed key, needed by steps that draw. Its data is kept in the state, and that is used:
        a method made once serves many seeds under ``vmap``.
      name: which states carry, so that one of another method is refused.

    Example: a method in one line, with a rule of your own for what to grow.
      >>> import granet_jax as gj
      >>> import jax.numpy as jnp
      >>> method = gj.compose(
      ...     gj.ones,
      ...     gj.prune_to(gj.gradual_num_keep(gj.global_ranking, 0.0, 0.5, 0, 20)),
      ...     gj.regenerate(gj.cosine(0.3, 0.0, 40), grow=gj.scores.saliency),
      ...     is_update_step=gj.every(10, last_step=40),
      ... )
      >>> state = method.init({"kernel": jnp.ones((4, 4))})
      >>> int(state.masks["kernel"].sum())
      16
    """

    def init(params: PyTree) -> MaskState:
        # A copy, so that donating the state does not delete the caller's.
        return MaskState(start(params), None if key is None else jnp.copy(_key_data(key)))

    def update(state: MaskState, event: Event) -> tuple[MaskState, PyTree]:
        masks = keep = state.masks
        event_key = _event_key(state.key, key, event.step)
        for i, mask_step in enumerate(steps):
            step_key = None if event_key is None else jax.random.fold_in(event_key, i)
            masks, keep = mask_step(masks, keep, event._replace(masks=masks, key=step_key))
        return state._replace(masks=masks), keep

    return Method(init, update, is_update_step, name=name)


def _key_data(key: jax.Array) -> jax.Array:
    is_typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(key) if is_typed else key


def _event_key(data: jax.Array | None, key: jax.Array | None, step: jax.Array) -> jax.Array | None:
    """The key of an event, from the data in a state; ``key`` tells what kind it is."""
    if (data is None) != (key is None):
        raise ValueError(
            f"The state was made {'without' if data is None else 'with'} a key, the method "
            f"{'with' if data is None else 'without'} one. Give the method the key= that it had, "
            "or start anew: granet_jax.set_masks(tx.init(params), granet_jax.get_masks(old_state))."
        )
    if data is None or key is None:
        return None
    if jnp.issubdtype(data.dtype, jax.dtypes.prng_key):
        raise ValueError(
            "The state holds a typed key, as states of before did; now it is plain data: put "
            "jax.random.key_data(key) in its place."
        )
    return jax.random.fold_in(jax.random.wrap_key_data(data, impl=jax.random.key_impl(key)), step)


def _check_asked(masks: PyTree, sparsity: Any, leaves: tuple[trees.Leaf, ...]) -> None:
    """Refuses masks of another sparsity than the one asked for."""
    stacks = structures.live_units(trees.split(masks, leaves), leaves)
    if not all(map(is_known, stacks)) or isinstance(sparsity, jax.core.Tracer):
        return
    total = sum(x.size for x in stacks)
    live, asked = int(sum(jnp.sum(x) for x in stacks)), round(total * (1 - float(sparsity)))
    # Masks drawn at random, or with rounded layers, are about right.
    if abs(live - asked) > max(len(stacks), min(0.01 * total, 0.05 * asked)):
        raise ValueError(
            f"The masks keep {live} of {total} prunable weights, a sparsity of "
            f"{1 - live / total:.4f}, but the method was asked for {float(sparsity):g}, which is "
            f"{asked}. Give it the sparsity of the masks, or masks of that sparsity."
        )
