"""The files of a run, for programs: settings, what it ran on, and a line for each epoch."""

import contextlib
import fcntl
import json
import os
import pathlib
import shlex
import sys
from collections.abc import Iterator
from typing import Any

import jax

from experiments import distributed

Record = dict[str, float]


@contextlib.contextmanager
def opened(out_dir: pathlib.Path, config: dict[str, Any], resume: bool) -> Iterator[None]:
    """Holds a run's folder, so that no second process writes there; writes its settings.

    Raises:
      ValueError: the folder holds a run of other settings, or another process is at work there.
    """
    with contextlib.ExitStack() as stack:
        distributed.first(lambda: stack.enter_context(_opened(out_dir, config, resume)))
        yield


@contextlib.contextmanager
def _opened(out_dir: pathlib.Path, config: dict[str, Any], resume: bool) -> Iterator[None]:
    out_dir.mkdir(parents=True, exist_ok=True)
    with (out_dir / "lock").open("w") as lock:  # freed by the system however the process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process is training in {out_dir}.") from error
        path = out_dir / "settings.json"
        if path.exists():
            _check_same(out_dir, config, resume)
        else:
            _write(path, json.dumps(config, indent=2) + "\n")
        yield


def _check_same(out_dir: pathlib.Path, config: dict[str, Any], resume: bool) -> None:
    old, new = json.loads((out_dir / "settings.json").read_text()), json.loads(json.dumps(config))
    differing = [k for k in {**old, **new} if old.get(k) != new.get(k)]
    if differing:
        changes = ", ".join(f"{k} {old.get(k)} -> {new.get(k)}" for k in differing)
        raise ValueError(
            f"{out_dir} holds a run of other settings ({changes}). "
            "Choose another --out_dir, or remove it."
        )
    if not resume:
        raise ValueError(
            f"{out_dir} holds a run, which --noresume would overwrite. "
            "Choose another --out_dir, or remove it."
        )


def check_data(out_dir: pathlib.Path, facts: dict[str, Any]) -> None:
    """Refuses to go on with a run on other data.

    Raises:
      ValueError: the folder's run was on data with other facts.
    """
    path = out_dir / "about.json"
    old = read_json(out_dir, "about.json").get("data", facts) if path.exists() else facts
    differing = [k for k in facts if old.get(k) != facts[k]]
    if differing:
        changes = ", ".join(f"{k} {old.get(k)} -> {facts[k]}" for k in differing)
        raise ValueError(
            f"{out_dir} holds a run on other data ({changes}). Choose another --out_dir."
        )


def write_about(out_dir: pathlib.Path, layers: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    """Notes how the run was called, each time, on what, and what its data and layers are."""
    if jax.process_index() != 0:
        return
    path = out_dir / "about.json"
    about = json.loads(path.read_text()) if path.exists() else {"sessions": []}
    about["data"] = facts
    devices = jax.devices()
    about["sessions"].append(
        {
            "command": _command(),
            "devices": f"{len(devices)} {devices[0].device_kind}",
            "jax": jax.__version__,
        }
    )
    about["layers"] = layers
    _write(path, json.dumps(about, indent=2) + "\n")


def _command() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["python", "-m", spec.name] if spec else ["python", sys.argv[0]]
    return shlex.join(program + sys.argv[1:])


def read_json(out_dir: pathlib.Path, name: str) -> Any:
    """Reads settings.json or about.json."""
    return json.loads((out_dir / name).read_text())


def read_history(out_dir: pathlib.Path) -> list[Record]:
    """The records of the epochs; a line that a killed process left unfinished is skipped."""
    path = out_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    records = []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def selected_by(record: Record) -> str:
    """By which accuracy the best epoch is chosen: on the validation images, if any are held out."""
    return "validation_accuracy" if "validation_accuracy" in record else "test_accuracy"


def best(history: list[Record]) -> Record:
    """The best epoch among those with no more weights than at the end; the latest of equals."""
    final = [record for record in history if record["live"] <= history[-1]["live"]]
    return max(reversed(final), key=lambda record: record[selected_by(record)])


def rewind(out_dir: pathlib.Path, step: int, steps_per_epoch: int) -> list[Record]:
    """Drops the records after a step, which are going to be written again.

    Raises:
      ValueError: records of epochs up to the step are missing.
    """
    history = [record for record in read_history(out_dir) if record["step"] <= step]
    if len(history) != step // steps_per_epoch:
        raise ValueError(
            f"{out_dir}/metrics.jsonl holds {len(history)} of the {step // steps_per_epoch} epochs "
            "before the last checkpoint. Put it back, or choose another --out_dir."
        )
    if jax.process_index() == 0:
        _write(out_dir / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in history))
    return history


def append_record(out_dir: pathlib.Path, record: Record) -> None:
    """Adds a line to metrics.jsonl."""
    if jax.process_index() == 0:
        with (out_dir / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")


def _write(path: pathlib.Path, text: str) -> None:
    """Whole or not at all."""
    new = path.with_suffix(".new")
    new.write_text(text)
    os.replace(new, path)
