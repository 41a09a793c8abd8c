"""The files of a run, for programs: settings, what it ran on, a line for each epoch, masks."""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import pathlib
import shlex
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

import granet_jax as gj
from experiments.engine import distributed
from experiments.engine.task import Told, told_from_json

Record = dict[str, float]


def digest(tree: Any) -> str:
    """A sha256 over the bits of all arrays of a tree, in the order of its leaves."""
    hashed = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        hashed.update(np.asarray(leaf).tobytes())
    return hashed.hexdigest()


@contextlib.contextmanager
def opened(
    out_dir: pathlib.Path,
    config: dict[str, Any],
    resume: bool,
    defaults: Mapping[str, Any] = types.MappingProxyType({}),
) -> Iterator[None]:
    """Holds a run's folder, so that no second process writes there; writes its settings.

    Args:
      out_dir: the folder; made if missing.
      config: the settings.
      resume: False = a folder that holds a run is an error.
      defaults: what settings were before they could be chosen; a folder from then lacks them.

    Raises:
      ValueError: the folder holds a run of other settings, or another process is at work there.
    """
    with contextlib.ExitStack() as stack:
        distributed.first(lambda: stack.enter_context(_opened(out_dir, config, resume, defaults)))
        yield


@contextlib.contextmanager
def _opened(
    out_dir: pathlib.Path, config: dict[str, Any], resume: bool, defaults: Mapping[str, Any]
) -> Iterator[None]:
    out_dir.mkdir(parents=True, exist_ok=True)
    with (out_dir / "lock").open("w") as lock:  # freed by the system however the process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process is training in {out_dir}.") from error
        path = out_dir / "settings.json"
        if path.exists():
            _check_same(out_dir, config, resume, defaults)
        write(path, json.dumps(config, indent=2) + "\n")
        yield


def _check_same(
    out_dir: pathlib.Path, config: dict[str, Any], resume: bool, defaults: Mapping[str, Any]
) -> None:
    written = read_json(out_dir, "settings.json")
    old, new = json.loads(json.dumps([{**defaults, **written}, config]))
    if unknown := [f"{k} {written[k]}" for k in written if k not in new]:
        raise ValueError(
            f"{out_dir} holds a run with settings that there are no more ({', '.join(unknown)}). "
            "Go on with the version that began it, or choose another --out_dir."
        )
    differing = [k for k in new if k not in old or old[k] != new[k]]
    if differing:
        changes = ", ".join(f"{k} {old.get(k, 'unknown')} -> {new[k]}" for k in differing)
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
    old = read_about(out_dir).get("data", {})
    differing = [k for k in facts if k in old and old[k] != facts[k]]
    if differing:
        changes = ", ".join(f"{k} {old[k]} -> {facts[k]}" for k in differing)
        raise ValueError(
            f"{out_dir} holds a run on other data ({changes}). Choose another --out_dir."
        )


def write_about(
    out_dir: pathlib.Path, layers: list[dict[str, Any]], facts: dict[str, Any], told: Told
) -> None:
    """Notes how the run was called, each time, on what, and what task, data and layers are."""
    if jax.process_index() != 0:
        return
    devices = jax.devices()
    session = {
        "command": _command(),
        "devices": f"{len(devices)} {devices[0].device_kind}",
        "jax": jax.__version__,
    }
    sessions = [*read_about(out_dir).get("sessions", []), session]
    about = {"sessions": sessions, "task": told._asdict(), "data": facts, "layers": layers}
    write(out_dir / "about.json", json.dumps(about, indent=2) + "\n")


def note_shortfall(out_dir: pathlib.Path, shortfall: str) -> None:
    """Notes in about.json what was asked for and not got, in one line; "" = nothing."""
    if jax.process_index() == 0:
        about = read_about(out_dir) | {"shortfall": shortfall}
        write(out_dir / "about.json", json.dumps(about, indent=2) + "\n")


def _command() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["python", "-m", spec.name] if spec else ["python", sys.argv[0]]
    return shlex.join(program + sys.argv[1:])


