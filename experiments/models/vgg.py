"""VGG with batch norm and one linear classifier, for 32x32 images."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models import layers


class VGG(nn.Module):
    """Stages of 3x3 convolutions, halved by max pooling (Simonyan & Zisserman 2015).

    The version that sparse training uses on CIFAR: batch norm after each convolution, no hidden
    linear layers.
    """

    num_classes: int
    convs: tuple[int, ...]  # in each stage
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        if min(x.shape[1:3]) < 16:
            raise ValueError(f"VGG needs images of 16x16 or more, got {x.shape[1]}x{x.shape[2]}.")
        for stage, (convs, filters) in enumerate(
            zip(self.convs, (64, 128, 256, 512, 512), strict=True)
        ):
            if stage > 0:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
            for i in range(convs):
                name = f"{stage + 1}_{i + 1}"
                x = layers.conv(filters, (3, 3), dtype=self.dtype, name=f"conv{name}")(x)
                x = nn.relu(layers.norm(train, self.dtype, name=f"norm{name}")(x))
        return nn.Dense(self.num_classes, name="fc")(x.mean((1, 2)))


vgg16 = functools.partial(VGG, convs=(2, 2, 3, 3, 3))
vgg19 = functools.partial(VGG, convs=(2, 2, 4, 4, 4))
