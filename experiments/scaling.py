"""The scaling law of sparse networks: fits it anew to the points that were published. No training.

Example:
  python -m experiments.scaling --data_dir=FOLDER

FOLDER holds the points of Frantar et al. 2023 (google-research/jaxpruner, projects/bigsparse):
t5-data.csv and vit-data.json, either or both. Prints the coefficients of the fit beside those of
the paper, what both say of a network that was held out, and the sparsity that is best for budgets;
leaves table.txt, scaling.svg and scaling.png in --out_dir.
"""

import csv
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from absl import app, flags
from matplotlib import pyplot as plt
from rich.console import Console

from experiments.engine import output, settings
from granet_jax import scaling

matplotlib.use("Agg")


class Points(NamedTuple):
    """Trained networks, a column each."""

    sparsity: np.ndarray
    live: np.ndarray  # millions of weights that are on
    data: np.ndarray  # in the unit of the study
    losses: np.ndarray


class Study(NamedTuple):
    """What was published of one kind of network."""

    file: str
    read: Callable[[str], Any]  # text -> {column: values}
    weights: int  # of a network of scale 1, before sparsity
    length: str  # the column with what was trained on
    unit: float
    unit_name: str
    of_logs: bool
    delta: float
    published: scaling.Law
    held_out: tuple[float, float, float, float] | None = None  # sparsity, live, data, loss


def _read_csv(text: str) -> dict[str, list[float]]:
    rows = list(csv.DictReader(text.splitlines()))
    return {name: [float(row[name]) for row in rows] for name in rows[0] if name}


def _read_json(text: str) -> dict[str, list[float]]:
    return {name: list(values.values()) for name, values in json.loads(text).items()}


STUDIES = {  # coefficients: the paper's notebooks
    "T5": Study(
        "t5-data.csv",
        _read_csv,
        24 * 12 * 768**2,
        "steps",
        1e5,
        "10^5 steps",
        True,
        1e-3,
        scaling.Law(0.56779, 0.72161, 1.52265, 0.24513, 0.63362, 0.20271, 0.65074),
        (0.75, 48 * 12 * 1024**2 / 1e6, 5.0, 1.48278),  # T5-XL
    ),
    "ViT": Study(
        "vit-data.json",
        _read_json,
        12 * 12 * 768**2,
        "total_examples",
        1e9,
        "10^9 images",
        False,
        1e-2,
        scaling.Law(1.30485, 0.82101, 2.07506, 0.39223, 0.27818, 0.88979, 4.51669),
    ),
}


def define_flags() -> None:
    """Defines the flags."""
    flags.DEFINE_string("data_dir", None, "folder with t5-data.csv or vit-data.json, or both")
    flags.DEFINE_integer("starts", 25, "random starts of a fit", lower_bound=1)
    flags.DEFINE_string("out_dir", "runs/scaling", "where to write")


def read(study: Study, folder: pathlib.Path) -> Points:
    """The points of a study."""
    columns = study.read((folder / study.file).read_text())
    sparsity, scale = np.array(columns["sparsity"]), np.array(columns["scale"])
    live = study.weights * scale * (1 - sparsity) / 1e6
    length = np.array(columns[study.length], float) / study.unit
    return Points(sparsity, live, length, np.array(columns["val-loss"]))


def fit(study: Study, points: Points, starts: int) -> tuple[scaling.Fit, float]:
    """A law of our own, and the mean Huber loss of the published one."""
    objective: dict[str, Any] = {"of_logs": study.of_logs, "delta": study.delta}
    published = scaling.huber(study.published, *points, **objective)
    return scaling.fit(*points, **objective, num_starts=starts), published


