"""One self-contained page about one run or many: ``python -m experiments.report FOLDER [FOLDER]``.

Made from the files of the runs alone, so it can be made at any time, also while they go on. Runs of
one method from several seeds share a line and a band.
"""

import functools
import io
import pathlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jinja2
import matplotlib
import numpy as np
from absl import app
from markupsafe import Markup
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator

from experiments import files, settings

matplotlib.use("Agg")

Runs = Mapping[str, Sequence[pathlib.Path]]  # label -> a folder for each seed

CURVES = (  # name in the records, label, factor
    ("test_accuracy", "test accuracy (%)", 1),
    ("validation_accuracy", "validation accuracy (%)", 1),
    ("loss", "training loss", 1),
    ("sparsity", "sparsity (%)", 100),
    ("regeneration_fraction", "regeneration fraction (%)", 100),
    ("churn", "churn: weights newly live (% of all live)", 100),
    ("exploration", "exploration rate R_s: weights live at least once (%)", 100),
    ("training_flops", "training FLOPs so far (% of dense)", 100),
)


def write(path: pathlib.Path, runs: Runs) -> None:
    """Writes the page.

    Args:
      path: an .html file.
      runs: folders of runs that have finished an epoch, by label.
    """
    histories = {
        label: [files.read_history(folder) for folder in folders] for label, folders in runs.items()
    }
    first = next(iter(runs.values()))[0]
    page = _TEMPLATES.get_template("report.html").render(
        title=_title(runs),
        summary=[summarise(label, histories[label]) for label in runs],
        curves=Markup(_svg(_curves(histories))),
        heatmaps=Markup(_svg(_heatmaps(histories)) if _layers_shown(histories) else ""),
        labels=list(runs),
        explored=["exploration" in group[0][-1] for group in histories.values()],
        layers=_layers(first, histories),
        selection=selection(histories),
        settings=_settings(runs),
        abouts=[
            (folder, files.read_about(folder)) for folders in runs.values() for folder in folders
        ],
    )
    path.write_text(page)


def summarise(label: str, histories: Sequence[list[files.Record]]) -> dict[str, str]:
    """What a table says of the runs of one label: last and best epoch, size and speed.

    Records of before may lack a number; there it says "-".
    """
    last = [history[-1] for history in histories]
    best = [files.best(history) for history in histories]
    every = [record for history in histories for record in history]

    def told(form: Callable[[list[float]], str], records: list[files.Record], name: str) -> str:
        all_have_it = all(name in record for record in records)
        return form([record[name] for record in records]) if all_have_it else "-"

    return {
        "method": label,
        "epochs": told(_span, last, "epoch"),
        "weights kept": told(_span, last, "live"),
        "sparsity": told(functools.partial(_span, form=".6f"), last, "sparsity"),
        "test accuracy, last epoch (%)": told(mean_and_std, last, "test_accuracy"),
        "best epoch (%)": told(mean_and_std, best, "test_accuracy"),
        "inference FLOPs": told(_ratio, last, "inference_flops"),
        "training FLOPs": told(_ratio, last, "training_flops"),
        "images/s": told(lambda x: f"{np.median(x):,.0f}", every, "images_per_second"),
    }


def selection(histories: Mapping[str, Sequence[list[files.Record]]]) -> str:
    """Says on which images the best epoch was chosen."""
    names = {files.selected_by(h[-1]) for group in histories.values() for h in group}
    if names == {"validation_accuracy"}:
        images = "validation images held out of training"
    else:
        images = "the test set itself, as in the GraNet paper"
    return f"The best epoch is chosen among those at the final sparsity, on {images}."


def _title(runs: Runs) -> str:
    config = files.read_json(next(iter(runs.values()))[0], "settings.json")
    return f"{config['dataset']}, {config['model']}, sparsity {config['sparsity']:g}"


def _settings(runs: Runs) -> list[tuple[str, str]]:
    """Each setting once; where runs differ, all values."""
    configs = [files.read_json(f, "settings.json") for fs in runs.values() for f in fs]
    return [
        (name, ", ".join(dict.fromkeys(str(config.get(name, "-")) for config in configs)))
        for name in {name: None for config in configs for name in config}
    ]


def _layers(
    folder: pathlib.Path, histories: Mapping[str, Sequence[list[files.Record]]]
) -> list[dict[str, Any]]:
    """For each leaf: what about.json tells, density and exploration at the end by label."""
    return [
        layer
        | {
            name: [
                _mean_at_end(group, f"{name}/{layer.get('path')}") for group in histories.values()
            ]
            for name in ("density", "exploration")
        }
        for layer in files.read_about(folder).get("layers", [])
    ]


def _mean_at_end(group: Sequence[list[files.Record]], name: str) -> float | None:
    if any(name not in history[-1] for history in group):
        return None
    return float(np.mean([history[-1][name] for history in group]))


