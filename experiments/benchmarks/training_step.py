"""What a training step costs beside the model: augmentation, optimizer, masks.

Example:
  python -m experiments.benchmarks.training_step --dataset=cifar10 --data_dir=FOLDER --sparsity=0.95

Takes the flags of experiments.train. Steps of both kinds are measured in turns, so that what else
the machine does falls on both.
"""

import dataclasses
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import app, flags
from rich.console import Console

from experiments import data, output, settings, training
from experiments.streams import Batch, Stream

settings.define_flags()
flags.DEFINE_integer("repeats", 5, "how often each is measured", lower_bound=1)
flags.DEFINE_integer("steps", 4, "steps in a measurement", lower_bound=1)


def measure(config: settings.Settings, dataset: data.Dataset, repeats: int, steps: int) -> Any:
    """Seconds: the model alone, a step without mask update, a step with one; medians."""
    assert not isinstance(dataset.train, Stream)
    quiet = training.make_trainer(dataclasses.replace(config, method="dense"), dataset)
    sparse = training.make_trainer(config, dataset)
    event = training.make_trainer(dataclasses.replace(config, update_every=1), dataset)
    batch = Batch(*(array[: config.batch_size] for array in dataset.train))
    model = jax.jit(quiet.loss_and_grads)
    fixed = quiet.init(0)

    def run_model() -> None:
        for _ in range(steps):
            jax.block_until_ready(model(fixed, batch))

    runs = [run_model, _runner(quiet, steps), _runner(sparse, steps), _runner(event, steps)]
    for run in runs:
        run()  # compiles
    seconds = np.array([[_timed(run) for run in runs] for _ in range(repeats)]) / steps
    return np.median(seconds, axis=0)


def _runner(trainer: training.Trainer, steps: int) -> Callable[[], None]:
    state = trainer.init(0)

    def run() -> None:
        nonlocal state
        state, losses = trainer.run(state, None, steps)
        jax.block_until_ready(losses)

    return run


def _timed(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def main(argv: list[str]) -> None:
    """Measures what the flags say and prints a table."""
    if len(argv) > 1:
        sys.exit(f"error: {argv[1]!r} is no flag. See --help.")
    with settings.errors_in_one_line():
        config = settings.from_flags()
        dataset = data.load(config.dataset, flags.FLAGS.data_dir, config.validation)
        if isinstance(dataset.train, Stream):
            raise ValueError(
                f"{config.dataset} is not in memory; see experiments.benchmarks.input."
            )
        steps, repeats = flags.FLAGS.steps, flags.FLAGS.repeats
        if (repeats + 1) * steps >= config.update_every:
            raise ValueError(
                f"--update_every={config.update_every} must exceed {(repeats + 1) * steps}, "
                "(--repeats + 1) x --steps, so that ordinary steps are measured as such."
            )
        seconds = measure(config, dataset, repeats, steps)
    model = seconds[0]
    names = ("the model, forward and backward", "dense step", "sparse step", "step with an event")
    rows = [
        {
            name: where,
            "ms": f"{1000 * value:,.1f}",
            "not the model (%)": f"{100 * (1 - model / value):.1f}",
            "images/s": f"{config.batch_size / value:,.0f}",
        }
        for name, where, value in zip(["step"] * 4, names, seconds, strict=True)
    ]
    average = seconds[2] + (seconds[3] - seconds[2]) / config.update_every
    title = f"{config.model}, {config.method}, batch {config.batch_size}"
    output.print_table(Console(), title, rows)
    print(
        f"with an event every {config.update_every} steps, "
        f"{100 * (1 - model / average):.1f} % of a step is not the model"
    )


if __name__ == "__main__":
    app.run(main)
