"""Numbers about masks: pure functions, cheap, safe under ``jit``.

All take the same static ``prunable`` rules as the method did, so that sparsity counts prunable
weights alone.
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
    return {
        leaf.path: jnp.mean(mask, dtype=jnp.float32)
        for leaf, mask in zip(leaves, jax.tree.leaves(masks), strict=True)
        if leaf.prunable
    }


def num_grown(old: PyTree, new: PyTree) -> jax.Array:
    """How many weights are on in ``new`` that were off in ``old``, an int32 scalar."""
    return _total(jax.tree.map(lambda a, b: jnp.sum(b & ~a, dtype=jnp.int32), old, new))


def num_nonfinite(tree: PyTree) -> jax.Array:
    """How many entries of a tree are NaN or infinite, an int32 scalar."""
    return _total(jax.tree.map(lambda x: jnp.sum(~jnp.isfinite(x), dtype=jnp.int32), tree))


def _total(counts: PyTree) -> jax.Array:
    return sum(jax.tree.leaves(counts), start=jnp.zeros([], jnp.int32))