def _curves(histories: Mapping[str, Sequence[list[files.Record]]]) -> Any:
    has = {
        label: {name for history in group for record in history for name in record}
        for label, group in histories.items()
    }
    shown = [curve for curve in CURVES if any(curve[0] in names for names in has.values())]
    rows = (len(shown) + 1) // 2
    figure, grid = plt.subplots(
        rows, 2, figsize=(11, 2.9 * rows), layout="constrained", squeeze=False
    )
    for axes, (name, label, factor) in zip(grid.flat, shown, strict=False):
        for i, (method, group) in enumerate(histories.items()):
            if name not in has[method]:
                continue
            epochs = min(len(history) for history in group)
            x = range(1, epochs + 1)
            # Records of before may lack it: a gap.
            values = factor * np.array([[r.get(name, np.nan) for r in h[:epochs]] for h in group])
            # Wider lines below, for many methods follow the same schedule.
            width = 1.5 + (0.0 if "accuracy" in name else 0.8 * (len(histories) - 1 - i))
            axes.plot(
                x, values.mean(0), color=f"C{i}", label=method, linewidth=width, marker=_dot(x)
            )
            if len(values) > 1:
                axes.fill_between(
                    x, values.min(0), values.max(0), color=f"C{i}", alpha=0.15, linewidth=0
                )
        axes.set_title(label, loc="left", fontsize=10)
        axes.set_xlabel("epoch")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        if "accuracy" in name:
            _zoom(axes, histories, name)
        if name == "loss" and any(np.isfinite(line.get_ydata()).any() for line in axes.lines):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
            axes.yaxis.set_minor_formatter("{x:g}")
    for axes in list(grid.flat)[len(shown) :]:
        axes.axis("off")
    if len(histories) > 1:
        grid.flat[0].legend(loc="lower right", ncols=2, frameon=False, fontsize=8)
    return figure


def _dot(x: Sequence[float]) -> str | None:
    return "o" if len(x) == 1 else None


def _zoom(axes: Any, histories: Mapping[str, Sequence[list[files.Record]]], name: str) -> None:
    """Shows what comes after the first quarter of training."""
    every = [h for group in histories.values() for h in group]
    settled = [r[name] for h in every for r in h[len(h) // 4 :] if name in r]
    low, high = min(settled, default=0.0), max(settled, default=100.0)
    axes.set_ylim(low - 0.15 * (high - low) - 0.1, high + 0.1 * (high - low) + 0.1)


def _layers_shown(histories: Mapping[str, Sequence[list[files.Record]]]) -> list[str]:
    return [k for k in next(iter(histories.values()))[0][-1] if k.startswith("density/")]


def _heatmaps(histories: Mapping[str, Sequence[list[files.Record]]]) -> Any:
    """Density of each layer over time, of the first seed."""
    names = _layers_shown(histories)
    height = 1.1 + 0.17 * len(names)
    figure, grid = plt.subplots(
        len(histories),
        1,
        figsize=(11, height * len(histories)),
        layout="constrained",
        squeeze=False,
    )
    values = {
        label: 100 * np.array([[record.get(n, np.nan) for record in group[0]] for n in names])
        for label, group in histories.items()
    }
    lowest = max(min(v[v > 0].min(initial=100.0) for v in values.values()), 1e-3)
    norm = matplotlib.colors.LogNorm(min(lowest, 99.0), 100.0)
    for axes, (label, densities) in zip(grid.flat, values.items(), strict=True):
        epochs = np.arange(densities.shape[1] + 1) + 0.5
        edges = np.arange(len(names) + 1)
        image = axes.pcolormesh(
            epochs, edges, np.maximum(densities, 1e-9), norm=norm, rasterized=True
        )
        axes.set_yticks(
            np.arange(len(names)) + 0.5, [n.removeprefix("density/") for n in names], fontsize=7
        )
        axes.invert_yaxis()
        axes.set_title(f"{label}: weights kept in each layer (%)", loc="left", fontsize=10)
        axes.set_xlabel("epoch")
    figure.colorbar(image, ax=list(grid.flat), format="%g", aspect=30)
    return figure


def _svg(figure: Any) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", dpi=150, metadata={"Date": None})
    plt.close(figure)
    return file.getvalue()[file.getvalue().index("<svg") :]


def _span(values: Any, form: str = ",") -> str:
    return "-".join(f"{v:{form}}" for v in sorted(set(values)))


def _ratio(values: Iterable[float]) -> str:
    return f"{np.mean(list(values)):.4f}x"


def mean_and_std(values: Sequence[float]) -> str:
    """Of seeds, for a table: 97.50 ± 0.25, or the value of a single one."""
    std = f" ± {np.std(values, ddof=1):4.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):5.2f}{std}"


_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent), autoescape=True
)


def main(argv: list[str]) -> None:
    """Writes FOLDER/report.html for each folder given."""
    if len(argv) < 2:
        sys.exit("error: name the folders of runs, as in runs/digits-lenet_300_100-granet-0.98-0.")
    for folder in map(pathlib.Path, argv[1:]):
        with settings.errors_in_one_line():
            if not any("epoch" in record for record in files.read_history(folder)):
                raise ValueError(f"{folder} holds no run that has finished an epoch.")
            method = files.read_json(folder, "settings.json")["method"]
            write(folder / "report.html", {method: [folder]})
            print(f"written: {folder}/report.html")


if __name__ == "__main__":
    app.run(main)
