"""Lottery tickets: prunes a trained network level by level and compares ways to retrain it.

Example:
  python -m experiments.lottery --epochs=20
  python -m experiments.lottery --dataset=mnist --data_dir=FOLDER --momentum=0 --weight_decay=0

The first takes two minutes and shows the machinery: digits are too few to tell the rules apart.

Each seed trains dense once. From there every rule has a ladder of its own: each level prunes a
fifth of the weights that the level before ended with, and trains what is left, starting from

  weight_rewinding  the weights after step k of the dense run (--rewind_at), from step k to the end;
  lr_rewinding      its own weights, over the last part (--retrain) of the learning-rate schedule;
  fine_tuning       its own weights, for as long, at the final learning rate;
  reset             the initial weights, over the whole schedule: the winning ticket;
  reinit            new random weights, at every level others, under the masks of reset's ladder,
                    over the whole schedule.

With --oneshot every level is pruned straight from the dense network instead. Batch statistics go
with the weights, moments of the optimizer start at zero, and the data come in the order in which
the dense run saw them at the same steps (from its beginning, where they are streamed).

Leaves in --out_dir: lottery.png and .svg, table.txt, and for each seed the dense run and the levels
of each rule: weights and masks as .msgpack, one record for each epoch as .json. Stopped at any
moment, the same command goes on from the last level finished; rules, levels and seeds can be added.
"""

import dataclasses
import functools
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from absl import app, flags
from matplotlib import pyplot as plt
from rich.console import Console

import granet_jax as gj
from experiments import data, files, optimizers, output, report, run, settings, training
from experiments.training import State, Trainer
from granet_jax.methods import lottery

matplotlib.use("Agg")

# Settings that have no flag here: levels train under fixed masks, epoch by epoch.
_FIXED: dict[str, Any] = {
    "method": "dense",
    "sparsity": 0.0,
    "update_every": 1,
    "compact": False,
    "prune_until": 0.5,
    "penalty": -1.0,
    "initial_threshold": -10.0,
    "chunk_steps": 0,
    "seed": 0,
}

History = list[files.Record]


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
    total_steps: int  # of the dense run


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
    return Start(_read(level.study, _dense_file(level.study, level.seed, "rewind")), k, k)


def _lr_rewinding(level: Level) -> Start:
    step = level.study.total_steps - level.study.retrain_steps
    return Start(level.pruned, step, step)


def _fine_tuning(level: Level) -> Start:
    return _lr_rewinding(level)._replace(schedule_step=level.study.total_steps)


def _reset(level: Level) -> Start:
    return Start(_read(level.study, _dense_file(level.study, level.seed, "init")), 0, 0)


def _reinit(level: Level) -> Start:
    key = jax.random.fold_in(jax.random.key(level.seed), 3)  # training has 0, 1 and 2
    new = jax.random.randint(jax.random.fold_in(key, level.number), (), 0, 2**31 - 1)
    return Start(_snapshot(level.study.trainer.init(int(new))), 0, 0)


class Rule(NamedTuple):
    """A row of the table."""

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


def train_dense(study: Study, seed: int, show: Callable[[files.Record], None]) -> History:
    """Trains the dense network, with snapshots at the start, at step k and at the end."""
    final = _dense_file(study, seed, "final")
    if _done(final):
        return _history(final)
    state = study.trainer.init(seed)
    history: History = []
    stream = study.trainer.open_stream(seed)
    stops = {"init": 0, "rewind": study.rewind_step, "final": study.total_steps}
    for name, stop in stops.items():
        state = _train(study, state, stream, stop, history, show)
        _write(_dense_file(study, seed, name), _to_bytes(state))
    _write_history(final, history)
    return history


