"""Initial weights for sparse starts."""

import jax
import jax.numpy as jnp

from granet_jax import trees
from granet_jax.types import PyTree


def by_fan_in(params: PyTree, masks: PyTree, prunable: trees.Rules = ()) -> PyTree:
    """Scales each output's live weights to the spread that its live inputs call for.

    An output that keeps a share f of its inputs sums over fewer of them, so its weights are divided
    by ``sqrt(f)``: what was drawn with a deviation of ``gain / sqrt(inputs)`` then has ``gain /
    sqrt(live inputs)``. Without it, signals and gradients shrink with every sparse layer. Masked
    weights are 0; outputs without inputs stay 0; leaves that are not prunable stay as they are.

    Source: Evci et al. 2022, "Gradient flow in sparse neural networks and how lottery tickets win",
    section 3.1 (each output for itself, not the mean of its layer).

    Args:
      params: tree of arrays, as initialised for a dense network. The last axis of a layer is its
        outputs, all others are inputs (Flax's and Haiku's kernels).
      masks: bool tree of params.
      prunable: path rules, see :func:`granet_jax.trees.describe`; stack axes are no inputs.

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
