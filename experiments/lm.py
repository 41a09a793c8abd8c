"""A byte-level language model trained sparse, on one device or a mesh of many.

Examples:
  python -m experiments.lm --size=1m --bytes=500_000
  python -m experiments.lm --size=10m --methods=dense,gmp,granet,rigl,static --sparsity=0.8
  python -m experiments.lm --text_dir=FOLDER --size=100m --precision=bf16 --fsdp=4 --tensor=2
  python -m experiments.lm --plan --size=1b --devices=64 --fsdp=64 --batch_size=64

The text is the source of Python's own library, or all files of --text_dir; whole files are held
out. Methods are trained one after the other from the same weights on the same windows. Leaves in
--out_dir: results.txt, results.json, curves.png and a folder for each method with metrics.jsonl,
checkpoints and masks.npz. Stopped at any moment, the same command goes on. With --plan nothing is
trained: the step is compiled for the mesh, and its memory and communication are told.
"""

import json
import pathlib
import statistics
import sys
from typing import Any

import jax
import matplotlib
from absl import app, flags
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from rich.console import Console

from experiments import distributed, lm_plan, lm_run, lm_training, output, settings, text
from experiments import run as runs
from experiments.files import Record
from experiments.lm_run import Result
from experiments.models import transformer

matplotlib.use("Agg")


def _define_flags() -> None:
    d = lm_training.Config()  # the defaults
    flags.DEFINE_list("methods", [d.method], f"one or more of {', '.join(lm_training.METHODS)}")
    flags.DEFINE_enum("size", d.size, list(transformer.SIZES), "weights outside the embedding")
    flags.DEFINE_string("text_dir", None, "folder of text (default: Python's own library)")
    flags.DEFINE_integer("context", d.context, "bytes that the model sees at once", lower_bound=2)
    flags.DEFINE_integer(
        "batch_size", d.batch_size, "windows in a step, over all devices", lower_bound=1
    )
    flags.DEFINE_integer("bytes", d.bytes, "of training text in all", lower_bound=1)
    flags.DEFINE_float("learning_rate", d.learning_rate, "peak of AdamW", lower_bound=0)
    flags.DEFINE_float(
        "sparsity", d.sparsity, "fraction of zeros among prunable weights at the end"
    )
    flags.DEFINE_string(
        "structure", d.structure, "of masks: none, 2:4 and the like, block:RxC, fan_in"
    )
    flags.DEFINE_boolean(
        "block_kernel",
        d.block_kernel,
        "dense layers multiply only by blocks that are on; see train --help",
    )
    flags.DEFINE_boolean(
        "compact",
        d.compact,
        "train live weights alone; see train --help",
    )
    flags.DEFINE_integer(
        "update_every", d.update_every, "steps between mask updates (Delta T)", lower_bound=1
    )
    flags.DEFINE_float(
        "prune_until", d.prune_until, "gradual pruning ends at this fraction of training", 0.0, 1.0
    )
    flags.DEFINE_integer("eval_every", d.eval_every, "steps between evaluations", lower_bound=1)
    flags.DEFINE_enum(
        "precision", d.precision, ["f32", "bf16"], "of the model's arithmetic; parameters are f32"
    )
    flags.DEFINE_boolean("remat", d.remat, "compute layers again in the backward pass, for memory")
    flags.DEFINE_integer("seed", d.seed, "of weights, masks and windows", lower_bound=0)
    flags.DEFINE_string("out_dir", None, "where to write (default: runs/lm-SIZE-SPARSITY)")
    flags.DEFINE_string("reference", None, "--out_dir of another run, to compare masks with")
    flags.DEFINE_integer("data", None, "mesh axis of copies (default: all devices)", lower_bound=1)
    flags.DEFINE_integer("fsdp", 1, "mesh axis that shares parameters and batch", lower_bound=1)
    flags.DEFINE_integer("tensor", 1, "mesh axis that shares each window's work", lower_bound=1)
    flags.DEFINE_integer("devices", None, "run on so many virtual CPU devices", lower_bound=1)
    flags.DEFINE_boolean("plan", False, "compile for the mesh and tell memory; train nothing")
    runs.define_flags()
    distributed.define_flags()


