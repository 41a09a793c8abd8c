"""Text as bytes, from the files of a folder; whole files are held out."""

import hashlib
import pathlib
import sysconfig
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

HELD_OUT = 20  # one file in so many, by a hash of its path
_LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})


class Text(NamedTuple):
    """Files joined by zero bytes, uint8 ``(n,)`` each."""

    train: np.ndarray
    validation: np.ndarray


def read(folder: str | pathlib.Path | None = None) -> Text:
    """Reads all text below a folder, in the order of paths.

    Args:
      folder: its files are taken but for those that hold a zero byte (they are no text); None =
        the ``*.py`` of Python's own library, without tests and installed packages.

    Raises:
      ValueError: no file is left for training, or none to be held out, or there is too much.

    Example:
      >>> text = read()
      >>> text.train.dtype, len(text.train) > len(text.validation)
      (dtype('uint8'), True)
    """
    root = pathlib.Path(folder or sysconfig.get_paths()["stdlib"])
    if not root.is_dir():
        raise ValueError(f"--text_dir={root} is no folder.")
    paths = library(root) if folder is None else root.rglob("*")
    train: list[bytes] = []
    validation: list[bytes] = []
    for name in sorted(path.relative_to(root).as_posix() for path in paths if path.is_file()):
        content = (root / name).read_bytes()
        if content and 0 not in content:
            (validation if is_held_out(name) else train).append(content)
    if not train or not validation:
        raise ValueError(
            f"{root} has {len(train)} text files to train on and {len(validation)} to hold out; "
            f"about one in {HELD_OUT} is held out, by its path. Split the text into more files."
        )
    text = Text(_joined(train), _joined(validation))
    if len(text.train) >= 2**31:
        raise ValueError(
            f"{root} has {len(text.train):,} bytes of text, of which 2^31 - 1 can be used. "
            "Take some files out."
        )
    return text


def library(root: pathlib.Path) -> Iterator[pathlib.Path]:
    """The ``*.py`` of Python's own library below ``root``, without tests and installed packages."""
    for path in root.rglob("*.py"):
        if not _LEFT_OUT.intersection(path.relative_to(root).parts):
            yield path


def is_held_out(name: str) -> bool:
    """Whether a file is for validation; ``name`` is its path below the folder, with slashes."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) % HELD_OUT == 0


def facts(text: Text) -> dict[str, Any]:
    """JSON, by which other text is noticed."""
    return {
        name: f"{len(split):,} bytes, sha256 {hashlib.sha256(split).hexdigest()[:16]}"
        for name, split in text._asdict().items()
    }


def held_out_windows(text: Text, num: int, length: int) -> np.ndarray:
    """Windows of the held-out text, evenly spaced, the same each time; uint8 ``(num, length)``.

    Raises:
      ValueError: there is less text than one window.
    """
    offsets = np.linspace(0, _last_offset(text.validation, length), num).astype(np.int64)
    return text.validation[offsets[:, None] + np.arange(length)[None, :]]


def check_length(text: Text, length: int) -> None:
    """Raises a ValueError where either part of the text is shorter than a window."""
    for split in text:
        _last_offset(split, length)


def _last_offset(split: np.ndarray, length: int) -> int:
    if len(split) < length:
        raise ValueError(
            f"--context={length - 1} needs {length} bytes of text on both sides; the smaller has "
            f"{len(split)}. Lower --context, or give more text."
        )
    return len(split) - length


def _joined(contents: Iterable[bytes]) -> np.ndarray:
    return np.frombuffer(b"\0".join(contents), np.uint8)