def read_json(out_dir: pathlib.Path, name: str) -> dict[str, Any]:
    """Reads settings.json or about.json.

    Raises:
      ValueError: something else is in it than was written.
    """
    try:
        return dict(json.loads((out_dir / name).read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{out_dir / name} is damaged: {error}. Put it back, or choose another --out_dir."
        ) from error


def read_about(out_dir: pathlib.Path) -> dict[str, Any]:
    """What about.json holds; of runs of before, less."""
    return read_json(out_dir, "about.json") if (out_dir / "about.json").exists() else {}


def read_history(out_dir: pathlib.Path) -> list[Record]:
    """The records of the epochs; a line that a killed process left unfinished is skipped."""
    path = out_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    records = []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def read_told(out_dir: pathlib.Path) -> Told:
    """What the folder tells of the task."""
    return told_from_json(read_about(out_dir), read_json(out_dir, "settings.json"))


def best(history: list[Record], told: Told) -> Record:
    """The best epoch among those with no more weights than at the end; the latest of equals."""
    most = history[-1].get("live", math.inf)
    final = [record for record in history if record.get("live", math.inf) <= most]
    return max(reversed(final), key=lambda r: np.nan_to_num(told.score(r), nan=-np.inf))


def rewind(out_dir: pathlib.Path, step: int, steps_per_epoch: int) -> list[Record]:
    """Drops the records after a step, which are going to be written again.

    Raises:
      ValueError: records of epochs up to the step are missing.
    """
    history = [r for r in read_history(out_dir) if r.get("step", step + 1) <= step]
    if len(history) != step // steps_per_epoch:
        raise ValueError(
            f"{out_dir}/metrics.jsonl holds {len(history)} of the {step // steps_per_epoch} epochs "
            "before the last checkpoint. Put it back, or choose another --out_dir."
        )
    if jax.process_index() == 0:
        write(out_dir / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in history))
    return history


def append_record(out_dir: pathlib.Path, record: Record) -> None:
    """Adds a line to metrics.jsonl."""
    if jax.process_index() == 0:
        with (out_dir / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")


def write(path: pathlib.Path, text: str) -> None:
    """Whole or not at all."""
    new = path.with_suffix(".new")
    new.write_text(text)
    os.replace(new, path)


def write_masks(out_dir: pathlib.Path, masks: Any) -> None:
    """masks.npz: the bits of each mask by its path; a byte holds eight."""
    if jax.process_index() == 0:
        packed: dict[str, Any] = {k: np.packbits(x) for k, x in gj.trees.paths(masks).items()}
        new = out_dir / "masks.new"
        with new.open("wb") as file:
            np.savez(file, **packed)
        os.replace(new, out_dir / "masks.npz")


def read_masks(out_dir: pathlib.Path, like: Any) -> Any:
    """The masks of a finished run.

    Args:
      out_dir: its folder.
      like: tree of arrays or ``ShapeDtypeStruct``s of the masks' shapes.

    Raises:
      ValueError: there are none, or they are of another network.
    """
    path = out_dir / "masks.npz"
    if not path.exists():
        raise ValueError(f"there is no {path}; name a run that has come to its end.")
    with np.load(path) as packed:
        held = {name: packed[name] for name in packed.files}
    masks = []
    for name, leaf in gj.trees.paths(like).items():
        bits = held.get(name)
        if bits is None or bits.size != -(-leaf.size // 8):
            raise ValueError(f"{path} holds the masks of another network.")
        masks.append(np.unpackbits(bits, count=leaf.size).reshape(leaf.shape).astype(bool))
    return jax.tree.unflatten(jax.tree.structure(like), masks)


def agreement(masks: Any, others: Any, prunable: gj.trees.Rules = ()) -> tuple[float, float]:
    """Share of the live weights that are live in other masks too, and what chance would give.

    By chance: masks with the same number of live weights in each layer, drawn without regard to
    each other.

    Example:
      >>> import numpy as np
      >>> a = {"kernel": np.array([[True, True], [False, False]])}
      >>> b = {"kernel": np.array([[True, False], [True, False]])}
      >>> agreement(a, b)
      (0.5, 0.5)
    """
    floats = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float32), masks)
    shared = expected = live = 0.0
    leaves = gj.trees.describe(floats, prunable)
    pairs = zip(leaves, jax.tree.leaves(masks), jax.tree.leaves(others), strict=True)
    for leaf, mask, other in pairs:
        if leaf.prunable:
            mine, theirs = (x.reshape(leaf.num_layers, -1) for x in (mask, other))
            shared += float((mine & theirs).sum())
            expected += float((mine.sum(1) * theirs.mean(1)).sum())
            live += float(mine.sum())
    return shared / max(live, 1.0), expected / max(live, 1.0)
