"""A whole training step of a network, as short as it can be written."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from experiments.benchmarks import step
from experiments.models import MODELS

INNER = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9, nesterov=True))


def make(name: str) -> nn.Module:
    """A network for images of ten classes."""
    return MODELS[name](num_classes=10)


def init(model: nn.Module, image: tuple[int, ...], key: jax.Array) -> tuple[Any, Any]:
    """Parameters and batch statistics."""
    variables = dict(model.init(key, jnp.zeros((1, *image))))
    return variables.pop("params"), variables


def batch(size: int, image: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Random images, uint8, and labels."""
    keys = jax.random.split(jax.random.key(0))
    images = jax.random.randint(keys[0], (size, *image), 0, 256).astype(jnp.uint8)
    return images, jax.random.randint(keys[1], (size,), 0, 10)


def training_step(
    model: nn.Module, tx: optax.GradientTransformation
) -> Callable[..., tuple[Any, Any, Any]]:
    """``(params, statistics, opt_state, batch) -> (params, statistics, opt_state)``."""

    def loss(params: Any, rest: Any, batch: tuple[jax.Array, jax.Array]) -> Any:
        images, labels = batch
        inputs = images.astype(jnp.float32) / 255
        logits, rest = model.apply({"params": params, **rest}, inputs, True, mutable=list(rest))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(losses), rest

    def train(params: Any, rest: Any, opt_state: Any, batch: Any) -> tuple[Any, Any, Any]:
        grads, rest = jax.grad(loss, has_aux=True)(params, rest, batch)
        params, opt_state = step.update(tx)(params, opt_state, grads)
        return params, rest, opt_state

    return train
