"""A trained run, pruned in one shot: what each method costs, before and after training on.

Example:
  python -m experiments.train --task=text --size=1m --method=dense --out_dir=runs/dense
  python -m experiments.one_shot --run_dir=runs/dense

Takes the newest checkpoint of a dense run of any task, calibrates on batches of its training data,
prunes by each method to each sparsity, and evaluates; then trains on for --steps under the masks,
with Adam at --learning_rate. Leaves table.txt in --out_dir.
"""

import itertools
import pathlib
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from absl import app, flags
from rich.console import Console

import granet_jax as gj
from experiments import tasks
from experiments.engine import batches, files, memory, mesh, output, run, settings, training
from experiments.engine.training import State, Trainer
from experiments.studies import one_shot as pruning
from granet_jax import one_shot


def define_flags() -> None:
    """Defines the flags."""
    flags.DEFINE_string("run_dir", None, "folder of a dense run")
    flags.DEFINE_string("task", None, "FILE.py of a task of your own, as the run had it")
    flags.DEFINE_string("data_dir", None, "where the task's data are, as the run had it")
    flags.DEFINE_integer("batches", 2, "of training data to calibrate on", lower_bound=1)
    flags.DEFINE_integer("steps", 100, "of training under the masks; 0 = none", lower_bound=0)
    flags.DEFINE_float("learning_rate", 3e-4, "of Adam, falling as a cosine", lower_bound=0.0)
    flags.DEFINE_string("out_dir", None, "where to write (default: one_shot in the run's folder)")
    pruning.define_flags()


def load(run_dir: pathlib.Path, task: str | None, data_dir: str | None) -> tuple[Trainer, State]:
    """The trainer of a run and its newest state.

    Args:
      run_dir: folder of the run.
      task: the file of a task of one's own; None = the run's is one of those here.
      data_dir: where the task's data are.

    Raises:
      ValueError: ``run_dir`` holds no run, or one without checkpoint, that is not dense, or on
        other data.
    """
    if not (run_dir / "settings.json").exists():
        raise ValueError(f"--run_dir={run_dir} holds no run: there is no settings.json in it.")
    written = files.read_json(run_dir, "settings.json")
    kind = tasks.load(task or written["task"])
    if kind.name != written["task"]:
        raise ValueError(f"--run_dir={run_dir} is a run of the task {written['task']}.")
    config = settings.from_json(kind.settings, written)
    if config.method != "dense":
        raise ValueError(f"--run_dir={run_dir} is a run of {config.method}; give a dense one.")
    devices = mesh.make()
    trainer = training.make_trainer(config, kind.make(config, devices, data_dir), devices)
    files.check_data(run_dir, trainer.facts)
    return trainer, run.newest(trainer, run_dir)


class Target(NamedTuple):
    """A sparsity to prune to."""

    told: str  # as the flag has it
    fraction: float
    rules: gj.trees.Rules


def targets(trainer: Trainer) -> list[Target]:
    """The sparsities of the flag.

    Raises:
      ValueError: a structure does not fit a layer.
    """
    config, task = trainer.settings, trainer.setup.task
    found = []
    for sparsity in flags.FLAGS.sparsities:
        fraction, structure = pruning.parse(sparsity)
        rules = training.rules_of(config, task, structure)
        gj.trees.describe(trainer.setup.abstract_params, rules)  # raises before anything is done
        found.append(Target(sparsity, fraction, rules))
    return found


def study(trainer: Trainer, state: State, wanted: list[Target]) -> Iterator[dict[str, str]]:
    """The rows of the table, one by one."""
    given, task, told = flags.FLAGS, trainer.setup.task, trainer.told
    num_batches = max(given.batches, given.steps)
    some = batches.first(task.train, num_batches, trainer.settings.batch_size)
    if len(some) < given.batches:
        raise ValueError(f"--batches={given.batches}: the training data have {len(some)}.")
    train = pruning.train_under_masks(task.loss, given.steps, given.learning_rate)
    column, after = told.metrics[0].label(told.shown), f"after {given.steps} steps"

    def measured(params: Any, variables: Any) -> str:
        found = trainer.evaluate(state._replace(params=params, model_state=variables))
        return f"{found[told.key(told.shown)]:.4f}"

    right = measured(state.params, state.model_state)
    yield {"sparsity": "0", "method": "dense", "zeros": "0", column: right, after: "-"}
    for target, name in itertools.product(wanted, given.methods):
        pruned = one_shot.prune(
            pruning.METHODS[name](),
            lambda params, batch: task.evaluate(params, state.model_state, batch),
            state.params,
            some[: given.batches],
            sparsity=target.fraction,
            prunable=target.rules,
            sequential=given.sequential,
        )
        zeros = float(gj.metrics.sparsity(pruned.masks, state.params, target.rules))
        row = {"sparsity": target.told, "method": name, "zeros": f"{zeros:.4f}"}
        row |= {column: measured(pruned.params, state.model_state), after: "-"}
        if given.steps:
            again = itertools.islice(itertools.cycle(some), given.steps)
            row[after] = measured(*train(pruned, state.model_state, again))
        yield row


def main(argv: list[str]) -> None:
    """Runs what the flags say."""
    if len(argv) > 1:
        sys.exit(f"error: {argv[1]!r} is no flag; flags look like --steps=100. See --help.")
    given = flags.FLAGS
    with settings.errors_in_one_line():
        memory.keep()
        pruning.check_flags()
        if given.run_dir is None:
            raise ValueError("--run_dir: give the folder of a dense run.")
        run_dir = pathlib.Path(given.run_dir)
        trainer, state = load(run_dir, given.task, given.data_dir)
        wanted = targets(trainer)
        out_dir = pathlib.Path(given.out_dir or run_dir / "one_shot")
        out_dir.mkdir(parents=True, exist_ok=True)
        caption = f"{trainer.told.title}; pruned in one shot, calibrated on {given.batches} batches"
        table: list[dict[str, str]] = []
        try:
            for row in study(trainer, state, wanted):
                print("  ".join(row.values()), flush=True)
                table.append(row)
        finally:  # also of a study that was stopped
            if table:
                text = output.print_table(Console(), caption, table)
                (out_dir / "table.txt").write_text(text)
    print(f"written: {out_dir}/table.txt")


if __name__ == "__main__":
    define_flags()
    app.run(main)
