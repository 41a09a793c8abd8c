"""Tables of figures and the file that holds them."""

import datetime
import os
import pathlib
import platform
from collections.abc import Sequence
from typing import NamedTuple

import jax
from matplotlib.figure import Figure


class Table(NamedTuple):
    """Rows under a title, and what a reader needs to know about them."""

    title: str
    rows: Sequence[dict[str, str]]  # all with the same keys, which head the columns
    note: str
    figure: tuple[str, Figure] | None = None  # name of a file beside the tables', and what it shows


def write(path: pathlib.Path, tables: Sequence[Table], about: str) -> None:
    """Writes a Markdown file, and the figures beside it."""
    parts = ["# Benchmarks", about, machine()]
    for table in tables:
        parts += [f"## {table.title}", table.note, _markdown(table.rows)]
        if table.figure is not None:
            name, figure = table.figure
            figure.savefig(path.parent / name, dpi=110)
            parts.append(f"![{table.title}]({name})")
    path.write_text("\n\n".join(parts) + "\n")


def machine() -> str:
    """What all of this was measured on, and when."""
    info = pathlib.Path("/proc/cpuinfo")
    names = [
        line.split(":", 1)[1].strip()
        for line in (info.read_text().splitlines() if info.exists() else [])
        if line.startswith("model name")
    ]
    processor = names[0] if names else platform.processor() or platform.machine()
    devices = jax.devices()
    return (
        f"{processor}, {cores()} cores; JAX device: {len(devices)} {devices[0].device_kind}; "
        f"jax {jax.__version__}, Python {platform.python_version()}; "
        f"{datetime.date.today().isoformat()}."
    )


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0))


def _markdown(rows: Sequence[dict[str, str]]) -> str:
    columns = list(rows[0])
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *(row.values() for row in rows)]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )
