"""Scores: how much each weight is worth keeping, or growing. All share one signature.

Each function takes ``(params, grads, key)`` and returns a tree of float32 arrays of the params'
shapes, larger = better; see :class:`granet_jax.types.ScoreFn`. Scores are float32 whatever the
dtype of the parameters, because low-precision scores tie by the thousand (growing by bfloat16
gradients is known to ruin RigL and GraNet on transformers).

Example:
  >>> import jax.numpy as jnp
  >>> magnitude({"w": jnp.array([[-2.0, 1.0]])}, None, None)["w"].tolist()
  [[2.0, 1.0]]
"""

import jax
import jax.numpy as jnp

from granet_jax.types import PyTree, ScoreFn


def magnitude(params: PyTree, grads: PyTree, key: jax.Array | None) -> PyTree:
    """``|w|``: Han et al. 2015; the pruning score of GMP, SET, RigL and GraNet."""
    del grads, key
    return jax.tree.map(_abs32, params)


def gradient(params: PyTree, grads: PyTree, key: jax.Array | None) -> PyTree:
    """``|g|``: the growth score of RigL (Evci et al. 2020, section 3) and GraNet."""
    del params, key
    return jax.tree.map(_abs32, grads)


def saliency(params: PyTree, grads: PyTree, key: jax.Array | None) -> PyTree:
    """``|w * g|``: the first-order change of the loss (Molchanov et al. 2017; SNIP's score)."""
    del key
    return jax.tree.map(
        lambda p, g: _abs32(p.astype(jnp.float32) * g.astype(jnp.float32)), params, grads
    )


def magnitude_and_gradient(coefficient: float = 0.01) -> ScoreFn:
    """``|w| + coefficient * |g|``: a drop score that spares small weights about to move.

    Source: Yuan et al. 2021 (MEST), section 3, where the coefficient is .01.

    Example:
      >>> import jax.numpy as jnp
      >>> score = magnitude_and_gradient(0.5)
      >>> score({"w": jnp.array([-1.0, 0.0])}, {"w": jnp.array([2.0, 4.0])}, None)["w"].tolist()
      [2.0, 2.0]
    """

    def score(params: PyTree, grads: PyTree, key: jax.Array | None) -> PyTree:
        del key
        return jax.tree.map(lambda p, g: _abs32(p) + coefficient * _abs32(g), params, grads)

    return score


def random(params: PyTree, grads: PyTree, key: jax.Array | None) -> PyTree:
    """Uniform in [0, 1): the growth score of SET (Mocanu et al. 2018).

    Raises:
      ValueError: without a key.
    """
    del grads
    if key is None:
        raise ValueError("Random scores need a key: give the method key=jax.random.key(seed).")
    leaves, treedef = jax.tree.flatten(params)
    draws = [
        jax.random.uniform(jax.random.fold_in(key, i), p.shape, jnp.float32)
        for i, p in enumerate(leaves)
    ]
    return jax.tree.unflatten(treedef, draws)


def _abs32(x: jax.Array) -> jax.Array:
    return jnp.abs(x).astype(jnp.float32)
