"""Composing methods from a start and mask steps."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from granet_jax import distributions, groups, selection, structures, trees
from granet_jax.masks import check_dense, check_masks, is_known, ones, random_masks
from granet_jax.types import (
    Counts,
    Distribution,
    Event,
    MaskState,
    MaskStep,
    Method,
    PyTree,
    Shapes,
    check_callable,
)


def start_from(
    masks: PyTree | None,
    sparsity: Any,
    distribution: Distribution,
    prunable: trees.Rules,
    key: jax.Array | None,
    end: tuple[Distribution, Any] | None = None,
) -> Callable[[PyTree], PyTree]:
    """The start of a method, ``params -> masks``: given masks, random ones, or dense (sparsity 0).

    Args:
      masks: bool tree of params, or None.
      sparsity: fraction of zeros among prunable weights at the start, in [0, 1).
      distribution: how it is spread over layers.
      prunable: path rules, see :func:`granet_jax.trees.describe`.
      key: typed key for random masks.
      end: distribution and sparsity at the end of gradual pruning. They are only checked, so that
        errors come with the parameters and not at the end of training.

    Returns:
      ``params -> masks``, for :func:`compose`. It raises a ValueError for masks that do not fit the
      parameters, that have another sparsity than the one asked for (unless that is 0), or that
      switch off weights of a leaf that is not prunable; and for a sparsity that the layers or their
      structures cannot have.

    Raises:
      ValueError: a sparsity outside [0, 1), or random masks without a key.

    Example:
      >>> import granet_jax as gj, jax, jax.numpy as jnp
      >>> start = gj.start_from(None, 0.5, gj.erk, (), jax.random.key(0))
      >>> int(start({"kernel": jnp.ones((4, 4))})["kernel"].sum())
      8
    """
    check_callable(distribution=distribution)
    distributions.check_sparsity("sparsity", sparsity)
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
            shapes = structures.shapes(leaves)
            last = end[0](shapes, end[1])
            groups.check_counts(leaves, last, end[1])
            if masks is None and not is_dense:
                _check_falls(distribution(shapes, sparsity), last, shapes)
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
      *steps: mask steps; each gets its own key, made from ``key``, the step and its position.
      is_update_step: which steps are events.
      key: a typed key, needed by steps that draw. The state holds its data, and events read the key
        from there, so one method serves many seeds under ``vmap``.
      name: stored in the state, so that the state of another method is refused.

    Returns:
      A :class:`granet_jax.types.Method` whose state is a :class:`granet_jax.types.MaskState`. At an
      event it raises a ValueError if the state was made with a key and the method has none, or the
      other way round.

    Raises:
      TypeError: ``key`` is no key, or a function is none.

    Example: a method in one line, with a rule of your own for growth.
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
    named = {f"step {i}": mask_step for i, mask_step in enumerate(steps)}
    check_callable(start=start, is_update_step=is_update_step, **named)
    if key is not None and not hasattr(key, "dtype"):
        raise TypeError(f"key is a key of JAX, as jax.random.key(0) gives it; got {key!r}.")

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
    """The key of an event, from the data in a state; ``key`` gives its implementation."""
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


def _check_falls(first: Counts, last: Counts, shapes: Shapes) -> None:
    """Refuses a start that has fewer weights in a layer than the end: pruning adds none."""
    if not (isinstance(first, tuple) and isinstance(last, tuple)):
        return
    for shape, start, end in zip(shapes, first, last, strict=True):
        if start + 1 < end:  # each is rounded
            raise ValueError(
                f"The start gives {start} weights to {getattr(shape, 'path', '')} {tuple(shape)}, "
                f"and the end {end}: pruning adds none, so the final sparsity would be missed. "
                "Spread both alike (start=scope), or let them differ more."
            )


def _check_asked(masks: PyTree, sparsity: Any, leaves: tuple[trees.Leaf, ...]) -> None:
    """Refuses masks of another sparsity than the one asked for."""
    stacks = structures.live_units(trees.split(masks, leaves), leaves)
    if not all(map(is_known, stacks)) or isinstance(sparsity, jax.core.Tracer):
        return
    total = sum(x.size for x in stacks)
    counts = np.asarray(selection.count(stacks))  # of layers
    live, asked = int(counts.sum(dtype=np.int64)), round(total * (1 - float(sparsity)))
    # Masks drawn at random, or with rounded counts, differ a little.
    if abs(live - asked) > max(len(stacks), min(0.01 * total, 0.05 * asked)):
        raise ValueError(
            f"The masks keep {live} of {total} prunable weights, a sparsity of "
            f"{1 - live / total:.4f}, but the method was asked for {float(sparsity):g}, which is "
            f"{asked}. Give it the sparsity of the masks, or masks of that sparsity."
        )
