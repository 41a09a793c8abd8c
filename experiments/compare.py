"""Trains several methods from several seeds and shows them side by side.

Example:
  python -m experiments.compare --methods=dense,static,rigl,gmp,granet,granet_st --seeds=3
  python -m experiments.compare --task=text --size=1m --methods=dense,rigl,granet --seeds=1

All runs share the flags of experiments.train. Leaves in --out_dir: report.html, table.txt, and the
folder of each run. Stopped at any moment, the same command goes on; finished runs are not repeated,
and methods or seeds can be added. With --plan nothing is trained, see experiments.train.
"""

import dataclasses
import pathlib
import sys
from typing import Any, NamedTuple

import jax
from absl import app, flags
from rich.console import Console

from experiments import tasks
from experiments.engine import (
    batches,
    distributed,
    files,
    memory,
    mesh,
    methods,
    output,
    page,
    plan,
    records,
    run,
    settings,
    training,
)
from experiments.engine.training import Trainer

METHODS = ["dense", "static", "rigl", "gmp", "granet", "granet_st"]


class Outcome(NamedTuple):
    """What became of all runs."""

    folders: dict[str, list[pathlib.Path]]  # by method, of the runs that came to their end
    agreements: list[str]  # with the masks of --reference
    shortfalls: list[str]
    diverged: list[str]


def define_flags(argv: list[str], task: str = "images", seeds: int = 3) -> None:
    """Defines the flags of the task that the command line names.

    Args:
      argv: the command line.
      task: the one where none is named.
      seeds: how many where it is not said.
    """
    tasks.define_flags(argv, leave_out=("method", "seed"), default=task)
    flags.DEFINE_list("methods", METHODS, f"what to compare, of: {', '.join(methods.METHODS)}")
    flags.DEFINE_integer("seeds", seeds, "so many seeds for each method", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "the first of them", lower_bound=0)
    flags.DEFINE_string("out_dir", None, "where to write (default: runs/compare-DATASET-MODEL-...)")
    flags.DEFINE_string("reference", None, "--out_dir of another comparison, to compare masks with")
    flags.DEFINE_boolean("plan", False, "compile for the mesh and tell memory; train nothing")
    mesh.define_flags()
    run.define_flags()
    distributed.define_flags()


def main(argv: list[str]) -> None:
    """Runs what the flags say."""
    if len(argv) > 1:
        sys.exit(f"error: {argv[1]!r} is no flag; flags look like --seeds=3. See --help.")
    given = flags.FLAGS
    with settings.errors_in_one_line():
        memory.keep()
        mesh.use_devices()
        distributed.start()
        console = Console(quiet=jax.process_index() != 0, soft_wrap=True, highlight=False)
        trainers = _trainers(given.methods)
        first, length = trainers[0].settings, trainers[0].length
        if given.plan:
            for trainer in trainers:
                plan.show(console, plan.plan(trainer))
            return
        title = f"{first.title}, sparsity {first.sparsity:g}"
        name = f"{first.title.replace(', ', '-')}-{first.sparsity:g}-{length.epochs}ep"
        out_dir = pathlib.Path(given.out_dir or f"runs/compare-{name}")
        outcome = _run_all(console, trainers, out_dir)
        if not outcome.folders:
            raise ValueError("; ".join(outcome.diverged))
    if jax.process_index() == 0:
        caption = f"{title}; {length.epochs} epochs, {given.seeds} seeds"
        _show(console, trainers[0], outcome, out_dir, caption)
    if outcome.diverged:
        sys.exit("error: left out of the table: " + "; ".join(outcome.diverged))


def _trainers(names: list[str]) -> list[Trainer]:
    """All, so that what cannot be is told before the first run."""
    unknown = [name for name in names if name not in methods.METHODS]
    if unknown or not names or len(set(names)) < len(names):
        raise ValueError(
            f"--methods={','.join(names)}: name each of these once at most: "
            f"{', '.join(methods.METHODS)}."
        )
    kind, devices = tasks.load(flags.FLAGS.task), mesh.from_flags()
    first = kind.from_flags(method=names[0], seed=0)
    task = kind.make(first, devices, flags.FLAGS.data_dir)
    if not flags.FLAGS.plan:
        task = batches.placed(task, devices)
    return [
        training.make_trainer(dataclasses.replace(first, method=name), task, devices)
        for name in names
    ]


def _run_all(console: Console, trainers: list[Trainer], out_dir: pathlib.Path) -> Outcome:
    given = flags.FLAGS
    outcome = Outcome({}, [], [], [])
    for trainer in trainers:
        for seed in range(given.seed, given.seed + given.seeds):
            config = dataclasses.replace(trainer.settings, seed=seed)
            name, label = config.method, f"{config.method} seed {seed}"
            this, folder = trainer._replace(settings=config), out_dir / f"{name}-{seed}"
            plain_every = max(1, trainer.length.epochs // 4)
            try:
                with output.progress(console, f"{label:18}", this, plain_every) as show:
                    result = run.run(this, folder, show=show, **run.from_flags())
            except records.Diverged as error:
                outcome.diverged.append(f"{label}: {error}")
                continue
            outcome.folders.setdefault(name, []).append(folder)
            if given.reference:
                outcome.agreements.append(f"{label}: {_agreement(this, folder.name, result.masks)}")
            if result.shortfall:
                outcome.shortfalls.append(f"{label}: {result.shortfall}")
    return outcome


def _agreement(trainer: Trainer, name: str, masks: Any) -> str:
    reference = flags.FLAGS.reference
    other = files.read_masks(pathlib.Path(reference) / name, masks)
    shared, chance = files.agreement(masks, other, trainer.setup.rules)
    return (
        f"{100 * shared:.2f} % of the live weights are live in {reference} too, "
        f"{100 * chance:.2f} % by chance"
    )


def _show(
    console: Console, trainer: Trainer, outcome: Outcome, out_dir: pathlib.Path, caption: str
) -> None:
    """The table and the page."""
    histories = {
        name: [files.read_history(folder) for folder in folders]
        for name, folders in outcome.folders.items()
    }
    rows = page.summary(histories, trainer.told)
    (out_dir / "table.txt").write_text(output.print_table(console, caption, rows))
    print(f"Mean and standard deviation over seeds. {page.selection(trainer.told)}")
    for line in outcome.agreements:
        print(line)
    for shortfall in outcome.shortfalls:
        print(f"warning: {shortfall}")
    page.write(out_dir / "report.html", outcome.folders)
    print(f"written: {out_dir}/report.html, table.txt and a folder for each run")


if __name__ == "__main__":
    define_flags(sys.argv)
    app.run(main)
