"""What appears on the terminal: progress and tables."""

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from experiments.engine.files import Record
from experiments.engine.training import Trainer


@contextlib.contextmanager
def progress(
    console: Console, label: str, trainer: Trainer, plain_every: int = 1
) -> Iterator[Callable[[Record], None]]:
    """Gives a function to call with each epoch's record.

    On a terminal it moves a bar; elsewhere it prints one plain line for every ``plain_every``-th
    epoch and for the last.
    """
    epochs = trainer.length.epochs
    if not console.is_terminal:

        def print_line(record: Record) -> None:
            if record["epoch"] % plain_every == 0 or record["epoch"] == epochs:
                print(f"{label}  {_line(record, trainer)}", flush=True)

        yield print_line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(label, total=epochs)
        yield lambda record: bar.update(
            task, completed=record["epoch"], description=f"{label}  {_line(record, trainer)}"
        )


def _line(record: Record, trainer: Trainer) -> str:
    told = trainer.told
    metric = told.metrics[0]
    return (
        f"epoch {record['epoch']:3.0f}/{trainer.length.epochs}  loss {record['loss']:.4f}  "
        f"{metric.label(told.shown)} {record[told.key(told.shown)]:{metric.form}}  "
        f"sparsity {record['sparsity']:.4f}  "
        f"{record[f'{told.unit}_per_second']:,.0f} {told.unit}/s"
    )


def print_table(console: Console, title: str, rows: Sequence[dict[str, str]]) -> str:
    """Prints a table, never cut off, and returns it as plain text; keys head the columns."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(rows[0]):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row.values())
    wide = Console(width=1000)
    width = wide.measure(table).maximum
    Console(width=max(width, console.width), file=console.file).print(table)
    with (plain := Console(width=width, file=io.StringIO())).capture() as text:
        plain.print(table)
    return text.get()
