"""Numbers about masks: pure functions, cheap, safe under ``jit``.

Give them the same ``prunable`` rules as the method, so that sparsity counts prunable weights alone.
Masks and parameters are matched by path.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from granet_jax import selection, trees
from granet_jax.types import PyTree


def num_live(masks: PyTree, params: PyTree, prunable: trees.Rules = ()) -> jax.Array:
    """How many weights each layer keeps.

    Args:
      masks: bool tree of params.
      params: tree of arrays or ``ShapeDtypeStruct``.
      prunable: the path rules that the method was given.

    Returns:
      int32 ``(layers,)``, in layer order.

    Raises:
      ValueError: masks of another tree.

    Example:
      >>> import jax.numpy as jnp
      >>> masks = {"kernel": jnp.array([[True, False], [False, False]])}
      >>> num_live(masks, {"kernel": jnp.zeros((2, 2))}).tolist()
      [1]
    """
    return selection.count(trees.split(masks, trees.describe(params, prunable)))


def sparsity(masks: PyTree, params: PyTree, prunable: trees.Rules = ()) -> jax.Array:
    """Fraction of zeros among all prunable weights.

    Args:
      masks: as for :func:`num_live`.
      params: as for :func:`num_live`.
      prunable: as for :func:`num_live`.

    Returns:
      A float32 scalar in [0, 1].

    Raises:
      ValueError: masks of another tree.

    Example:
      >>> import jax.numpy as jnp
      >>> masks = {"kernel": jnp.array([[True, False], [False, False]])}
      >>> float(sparsity(masks, {"kernel": jnp.zeros((2, 2))}))
      0.75
    """
    shapes = trees.layer_shapes(trees.describe(params, prunable))
    sizes = np.array([math.prod(shape) for shape in shapes])
    removed = sizes.astype(np.float32) - num_live(masks, params, prunable).astype(jnp.float32)
    return jnp.sum(removed) / float(sizes.sum())


def densities(masks: PyTree, params: PyTree, prunable: trees.Rules = ()) -> dict[str, Any]:
    """The fraction of weights that each prunable leaf keeps.

    Args:
      masks: as for :func:`num_live`.
      params: as for :func:`num_live`.
      prunable: as for :func:`num_live`.

    Returns:
      ``{path: float32 scalar}``, for :func:`granet_jax.flops.forward`.

    Raises:
      ValueError: masks of another tree.

    Example:
      >>> import jax.numpy as jnp
      >>> masks = {"kernel": jnp.array([[True, False], [False, False]])}
      >>> float(densities(masks, {"kernel": jnp.zeros((2, 2))})["kernel"])
      0.25
    """
    leaves = trees.describe(params, prunable)
    paths = [leaf.path for leaf in leaves if leaf.prunable]
    pairs = zip(paths, trees.pick(masks, leaves), strict=True)
    return {path: jnp.mean(mask, dtype=jnp.float32) for path, mask in pairs}


def num_grown(old: PyTree, new: PyTree) -> jax.Array:
    """How many weights are on in ``new`` that were off in ``old``, at most 2^31 - 1.

    Args:
      old: masks, bool tree of params.
      new: masks of the same paths and shapes.

    Returns:
      An int32 scalar.

    Raises:
      ValueError: the paths differ.

    Example:
      >>> import jax.numpy as jnp
      >>> old, new = jnp.array([True, False, False]), jnp.array([False, True, True])
      >>> int(num_grown({"w": old}, {"w": new}))
      2
    """
    before, after = trees.by_path(old), trees.by_path(new)
    if before.keys() != after.keys():
        odd = sorted("/".join(path) for path in before.keys() ^ after.keys())
        raise ValueError(f"Masks of two models: only one of them has {', '.join(odd)}.")
    return selection.total([after[path] & ~before[path] for path in before])


def num_nonfinite(tree: PyTree) -> jax.Array:
    """How many entries of a tree are NaN or infinite, at most 2^31 - 1.

    Args:
      tree: tree of arrays of any dtype; integers are always finite.

    Returns:
      An int32 scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> int(num_nonfinite({"w": jnp.array([1.0, jnp.nan, -jnp.inf])}))
      2
    """
    return selection.total([~jnp.isfinite(x) for x in jax.tree.leaves(tree)])
