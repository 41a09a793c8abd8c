"""Trains several methods from several seeds and shows them side by side.

Example:
  python -m experiments.compare --methods=dense,static,rigl,gmp,granet,granet_st --seeds=3

All runs share the flags of experiments.train. Leaves in --out_dir: report.html, table.txt, and the
folder of each run. Stopped at any moment, the same command goes on; finished runs are not repeated,
and methods or seeds can be added.
"""

import dataclasses
import pathlib
import sys

import jax
from absl import app, flags
from rich.console import Console

from experiments import data, distributed, files, methods, output, report, run, settings, training

settings.define_flags(leave_out=("method", "seed"))
flags.DEFINE_list(
    "methods",
    ["dense", "static", "rigl", "gmp", "granet", "granet_st"],
    f"what to compare, of: {', '.join(methods.METHODS)}",
)
flags.DEFINE_integer("seeds", 3, "seeds 0, 1, ... for each method", lower_bound=1)
flags.DEFINE_string("out_dir", None, "where to write (default: runs/compare-DATASET-MODEL-...)")
run.define_flags()
distributed.define_flags()


def main(argv: list[str]) -> None:
    """Runs what the flags say."""
    if len(argv) > 1:
        sys.exit(f"error: {argv[1]!r} is no flag; flags look like --seeds=3. See --help.")
    names = flags.FLAGS.methods
    with settings.errors_in_one_line():
        distributed.start()
        console = Console(quiet=jax.process_index() != 0)
        unknown = [name for name in names if name not in methods.METHODS]
        if unknown or not names or len(set(names)) < len(names):
            raise ValueError(
                f"--methods={','.join(names)}: name each of these once at most: "
                f"{', '.join(methods.METHODS)}."
            )
        first = settings.from_flags(method=names[0], seed=0)
        dataset = data.load(first.dataset, flags.FLAGS.data_dir, first.validation)
        dataset = dataset._replace(train=training.placed(dataset.train))
        trainers = [  # all, so that infeasible targets are told before the first run
            training.make_trainer(dataclasses.replace(first, method=name), dataset)
            for name in names
        ]
        title = f"{first.dataset}, {first.model}, sparsity {first.sparsity:g}"
        out_dir = pathlib.Path(
            flags.FLAGS.out_dir
            or f"runs/compare-{first.dataset}-{first.model}-{first.sparsity:g}-{first.epochs}ep"
        )
        runs = {
            name: [out_dir / f"{name}-{seed}" for seed in range(flags.FLAGS.seeds)]
            for name in names
        }
        diverged: list[str] = []
        shortfalls: list[str] = []
        for trainer, (name, folders) in zip(trainers, list(runs.items()), strict=True):
            for seed, folder in enumerate(folders):
                config = dataclasses.replace(trainer.settings, seed=seed)
                label = f"{name} seed {seed}"
                plain_every = max(1, config.epochs // 4)
                this = trainer._replace(settings=config)
                try:
                    with output.progress(
                        console, f"{label:18}", config.epochs, plain_every
                    ) as show:
                        result = run.run_trainer(this, folder, show=show, **run.from_flags())
                    if result.shortfall:
                        shortfalls.append(f"{label}: {result.shortfall}")
                except run.Diverged as error:
                    diverged.append(f"{label}: {error}")
                    runs[name] = [f for f in runs[name] if f != folder]
        runs = {name: folders for name, folders in runs.items() if folders}
        if not runs:
            raise ValueError("; ".join(diverged))

    if jax.process_index() != 0:
        return
    histories = {
        name: [files.read_history(folder) for folder in folders] for name, folders in runs.items()
    }
    rows = [report.summarise(name, group) for name, group in histories.items()]
    caption = f"{title}; {first.epochs} epochs, {flags.FLAGS.seeds} seeds"
    (out_dir / "table.txt").write_text(output.print_table(console, caption, rows))
    print(f"Mean and standard deviation over seeds. {report.selection(histories)}")
    for shortfall in shortfalls:
        print(f"warning: {shortfall}")
    report.write(out_dir / "report.html", runs)
    print(f"written: {out_dir}/report.html, table.txt and a folder for each run")
    if diverged:
        sys.exit("error: left out of the table: " + "; ".join(diverged))


if __name__ == "__main__":
    app.run(main)
