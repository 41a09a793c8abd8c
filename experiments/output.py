"""What people look at: progress, tables, pictures, and files for programs."""

import contextlib
import io
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

matplotlib.use("Agg")

History = Sequence[dict[str, float]]


@contextlib.contextmanager
def progress(
    console: Console, label: str, epochs: int, plain_every: int = 1
) -> Iterator[Callable[[dict[str, float]], None]]:
    """Gives a function to call with each epoch's record.

    On a terminal it moves a bar; elsewhere it prints one plain line for every ``plain_every``-th
    epoch and for the last.
    """
    if not console.is_terminal:

        def print_line(record: dict[str, float]) -> None:
            if record["epoch"] % plain_every == 0 or record["epoch"] == epochs:
                print(f"{label}  {_line(record, epochs)}", flush=True)

        yield print_line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(label, total=epochs)
        yield lambda record: bar.update(
            task, advance=1, description=f"{label}  {_line(record, epochs)}"
        )


def _line(record: dict[str, float], epochs: int) -> str:
    return (
        f"epoch {record['epoch']:3.0f}/{epochs}  loss {record['loss']:.4f}  "
        f"test {record['test_accuracy']:6.2f} %  sparsity {record['sparsity']:.4f}  "
        f"{record['images_per_second']:,.0f} images/s"
    )


def open_run(out_dir: pathlib.Path, config: dict[str, Any]) -> pathlib.Path:
    """Makes the folder of a run and writes its settings.

    Returns:
      The path of metrics.jsonl, emptied.

    Raises:
      ValueError: the folder holds a run of other settings, which would be lost.
    """
    path = out_dir / "settings.json"
    if path.exists():
        old = json.loads(path.read_text())
        differing = [k for k in {**old, **config} if old.get(k) != config.get(k)]
        if differing:
            changes = ", ".join(f"{k} {old.get(k)} -> {config.get(k)}" for k in differing)
            raise ValueError(
                f"{out_dir} holds a run of other settings ({changes}). "
                "Choose another --out_dir, or remove it."
            )
    out_dir.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config, indent=2) + "\n")
    metrics = out_dir / "metrics.jsonl"
    metrics.write_text("")
    return metrics


def append_jsonl(path: pathlib.Path, record: dict[str, Any]) -> None:
    """Adds one JSON object as a line."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def print_table(
    console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> str:
    """Prints a table, never cut off, and returns it as plain text."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    wide = Console(width=1000)
    width = wide.measure(table).maximum
    Console(width=max(width, console.width), file=console.file).print(table)
    with (plain := Console(width=width, file=io.StringIO())).capture() as text:
        plain.print(table)
    return text.get()


def plot_runs(path: pathlib.Path, title: str, runs: Mapping[str, Sequence[History]]) -> None:
    """One picture: accuracy and sparsity over steps, and the density of each layer at the end.

    Args:
      path: a .png file.
      title: heading.
      runs: histories by label, one for each seed; lines are means, bands go from min to max.
    """
    figure, (top, middle, bottom) = plt.subplots(
        3, 1, figsize=(8, 10), height_ratios=(3, 2, 2), layout="constrained"
    )
    layers = [k.removeprefix("density/") for k in _first(runs)[-1] if k.startswith("density/")]
    bar_width = 0.8 / len(runs)
    accuracies = []
    for i, (label, histories) in enumerate(runs.items()):
        steps = [record["step"] for record in histories[0]]
        color = f"C{i}"
        values = _series(histories, "test_accuracy")
        accuracies.append(values.mean(0))
        _line_with_band(top, steps, values, color, label)
        # Wider lines below, for many methods follow the same schedule.
        _line_with_band(
            middle,
            steps,
            100 * _series(histories, "sparsity"),
            color,
            label,
            1.5 + 0.9 * (len(runs) - 1 - i),
        )
        final = [np.mean([h[-1][f"density/{layer}"] for h in histories]) for layer in layers]
        x = np.arange(len(layers)) + (i - (len(runs) - 1) / 2) * bar_width
        bottom.bar(x, 100 * np.array(final), bar_width, color=color, label=label)
    top.set_ylabel("test accuracy (%)")
    settled = np.concatenate([a[len(a) // 4 :] for a in accuracies])
    low, high = settled.min(), max(a.max() for a in accuracies)
    top.set_ylim(low - 0.15 * (high - low) - 0.1, high + 0.1 * (high - low) + 0.1)
    middle.set_ylabel("sparsity (%)")
    middle.set_xlabel("optimizer steps")
    bottom.set_ylabel("weights kept at the end (%)")
    bottom.set_xticks(np.arange(len(layers)), layers)
    bottom.set_yscale("log")
    bottom.set_ylim(top=130)
    bottom.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    for axes in (top, middle, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    if len(runs) > 1:
        top.legend(loc="lower right", ncols=2, frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _first(runs: Mapping[str, Sequence[History]]) -> History:
    return next(iter(runs.values()))[0]


def _series(histories: Sequence[History], name: str) -> np.ndarray:
    """(seeds, epochs)."""
    return np.array([[record[name] for record in history] for history in histories])


def _line_with_band(
    axes: Any, steps: Any, values: np.ndarray, color: str, label: str, width: float = 1.6
) -> None:
    axes.plot(steps, values.mean(0), color=color, label=label, linewidth=width)
    if len(values) > 1:
        axes.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)
