"""STR."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from granet_jax import trees
from granet_jax.reparam.base import Reparameterisation, from_thresholds


def str_(
    *,
    initial: float,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.sigmoid,
    prunable: trees.Rules = (),
) -> Reparameterisation:
    """doc."""
    return from_thresholds(
        initial=lambda leaf: jnp.full(leaf.shape[: leaf.stack_axes], initial, jnp.float32),
        threshold=lambda s, leaf: activation(s).reshape(-1, *[1] * len(leaf.layer_shape)),
        gate=lambda w, x: jnp.sign(w) * jax.nn.relu(x),
        penalty=lambda s: 0.5 * s**2,
        prunable=prunable,
    )