def train_level(
    study: Study, seed: int, name: str, number: int, show: Callable[[files.Record], None]
) -> History:
    """Prunes and retrains; returns at once what is there already.

    The level before it, and the same level of the rule whose masks it takes, must be there.
    """
    path = _level_file(study, seed, name, number)
    if _done(path):
        return _history(path)
    rule, before = RULES[name], _level_file(study, seed, name, number - 1)
    if study.oneshot or number == 1:
        before = _dense_file(study, seed, "final")
    pruned = _read(study, before)
    masks = pruned.masks
    if rule.masks_of:
        masks = _read(study, _level_file(study, seed, rule.masks_of, number)).masks
    else:
        for _ in range(number if study.oneshot else 1):
            masks = study.prune(pruned.params, masks)
    state = start_state(study.trainer, seed, rule.start(Level(study, seed, number, pruned)), masks)
    history: History = []
    stream = study.trainer.open_stream(seed)
    state = _train(study, state, stream, study.total_steps, history, show)
    _write(path, _to_bytes(state))
    _write_history(path, history)
    return history


def start_state(trainer: Trainer, seed: int, start: Start, masks: Any) -> State:
    """The state in which a level begins: masked weights, no moments, learning rate as told."""
    state = trainer.init(seed)
    opt_state = gj.set_masks(state.opt_state, masks, trainer.settings.prunable)
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
    study: Study,
    state: State,
    stream: Any,
    stop: int,
    history: History,
    show: Callable[[files.Record], None],
) -> State:
    """Trains until step ``stop``; adds a record to the history at the end of each epoch."""
    trainer, step = study.trainer, int(state.step)
    config, steps_per_epoch = trainer.settings, trainer.steps_per_epoch
    schedule = optimizers.learning_rate(config, steps_per_epoch)
    while step < stop:
        num_steps = min(steps_per_epoch - step % steps_per_epoch, stop - step)
        started = time.perf_counter()
        state, device_losses = trainer.run(state, stream, num_steps)
        losses = np.asarray(device_losses)
        seconds = time.perf_counter() - started
        step += num_steps
        if not np.isfinite(losses).all() or gj.metrics.num_nonfinite(state.params):
            raise run.Diverged(
                f"the loss or a parameter is NaN or infinite at step {step} "
                f"(epoch {(step - 1) // steps_per_epoch + 1}). Lower --learning_rate."
            )
        run.check_sparse(state)
        if step % steps_per_epoch == 0:
            masks, prunable = gj.get_masks(state.opt_state), config.prunable
            count = optax.tree.get(state.opt_state, "count", filtering=_of_schedule)
            record = {
                "epoch": step // steps_per_epoch,
                "step": step,
                "loss": float(losses.mean(dtype=np.float64)),  # since the last stop
                **{f"{name}_accuracy": x for name, x in trainer.evaluate(state).items()},
                "learning_rate": float(schedule(count - 1)),  # of the last update
                "sparsity": float(gj.metrics.sparsity(masks, state.params, prunable)),
                "live": int(gj.metrics.num_live(masks, state.params, prunable).sum()),
                "images_per_second": config.batch_size * num_steps / seconds,
            }
            history.append(record)
            show(record)
    return state


def _snapshot(state: State) -> Snapshot:
    """Copies, for training donates the state."""
    arrays = Snapshot(state.params, state.model_state, gj.get_masks(state.opt_state))
    return jax.tree.map(np.array, arrays)


def _dense_file(study: Study, seed: int, name: str) -> pathlib.Path:
    return study.out_dir / f"seed-{seed}" / "dense" / f"{name}.msgpack"


def _level_file(study: Study, seed: int, rule: str, number: int) -> pathlib.Path:
    return study.out_dir / f"seed-{seed}" / rule / f"level-{number:02}.msgpack"


def _to_bytes(state: State) -> bytes:
    return flax.serialization.to_bytes(_snapshot(state))


def _read(study: Study, path: pathlib.Path) -> Snapshot:
    state = study.trainer.abstract_state
    masks = jax.eval_shape(gj.ones, state.params)
    restored = flax.serialization.msgpack_restore(path.read_bytes())
    return gj.check_restored(restored, Snapshot(state.params, state.model_state, masks))


