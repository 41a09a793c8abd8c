"""A compact file: packed mask bits and live values in a safetensors container.

For a leaf with masked weights the file holds the live values, in their dtype and order, and one bit
for each weight; for other leaves, all values. So a file has 4 bytes for each live float32, one bit
for each weight of a leaf that is not dense, and a header. Reading gives back exactly the same bits.
Any reader of safetensors can read the tensors ``values/PATH`` and ``mask/PATH`` (in the order of
``numpy.unpackbits``). Dtypes that numpy does not have, such as bfloat16, are stored as unsigned
integers.

Needs the package safetensors: ``pip install granet_jax[export]``.
"""

import hashlib
import json
import math
import os
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np

from granet_jax import trees
from granet_jax.masks import check_masks
from granet_jax.types import PyTree

VERSION = 1
_FORMAT = "granet_jax.sparse"
_PLAIN = {  # dtypes that safetensors reads back as numpy's
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64"),
}


class Saved(NamedTuple):
    """What :func:`load` returns."""

    params: PyTree  # numpy arrays; exactly 0 where masked
    masks: PyTree  # bool numpy arrays of the same shapes


def save(path: str | os.PathLike[str], params: PyTree, masks: PyTree | None = None) -> int:
    """Writes parameters and masks to one compact file. A failed write leaves the old file.

    Args:
      path: of the file; an existing file is replaced.
      params: tree of arrays of any numeric dtype of at most 8 bytes, including those of
        ``ml_dtypes``. Weights under a False mask are read back as +0.
      masks: bool tree of params; None = all True.

    Returns:
      The size of the file in bytes.

    Raises:
      ValueError: masks of another tree; a leaf that is no array of numbers, or of numbers of more
        than 8 bytes; two leaves whose joined paths are the same.

    Example:
      >>> import granet_jax as gj, jax.numpy as jnp, os, tempfile
      >>> params = {"fc": {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "bias": jnp.ones(2)}}
      >>> masks = gj.ones(params)
      >>> masks["fc"]["kernel"] = jnp.array([[True, False], [False, True]])
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     size = gj.export.save(os.path.join(folder, "model.safetensors"), params, masks)
      ...     saved = gj.export.load(os.path.join(folder, "model.safetensors"))
      >>> saved.params["fc"]["kernel"].tolist()
      [[1.0, 0.0], [0.0, 4.0]]
    """
    from safetensors.numpy import save as serialize

    if masks is not None:
        masks = check_masks(masks, params)
    flat = trees.by_path(jax.device_get(params))
    flat_masks = {} if masks is None else trees.by_path(jax.device_get(masks))
    tensors, leaves = {}, []
    for words, x in flat.items():
        name = "/".join(words)
        array = native(name, x)
        if f"values/{name}" in tensors:
            raise ValueError(f"Two leaves are called {name} once their paths are joined.")
        leaf = _Stored.of(array, flat_masks.get(words))
        leaves.append([list(words), array.dtype.name, list(array.shape)])
        tensors[f"values/{name}"] = leaf.values
        if leaf.bits is not None:
            tensors[f"mask/{name}"] = leaf.bits
    metadata = {
        "format": _FORMAT,
        "version": str(VERSION),
        "leaves": json.dumps(leaves, separators=(",", ":")),
        "sha256": _digest(leaves, tensors),
    }
    data = serialize(tensors, metadata)
    write_whole(pathlib.Path(path), data)
    return len(data)


def load(path: str | os.PathLike[str], like: PyTree | None = None) -> Saved:
    """Reads what :func:`save` wrote, and checks it: lengths, counts and a SHA-256 of everything.

    Args:
      path: of the file.
      like: a tree of arrays or ``ShapeDtypeStruct`` with the leaves that the file should hold,
        matched by path; the result has its structure. None = the result is nested dicts, one level
        for each word of a path (indices of lists become strings).

    Returns:
      Parameters and masks, trees of numpy arrays.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is truncated, was changed, has another version or is something else; or
        its leaves are not those of ``like``.

    Example:
      >>> import os, tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = os.path.join(folder, "model.safetensors")
      ...     size = save(path, {"w": np.array([1.0, 0.0])}, {"w": np.array([True, False])})
      ...     load(path).masks["w"].tolist()
      [True, False]
    """
    from safetensors.numpy import load as deserialize

    path = pathlib.Path(path)
    data = path.read_bytes()
    try:
        tensors = deserialize(data)
        metadata = _metadata(data)
        if metadata.get("format") != _FORMAT:
            raise ValueError("it was not written by granet_jax.export.save")
        if metadata["version"] != str(VERSION):
            raise ValueError(f"it has version {metadata['version']}, this library reads {VERSION}")
        leaves = json.loads(metadata["leaves"])
        if metadata["sha256"] != _digest(leaves, tensors):
            raise ValueError("its checksum does not match, so some of it was changed")
        found = {}
        for words, dtype, shape in leaves:
            name = "/".join(words)
            stored = _Stored(tensors.pop(f"values/{name}"), tensors.pop(f"mask/{name}", None))
            found[tuple(words)] = stored.unpack(np.dtype(dtype), tuple(shape))
        if tensors:
            raise ValueError(f"it holds tensors of no leaf: {', '.join(sorted(tensors))}")
    except Exception as error:  # whatever a hostile file brings about
        raise ValueError(
            f"{path} cannot be read as a sparse model: {error or type(error).__name__}. "
            "Write it again with granet_jax.export.save."
        ) from error
    if like is None:
        return Saved(*(_nested({words: pair[i] for words, pair in found.items()}) for i in (0, 1)))
    _check_like(path, {words: array for words, (array, _) in found.items()}, trees.by_path(like))
    in_order = [found[words] for words in trees.by_path(like)]
    structure = jax.tree.structure(like)
    return Saved(*(jax.tree.unflatten(structure, [pair[i] for pair in in_order]) for i in (0, 1)))


