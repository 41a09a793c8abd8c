"""p."""
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from granet_jax import metrics
from granet_jax.reparam.base import Reparameterisation
from granet_jax.types import PyTree


class PenaltyState(NamedTuple):
    penalty_step: jax.Array
    coefficient: jax.Array
    sparsity: jax.Array
    inner: Any


def penalise(inner, method, coefficient) -> optax.GradientTransformationExtraArgs:
    inner = optax.with_extra_args_support(inner)
    control = coefficient if callable(coefficient) else lambda *_: jnp.asarray(coefficient, jnp.float32)

    def init(params):
        zero = jnp.zeros([], jnp.float32)
        return PenaltyState(jnp.zeros([], jnp.int32), zero, zero, inner.init(params))

    def update(grads, state, params=None, **extra_args):
        weights, extra = params
        step = optax.safe_increment(state.penalty_step)
        sparsity = metrics.sparsity(method.masks(weights, extra), weights, method.prunable)
        c = control(state.coefficient, sparsity, state.sparsity, step)
        slope = jax.grad(method.penalty)(extra)
        weight_grads, extra_grads = grads
        extra_grads = jax.tree.map(lambda g, d: g + c * d, extra_grads, slope)
        updates, inner_state = inner.update((weight_grads, extra_grads), state.inner, params, **extra_args)
        new_weights, new_extra = optax.apply_updates(params, updates)
        reset = method.reset(new_weights, new_extra)
        u = jax.tree.map(lambda u, old, new, r: jnp.where(r == new, u, r - old), updates[1], extra, new_extra, reset)
        return (updates[0], u), PenaltyState(step, c, sparsity, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)
