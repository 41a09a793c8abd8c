"""Plain safetensors with exact zeros, under other libraries' names; and other libraries' masks.

With a map of names and transpositions, a PyTorch checkpoint can be loaded, pruned, and saved in its
own format, with zeros.
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from granet_jax import trees
from granet_jax.export.files import Saved, native, write_whole
from granet_jax.masks import apply_masks, check_masks, masks_from_zeros, ones
from granet_jax.types import PyTree

Names = Mapping[str, tuple[str, bool]]  # path of a leaf -> (name in the file, is it transposed)


def save_dense(
    path: str | os.PathLike[str],
    params: PyTree,
    masks: PyTree | None = None,
    names: Names | None = None,
) -> int:
    """Writes all values to a safetensors file that any library can read.

    A failed write leaves the old file.

    Args:
      path: of the file; an existing file is replaced.
      params: tree of arrays, of numpy's dtypes or bfloat16.
      masks: bool tree of params; weights under False are written as +0. None = no masks.
      names: ``{path: (name in the file, transposed)}`` for all leaves; a transposed leaf has two
        axes. None = the paths, with dots for slashes.

    Returns:
      The size of the file in bytes.

    Raises:
      ValueError: masks of another tree; ``names`` lacks a leaf, or gives two leaves one name; a
        dtype that files cannot hold.

    Example:
      >>> import granet_jax as gj, jax.numpy as jnp, os, tempfile
      >>> params = {"fc": {"kernel": jnp.array([[1.0, 0.0, 2.0], [0.0, 0.0, 3.0]])}}
      >>> names = {"fc/kernel": ("fc.weight", True)}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     file = os.path.join(folder, "model.safetensors")
      ...     size = gj.export.save_dense(file, params, names=names)
      ...     saved = gj.export.load_dense(file, params, names)
      >>> saved.masks["fc"]["kernel"].tolist()
      [[True, False, True], [False, False, True]]
    """
    from safetensors.numpy import save as serialize

    if masks is not None:
        params = apply_masks(params, check_masks(masks, params))
    tensors: dict[str, Any] = {}
    for leaf, x in trees.paths(params).items():
        name, transposed = _name(leaf, names)
        if name in tensors:
            raise ValueError(f"Two leaves are called {name!r} in the file; the second is {leaf}.")
        if name == "__metadata__":
            raise ValueError(f"{leaf} is called {name!r} in the file, a name that files use.")
        array = native(leaf, jax.device_get(x))
        _check_transposed(leaf, array.shape, transposed)
        tensors[name] = np.array(array.T if transposed else array, order="C")
    data = serialize(tensors, {"format": "pt"})
    write_whole(pathlib.Path(path), data)
    return len(data)


def load_dense(
    path: str | os.PathLike[str],
    like: PyTree,
    names: Names | None = None,
    *,
    prunable: trees.Rules = (),
) -> Saved:
    """Reads a plain safetensors file; masks are its zeros, or those of ``torch.nn.utils.prune``.

    Modules under ``torch.nn.utils.prune`` save ``NAME_orig`` and ``NAME_mask`` in place of
    ``NAME``. If a file holds these, the mask is read and applied.

    Args:
      path: of the file. Tensors with other names are not read.
      like: tree of arrays or ``ShapeDtypeStruct`` of the shapes and dtypes to return.
      names: as in :func:`save_dense`.
      prunable: path rules, see :func:`granet_jax.trees.describe`. Zeros in leaves that are not
        prunable, such as biases, do not count as masked.

    Returns:
      Parameters and masks, trees of numpy arrays with the structure of ``like``; parameters are 0
      where masked.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no safetensors file, lacks a leaf, or has it in another shape; a mask holds
        other numbers than 0 and 1.

    Example:
      >>> import os, tempfile
      >>> params = {"kernel": np.array([[1.0, 0.0]], np.float32)}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = os.path.join(folder, "model.safetensors")
      ...     size = save_dense(path, params)
      ...     load_dense(path, params).masks["kernel"].tolist()
      [[True, False]]
    """
    from safetensors import deserialize

    data = pathlib.Path(path).read_bytes()
    try:
        tensors = dict(deserialize(data))
    except Exception as error:
        raise ValueError(f"{path} is no safetensors file: {error}.") from error
    found, found_masks = [], {}
    for leaf, wanted in trees.paths(like).items():
        name, transposed = _name(leaf, names)
        _check_transposed(leaf, wanted.shape, transposed)
        array, mask = _tensor(f"{path}", tensors, name)
        if transposed:
            array, mask = array.T, None if mask is None else mask.T
        if array.shape != tuple(wanted.shape):
            raise ValueError(
                f"{path} holds {name!r} in shape {array.shape}, once transposed if so told; {leaf} "
                f"has {tuple(wanted.shape)}."
            )
        found.append(array.astype(wanted.dtype, order="C"))
        found_masks[leaf] = mask
    params = jax.tree.unflatten(jax.tree.structure(like), found)
    masks = masks_from_zeros(params, prunable)
    given = [
        m if found_masks[leaf] is None else found_masks[leaf]
        for leaf, m in trees.paths(masks).items()
    ]
    masks = jax.tree.unflatten(jax.tree.structure(like), [np.asarray(x) for x in given])
    return Saved(jax.tree.map(lambda p, m: np.where(m, p, np.zeros_like(p)), params, masks), masks)


def masks_from(masks: Any, params: PyTree) -> PyTree:
    """Total bool masks from another library's masks.

    Those may be 0 and 1 of any dtype, and for some leaves only: JaxPruner's states hold ``masks``
    as a tree of uint8 with None for leaves that it does not prune; PyTorch's ``weight_mask`` is a
    float array.

    Args:
      masks: a tree, or ``{path: mask}``, matched by path.
      params: tree of arrays or ``ShapeDtypeStruct``.

    Returns:
      bool tree of params; leaves without a mask are all True.

    Raises:
      ValueError: a mask has no parameter, has another shape, or holds other numbers than 0 and 1.

    Example:
      >>> import granet_jax as gj, jax.numpy as jnp
      >>> params = {"kernel": jnp.ones((1, 2)), "bias": jnp.ones(2)}
      >>> state_masks = {"kernel": jnp.array([[1, 0]], jnp.uint8), "bias": None}
      >>> gj.export.masks_from(state_masks, params)["kernel"].tolist()
      [[True, False]]
    """
    found = {path: _is_on(path, np.asarray(x)) for path, x in trees.paths(masks).items()}
    wanted = trees.paths(params)
    for path, mask in found.items():
        shape = tuple(wanted[path].shape) if path in wanted else "none"
        if shape != mask.shape:
            raise ValueError(
                f"The mask of {path} has shape {mask.shape}, its parameter {shape}; the paths are: "
                f"{', '.join(wanted)}."
            )
    total = trees.paths(ones(params))
    each = [jnp.asarray(found[path]) if path in found else x for path, x in total.items()]
    return jax.tree.unflatten(jax.tree.structure(params), each)


def _name(leaf: str, names: Names | None) -> tuple[str, bool]:
    if names is None:
        return leaf.replace("/", "."), False
    if leaf not in names:
        raise ValueError(f"The map of names lacks {leaf}; it has {', '.join(names)}.")
    return names[leaf]


def _check_transposed(leaf: str, shape: tuple[int, ...], transposed: bool) -> None:
    if transposed and len(shape) != 2:
        raise ValueError(
            f"{leaf} {tuple(shape)} cannot be transposed by a map of names: that is for two axes. "
            "Move its axes before."
        )


def _tensor(path: str, tensors: dict[str, Any], name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """A tensor, and its mask if the file has one, else None."""
    names = [name] if name in tensors else [f"{name}_orig", f"{name}_mask"]
    if not all(each in tensors for each in names):
        few = ", ".join(sorted(tensors)[:5])
        raise ValueError(
            f"{path} holds no {name!r}; the first of its {len(tensors)} tensors: {few}."
        )
    array, *masks = (_decoded(path, each, tensors[each]) for each in names)
    return array, _is_on(name, masks[0]) if masks else None


def _is_on(name: str, mask: np.ndarray) -> np.ndarray:
    if not np.isin(mask, (0, 1)).all():
        raise ValueError(f"The mask of {name} holds other numbers than 0 and 1.")
    return mask.astype(bool)


_KINDS = {  # dtypes as safetensors calls them; its numpy reader lacks bfloat16
    "BOOL": np.bool_,
    **{f"{k}{8 * n}": np.dtype(f"{k.lower()}{n}") for k in "IU" for n in (1, 2, 4, 8)},
    **{f"F{8 * n}": np.dtype(f"f{n}") for n in (2, 4, 8)},
    "BF16": np.dtype(jnp.bfloat16),
    "C64": np.dtype(np.complex64),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
}


def _decoded(path: str, name: str, tensor: dict[str, Any]) -> np.ndarray:
    kind = tensor["dtype"]
    if kind not in _KINDS:
        raise ValueError(f"{path} holds {name!r} as {kind}; expected one of {', '.join(_KINDS)}.")
    return np.frombuffer(tensor["data"], _KINDS[kind]).reshape(tensor["shape"])