def rows(name: str, study: Study, found: scaling.Fit, published: float) -> list[dict[str, str]]:
    """Two rows of the table: the fit, and what was published."""
    table = []
    for what, law, loss in (
        ("fit", found.law, found.huber),
        ("published", study.published, published),
    ):
        row = {"points": name, "law": what}
        row |= {k: f"{x:.5f}" for k, x in law._asdict().items()} | {"Huber": f"{loss:.3e}"}
        if study.held_out:
            *where, measured = study.held_out
            told = float(scaling.predict(law, *where))
            row["held out"] = f"{told:.4f} ({100 * (told / measured - 1):+.2f} %)"
        else:
            row["held out"] = "-"
        table.append(row)
    return table


def budgets(name: str, study: Study, law: scaling.Law) -> list[dict[str, str]]:
    """The best sparsity of gradual pruning, by live weights and length of training."""
    table = []
    for live in (1, 10, 100, 1000):
        row = {"points": name, "live weights": f"{live:,} M"}
        for length in (1, 5, 20, 100):
            best, _ = scaling.best_sparsity(law, live, live * length)
            row[f"{length} x {study.unit_name}"] = f"{best:.2f}"
        table.append(row)
    return table


def draw(stem: pathlib.Path, studies: dict[str, tuple[Study, Points, scaling.Fit]]) -> None:
    """Points and laws, a panel for each study, at its longest training; .svg and .png."""
    figure, grid = plt.subplots(
        1, len(studies), figsize=(5 * len(studies), 3.9), layout="constrained", squeeze=False
    )
    for axes, (name, (study, points, found)) in zip(grid.flat, studies.items(), strict=True):
        longest = points.data.max()
        seen = points.data == longest
        x = np.geomspace(points.live.min(), points.live.max())
        for i, sparsity in enumerate(np.unique(points.sparsity)):
            color, these = f"C{i}", seen & (points.sparsity == sparsity)
            axes.plot(points.live[these], points.losses[these], "o", color=color, markersize=4)
            told = scaling.predict(found.law, sparsity, x, longest)
            axes.plot(x, told, color=color, label=f"{100 * sparsity:g} % sparse")
            told = scaling.predict(study.published, sparsity, x, longest)
            axes.plot(x, told, color=color, linestyle=":", linewidth=1)
        axes.plot([], [], "k:", linewidth=1, label="published law")
        axes.set_xscale("log")
        axes.set_xlabel("live weights, millions")
        axes.set_ylabel("validation loss")
        axes.set_title(f"{name}, {longest:g} x {study.unit_name}", loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
    figure.savefig(stem.with_suffix(".png"), dpi=110)
    plt.close(figure)


def main(argv: list[str]) -> None:
    """Runs what the flags say."""
    if len(argv) > 1:
        sys.exit(f"error: {argv[1]!r} is no flag; flags look like --starts=25. See --help.")
    console, out_dir = Console(), pathlib.Path(flags.FLAGS.out_dir)
    with settings.errors_in_one_line():
        folder = pathlib.Path(flags.FLAGS.data_dir or ".")
        there = {n: s for n, s in STUDIES.items() if (folder / s.file).exists()}
        if not there:
            files = " nor ".join(study.file for study in STUDIES.values())
            raise ValueError(
                f"--data_dir={folder}: neither {files} is there; they are in projects/bigsparse "
                "of github.com/google-research/jaxpruner."
            )
        studies, table, planned = {}, [], []
        for name, study in there.items():
            points = read(study, folder)
            found, published = fit(study, points, flags.FLAGS.starts)
            print(f"{name}: {found.num_found} of {flags.FLAGS.starts} starts ended in the best fit")
            studies[name] = study, points, found
            table += rows(name, study, found, published)
            planned.append((study, budgets(name, study, found.law)))
        out_dir.mkdir(parents=True, exist_ok=True)
    text = output.print_table(console, "L = (a (1-S)^b + c) N^-d + e D^-f + g", table)
    for study, each in planned:
        caption = f"sparsity that is best for a budget; live weights, training in {study.unit_name}"
        text += output.print_table(console, caption, each)
    (out_dir / "table.txt").write_text(text)
    draw(out_dir / "scaling", studies)
    print(f"written: {out_dir}/table.txt, scaling.svg and .png")


if __name__ == "__main__":
    define_flags()
    app.run(main)
