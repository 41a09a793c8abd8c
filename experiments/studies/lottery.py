"""Lottery tickets: where each rule of retraining starts, and the ladders of levels, as files.

Each seed trains dense once; a level prunes the network that the level before ended with (or, in one
shot, the dense one) and trains what is left. A folder for each seed holds the dense run and the
levels of each rule: weights and masks as .msgpack, one record for each epoch as .json.
"""

import functools
import json
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax

import granet_jax as gj
from experiments.engine import optimizers, records
from experiments.engine.files import Record
from experiments.engine.training import State, Trainer

History = list[Record]


class Snapshot(NamedTuple):
    """Weights and the masks they were trained under; what files hold."""

    params: Any
    model_state: Any  # batch statistics
    masks: Any


class Study(NamedTuple):
    """What all seeds, rules and levels share."""

    trainer: Trainer
    out_dir: pathlib.Path
    prune: Callable[[Any, Any], Any]  # (params, masks) -> masks
    fraction: float  # of the live weights that a level prunes
    oneshot: bool  # prune the dense network, not the level before
    rewind_step: int  # k
    retrain_steps: int  # of lr_rewinding and fine_tuning


class Start(NamedTuple):
    """From where a level trains to the end of the dense run's steps."""

    weights: Snapshot
    step: int  # which sets the order of the data
    schedule_step: int  # which sets the learning rate


class Level(NamedTuple):
    """What a rule may start from."""

    study: Study
    seed: int
    number: int  # from 1
    pruned: Snapshot  # what the masks were made from


def _weight_rewinding(level: Level) -> Start:
    k = level.study.rewind_step
    return Start(read(level.study, dense_file(level.study, level.seed, "rewind")), k, k)


def _lr_rewinding(level: Level) -> Start:
    step = level.study.trainer.length.steps - level.study.retrain_steps
    return Start(level.pruned, step, step)


def _fine_tuning(level: Level) -> Start:
    return _lr_rewinding(level)._replace(schedule_step=level.study.trainer.length.steps)


def _reset(level: Level) -> Start:
    return Start(read(level.study, dense_file(level.study, level.seed, "init")), 0, 0)


def _reinit(level: Level) -> Start:
    key = jax.random.fold_in(jax.random.key(level.seed), 3)  # training has 0, 1 and 2
    new = jax.random.randint(jax.random.fold_in(key, level.number), (), 0, 2**31 - 1)
    return Start(snapshot(level.study.trainer.init(int(new))), 0, 0)


class Rule(NamedTuple):
    """A way to retrain."""

    start: Callable[[Level], Start]
    label: str
    masks_of: str | None = None  # the rule whose masks it takes; None = prunes for itself


RULES: dict[str, Rule] = {
    "weight_rewinding": Rule(_weight_rewinding, "weight rewinding"),
    "lr_rewinding": Rule(_lr_rewinding, "learning-rate rewinding"),
    "fine_tuning": Rule(_fine_tuning, "fine-tuning"),
    "reset": Rule(_reset, "reset to init (winning ticket)"),
    "reinit": Rule(_reinit, "random reinit of the winning ticket", masks_of="reset"),
}


def rules_named(given: Sequence[str] | None) -> list[str]:
    """The rules asked for, and those whose masks they take, in the order of ``RULES``.

    Raises:
      ValueError: there is no such rule.
    """
    given = list(RULES) if given is None else given
    unknown = [name for name in given if name not in RULES]
    if unknown or not given:
        raise ValueError(f"--rules={','.join(given)}: name some of {', '.join(RULES)}.")
    wanted = {*given, *(RULES[name].masks_of for name in given)}
    return [name for name in RULES if name in wanted]


def make_study(
    trainer: Trainer,
    out_dir: pathlib.Path,
    *,
    fraction: float,
    oneshot: bool,
    rewind_at: float,
    retrain: float,
    rules: Sequence[str],
) -> Study:
    """Turns fractions of training into steps.

    Raises:
      ValueError: a rule would have nothing to do.
    """
    length = trainer.length
    rewind_step, retrain_steps = round(rewind_at * length.steps), round(retrain * length.steps)
    if not 0 < fraction < 1:
        raise ValueError(f"--prune_fraction must be in (0, 1); got {fraction}.")
    if min(length.steps - rewind_step, retrain_steps) < length.epoch_steps:
        raise ValueError(
            f"--rewind_at={rewind_at} and --retrain={retrain} must leave a whole epoch of training."
        )
    last_rate = optimizers.learning_rate(trainer.settings, length)(length.steps)
    if "fine_tuning" in rules and float(last_rate) == 0.0:
        raise ValueError(
            "fine_tuning trains at the final learning rate, which --schedule=cosine brings to 0. "
            "Leave it out of --rules, or raise --final_rate."
        )
    prune = functools.partial(gj.lottery.prune, fraction=fraction, prunable=trainer.setup.rules)
    return Study(trainer, out_dir, jax.jit(prune), fraction, oneshot, rewind_step, retrain_steps)


def train_dense(study: Study, seed: int, show: Callable[[Record], None]) -> History:
    """Trains the dense network, with snapshots at the start, at step k and at the end."""
    final = dense_file(study, seed, "final")
    if done(final):
        return _history(final)
    state = study.trainer.init(seed)
    history: History = []
    stream = study.trainer.open_stream(seed)
    stops = {"init": 0, "rewind": study.rewind_step, "final": study.trainer.length.steps}
    for name, stop in stops.items():
        state = _train(study.trainer, state, stream, stop, history, show)
        _write(dense_file(study, seed, name), _to_bytes(state))
    _write_history(final, history)
    return history


