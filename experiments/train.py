"""Trains one network sparse and shows how it went.

Example:
  python -m experiments.train --method=granet --sparsity=0.98
  python -m experiments.train --dataset=cifar10 --data_dir=FOLDER --method=rigl --sparsity=0.9
  python -m experiments.train --flagfile=experiments/recipes/cifar10-vgg19-granet.flags

Leaves in --out_dir what experiments/run.py tells, above all report.html. Stopped at any moment, the
same command goes on. In several processes, of which the first writes, each is started with
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
from experiments import data, distributed, files, output, run, settings

settings.define_flags()
flags.DEFINE_string("out_dir", None, "where to write (default: runs/DATASET-MODEL-METHOD-...)")
run.define_flags()
distributed.define_flags()


def main(argv: list[str]) -> None:
    """Runs what the flags say."""
    if len(argv) > 1:
        sys.exit(f"error: {argv[1]!r} is no flag; flags look like --method=granet. See --help.")
    with settings.errors_in_one_line():
        distributed.start()
        console = Console(quiet=jax.process_index() != 0)
        config = settings.from_flags()
        name = f"{config.dataset}-{config.model}-{config.method}-{config.sparsity:g}-{config.seed}"
        out_dir = pathlib.Path(flags.FLAGS.out_dir or f"runs/{name}")
        dataset = data.load(config.dataset, flags.FLAGS.data_dir, config.validation)
        plain_every = max(1, config.epochs // 20)
        with output.progress(console, config.method, config.epochs, plain_every) as show:
            result = run.run(config, dataset, out_dir, show=show, **run.from_flags())

    if jax.process_index() != 0:
        return
    print(gj.report.table(result.weights, result.masks, config.prunable))
    chosen = files.selected_by(result.history[-1]).split("_")[0]
    last, best = (  # of an epoch of before, a number may be unknown
        collections.defaultdict(lambda: math.nan, record)
        for record in (result.history[-1], files.best(result.history))
    )
    print(
        f"test accuracy {last['test_accuracy']:.2f} % after the last epoch, "
        f"{best['test_accuracy']:.2f} % after epoch {best['epoch']} "
        f"(the best at this sparsity, on the {chosen} images), at sparsity {last['sparsity']:.4f}; "
        f"{last['inference_flops']:.4f} of the FLOPs of dense inference, "
        f"{last['training_flops']:.4f} of dense training"
    )
    if result.shortfall:
        print(f"warning: {result.shortfall}")
    params = run.digest(result.state.params)[:16]
    print(f"sha256: masks {run.digest(result.masks)[:16]}, parameters {params}")
    print(f"written: {out_dir}/report.html and what it is made from")


if __name__ == "__main__":
    app.run(main)
