"""Trains one network sparse and shows how it went.

Example:
  python -m experiments.train --method=granet --sparsity=0.98
  python -m experiments.train --dataset=mnist --data_dir=~/tensorflow_datasets --method=rigl

Leaves in --out_dir: settings.json, metrics.jsonl (a line for each epoch) and curves.png.
"""

import dataclasses
import pathlib
import sys

import jax
from absl import app, flags
from rich.console import Console

import granet_jax as gj
from experiments import data, output, settings, training

settings.define_flags()
flags.DEFINE_string("out_dir", None, "where to write (default: runs/DATASET-MODEL-METHOD-...)")


def main(argv: list[str]) -> None:
    """Runs what the flags say."""
    if len(argv) > 1:
        sys.exit(f"error: {argv[1]!r} is no flag; flags look like --method=granet. See --help.")
    console = Console()
    with settings.errors_in_one_line():
        config = settings.from_flags()
        trainer = training.make_trainer(config, data.load(config.dataset, config.data_dir))
        start = trainer.init(jax.random.key(config.seed))
        name = f"{config.dataset}-{config.model}-{config.method}-{config.sparsity}-{config.seed}"
        out_dir = pathlib.Path(flags.FLAGS.out_dir or f"runs/{name}")
        metrics = output.open_run(out_dir, dataclasses.asdict(config))
    print(gj.report.table(start.params, gj.get_masks(start.opt_state)))

    plain_every = max(1, config.epochs // 20)
    with (
        settings.errors_in_one_line(),
        output.progress(console, config.method, config.epochs, plain_every) as show,
    ):

        def on_epoch(record: dict[str, float]) -> None:
            output.append_jsonl(metrics, record)
            show(record)

        result = training.train(trainer, config.seed, on_epoch)

    output.plot_runs(out_dir / "curves.png", name, {config.method: [result.history]})
    print(gj.report.table(result.state.params, gj.get_masks(result.state.opt_state)))
    last, best = result.history[-1], max(r["test_accuracy"] for r in result.history)
    print(
        f"test accuracy {last['test_accuracy']:.2f} % after the last epoch "
        f"({best:.2f} % at the best; chosen on the test set) at sparsity {last['sparsity']:.4f}"
    )
    print(f"written: {out_dir}/curves.png, metrics.jsonl, settings.json")


if __name__ == "__main__":
    app.run(main)
