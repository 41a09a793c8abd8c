"""Checkpoints keep the sparsity: a check that what came back is what went in."""

from typing import Any

import jax

from granet_jax.types import PyTree


def check_restored(restored: PyTree, example: PyTree) -> PyTree:
    """Returns ``restored`` if it has the paths, shapes and dtypes of ``example``.

    Readers of checkpoints are lenient: where the checkpoint holds None, or less than the model
    asks for, Orbax gives None without a word, and casts bool masks to what it is asked for. Masks
    that are gone or belong to another model then let pruned weights grow back. Masks live in the
    optimizer state, so one call on the whole restored state checks them too.

    Args:
      restored: what the reader returned.
      example: the state of the model at hand: arrays or ``ShapeDtypeStruct``s, as from
        ``jax.eval_shape``.

    Raises:
      ValueError: a leaf is missing, None, unexpected, or of another shape or dtype; the message
        names up to five.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> example = {"masks": {"kernel": jax.ShapeDtypeStruct((2, 3), bool)}}
      >>> check_restored({"masks": {"kernel": None}}, example)  # doctest: +ELLIPSIS
      Traceback (most recent call last):
        ...
      ValueError: The checkpoint does not fit the model: masks/kernel is missing, expected bool...
    """
    found, expected = _by_path(restored), _by_path(example)
    wrong = [
        f"{path} is {found.get(path, 'missing')}, expected {kind}"
        for path, kind in expected.items()
        if found.get(path) != kind
    ]
    wrong += [f"{path} is {found[path]}, expected nothing" for path in found.keys() - expected]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(
            f"The checkpoint does not fit the model: {'; '.join(wrong[:5])}{more}. "
            "Build the model, optimizer and method that it was saved with."
        )
    return restored


def _by_path(tree: PyTree) -> dict[str, str]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): _kind(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _kind(leaf: Any) -> str:
    return f"{leaf.dtype} {leaf.shape}" if hasattr(leaf, "dtype") else type(leaf).__name__
