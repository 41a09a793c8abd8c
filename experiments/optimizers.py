"""The optimizer that the settings describe, made sparse by the method they name."""

import functools
from collections.abc import Collection
from typing import Any

import jax
import optax

import granet_jax as gj
from experiments import methods, weights
from experiments.settings import Settings
from experiments.weights import Family, Slots


def family_of(method: methods.SparseMethod, config: Settings, slots: Slots | None) -> Family:
    """How the weights are held that the method trains."""
    if not isinstance(method, gj.Method):
        return weights.thresholds(method, config.update_every)
    return weights.masked(method) if slots is None else weights.live(method)


def make_method(config: Settings, steps_per_epoch: int, key: jax.Array) -> methods.SparseMethod:
    """The method that the settings name.

    Args:
      config: the settings.
      steps_per_epoch: updates in an epoch.
      key: typed key, for methods that draw.

    Raises:
      ValueError: the settings of the method contradict each other.
    """
    total_steps = steps_per_epoch * config.epochs
    plan = methods.Plan(
        sparsity=config.sparsity,
        update_every=config.update_every,
        prune_end_step=max(1, round(config.prune_until * total_steps)),
        total_steps=total_steps,
        initial_threshold=config.initial_threshold,
        prunable=config.prunable,
        start=gj.erk if config.structure == "none" else gj.uniform,
        key=key,
    )
    return methods.METHODS[config.method].make(plan)


def make_optimizer(
    config: Settings,
    steps_per_epoch: int,
    method: methods.SparseMethod,
    slots: Slots | None = None,
) -> optax.GradientTransformation:
    """Wraps SGD or AdamW in ``gj.sparsify`` (of slots, if given) or ``gj.reparam.penalise``."""
    schedule = learning_rate(config, steps_per_epoch)
    compact = slots.capacity if slots else ()
    decayed = None if config.decay_all else functools.partial(_kernels, compact)
    if config.optimizer == "adamw":
        inner = optax.adamw(schedule, weight_decay=config.weight_decay, mask=decayed)
    else:
        inner = optax.chain(
            optax.add_decayed_weights(config.weight_decay, decayed),
            optax.sgd(schedule, momentum=config.momentum, nesterov=config.nesterov),
        )
    if isinstance(method, gj.Method):
        return slots.sparsify(inner, method) if slots else gj.sparsify(inner, method)
    return gj.reparam.penalise(inner, method, coefficient(config, steps_per_epoch))


def coefficient(config: Settings, steps_per_epoch: int) -> float | gj.reparam.Controller:
    """Of the penalty of dst and str."""
    if config.penalty >= 0:
        return config.penalty
    end_step = round(config.prune_until * config.epochs * steps_per_epoch)
    return gj.reparam.steer(config.sparsity, end_step)


def learning_rate(config: Settings, steps_per_epoch: int) -> optax.Schedule:
    """The learning rate at a step: a linear rise, then steps down or a cosine to 0."""
    total_steps = steps_per_epoch * config.epochs
    warmup_steps = round(config.warmup_epochs * steps_per_epoch)
    if warmup_steps >= total_steps:
        raise ValueError(
            f"--warmup_epochs={config.warmup_epochs:g} leaves nothing of {config.epochs} epochs."
        )
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(config.learning_rate, total_steps - warmup_steps)
    else:
        if not all(0.0 < fraction < 1.0 for fraction in config.drop_at):
            raise ValueError(f"--drop_at: fractions between 0 and 1, got {config.drop_at}.")
        # Counted from the end of the warm-up, as optax does, though said from the beginning.
        drops = [round(fraction * total_steps) - warmup_steps for fraction in config.drop_at]
        after = optax.piecewise_constant_schedule(
            config.learning_rate, {drop: config.drop_factor for drop in drops}
        )
    if warmup_steps == 0:
        return after
    rise = optax.linear_schedule(0.0, config.learning_rate, warmup_steps)
    return optax.join_schedules([rise, after], [warmup_steps])


def _kernels(compact: Collection[str], params: Any) -> Any:
    """Which leaves are kernels: slots are, too."""
    kernels = [p.ndim >= 2 or path in compact for path, p in gj.trees.paths(params).items()]
    return jax.tree.unflatten(jax.tree.structure(params), kernels)
