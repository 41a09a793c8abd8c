"""Lottery tickets: prunes a trained network level by level and compares ways to retrain it.

Example:
  python -m experiments.lottery --epochs=20
  python -m experiments.lottery --dataset=mnist --data_dir=FOLDER --momentum=0 --weight_decay=0
  python -m experiments.lottery --task=text --size=1m --levels=6 --seeds=1
  python -m experiments.lottery --task=mine.py

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
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from absl import app, flags
from matplotlib import pyplot as plt
from rich.console import Console

from experiments import tasks
from experiments.engine import files, memory, mesh, output, page, records, settings, training
from experiments.engine.task import Told
from experiments.studies import lottery
from experiments.studies.lottery import RULES, History, Study

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

Curves = dict[str, list[list[History]]]  # rule -> level (the first is dense) -> seed


def define_flags(argv: list[str]) -> None:
    """Defines the flags of the task that the command line names."""
    tasks.define_flags(argv, leave_out=tuple(_FIXED))
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
    mesh.define_flags()


def main(argv: list[str]) -> None:
    """Runs what the flags say."""
    if len(argv) > 1:
        sys.exit(f"error: {argv[1]!r} is no flag; flags look like --seeds=3. See --help.")
    console = Console()
    given = flags.FLAGS
    with settings.errors_in_one_line():
        memory.keep()
        mesh.use_devices()
        names = lottery.rules_named(given.rules)
        study = _study(names)
        trainer, out_dir = study.trainer, study.out_dir
        with files.opened(out_dir, written(study), given.resume, defaults(study)):
            files.check_data(out_dir, trainer.facts)
            files.write_about(out_dir, records.layers(trainer), trainer.facts, trainer.told)
            curves = _train_all(console, study, names)
            _show(console, study, curves)
    print("After the last epoch; mean and standard deviation over seeds.")
    print(f"written: {out_dir}/lottery.png, lottery.svg, table.txt and all levels")


def _study(rules: Sequence[str]) -> Study:
    given = flags.FLAGS
    kind, devices = tasks.load(given.task), mesh.from_flags()
    config = kind.from_flags(**_FIXED)
    name = config.title.replace(", ", "-")
    return lottery.make_study(
        training.make_trainer(config, kind.make(config, devices, given.data_dir), devices),
        pathlib.Path(given.out_dir or f"runs/lottery-{name}"),
        fraction=given.prune_fraction,
        oneshot=given.oneshot,
        rewind_at=given.rewind_at,
        retrain=given.retrain,
        rules=rules,
    )


def written(study: Study) -> dict[str, Any]:
    """The settings by which a folder is known."""
    config = dataclasses.asdict(study.trainer.settings)
    mine = ("fraction", "oneshot", "rewind_step", "retrain_steps")
    used = {name: value for name, value in config.items() if name not in _FIXED}
    return used | {name: getattr(study, name) for name in mine}


def defaults(study: Study, given: Any = flags.FLAGS) -> dict[str, Any]:
    """The settings of a folder from before they could be chosen.

    Args:
      study: that is to be made in the folder.
      given: flags by their names.
    """
    names = ("prune_fraction", "oneshot", "rewind_at", "retrain")
    fraction, oneshot, *shares = (given[name].default for name in names)
    rewind_step, retrain_steps = (round(x * study.trainer.length.steps) for x in shares)
    config = study.trainer.settings
    return settings.defaults(type(config), dataclasses.asdict(config)) | {
        "fraction": fraction,
        "oneshot": oneshot,
        "rewind_step": rewind_step,
        "retrain_steps": retrain_steps,
    }


def _train_all(console: Console, study: Study, names: Sequence[str]) -> Curves:
    """Each seed's dense run and ladders."""
    given, epochs = flags.FLAGS, study.trainer.length.epochs

    def progress(label: str) -> Any:
        return output.progress(console, f"{label:32}", study.trainer, epochs)

    curves: Curves = {name: [[] for _ in range(given.levels + 1)] for name in names}
    for seed in range(given.seeds):
        with progress(f"seed {seed} dense") as show:
            dense = lottery.train_dense(study, seed, show)
        for name, levels in curves.items():
            levels[0].append(dense)
            for number in range(1, given.levels + 1):
                with progress(f"seed {seed} {name} {number}") as show:
                    levels[number].append(lottery.train_level(study, seed, name, number, show))
    return curves


def _show(console: Console, study: Study, curves: Curves) -> None:
    """The table and the figure."""
    told, seeds = study.trainer.told, flags.FLAGS.seeds
    times = f"{study.trainer.length.epochs} epochs, {seeds} seed{'s' * (seeds > 1)}"
    title = f"{told.title}, {times}"
    caption = f"{title}; {told.metrics[0].label(told.shown)}"
    (study.out_dir / "table.txt").write_text(
        output.print_table(console, caption, table(curves, told))
    )
    figure = draw(curves, told, title)
    for ending in ("png", "svg"):
        figure.savefig(study.out_dir / f"lottery.{ending}", dpi=150)
    plt.close(figure)


def table(curves: Curves, told: Told) -> list[dict[str, str]]:
    """Rows of the metric after the last epoch, mean and standard deviation over seeds."""
    return [
        {
            "weights kept": f"{100 * _density(curves, level):.2f} %",
            **{
                name: page.mean_and_std(_last(levels[level], told), told.metrics[0].form)
                for name, levels in curves.items()
            },
        }
        for level in range(len(next(iter(curves.values()))))
    ]


def draw(curves: Curves, told: Told, title: str) -> Any:
    """The metric against density: a line and a band (lowest to highest seed) for each rule."""
    metric = told.metrics[0]
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    dense = float(np.mean(_last(next(iter(curves.values()))[0], told)))
    axes.axhline(dense, color="0.4", linestyle="--", linewidth=1, label="dense")
    x = [100 * _density(curves, level) for level in range(len(next(iter(curves.values()))))]
    for name, levels in curves.items():
        values = np.array([_last(level, told) for level in levels])
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
    axes.set_ylabel(metric.label(told.shown, " after the last epoch"))
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left" if metric.higher_is_better else "best", frameon=False)
    return figure


def _density(curves: Curves, level: int) -> float:
    return 1 - next(iter(curves.values()))[level][0][-1]["sparsity"]


def _last(level: Sequence[History], told: Told) -> list[float]:
    """What tables show of each seed, after the last epoch."""
    return [history[-1][told.key(told.shown)] for history in level]


if __name__ == "__main__":
    define_flags(sys.argv)
    app.run(main)
