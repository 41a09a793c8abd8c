"""The optimizer that the settings describe, made sparse by the method they name."""

import functools
import math
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import optax

import granet_jax as gj
from experiments.engine import methods, weights
from experiments.engine.settings import Settings
from experiments.engine.weights import Family, Slots


class Length(NamedTuple):
    """How long a run is."""

    epochs: int
    epoch_steps: int

    @property
    def steps(self) -> int:
        """Updates in all."""
        return self.epochs * self.epoch_steps


def family_of(method: methods.SparseMethod, config: Settings, slots: Slots | None) -> Family:
    """How the weights are held that the method trains."""
    if not isinstance(method, gj.Method):
        return weights.thresholds(method)
    return weights.masked(method) if slots is None else weights.live(method)


def make_method(
    config: Settings, length: Length, prunable: gj.trees.Rules, key: jax.Array
) -> methods.SparseMethod:
    """The method that the settings name.

    Args:
      config: the settings.
      length: of the run.
      prunable: path rules.
      key: typed key, for methods that draw.

    Raises:
      ValueError: the settings of the method contradict each other.
    """
    plan = methods.Plan(
        sparsity=config.sparsity,
        update_every=config.update_every,
        prune_end_step=max(1, round(config.prune_until * length.steps)),
        total_steps=length.steps,
        initial_threshold=config.initial_threshold,
        prunable=prunable,
        start=gj.erk if config.structure == "none" else gj.uniform,
        key=key,
        group=methods.parse_group(config.structure),
    )
    return methods.METHODS[config.method].make(plan)


def make_optimizer(
    config: Settings,
    length: Length,
    method: methods.SparseMethod,
    slots: Slots | None = None,
) -> optax.GradientTransformation:
    """Wraps :func:`inner` in ``gj.sparsify`` (of slots, if given) or ``gj.reparam.penalise``."""
    dense = inner(config, length, slots.capacity if slots else ())
    if isinstance(method, gj.Method):
        return slots.sparsify(dense, method) if slots else gj.sparsify(dense, method)
    return gj.reparam.penalise(dense, method, coefficient(config, length))


def inner(
    config: Settings, length: Length, compact: Collection[str] = ()
) -> optax.GradientTransformation:
    """SGD or AdamW, as the settings say, and what the method needs inside.

    Args:
      config: the settings.
      length: of the run.
      compact: paths of leaves that are slots.
    """
    schedule = learning_rate(config, length)
    decayed = None if config.decay_all else functools.partial(_kernels, compact)
    if config.optimizer != "adamw" and config.young_ramp:
        raise ValueError("--young_ramp is for --optimizer=adamw: SGD has no step count to correct.")
    if config.young_ramp:
        tx = optax.chain(
            optax.scale_by_adam(b2=config.b2),
            gj.correct_young(b2=config.b2, ramp=config.young_ramp),
            optax.add_decayed_weights(config.weight_decay, decayed),
            optax.scale_by_learning_rate(schedule),
        )
    elif config.optimizer == "adamw":
        tx = optax.adamw(schedule, b2=config.b2, weight_decay=config.weight_decay, mask=decayed)
    else:
        tx = optax.chain(
            optax.add_decayed_weights(config.weight_decay, decayed),
            optax.sgd(schedule, momentum=config.momentum, nesterov=config.nesterov),
        )
    tx = optax.chain(optax.clip_by_global_norm(config.clip_norm), tx) if config.clip_norm else tx
    inside = methods.METHODS[config.method].inside
    return optax.chain(inside(), tx) if inside else tx


def coefficient(config: Settings, length: Length) -> float | gj.reparam.Controller:
    """Of the penalty of dst and str."""
    if config.penalty < 0 and config.penalty != -1:
        raise ValueError(f"--penalty={config.penalty:g}: at least 0, or -1 to steer it.")
    if config.penalty >= 0 or not methods.METHODS[config.method].has_penalty:
        return max(config.penalty, 0.0)
    return gj.reparam.steer(config.sparsity, round(config.prune_until * length.steps))


def learning_rate(config: Settings, length: Length) -> optax.Schedule:
    """The learning rate at a step: a linear rise, then steps down or a cosine."""
    peak, warmup_steps = config.learning_rate, round(config.warmup_epochs * length.epoch_steps)
    if config.warmup_epochs < 0:
        if config.warmup_epochs != -1:
            raise ValueError(
                f"--warmup_epochs={config.warmup_epochs:g}: at least 0, or -1 for 5 % of the run."
            )
        warmup_steps = min(math.ceil(length.steps / 20), length.steps - 1)
    if warmup_steps >= length.steps:
        raise ValueError(
            f"--warmup_epochs={config.warmup_epochs:g} leaves nothing of {length.epochs} epochs."
        )
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, length.steps - warmup_steps, config.final_rate)
    else:
        if not all(0.0 < fraction < 1.0 for fraction in config.drop_at):
            raise ValueError(f"--drop_at: fractions between 0 and 1, got {config.drop_at}.")
        # Counted from the end of the warm-up, as optax does, though said from the beginning.
        drops = [round(fraction * length.steps) - warmup_steps for fraction in config.drop_at]
        factors = {drop: config.drop_factor ** drops.count(drop) for drop in drops}
        after = optax.piecewise_constant_schedule(peak, factors)
    if warmup_steps == 0:
        return after
    rise = optax.linear_schedule(0.0, peak, warmup_steps)
    return optax.join_schedules([rise, after], [warmup_steps])


def _kernels(compact: Collection[str], params: Any) -> Any:
    """Which leaves are kernels: slots are, too; stacked norms are not, for all their axes."""
    kernels = [
        (p.ndim >= 2 or path in compact) and path.split("/")[-1] != "scale"
        for path, p in gj.trees.paths(params).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(params), kernels)