def main(argv: list[str]) -> None:
    """Runs what the flags say."""
    if len(argv) > 1:
        sys.exit(f"error: {argv[1]!r} is no flag; flags look like --size=10m. See --help.")
    given = flags.FLAGS
    if given.devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", given.devices)
    with settings.errors_in_one_line():
        distributed.start()
        console = Console(quiet=jax.process_index() != 0, soft_wrap=True, highlight=False)
        names = given.methods
        if not names or len(set(names)) < len(names):
            raise ValueError(f"--methods={','.join(names)}: name each once.")
        mesh = lm_training.make_mesh(given.data, given.fsdp, given.tensor)
        trainers = [  # all, so that what cannot be is told before the first run
            lm_training.make_trainer(_config(name), mesh) for name in names
        ]
        if given.plan:
            for trainer in trainers:
                planned = lm_plan.plan(trainer)
                if jax.process_index() == 0:
                    lm_plan.show(console, planned)
            return
        out_dir = pathlib.Path(given.out_dir or f"runs/lm-{given.size}-{given.sparsity:g}")
        references = {
            name: lm_run.read_masks(
                pathlib.Path(given.reference) / name / "masks.npz", trainer.abstract_params
            )
            for name, trainer in zip(names, trainers, strict=True)
            if given.reference
        }
        data = text.read(given.text_dir)
        results: dict[str, Result] = {}
        failed = []
        for name, trainer in zip(names, trainers, strict=True):

            def show(record: Record, name: str = name, trainer: Any = trainer) -> None:
                console.print(_line(name, record, trainer.config.total_steps))

            try:
                result = lm_run.run(trainer, data, out_dir / name, show=show, **runs.from_flags())
                result = result._replace(state=None)  # its memory is for the next
            except runs.Diverged as error:
                failed.append(f"{name}: {error}")
                continue
            results[name] = result
            console.print(f"{name}: sha256 of masks {runs.digest(result.masks)}")
            if name in references:
                shared, chance = lm_run.agreement(result.masks, references[name])
                console.print(
                    f"{name}: {100 * shared:.2f} % of the live weights are live in "
                    f"{given.reference} too; {100 * chance:.2f} % by chance",
                )
        if results and jax.process_index() == 0:
            _write(console, out_dir, results)
        if failed:
            raise ValueError("; ".join(failed))


def _config(method: str) -> lm_training.Config:
    values: dict[str, Any] = {k: flags.FLAGS[k].value for k in lm_training.Config._fields[1:]}
    return lm_training.Config(method, **values)


def _line(name: str, record: Record, total_steps: int) -> str:
    return (
        f"{name:10} step {record['step']:6}/{total_steps}  bits/byte {record['loss']:.4f}  "
        f"validation {record['validation']:.4f}  sparsity {record['sparsity']:.4f}  "
        f"churn {record['churn']:.4f}  {record['bytes_per_second']:,.0f} bytes/s"
    )


def _write(console: Console, out_dir: pathlib.Path, results: dict[str, Result]) -> None:
    """The table and the curves."""
    given = flags.FLAGS
    title = f"{given.size}, sparsity {given.sparsity:g}"
    count = next(iter(results.values())).history[-1]["bytes"]
    caption = f"{title}; {count:,} bytes, seed {given.seed}"
    rows = [row(name, result) for name, result in results.items()]
    (out_dir / "results.txt").write_text(output.print_table(console, caption, rows))
    last = {name: result.history[-1] for name, result in results.items()}
    digests = {name: runs.digest(result.masks) for name, result in results.items()}
    told = {name: {**last[name], "masks": digests[name]} for name in results}
    (out_dir / "results.json").write_text(json.dumps(told, indent=2) + "\n")
    histories = {name: result.history for name, result in results.items()}
    draw(histories, title).savefig(out_dir / "curves.png", dpi=150)
    console.print(f"written: {out_dir}/results.txt, results.json, curves.png and each run")


def row(name: str, result: Result) -> dict[str, str]:
    """A line of the table: the last evaluation, and the median speed."""
    last = result.history[-1]
    speed = statistics.median(record["bytes_per_second"] for record in result.history)
    return {
        "method": name,
        "sparsity": f"{last['sparsity']:.6f}",
        "validation bits/byte": f"{last['validation']:.4f}",
        "training bits/byte": f"{last['loss']:.4f}",
        "inference FLOPs": f"{last['inference_flops']:.4f}x",
        "training FLOPs": f"{last['training_flops']:.4f}x",
        "bytes/s": f"{speed:,.0f}",
        "masks": runs.digest(result.masks)[:16],
    }


def draw(histories: dict[str, list[Record]], title: str) -> Figure:
    """Validation loss and sparsity against bytes, a line for each method."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for key, axes in zip(("validation", "sparsity"), panels, strict=True):
        for name, history in histories.items():
            axes.plot([r["bytes"] for r in history], [r[key] for r in history], label=name)
        axes.set_xlabel("bytes of training text")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("validation, bits for each byte")
    panels[1].set_ylabel("sparsity")
    panels[0].set_title(title, loc="left", fontsize=10)
    panels[0].legend(frameon=False)
    plt.close(figure)
    return figure


if __name__ == "__main__":
    _define_flags()
    app.run(main)
