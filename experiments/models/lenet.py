"""LeNets, for MNIST, and a perceptron."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models import layers


class LeNet300100(nn.Module):
    """Hidden layers of 300 and 100 units; 266,200 weights on 28x28 images (LeCun et al. 1998)."""

    num_classes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = x.reshape(len(x), -1)
        x = nn.relu(nn.Dense(300, dtype=self.dtype, name="fc1")(x))
        x = nn.relu(nn.Dense(100, dtype=self.dtype, name="fc2")(x))
        return nn.Dense(self.num_classes, name="fc3")(x)


class LeNet5(nn.Module):
    """LeNet-5 as in Caffe: 20 and 50 filters of 5x5 without padding, 500 units; 430,500 weights."""

    num_classes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        if min(x.shape[1:3]) < 16:
            raise ValueError(
                f"lenet5 needs images of 16x16 or more, got {x.shape[1]}x{x.shape[2]}. "
                "Use --model=lenet_300_100, or --dataset=mnist."
            )
        for i, filters in enumerate((20, 50), start=1):
            conv = nn.Conv(
                filters,
                (5, 5),
                padding="VALID",
                dtype=self.dtype,
                conv_general_dilated=layers.convolve,
                name=f"conv{i}",
            )
            x = nn.max_pool(nn.relu(conv(x)), (2, 2), strides=(2, 2))
        x = x.reshape(len(x), -1)
        x = nn.relu(nn.Dense(500, dtype=self.dtype, name="fc1")(x))
        return nn.Dense(self.num_classes, name="fc2")(x)


class Perceptron(nn.Module):
    """Three hidden layers of one width, as of Cannistraci-Hebb training (Zhang et al. 2024)."""

    num_classes: int
    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = x.reshape(len(x), -1)
        for i in range(3):
            x = nn.relu(nn.Dense(self.width, dtype=self.dtype, name=f"fc{i + 1}")(x))
        return nn.Dense(self.num_classes, name="out")(x)
