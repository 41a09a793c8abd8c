"""When masks change, and by how much.

A schedule maps a step to a float32 scalar. The step is an int or an integer scalar; the first
update is 1. The result is float32 under ``jax_enable_x64`` as well, so that counts do not depend on
that flag. Numbers of steps are Python ints; sparsities and fractions may be traced.
"""

import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from granet_jax.distributions import check_sparsity
from granet_jax.types import Counts, Distribution, NumKeep, Shapes, check_callable


def cubic(initial: Any, final: Any, begin_step: int, end_step: int) -> optax.Schedule:
    """``final + (initial - final) * (1 - (t - begin) / (end - begin))^3``, flat outside.

    Source: Zhu & Gupta 2017, "To prune, or not to prune", section 3.

    Args:
      initial: value until ``begin_step``; may be traced.
      final: value from ``end_step`` on; may be traced.
      begin_step: where the curve begins, in updates.
      end_step: where it ends, in updates.

    Returns:
      A schedule ``step -> float32``.

    Raises:
      ValueError: ``end_step <= begin_step``, or steps that are not ints.

    Example:
      >>> sparsity = cubic(0.0, 0.9, begin_step=0, end_step=10)
      >>> [round(float(sparsity(t)), 4) for t in (0, 5, 10, 99)]
      [0.0, 0.7875, 0.9, 0.9]
    """
    _check_order(begin_step, end_step)
    initial, final = _number(initial), _number(final)
    curve = optax.polynomial_schedule(initial, final, 3, transition_steps=end_step - begin_step)

    def schedule(step: Any) -> jax.Array:
        value = curve(_elapsed(step, begin_step, end_step))
        return jnp.where(jnp.asarray(step) >= end_step, final, value)  # exactly

    return schedule


def cosine(initial: Any, final: Any, end_step: int) -> optax.Schedule:
    """``final + (initial - final) * (1 + cos(pi * t / end)) / 2``, flat after ``end_step``.

    Source: Dettmers & Zettlemoyer 2019 and Evci et al. 2020, section 3, for the drop fraction.

    Args:
      initial: value at step 0, in [0, 1]; may be traced.
      final: value from ``end_step`` on, in [0, 1]; may be traced.
      end_step: end of the half wave, in updates, >= 1.

    Returns:
      A schedule ``step -> float32``.

    Raises:
      ValueError: ``end_step < 1`` or not an int, or a value outside [0, 1].

    Example:
      >>> fraction = cosine(0.5, 0.005, end_step=100)
      >>> [round(float(fraction(t)), 4) for t in (0, 50, 100, 200)]
      [0.5, 0.2525, 0.005, 0.005]
    """
    check_fractions(initial, final)
    check_steps(end_step=end_step)
    if end_step < 1:
        raise ValueError(f"The cosine needs end_step >= 1 update; got {end_step}.")
    unit = optax.cosine_decay_schedule(1.0, end_step)
    initial, final = _number(initial), _number(final)
    return lambda step: final + (initial - final) * unit(_elapsed(step, 0, end_step))


def sigmoid(initial: Any, final: Any, begin_step: int, end_step: int) -> optax.Schedule:
    """A logistic curve from ``initial`` to ``final``, slow at both ends, flat outside.

    ``initial + (final - initial) * (1 + tanh(3 (2u - 1)) / tanh(3)) / 2`` with u = (t - begin) /
    (end - begin): the sigmoid of slope 6, stretched to meet both ends.

    Source: Zhang et al. 2025 (CHTss), the sigmoid gradual density decay.

    Args:
      initial: value until ``begin_step``; may be traced.
      final: value from ``end_step`` on; may be traced.
      begin_step: where the curve begins, in updates.
      end_step: where it ends, in updates.

    Returns:
      A schedule ``step -> float32``.

    Raises:
      ValueError: ``end_step <= begin_step``, or steps that are not ints.

    Example:
      >>> sparsity = sigmoid(0.5, 0.9, begin_step=0, end_step=10)
      >>> [round(float(sparsity(t)), 4) for t in (0, 2, 5, 8, 10, 99)]
      [0.5, 0.5097, 0.7, 0.8903, 0.9, 0.9]
    """
    _check_order(begin_step, end_step)
    initial, final = _number(initial), _number(final)

    def schedule(step: Any) -> jax.Array:
        u = _elapsed(step, begin_step, end_step) / (end_step - begin_step)
        share = (1 + jnp.tanh(3 * (2 * u - 1)) / math.tanh(3)) / 2
        share = jnp.where(u <= 0, 0.0, jnp.where(u >= 1, 1.0, share))  # exactly
        return initial + (final - initial) * share

    return schedule


