"""Scores: how much each weight is worth keeping, or growing. All share one signature.

Each function takes an :class:`granet_jax.types.Event` and returns a tree of real arrays of the
params' shapes, larger = better. Scores are float32 where parameters
are narrower, because low-precision scores tie by the thousand (growing by bfloat16 gradients is
known to ruin RigL and GraNet on transformers); of float64 and complex128 they are float64. Of
complex numbers ``|.|`` is the modulus.

Example:
  >>> import jax.numpy as jnp
  >>> magnitude(Event({"w": jnp.array([[-2.0, 1.0]])}))["w"].tolist()
  [[2.0, 1.0]]
"""

from typing import Any

import jax
import jax.numpy as jnp

from granet_jax.types import Event, PyTree, ScoreFn


def magnitude(event: Event) -> PyTree:
    """``|w|``: Han et al. 2015; the pruning score of GMP, SET, RigL and GraNet."""
    return jax.tree.map(size, event.params)


def gradient(event: Event) -> PyTree:
    """``|g|``: the growth score of RigL (Evci et al. 2020, section 3) and GraNet."""
    return jax.tree.map(size, event.grads)


def saliency(event: Event) -> PyTree:
    """``|w * g|``: the first-order change of the loss (Molchanov et al. 2017; SNIP's score).

    Of a complex weight it is the largest change by a move as far as to 0, in any direction.
    """
    return jax.tree.map(
        lambda p, g: jnp.multiply(*_alike(size(p), size(g))), event.params, event.grads
    )


def magnitude_and_gradient(coefficient: float = 0.01) -> ScoreFn:
    """``|w| + coefficient * |g|``: a drop score that spares small weights about to move.

    Source: Yuan et al. 2021 (MEST), section 3, where the coefficient is .01.

    Example:
      >>> import jax.numpy as jnp
      >>> score = magnitude_and_gradient(0.5)
      >>> score(Event({"w": jnp.array([-1.0, 0.0])}, {"w": jnp.array([2.0, 4.0])}))["w"].tolist()
      [2.0, 2.0]
    """

    def score(event: Event) -> PyTree:
        def of_leaf(p: jax.Array, g: jax.Array) -> jax.Array:
            p, g = _alike(size(p), size(g))
            return p + coefficient * g

        return jax.tree.map(of_leaf, event.params, event.grads)

    return score


def random(event: Event) -> PyTree:
    """Uniform in [0, 1): the growth score of SET (Mocanu et al. 2018).

    Raises:
      ValueError: without a key.
    """
    if event.key is None:
        raise ValueError("Random scores need a key: give the method key=jax.random.key(seed).")
    leaves, treedef = jax.tree.flatten(event.params)
    draws = [
        jax.random.uniform(jax.random.fold_in(event.key, i), p.shape, jnp.float32)
        for i, p in enumerate(leaves)
    ]
    return jax.tree.unflatten(treedef, draws)


def size(x: jax.Array) -> jax.Array:
    """``|x|`` in float32, or in the precision of ``x`` where that is wider.

    Example:
      >>> import jax.numpy as jnp
      >>> size(jnp.array([3 + 4j])).tolist(), size(jnp.ones(2, jnp.bfloat16)).dtype.name
      ([5.0], 'float32')
    """
    magnitude = jnp.abs(x)
    return magnitude.astype(at_least_float32(magnitude.dtype))


def at_least_float32(dtype: Any) -> Any:
    """``dtype`` where it is float64 or complex, else float32: what sums and means are made in."""
    is_wide = dtype == jnp.float64 or jnp.issubdtype(dtype, jnp.complexfloating)
    return jnp.dtype(dtype if is_wide else jnp.float32)


def _alike(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two arrays of float32 or float64 in the wider of the two."""
    dtype = max(a.dtype, b.dtype, key=lambda x: x.itemsize)
    return a.astype(dtype), b.astype(dtype)
