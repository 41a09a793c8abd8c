"""Trains one network sparse and shows how it went.

Example:
  python -m experiments.train --method=granet --sparsity=0.98
  python -m experiments.train --dataset=cifar10 --data_dir=FOLDER --method=rigl --sparsity=0.9
  python -m experiments.train --flagfile=experiments/recipes/cifar10-vgg19-granet.flags
  python -m experiments.train --task=text --size=1m --method=rigl --sparsity=0.9
  python -m experiments.train --task=mine.py --method=set

Leaves in --out_dir what experiments/engine/run.py tells, above all report.html. Stopped at any
moment, the same command goes on. --fsdp and --tensor share parameters over devices; with --plan
nothing is trained: the step is compiled for the mesh, and its memory and communication are told. In
several processes, of which the first writes, each is started with
  python -m experiments.train --coordinator=HOST:PORT --num_processes=2 --process_id=0 ...
and all of them in a folder that all can read.
"""

import collections
import math
import pathlib
import sys

import jax
from absl import app, flags
from rich.console import Console

import granet_jax as gj
from experiments import tasks
from experiments.engine import (
    distributed,
    files,
    memory,
    mesh,
    output,
    page,
    plan,
    run,
    settings,
    training,
)
from experiments.engine.run import Result
from experiments.engine.training import Trainer


def define_flags(argv: list[str]) -> None:
    """Defines the flags of the task that the command line names."""
    tasks.define_flags(argv)
    flags.DEFINE_string("out_dir", None, "where to write (default: runs/DATASET-MODEL-METHOD-...)")
    flags.DEFINE_boolean("plan", False, "compile for the mesh and tell memory; train nothing")
    mesh.define_flags()
    run.define_flags()
    distributed.define_flags()


def main(argv: list[str]) -> None:
    """Runs what the flags say."""
    if len(argv) > 1:
        sys.exit(f"error: {argv[1]!r} is no flag; flags look like --method=granet. See --help.")
    given = flags.FLAGS
    with settings.errors_in_one_line():
        memory.keep()
        mesh.use_devices()
        distributed.start()
        console = Console(quiet=jax.process_index() != 0, soft_wrap=True, highlight=False)
        kind, devices = tasks.load(given.task), mesh.from_flags()
        config = kind.from_flags()
        trainer = training.make_trainer(config, kind.make(config, devices, given.data_dir), devices)
        if given.plan:
            plan.show(console, plan.plan(trainer))
            return
        name = f"{config.title.replace(', ', '-')}-{config.method}-{config.sparsity:g}"
        out_dir = pathlib.Path(given.out_dir or f"runs/{name}-{config.seed}")
        plain_every = max(1, trainer.length.epochs // 20)
        with output.progress(console, config.method, trainer, plain_every) as show:
            result = run.run(trainer, out_dir, show=show, **run.from_flags())
        digests = [files.digest(x)[:16] for x in (result.masks, run.whole(result.state.params))]
    if jax.process_index() == 0:
        tell(trainer, result, digests)
        print(f"written: {out_dir}/report.html and what it is made from")


def tell(trainer: Trainer, result: Result, digests: list[str]) -> None:
    """Prints the layers, the last epoch and the best."""
    told = trainer.told
    shapes = jax.eval_shape(lambda: result.weights)
    print(gj.report.table(shapes, result.masks, trainer.setup.rules))
    last, best = (  # of an epoch of before, a number may be unknown
        collections.defaultdict(lambda: math.nan, record)
        for record in (result.history[-1], files.best(result.history, told))
    )
    metric, name = told.metrics[0], told.key(told.shown)
    print(
        f"{metric.label(told.shown)} {last[name]:{metric.form}} after the last epoch, "
        f"{best[name]:{metric.form}} after epoch {best['epoch']}, at sparsity "
        f"{last['sparsity']:.4f}; {last['inference_flops']:.4f} of the FLOPs of dense inference, "
        f"{last['training_flops']:.4f} of dense training. {page.selection(told)}"
    )
    if result.shortfall:
        print(f"warning: {result.shortfall}")
    print(f"sha256: masks {digests[0]}, parameters {digests[1]}")


if __name__ == "__main__":
    define_flags(sys.argv)
    app.run(main)
