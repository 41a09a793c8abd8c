"""Sentences of English prose, from the docstrings of Python's own library; and their tokens.

The library is there wherever Python is, so that sentences need no download. Whole packages are held
out: ``asyncio`` is in one split with all of its modules.
"""

import ast
import hashlib
import pathlib
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from experiments.data import text

SHORTEST, LONGEST = 6, 40  # words of a sentence
_SEED = 0  # of the order
# Where a sentence ends: at a stop that a capital follows, and that is none of an abbreviation.
_END = re.compile(r"(?<=[.!?])(?<!\be\.g\.)(?<!\bi\.e\.)(?<!\bcf\.)(?<!\bvs\.)\s+(?=[A-Z])")
_PROSE = re.compile(r"[A-Z][A-Za-z0-9 ,;:'\"()/.!?-]*[a-z)][.!?]")
_LETTERS = 0.85  # of the characters that are no spaces, at least


class Sentences(NamedTuple):
    """Sentences by what they are for; each is in one split, once, as is each package."""

    calibration: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]


def read(folder: str | pathlib.Path | None = None) -> Sentences:
    """Reads the sentences of docstrings, in an order that is shuffled and always the same.

    Sentences have ``SHORTEST`` to ``LONGEST`` words, which are letters mostly. Lists, examples and
    what else is indented in a docstring are left out. The same words in two places are taken once,
    with the first in the order of paths. Another version of Python has other sentences.

    Args:
      folder: its ``*.py`` are read, without tests and installed packages; None = Python's own
        library.

    Raises:
      ValueError: there is no such folder, or a split is left without sentences.

    Example:
      >>> sentences = read()
      >>> len(sentences.calibration) > len(sentences.test) > 100
      True
    """
    root = pathlib.Path(folder or sysconfig.get_paths()["stdlib"])
    if not root.is_dir():
        raise ValueError(f"{root} is no folder; expected one with the source of Python modules.")
    found: dict[str, list[str]] = {split: [] for split in Sentences._fields}
    seen: set[str] = set()
    for name in sorted(path.relative_to(root).as_posix() for path in text.library(root)):
        for sentence in prose(docstrings((root / name).read_bytes())):
            words = " ".join(re.findall(r"\w+", sentence.lower()))
            if words not in seen:
                seen.add(words)
                found[split_of(name)].append(sentence)
    if empty := [split for split, some in found.items() if not some]:
        raise ValueError(
            f"{root} has no sentences for {' and '.join(empty)}: they are in the docstrings of "
            "its *.py, and a package is in one split. Give a folder with more packages."
        )
    random = np.random.default_rng(_SEED)
    return Sentences(
        *(tuple(some[i] for i in random.permutation(len(some))) for some in found.values())
    )


def split_of(name: str) -> str:
    """The split of a module: half of the packages are for calibration, a quarter each for the rest.

    Args:
      name: path of the file, with slashes; its first part decides, by a hash.

    Example:
      >>> split_of("asyncio/tasks.py") == split_of("asyncio/events.py")
      True
    """
    package = name.split("/")[0].removesuffix(".py")
    part = hashlib.sha256(package.encode()).digest()[0] % 4
    return ("calibration", "calibration", "validation", "test")[part]


def docstrings(source: bytes) -> Iterator[str]:
    r"""The docstrings of a module, its classes and functions; none where it cannot be parsed.

    Example:
      >>> list(docstrings(b"def f():\n    'It is one.'"))
      ['It is one.']
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # of another Python, or no text
        return
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, holders) and (docstring := ast.get_docstring(node)):
            yield docstring
        stack += [x for x in reversed(getattr(node, "body", [])) if isinstance(x, holders)]


def prose(texts: Iterable[str]) -> Iterator[str]:
    r"""The sentences of texts, without line breaks.

    Example:
      >>> list(prose(["Wait until the queue is\nempty again. Or not.\n\n  >>> f()"]))
      ['Wait until the queue is empty again.']
    """
    for one in texts:
        for paragraph in re.split(r"\n\s*\n", one):
            if re.search(r"^(\s|>>>|[*+-] |\d+[.)])", paragraph, re.M):
                continue  # an example, a list, arguments
            for sentence in _END.split(" ".join(paragraph.split())):
                if is_prose(sentence):
                    yield sentence


def is_prose(sentence: str) -> bool:
    """Whether a text is one whole sentence of words.

    Example:
      >>> is_prose("Return the number of items in the queue."), is_prose("x = f(y); see PEP 8.")
      (True, False)
    """
    letters = sum(c.isalpha() for c in sentence)
    return (
        SHORTEST <= len(sentence.split()) <= LONGEST
        and _PROSE.fullmatch(sentence) is not None
        and letters >= _LETTERS * len(sentence.replace(" ", ""))
        and sentence.count("(") == sentence.count(")")
        and sentence.count('"') % 2 == 0
    )


def tokenize(
    sentences: Sequence[str], tokenizer_file: str | pathlib.Path, max_length: int = 64
) -> tuple[np.ndarray, np.ndarray]:
    """Sentences to tokens, as a file of Hugging Face's tokenizers says.

    Args:
      sentences: one or more.
      tokenizer_file: ``tokenizer.json``.
      max_length: tokens that are kept of a sentence, those at its ends included.

    Returns:
      ids int32 and mask bool, ``(sentences, time)``, True = a real token. ``time`` is the smallest
      multiple of 8 that holds the longest sentence.

    Raises:
      ValueError: the package tokenizers is not installed, the file is not there or cannot be read,
        there are no sentences, or no tokens are allowed.

    Example:
      >>> ids, mask = tokenize(["Ducks swim."], "model/tokenizer.json")  # doctest: +SKIP
      >>> ids.shape, mask.sum()  # doctest: +SKIP
      ((1, 8), 5)
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ValueError(
            "The package tokenizers is not installed: pip install 'granet_jax[pretrained]'."
        ) from error
    if not sentences or max_length < 3:
        raise ValueError(
            f"{len(sentences)} sentences and max_length={max_length} were given; expected "
            "1 sentence or more, and 3 tokens or more, of which two are the ends."
        )
    path = pathlib.Path(tokenizer_file)
    if not path.is_file():
        raise ValueError(f"{path} is no file; expected the tokenizer.json of a model.")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises no narrower one
        raise ValueError(f"{path} cannot be read: {error}.") from error
    tokenizer.enable_truncation(max_length)
    padding = {"pad_id": 0, "pad_token": "[PAD]", **(tokenizer.padding or {})}
    tokenizer.enable_padding(**{**padding, "length": None, "pad_to_multiple_of": 8})
    encoded = tokenizer.encode_batch(list(sentences))
    ids = np.array([x.ids for x in encoded], np.int32)
    return ids, np.array([x.attention_mask for x in encoded], np.bool_)
