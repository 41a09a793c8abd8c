"""Initial weights for sparse starts."""

import jax
import jax.numpy as jnp

from granet_jax import trees
from granet_jax.types import PyTree


def by_fan_in(params: PyTree, masks: PyTree, prunable: trees.Rules = ()) -> PyTree:
    """Scales the live weights of each output to match its number of live inputs.

    If an output keeps a share f of its inputs, its weights are divided by ``sqrt(f)``. Weights that
    were drawn with standard deviation ``gain / sqrt(inputs)`` then have ``gain / sqrt(live
    inputs)``. Without this, signals and gradients shrink in every sparse layer. Masked weights
    become 0, so outputs without live inputs are 0. Leaves that are not prunable do not change.

    Source: Evci et al. 2022, "Gradient flow in sparse neural networks and how lottery tickets win",
    section 3.1 (for each output, not the mean of its layer).

    Args:
      params: tree of arrays, as initialised for a dense network. The last axis of a layer is its
        outputs, all others are inputs (Flax's and Haiku's kernels).
      masks: bool tree of params.
      prunable: path rules, see :func:`granet_jax.trees.describe`; stack axes do not count as
        inputs.

    Returns:
      New parameters, of the same dtypes.

    Example: one of the two inputs is left for the first output, both for the second.
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jnp.array([[1.0, 1.0], [1.0, 1.0]])}
      >>> masks = {"kernel": jnp.array([[True, True], [False, True]])}
      >>> by_fan_in(params, masks)["kernel"].round(3).tolist()
      [[1.4140000343322754, 1.0], [0.0, 1.0]]
    """
    leaves = trees.describe(params, prunable)

    def scaled(w: jax.Array, mask: jax.Array) -> jax.Array:
        inputs = tuple(range(1, w.ndim - 1))
        share = jnp.mean(mask, axis=inputs, keepdims=True, dtype=jnp.float32)
        factor = jnp.where(share > 0, share, 1.0) ** -0.5
        return jnp.where(mask, w * factor.astype(w.dtype), jnp.zeros_like(w))

    pairs = zip(trees.split(params, leaves), trees.split(masks, leaves), strict=True)
    return trees.join([scaled(*pair) for pair in pairs], params, leaves)
