"""Trains several methods from several seeds and prints one table with mean and deviation.

Example:
  python -m experiments.compare --methods=dense,static,rigl,gmp,granet,granet_st --seeds=3

All runs share the flags of experiments.train. Leaves in --out_dir: comparison.png, table.txt, and
for each run a folder with settings.json and metrics.jsonl.
"""

import dataclasses
import pathlib
import sys
import time

import jax
import numpy as np
from absl import app, flags
from rich.console import Console

import granet_jax as gj
from experiments import data, methods, output, settings, training

settings.define_flags(leave_out=("method", "seed"))
flags.DEFINE_list(
    "methods",
    ["dense", "static", "rigl", "gmp", "granet", "granet_st"],
    f"what to compare, of: {', '.join(methods.METHODS)}",
)
flags.DEFINE_integer("seeds", 3, "seeds 0, 1, ... for each method", lower_bound=1)
flags.DEFINE_string("out_dir", None, "where to write (default: runs/compare-DATASET-MODEL-...)")

COLUMNS = (
    "method",
    "weights kept",
    "sparsity",
    "test accuracy (%)",
    "best epoch (%)",
    "seconds a run",
)


def main(argv: list[str]) -> None:
    """Runs what the flags say."""
    if len(argv) > 1:
        sys.exit(f"error: {argv[1]!r} is no flag; flags look like --seeds=3. See --help.")
    console = Console()
    names = flags.FLAGS.methods
    with settings.errors_in_one_line():
        unknown = [name for name in names if name not in methods.METHODS]
        if unknown or not names or len(set(names)) < len(names):
            raise ValueError(
                f"--methods={','.join(names)}: name each of these once at most: "
                f"{', '.join(methods.METHODS)}."
            )
        first = settings.from_flags(method=names[0], seed=0)
        dataset = data.load(first.dataset, first.data_dir)
        trainers = [
            training.make_trainer(dataclasses.replace(first, method=name), dataset)
            for name in names
        ]
        for trainer in trainers:
            jax.eval_shape(trainer.init, jax.random.key(0))  # tells infeasible targets early
        title = f"{first.dataset}, {first.model}, sparsity {first.sparsity:g}"
        out_dir = pathlib.Path(
            flags.FLAGS.out_dir
            or f"runs/compare-{first.dataset}-{first.model}-{first.sparsity:g}-{first.epochs}ep"
        )
        out_dir.mkdir(parents=True, exist_ok=True)

    runs: dict[str, list[output.History]] = {}
    rows = []
    with settings.errors_in_one_line():
        for trainer in trainers:
            name = trainer.settings.method
            results, seconds = [], []
            for seed in range(flags.FLAGS.seeds):
                started = time.perf_counter()
                results.append(_run(console, trainer, seed, out_dir / f"{name}-{seed}"))
                seconds.append(time.perf_counter() - started)
            runs[name] = [result.history for result in results]
            rows.append(_row(name, results, seconds))

    text = output.print_table(
        console, f"{title}; {first.epochs} epochs, {flags.FLAGS.seeds} seeds", COLUMNS, rows
    )
    (out_dir / "table.txt").write_text(text)
    print("Mean and standard deviation over seeds. The best epoch is chosen on the test set.")
    output.plot_runs(out_dir / "comparison.png", title, runs)
    print(f"written: {out_dir}/comparison.png, table.txt and a folder for each run")


def _run(
    console: Console, trainer: training.Trainer, seed: int, out_dir: pathlib.Path
) -> training.Result:
    config = dataclasses.replace(trainer.settings, seed=seed)
    metrics = output.open_run(out_dir, dataclasses.asdict(config))
    label = f"{config.method} seed {seed}"
    with output.progress(console, f"{label:18}", config.epochs, config.epochs) as show:

        def on_epoch(record: dict[str, float]) -> None:
            output.append_jsonl(metrics, record)
            show(record)

        return training.train(trainer, seed, on_epoch)


def _row(name: str, results: list[training.Result], seconds: list[float]) -> list[str]:
    last = [r.history[-1]["test_accuracy"] for r in results]
    best = [max(record["test_accuracy"] for record in r.history) for r in results]
    kept = {
        int(gj.metrics.num_live(gj.get_masks(r.state.opt_state), r.state.params).sum())
        for r in results
    }
    sparsity = {r.history[-1]["sparsity"] for r in results}
    return [
        name,
        "-".join(f"{k:,}" for k in sorted(kept)),
        "-".join(f"{s:.6f}" for s in sorted(sparsity)),
        _mean_and_std(last),
        _mean_and_std(best),
        f"{np.mean(seconds):.1f}",
    ]


def _mean_and_std(values: list[float]) -> str:
    std = f" ± {np.std(values, ddof=1):4.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):5.2f}{std}"


if __name__ == "__main__":
    app.run(main)