def stairs(num_stairs: int) -> Callable[[Any, Any, int, int], optax.Schedule]:
    """A curve ``(initial, final, begin_step, end_step) -> schedule`` of ``num_stairs`` equal steps.

    The first stair is at ``begin_step``, the last at ``end_step``; a single stair is at
    ``end_step``.

    Args:
      num_stairs: how many, >= 1.

    Returns:
      A curve, for :func:`gradual_num_keep`.

    Raises:
      ValueError: ``num_stairs < 1``; in the curve, ``end_step <= begin_step``.

    Example:
      >>> leak = stairs(4)(1.0, 0.0, 10, 40)
      >>> [float(leak(t)) for t in (9, 10, 19, 20, 30, 40, 99)]
      [1.0, 0.75, 0.75, 0.5, 0.25, 0.0, 0.0]
    """
    check_steps(num_stairs=num_stairs)
    if num_stairs < 1:
        raise ValueError(f"There has to be a stair at least; got {num_stairs=}.")

    def curve(initial: Any, final: Any, begin_step: int, end_step: int) -> optax.Schedule:
        _check_order(begin_step, end_step)
        first, last = _number(initial), _number(final)
        length, rises = end_step - begin_step, max(num_stairs - 1, 1)
        starts = [begin_step - (-i * length // rises) for i in range(num_stairs - 1)]  # Python ints
        edges = np.array([*starts, end_step], np.int32)
        # From a table, for compilers multiply by 1 / n, which need not give 1 at the end.
        shares = np.arange(num_stairs + 1) / np.float32(num_stairs)

        def schedule(step: Any) -> jax.Array:
            taken = jnp.sum(edges <= jnp.asarray(step), dtype=jnp.int32)
            value = first + (last - first) * jnp.asarray(shares, jnp.float32)[taken]
            return jnp.where(jnp.asarray(step) >= end_step, last, value)

        return schedule

    return curve


def every(
    update_every: int, begin_step: int = 0, last_step: int | None = None
) -> Callable[[jax.Array], Any]:
    """True at the multiples of ``update_every`` within ``[begin_step, last_step]``, both included.

    Args:
      update_every: updates between events, the papers' Delta T; >= 1.
      begin_step: no event before it.
      last_step: no event after it; None = events never end.

    Returns:
      ``step -> bool`` scalar, for ``is_update_step`` of a method.

    Raises:
      ValueError: ``update_every < 1``, a negative ``begin_step``, or a range without any event.

    Example:
      >>> is_update_step = every(10, begin_step=20, last_step=40)
      >>> [t for t in range(100) if is_update_step(t)]
      [20, 30, 40]
    """
    check_steps(update_every=update_every, begin_step=begin_step)
    if update_every < 1:
        raise ValueError(f"update_every must be >= 1 update; got {update_every}.")
    if begin_step < 0:
        raise ValueError(f"begin_step must be >= 0; got {begin_step}.")
    if last_step is not None:
        check_steps(last_step=last_step)
        first = max(1, -(-begin_step // update_every)) * update_every
        if first > last_step:
            raise ValueError(
                f"No step in [{begin_step}, {last_step}] is a multiple of {update_every=}: masks "
                "would never change. Lower update_every."
            )

    def is_update_step(step: jax.Array) -> Any:
        due = (step % update_every == 0) & (step >= begin_step)
        return due if last_step is None else due & (step <= last_step)

    return is_update_step


def gradual_num_keep(
    distribution: Distribution,
    initial_sparsity: Any,
    final_sparsity: Any,
    begin_step: int,
    end_step: int,
    curve: Callable[[Any, Any, int, int], optax.Schedule] = cubic,
) -> NumKeep:
    """How many weights to keep at a step, on a curve from the initial to the final sparsity.

    The curve runs on counts, ``final + round((initial - final) * curve)``. So from ``end_step`` on
    the count is exactly that of ``final_sparsity``. Before, float32 may be off by one weight in
    10^7.

    Args:
      distribution: how a sparsity is spread over layers.
      initial_sparsity: until ``begin_step``, in [0, 1); may be traced.
      final_sparsity: from ``end_step`` on, in [0, 1); may be traced.
      begin_step: where the curve begins, in updates.
      end_step: where it ends, in updates.
      curve: ``cubic``, ``sigmoid``, ``stairs(n)``, or another ``(initial, final, begin_step,
        end_step) -> schedule``.

    Returns:
      ``(shapes, step) -> counts``, int32, a scalar or one count for each layer, as ``distribution``
      gives them.

    Raises:
      ValueError: a sparsity outside [0, 1), ``initial_sparsity > final_sparsity``, or as ``curve``;
        when it is called, as ``distribution``.

    Example:
      >>> from granet_jax.distributions import global_ranking
      >>> num_keep = gradual_num_keep(global_ranking, 0.0, 0.9, begin_step=0, end_step=10)
      >>> [int(num_keep([(10, 100)], t)) for t in (0, 5, 10)]
      [1000, 212, 100]
    """
    check_callable(distribution=distribution, curve=curve)
    check_sparsity("initial_sparsity", initial_sparsity)
    check_sparsity("final_sparsity", final_sparsity)
    if _known(initial_sparsity, final_sparsity) and initial_sparsity > final_sparsity:
        raise ValueError(
            f"Gradual pruning only removes weights: initial_sparsity {initial_sparsity} is above "
            f"final_sparsity {final_sparsity}."
        )
    remaining = curve(1.0, 0.0, begin_step, end_step)

    def num_keep(shapes: Shapes, step: jax.Array) -> Counts:
        initial = jnp.asarray(distribution(shapes, initial_sparsity), jnp.int32)
        final = jnp.asarray(distribution(shapes, final_sparsity), jnp.int32)
        above = (initial - final).astype(jnp.float32) * remaining(step)
        return final + jnp.round(above).astype(jnp.int32)

    return num_keep


def check_end(update_every: int, end_step: int, total_steps: int) -> None:
    """Checks that an event in ``[end_step, total_steps]`` can end the pruning.

    Args:
      update_every: updates between events.
      end_step: the update at which the schedule reaches its final sparsity.
      total_steps: updates in all.

    Raises:
      ValueError: there is no such event, or ``total_steps`` is not an int.

    Example:
      >>> check_end(update_every=100, end_step=500, total_steps=550)
    """
    check_steps(total_steps=total_steps)
    last_event = total_steps // update_every * update_every
    if last_event < end_step:
        raise ValueError(
            f"Pruning would stop short of its final sparsity: {end_step=}, but with "
            f"{update_every=} the last event within {total_steps=} is step {last_event}. "
            f"Use end_step <= {last_event}."
        )


def check_fractions(*fractions: Any) -> None:
    """Checks that fractions of live weights are in [0, 1]; traced ones are not checked.

    Args:
      *fractions: numbers.

    Raises:
      ValueError: one is not.

    Example:
      >>> check_fractions(0.3, 0.0)
    """
    for value in fractions:
        if _known(value) and not 0.0 <= value <= 1.0:
            raise ValueError(f"A regeneration fraction must be in [0, 1]; got {value}.")


def _check_order(begin_step: int, end_step: int) -> None:
    check_steps(begin_step=begin_step, end_step=end_step)
    if end_step <= begin_step:
        raise ValueError(
            f"end_step must come after begin_step; got {begin_step=}, {end_step=} (in updates)."
        )


def check_steps(**steps: Any) -> None:
    """Checks that numbers of steps are ints.

    Args:
      **steps: by the name that the message gives.

    Raises:
      ValueError: one is not an int, or is traced.

    Example:
      >>> check_steps(update_every=100)
    """
    for name, value in steps.items():
        try:
            operator.index(value)
        except (TypeError, jax.errors.TracerIntegerConversionError):
            raise ValueError(
                f"{name} must be an int, a number of updates; got {value!r}. (Traced steps do not "
                f"work: with optax.inject_hyperparams name {name} in static_args.)"
            ) from None


def _elapsed(step: Any, begin_step: int, end_step: int) -> jax.Array:
    """Steps since ``begin_step``, at most until ``end_step``; float32, as optax keeps its dtype."""
    return (jnp.clip(step, begin_step, end_step) - begin_step).astype(jnp.float32)


def _number(value: Any) -> Any:
    return float(value) if _known(value) else value.astype(jnp.float32)


def _known(*values: Any) -> bool:
    return not any(isinstance(value, jax.core.Tracer) for value in values)