def _done(path: pathlib.Path) -> bool:
    """The history is written last."""
    return path.with_suffix(".json").exists()


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


Curves = dict[str, list[list[History]]]  # rule -> level (the first is dense) -> seed


def table(curves: Curves) -> list[dict[str, str]]:
    """Rows of test accuracy after the last epoch, mean and standard deviation over seeds."""
    return [
        {
            "weights kept": f"{100 * _density(curves, level):.2f} %",
            **{
                name: report.mean_and_std(_accuracies(levels[level]))
                for name, levels in curves.items()
            },
        }
        for level in range(len(next(iter(curves.values()))))
    ]


def draw(curves: Curves, title: str) -> Any:
    """Accuracy against density: a line and a band (lowest to highest seed) for each rule."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    dense = float(np.mean(_accuracies(next(iter(curves.values()))[0])))
    axes.axhline(dense, color="0.4", linestyle="--", linewidth=1, label="dense")
    x = [100 * _density(curves, level) for level in range(len(next(iter(curves.values()))))]
    for name, levels in curves.items():
        values = np.array([_accuracies(level) for level in levels])
        color = f"C{list(RULES).index(name)}"
        axes.plot(
            x, values.mean(1), color=color, marker="o", markersize=3.5, label=RULES[name].label
        )
        axes.fill_between(x, values.min(1), values.max(1), color=color, alpha=0.15, linewidth=0)
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.set_xticks(x, [f"{100 if i == 0 else v:.3g}" for i, v in enumerate(x)])
    axes.minorticks_off()
    axes.set_xlabel("weights kept (%)")
    axes.set_ylabel("test accuracy after the last epoch (%)")
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", frameon=False)
    return figure


def _density(curves: Curves, level: int) -> float:
    return 1 - next(iter(curves.values()))[level][0][-1]["sparsity"]


def _accuracies(level: Sequence[History]) -> list[float]:
    return [history[-1]["test_accuracy"] for history in level]


def _define_flags() -> None:
    settings.define_flags(leave_out=tuple(_FIXED))
    flags.DEFINE_list("rules", None, "which rules to compare (default: all five)")
    flags.DEFINE_integer("levels", 12, "how often to prune", lower_bound=1)
    flags.DEFINE_float("prune_fraction", 0.2, "share of the live weights that a level prunes")
    flags.DEFINE_boolean("oneshot", False, "prune each level straight from the dense network")
    flags.DEFINE_float(
        "rewind_at", 0.05, "step k as a fraction of training", lower_bound=0.0, upper_bound=1.0
    )
    flags.DEFINE_float(
        "retrain",
        1.0,
        "fraction of training for which lr_rewinding and fine_tuning train",
        lower_bound=0.0,
        upper_bound=1.0,
    )
    flags.DEFINE_integer("seeds", 3, "seeds 0, 1, ...", lower_bound=1)
    flags.DEFINE_string("out_dir", None, "where to write (default: runs/lottery-DATASET-MODEL-...)")
    flags.DEFINE_boolean("resume", True, "go on with levels of the same settings in the folder")


def main(argv: list[str]) -> None:
    """Runs what the flags say."""
    if len(argv) > 1:
        sys.exit(f"error: {argv[1]!r} is no flag; flags look like --seeds=3. See --help.")
    console = Console()
    given = flags.FLAGS
    with settings.errors_in_one_line():
        names = _rules(given.rules)
        config = settings.from_flags(**_FIXED)
        dataset = data.load(config.dataset, given.data_dir, config.validation)
        study = make_study(
            training.make_trainer(config, dataset),
            pathlib.Path(given.out_dir or f"runs/lottery-{config.dataset}-{config.model}"),
            fraction=given.prune_fraction,
            oneshot=given.oneshot,
            rewind_at=given.rewind_at,
            retrain=given.retrain,
            rules=names,
        )
        curves: Curves = {name: [[] for _ in range(given.levels + 1)] for name in names}
        with files.opened(study.out_dir, _told(study), given.resume, _defaults(study, given)):
            files.check_data(study.out_dir, study.trainer.data_facts)
            files.write_about(study.out_dir, _layers(study.trainer), study.trainer.data_facts)
            for seed in range(given.seeds):
                label = f"seed {seed} dense"
                with output.progress(console, f"{label:32}", config.epochs, config.epochs) as show:
                    dense = train_dense(study, seed, show)
                for name, levels in curves.items():
                    levels[0].append(dense)
                    for number in range(1, given.levels + 1):
                        label = f"seed {seed} {name} {number}"
                        with output.progress(
                            console, f"{label:32}", config.epochs, config.epochs
                        ) as show:
                            levels[number].append(train_level(study, seed, name, number, show))
            times = f"{config.epochs} epochs, {given.seeds} seed{'s' * (given.seeds > 1)}"
            title = f"{config.dataset}, {config.model}, {times}"
            text = output.print_table(console, f"{title}; test accuracy (%)", table(curves))
            (study.out_dir / "table.txt").write_text(text)
            figure = draw(curves, title)
            for ending in ("png", "svg"):
                figure.savefig(study.out_dir / f"lottery.{ending}", dpi=150)
    print("After the last epoch; mean and standard deviation over seeds.")
    print(f"written: {study.out_dir}/lottery.png, lottery.svg, table.txt and all levels")


def _rules(given: list[str] | None) -> list[str]:
    """The rules asked for, and those whose masks they take, in the order of the table."""
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
    total_steps = trainer.settings.epochs * trainer.steps_per_epoch
    rewind_step, retrain_steps = round(rewind_at * total_steps), round(retrain * total_steps)
    if not 0 < fraction < 1:
        raise ValueError(f"--prune_fraction must be in (0, 1); got {fraction}.")
    if min(total_steps - rewind_step, retrain_steps) < trainer.steps_per_epoch:
        raise ValueError(
            f"--rewind_at={rewind_at} and --retrain={retrain} must leave a whole epoch of training."
        )
    last_rate = optimizers.learning_rate(trainer.settings, trainer.steps_per_epoch)(total_steps)
    if "fine_tuning" in rules and float(last_rate) == 0.0:
        raise ValueError(
            "fine_tuning trains at the final learning rate, which --schedule=cosine brings to 0. "
            "Leave it out of --rules, or choose --schedule=steps."
        )
    prunable = trainer.settings.prunable
    prune = jax.jit(functools.partial(lottery.prune, fraction=fraction, prunable=prunable))
    return Study(
        trainer,
        out_dir,
        prune,
        fraction,
        oneshot,
        rewind_step,
        retrain_steps,
        total_steps,
    )


def _layers(trainer: Trainer) -> list[dict[str, Any]]:
    leaves = gj.trees.describe(trainer.abstract_state.params, trainer.settings.prunable)
    return [{"path": x.path, "weights": x.size, "prunable": x.prunable} for x in leaves]


def _told(study: Study) -> dict[str, Any]:
    """The settings by which a folder is known."""
    config = dataclasses.asdict(study.trainer.settings)
    mine = ("fraction", "oneshot", "rewind_step", "retrain_steps")
    used = {name: value for name, value in config.items() if name not in _FIXED}
    return used | {name: getattr(study, name) for name in mine}


def _defaults(study: Study, given: flags.FlagValues) -> dict[str, Any]:
    """The settings of a folder from before they could be chosen."""
    names = ("prune_fraction", "oneshot", "rewind_at", "retrain")
    fraction, oneshot, *shares = (given[name].default for name in names)
    rewind_step, retrain_steps = (round(float(x or 0) * study.total_steps) for x in shares)
    return settings.defaults(study.trainer.settings.dataset) | {
        "fraction": fraction,
        "oneshot": oneshot,
        "rewind_step": rewind_step,
        "retrain_steps": retrain_steps,
    }


if __name__ == "__main__":
    _define_flags()
    app.run(main)