def native(name: str, leaf: Any) -> np.ndarray:
    """A leaf as an array in this machine's byte order; an error if a file cannot hold it."""
    try:
        array = np.asarray(leaf)
        dtype = array.dtype.newbyteorder("=")
        is_number = dtype.kind in "biufcV" and np.dtype(dtype.name) == dtype
    except TypeError:  # raw bytes, records, typed keys
        is_number = False
    if not is_number:
        found = getattr(leaf, "dtype", type(leaf).__name__)
        raise ValueError(f"{name} is no array of numbers, but {found}.")
    if dtype.itemsize > 8:
        raise ValueError(
            f"{name} is {dtype}, which a file cannot hold: numbers have at most 8 bytes there. "
            "Cast it (complex128 to complex64), or save real and imaginary parts as two leaves."
        )
    return array.astype(dtype, order="C", copy=False)  # safetensors writes memory as it lies


class _Stored(NamedTuple):
    """A leaf as it is stored in the file."""

    values: np.ndarray  # all, or the live ones
    bits: np.ndarray | None  # uint8, packed; None = all live

    @classmethod
    def of(cls, array: np.ndarray, mask: Any) -> "_Stored":
        if array.dtype.name not in _PLAIN:
            array = array.view(f"uint{8 * array.dtype.itemsize}")
        if mask is None or np.all(mask):
            return cls(array, None)
        mask = np.asarray(mask)
        return cls(array[mask], np.packbits(mask))

    def unpack(self, dtype: np.dtype, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        size = math.prod(shape)
        if self.values.dtype.itemsize != dtype.itemsize or min(shape, default=0) < 0:
            raise ValueError(
                f"a leaf is described as {dtype}{shape}, but holds {self.values.dtype}"
            )
        if self.bits is None:
            if self.values.shape != shape:
                raise ValueError(f"a leaf of shape {shape} holds {self.values.shape}")
            return self.values.view(dtype), np.ones(shape, bool)
        if self.bits.shape != (-(-size // 8),) or self.bits.dtype != np.uint8:
            raise ValueError(f"a mask of {size} weights has {self.bits.size} bytes")
        flat = np.unpackbits(self.bits).view(bool)
        if np.any(flat[size:]) or self.values.shape != (np.count_nonzero(flat),):
            raise ValueError("a mask and its values disagree")
        array = np.zeros(size, dtype)
        array[flat[:size]] = self.values.view(dtype)
        return array.reshape(shape), flat[:size].reshape(shape)


def _metadata(data: bytes) -> dict[str, str]:
    """The strings in the header of a safetensors file: a length, then JSON."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]).get("__metadata__", {})


def _digest(leaves: Any, tensors: dict[str, np.ndarray]) -> str:
    """SHA-256 of names, dtypes, shapes and values."""
    digest = hashlib.sha256(json.dumps(leaves).encode())
    for name, x in sorted(tensors.items()):
        digest.update(json.dumps([name, x.dtype.name, list(x.shape)]).encode())
        digest.update(np.ascontiguousarray(x).view(np.uint8).data if x.size else b"")
    return digest.hexdigest()


def _nested(flat: dict[tuple[str, ...], np.ndarray]) -> Any:
    if () in flat:  # no tree, one array
        return flat[()]
    tree: dict[str, Any] = {}
    for (*front, last), leaf in flat.items():
        branch = tree
        for word in front:
            branch = branch.setdefault(word, {})
        branch[last] = leaf
    return tree


def _check_like(path: pathlib.Path, found: dict[Any, Any], wanted: dict[Any, Any]) -> None:
    for words in sorted(found.keys() | wanted.keys()):
        got, expected = (
            f"{x[words].dtype}{tuple(x[words].shape)}" if words in x else "no such leaf"
            for x in (found, wanted)
        )
        if got != expected:
            raise ValueError(
                f"{path} holds another model: {'/'.join(words)} is {got}, expected {expected}. "
                "Load it without like=, or into the model that it was saved from."
            )


def write_whole(path: pathlib.Path, data: bytes) -> None:
    """Writes a file so that a reader sees the old file or the new one, never a part."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
