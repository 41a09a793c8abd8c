"""DST: one trainable threshold for each output unit."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from granet_jax import selection, trees
from granet_jax.reparam.base import Reparameterisation, from_thresholds
from granet_jax.types import PyTree


def dst(*, output_axis: int = -1, prunable: trees.Rules = ()) -> Reparameterisation:
    """doc."""

    def shape(leaf: trees.Leaf) -> tuple[int, ...]:
        ndim = len(leaf.layer_shape)
        if not -ndim <= output_axis < ndim:
            raise ValueError("x")
        axis = output_axis % ndim
        return (leaf.num_layers, *(n if i == axis else 1 for i, n in enumerate(leaf.layer_shape)))

    def initial(leaf: trees.Leaf) -> jax.Array:
        return jnp.zeros((*leaf.shape[: leaf.stack_axes], math.prod(shape(leaf)[1:])))

    method = from_thresholds(
        initial=initial,
        threshold=lambda t, leaf: t.reshape(shape(leaf)),
        gate=lambda w, x: w * _step(x),
        penalty=lambda t: jnp.exp(-t),
        prunable=prunable,
    )

    def reset(params: PyTree, extra: dict[str, jax.Array]) -> dict[str, jax.Array]:
        leaves = [x for x in trees.describe(params, prunable)]
        num_live = selection.count(trees.split(method.masks(params, extra), leaves))
        pruned = [x for x in leaves if x.prunable]
        ends = np.cumsum([x.num_layers for x in pruned])
        out = {}
        for leaf, live in zip(pruned, jnp.split(num_live, ends[:-1]), strict=True):
            wiped = (live <= math.prod(leaf.layer_shape) // 100).reshape(
                (*leaf.shape[: leaf.stack_axes], 1)
            )
            out[leaf.path] = jnp.where(wiped, 0.0, extra[leaf.path])
        return out

    return method._replace(reset=reset)


@jax.custom_jvp
def _step(x: jax.Array) -> jax.Array:
    return (x > 0).astype(x.dtype)


@_step.defjvp
def _step_jvp(primals: Any, tangents: Any) -> Any:
    (x,), (dx,) = primals, tangents
    return _step(x), long_tailed(x) * dx


def long_tailed(x: jax.Array) -> jax.Array:
    size = jnp.abs(x)
    return jnp.where(size <= 0.4, 2 - 4 * size, jnp.where(size <= 1, 0.4, 0.0))
