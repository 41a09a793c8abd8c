"""Measures what sparsity and the input cost, and writes one file of tables.

Example:
  python -m experiments.benchmarks
  python -m experiments.benchmarks --only=selection,step --out=some.md
  python -m experiments.benchmarks --only=accelerator --data_dir=FOLDER --out=gpu.md

Takes some minutes on two cores; leave the machine alone meanwhile. Ratios are of times measured in
turns within the run; compare nothing across runs. --only=accelerator is an hour's work for a GPU
or a TPU, in pieces: stopped at any moment, the same command goes on.
"""

import pathlib
import sys

from absl import app, flags
from rich.console import Console

from experiments.benchmarks import (
    accelerator,
    bandwidth,
    compact,
    compile_time,
    convolutions,
    inference,
    input,
    kernels,
    selection,
    step,
    tables,
    training_step,
    update,
)
from experiments.engine import memory, output, settings

BENCHMARKS = {
    "bandwidth": bandwidth.tables,
    "selection": selection.tables,
    "update": update.tables,
    "step": step.tables,
    "compile_time": compile_time.tables,
    "training_step": training_step.tables,
    "input": input.tables,
    "inference": inference.tables_of,
    "kernels": kernels.tables,
    "compact": compact.tables,
    "convolutions": convolutions.tables,
}


def define_flags() -> None:
    """Defines what is measured, and where it is written."""
    flags.DEFINE_string("out", "docs/benchmarks.md", "the file to write; figures come beside it")
    flags.DEFINE_list("only", list(BENCHMARKS), "what to measure; the file then holds this alone")
    flags.DEFINE_string("data_dir", None, "TFDS data sets, of which accelerator reads CIFAR-10")
    flags.DEFINE_integer("epochs", 0, "of accelerator's trainings; 0 = the papers'", lower_bound=0)
    flags.DEFINE_boolean("quick", False, "sizes so small that the figures say nothing")


def run(
    names: list[str], quick: bool, out: pathlib.Path, data_dir: str | None = None, epochs: int = 0
) -> None:
    """Measures, prints and writes.

    Raises:
      ValueError: a name is none of ``BENCHMARKS``, or there is no folder for ``out``.
    """
    known = [*BENCHMARKS, "accelerator"]
    if not names or any(name not in known for name in names):
        raise ValueError(f"--only={','.join(names)}: name some of {', '.join(known)}.")
    if "accelerator" in names and len(names) > 1:
        raise ValueError("--only=accelerator writes a file of its own; measure the others apart.")
    if not out.parent.is_dir():
        raise ValueError(f"--out={out}: there is no folder {out.parent}; make it first.")
    print(tables.machine(), flush=True)
    measured = []

    def keep(table: tables.Table) -> None:
        output.print_table(Console(), table.title, table.rows)
        print(f"{table.note}\n", flush=True)
        measured.append(table)

    if names == ["accelerator"]:
        measured = accelerator.tables(quick, out, data_dir, epochs, keep)
    else:
        for name in names:
            for table in BENCHMARKS[name](quick):
                keep(table)
    command = "python -m experiments.benchmarks"
    command += f" --only={','.join(names)}" if names != list(BENCHMARKS) else ""
    about = f"`{command}`: medians; ratios of times taken in turns within this run."
    if quick:
        about += " With --quick: of sizes so small that the figures say nothing."
    tables.write(out, measured, about)
    print(f"written: {out}")


def main(argv: list[str]) -> None:
    """Runs what the flags say."""
    if len(argv) > 1:
        sys.exit(f"error: {argv[1]!r} is no flag; flags look like --only=step. See --help.")
    with settings.errors_in_one_line():
        memory.keep()
        given = flags.FLAGS
        run(given.only, given.quick, pathlib.Path(given.out), given.data_dir, given.epochs)


if __name__ == "__main__":
    define_flags()
    app.run(main)
