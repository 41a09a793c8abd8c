"""One self-contained page about one run or many.

Made from the files of the runs alone, so it can be made at any time, also while they go on. Runs of
one method from several seeds share a line and a band.
"""

import functools
import io
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator

from experiments.engine import files
from experiments.engine.task import Told

matplotlib.use("Agg")

Runs = Mapping[str, Sequence[pathlib.Path]]  # label -> a folder for each seed

Histories = Mapping[str, Sequence[list[files.Record]]]  # label -> a history for each seed

_CURVES = (  # name in the records, label, factor
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
    told = files.read_told(first)
    page = _TEMPLATES.get_template("page.html").render(
        title=_title(runs, told),
        summary=summary(histories, told),
        curves=Markup(_svg(_curves(histories, told))),
        heatmaps=Markup(_svg(_heatmaps(histories)) if _layers_shown(histories) else ""),
        labels=list(runs),
        explored=["exploration" in group[0][-1] for group in histories.values()],
        layers=_layers(first, histories),
        selection=selection(told),
        settings=_settings(runs),
        abouts=[
            (folder, files.read_about(folder)) for folders in runs.values() for folder in folders
        ],
    )
    path.write_text(page)


def summary(histories: Histories, told: Told) -> list[dict[str, str]]:
    """The table: a row for each label; of several, with their ranking and its spread."""
    ranks = _ranks(histories, told)
    return [_row(label, group, told, ranks.get(label, {})) for label, group in histories.items()]


def _row(
    label: str, histories: Sequence[list[files.Record]], told: Told, rank: dict[str, str]
) -> dict[str, str]:
    """Last and best epoch, size and speed.

    Records of before may lack a number; there it says "-".
    """
    last = [history[-1] for history in histories]
    best = [files.best(history, told) for history in histories]
    every = [record for history in histories for record in history]

    def of(form: Callable[[list[float]], str], records: list[files.Record], name: str) -> str:
        all_have_it = all(name in record for record in records)
        return form([record[name] for record in records]) if all_have_it else "-"

    metric, shown = told.metrics[0], told.key(told.shown)
    mean = functools.partial(mean_and_std, form=metric.form)
    unit = f" ({metric.unit})" if metric.unit else ""
    length = (told.unit, told.unit) if told.counts_units else ("epochs", "epoch")
    return {
        "method": label,
        length[0]: of(_span, last, length[1]),
        "weights kept": of(_span, last, "live"),
        "sparsity": of(functools.partial(_span, form=".6f"), last, "sparsity"),
        metric.label(told.shown, ", last epoch"): of(mean, last, shown),
        f"best epoch{unit}": of(mean, best, shown),
        **rank,
        "inference FLOPs": of(_ratio, last, "inference_flops"),
        "training FLOPs": of(_ratio, last, "training_flops"),
        f"{told.unit}/s": of(lambda x: f"{np.median(x):,.0f}", every, f"{told.unit}_per_second"),
    }


def _ranks(histories: Histories, told: Told) -> dict[str, dict[str, str]]:
    """The place of each label among all, from 1: the mean over seeds, lowest and highest."""
    if len(histories) < 2:
        return {}
    name, sign = told.key(told.shown), told.metrics[0].sign
    seeds = min(len(group) for group in histories.values())
    values = np.array(
        [
            [sign * history[-1].get(name, np.nan) for history in group[:seeds]]
            for group in histories.values()
        ]
    )
    values = np.nan_to_num(values, nan=-np.inf)
    places = 1 + (values[None] > values[:, None]).sum(1)  # (labels, seeds); equals share a place
    return {
        label: {"rank": f"{each.mean():.1f} ({each.min()}-{each.max()})"}
        for label, each in zip(histories, places, strict=True)
    }


def selection(told: Told) -> str:
    """Says on what the best epoch was chosen."""
    if told.chosen == "validation":
        where = "validation data held out of training"
    else:
        where = "the test set itself, as in the GraNet paper"
    return f"The best epoch is chosen among those at the final sparsity, on {where}."


def _title(runs: Runs, told: Told) -> str:
    config = files.read_json(next(iter(runs.values()))[0], "settings.json")
    return f"{told.title}, sparsity {config['sparsity']:g}"


def _settings(runs: Runs) -> list[tuple[str, str]]:
    """Each setting once; where runs differ, all values."""
    configs = [files.read_json(f, "settings.json") for fs in runs.values() for f in fs]
    return [
        (name, ", ".join(dict.fromkeys(str(config.get(name, "-")) for config in configs)))
        for name in {name: None for config in configs for name in config}
    ]


def _layers(folder: pathlib.Path, histories: Histories) -> list[dict[str, Any]]:
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


def _curves(histories: Histories, told: Told) -> Any:
    """A panel for each number over training: lines of means, bands from lowest to highest seed."""
    metrics = [
        (f"{split}_{metric.name}", metric.label(split), 1)
        for metric in told.metrics
        for split in sorted(told.splits)
    ]
    every = (*metrics, ("loss", told.loss_label, 1), *_CURVES)
    names = {name for group in histories.values() for h in group for record in h for name in record}
    shown = [curve for curve in every if curve[0] in names]
    rows = (len(shown) + 1) // 2
    figure, grid = plt.subplots(
        rows, 2, figsize=(11, 2.9 * rows), layout="constrained", squeeze=False
    )
    settled = {name for name, *_ in metrics}
    for axes, (name, label, factor) in zip(grid.flat, shown, strict=False):
        _lines(axes, histories, told, (name, factor), 0.0 if name in settled else 0.8)
        axes.set_title(label, loc="left", fontsize=10)
        axes.set_xlabel(told.unit if told.counts_units else "epoch")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        if name in settled:
            _zoom(axes, histories, name)
        if name == "loss" and any(np.isfinite(line.get_ydata()).any() for line in axes.lines):
            _logarithmic(axes)
    for axes in list(grid.flat)[len(shown) :]:
        axes.axis("off")
    if len(histories) > 1:
        higher = told.metrics[0].higher_is_better
        place = "lower right" if higher else "upper right"
        grid.flat[0].legend(loc=place, ncols=2, frameon=False, fontsize=8)
    return figure


def _lines(
    axes: Any, histories: Histories, told: Told, curve: tuple[str, float], widening: float
) -> None:
    """A line for each label; ``widening`` for those below, where many follow the same schedule."""
    (name, factor), along = curve, told.unit if told.counts_units else "epoch"
    for i, (label, group) in enumerate(histories.items()):
        if not any(name in record for history in group for record in history):
            continue
        epochs = min(len(history) for history in group)
        x = [record.get(along, k + 1) for k, record in enumerate(group[0][:epochs])]
        # Records of before may lack it: a gap.
        values = factor * np.array([[r.get(name, np.nan) for r in h[:epochs]] for h in group])
        width = 1.5 + widening * (len(histories) - 1 - i)
        axes.plot(x, values.mean(0), color=f"C{i}", label=label, linewidth=width, marker=_dot(x))
        if len(values) > 1:
            axes.fill_between(
                x, values.min(0), values.max(0), color=f"C{i}", alpha=0.15, linewidth=0
            )


def _logarithmic(axes: Any) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.yaxis.set_minor_formatter("{x:g}")


def _dot(x: Sequence[float]) -> str | None:
    return "o" if len(x) == 1 else None


def _zoom(axes: Any, histories: Histories, name: str) -> None:
    """Shows what comes after the first quarter of training."""
    every = [h for group in histories.values() for h in group]
    settled = [r[name] for h in every for r in h[len(h) // 4 :] if name in r]
    if settled and np.isfinite(settled).all():
        low, high = min(settled), max(settled)
        least = 1e-3 * max(abs(low), abs(high))
        axes.set_ylim(low - 0.15 * (high - low) - least, high + 0.1 * (high - low) + least)


def _layers_shown(histories: Histories) -> list[str]:
    return [k for k in next(iter(histories.values()))[0][-1] if k.startswith("density/")]


def _heatmaps(histories: Histories) -> Any:
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


def mean_and_std(values: Sequence[float], form: str = "5.2f") -> str:
    """Of seeds, for a table: 97.50 ± 0.25, or the value of a single one."""
    std = f" ± {np.std(values, ddof=1):{form[form.index('.') :]}}" if len(values) > 1 else ""
    return f"{np.mean(values):{form}}{std}"


_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent), autoescape=True
)
