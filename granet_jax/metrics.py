"""Numbers about masks: pure functions, cheap, safe under ``jit``.

All take the same static ``prunable`` rules as the method did, so that sparsity counts prunable
weights alone. Masks find their parameters by path.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from granet_jax import selection, trees
from granet_jax.types import PyTree


def num_live(masks: PyTree, params: PyTree, prunable: trees.Rules = ()) -> jax.Array:
    """How many weights each layer keeps, int32 ``(layers,)`` in layer order."""
    return selection.count(trees.split(masks, trees.describe(params, prunable)))


def sparsity(masks: PyTree, params: PyTree, prunable: trees.Rules = ()) -> jax.Array:
    """Fraction of zeros among all prunable weights, a float32 scalar.

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
    """Kept fraction of each prunable leaf by its path, float32 scalars."""
    leaves = trees.describe(params, prunable)
    paths = [leaf.path for leaf in leaves if leaf.prunable]
    pairs = zip(paths, trees.pick(masks, leaves), strict=True)
    return {path: jnp.mean(mask, dtype=jnp.float32) for path, mask in pairs}


def num_grown(old: PyTree, new: PyTree) -> jax.Array:
    """How many weights are on in ``new`` that were off in ``old``, an int32 scalar."""
    before, after = trees.by_path(old), trees.by_path(new)
    if before.keys() != after.keys():
        odd = sorted("/".join(path) for path in before.keys() ^ after.keys())
        raise ValueError(f"Masks of two models: only one of them has {', '.join(odd)}.")
    return _total({k: jnp.sum(after[k] & ~before[k], dtype=jnp.int32) for k in before})


def num_nonfinite(tree: PyTree) -> jax.Array:
    """How many entries of a tree are NaN or infinite, an int32 scalar."""
    return _total(jax.tree.map(lambda x: jnp.sum(~jnp.isfinite(x), dtype=jnp.int32), tree))


def _total(counts: PyTree) -> jax.Array:
    return sum(jax.tree.leaves(counts), start=jnp.zeros([], jnp.int32))