def train_level(
    study: Study, seed: int, name: str, number: int, show: Callable[[Record], None]
) -> History:
    """Prunes and retrains; returns at once what is there already.

    The level before it, and the same level of the rule whose masks it takes, must be there.
    """
    path = level_file(study, seed, name, number)
    if done(path):
        return _history(path)
    rule, before = RULES[name], level_file(study, seed, name, number - 1)
    if study.oneshot or number == 1:
        before = dense_file(study, seed, "final")
    pruned = read(study, before)
    masks = pruned.masks
    if rule.masks_of:
        masks = read(study, level_file(study, seed, rule.masks_of, number)).masks
    else:
        for _ in range(number if study.oneshot else 1):
            masks = study.prune(pruned.params, masks)
    state = start_state(study.trainer, seed, rule.start(Level(study, seed, number, pruned)), masks)
    history: History = []
    stream = study.trainer.open_stream(seed)
    state = _train(study.trainer, state, stream, study.trainer.length.steps, history, show)
    _write(path, _to_bytes(state))
    _write_history(path, history)
    return history


def start_state(trainer: Trainer, seed: int, start: Start, masks: Any) -> State:
    """The state in which a level begins: masked weights, no moments, learning rate as told."""
    state = trainer.init(seed)
    opt_state = gj.set_masks(state.opt_state, masks, trainer.setup.rules)
    state = state._replace(
        step=jnp.int32(start.step),
        params=gj.apply_masks(start.weights.params, masks),
        model_state=jax.tree.map(jnp.array, start.weights.model_state),
        opt_state=optax.tree.set(opt_state, _of_schedule, count=jnp.int32(start.schedule_step)),
    )
    return jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), state, trainer.abstract_state)


def _of_schedule(path: tuple[Any, ...], _: Any) -> bool:
    """Not Adam's own count, by which it corrects its moments."""
    return getattr(path[-1], "tuple_name", None) == "ScaleByScheduleState"


def _train(
    trainer: Trainer,
    state: State,
    stream: Any,
    stop: int,
    history: History,
    show: Callable[[Record], None],
) -> State:
    """Trains until step ``stop``; adds a record to the history at the end of each epoch."""
    step, epoch_steps = int(state.step), trainer.length.epoch_steps
    while step < stop:
        num_steps = min(epoch_steps - step % epoch_steps, stop - step)
        started = time.perf_counter()
        state, device_losses = trainer.run(state, stream, num_steps)
        losses = np.asarray(device_losses)
        seconds = time.perf_counter() - started
        measured = records.measure(trainer, gj.get_masks(state.opt_state), state)
        records.check_finite(losses, int(measured["nonfinite"]), step, epoch_steps)
        records.check_sparse(state)
        step += num_steps
        if step % epoch_steps == 0:
            record = _record(trainer, state, measured, losses, seconds)
            history.append(record)
            show(record)
    return state


def _record(
    trainer: Trainer, state: State, measured: dict[str, Any], losses: np.ndarray, seconds: float
) -> Record:
    """The numbers of an epoch; losses and seconds are those since the last stop."""
    config, setup, step = trainer.settings, trainer.setup, int(state.step)
    unit = setup.task.unit
    count = optax.tree.get(state.opt_state, "count", filtering=_of_schedule)
    in_step = config.batch_size * unit.in_example
    return {
        "epoch": step // trainer.length.epoch_steps,
        "step": step,
        **({unit.name: step * in_step} if trainer.told.counts_units else {}),
        "loss": float(losses.mean(dtype=np.float64)) * setup.task.loss_unit[1],
        **trainer.evaluate(state),
        # Of the last update.
        "learning_rate": float(optimizers.learning_rate(config, trainer.length)(count - 1)),
        "sparsity": float(measured["sparsity"]),
        "live": int(measured["live"]),
        f"{unit.name}_per_second": in_step * len(losses) / seconds,
    }


def snapshot(state: State) -> Snapshot:
    """Copies, for training donates the state."""
    arrays = Snapshot(state.params, state.model_state, gj.get_masks(state.opt_state))
    return jax.tree.map(np.array, arrays)


def dense_file(study: Study, seed: int, name: str) -> pathlib.Path:
    """Where a snapshot of the dense run is: "init", "rewind" or "final"."""
    return study.out_dir / f"seed-{seed}" / "dense" / f"{name}.msgpack"


def level_file(study: Study, seed: int, rule: str, number: int) -> pathlib.Path:
    """Where what a level ended with is."""
    return study.out_dir / f"seed-{seed}" / rule / f"level-{number:02}.msgpack"


def read(study: Study, path: pathlib.Path) -> Snapshot:
    """Reads a snapshot.

    Raises:
      ValueError: it is of another network.
    """
    state = study.trainer.abstract_state
    masks = jax.eval_shape(gj.ones, state.params)
    restored = flax.serialization.msgpack_restore(path.read_bytes())
    return gj.check_restored(restored, Snapshot(state.params, state.model_state, masks))


def done(path: pathlib.Path) -> bool:
    """Whether what ends with this snapshot is there: its history is written last."""
    return path.with_suffix(".json").exists()


def _to_bytes(state: State) -> bytes:
    return flax.serialization.to_bytes(snapshot(state))


def _history(path: pathlib.Path) -> History:
    return json.loads(path.with_suffix(".json").read_text())


def _write_history(path: pathlib.Path, history: History) -> None:
    _write(path.with_suffix(".json"), json.dumps(history, indent=1).encode())


def _write(path: pathlib.Path, content: bytes) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_bytes(content)
    os.replace(new, path)
