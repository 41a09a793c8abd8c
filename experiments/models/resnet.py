"""Residual networks: ResNet-20 and ResNet-50 (He et al. 2016), WRN-22-2 (Zagoruyko et al. 2016)."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models import layers


def _shortcut(x: jax.Array, y: jax.Array, stride: int, train: bool) -> jax.Array:
    """``x`` in the shape of ``y``: itself, or through a 1x1 convolution where the shape changes."""
    if x.shape == y.shape:
        return x
    strides = (stride, stride)
    x = layers.conv1x1(y.shape[-1], strides=strides, dtype=y.dtype, name="shortcut")(x)
    return layers.norm(train, y.dtype, name="norm_shortcut")(x)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions."""

    filters: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        strides = (self.stride, self.stride)
        conv = functools.partial(layers.conv, self.filters, (3, 3), dtype=self.dtype)
        y = conv(strides=strides, name="conv1")(x)
        y = nn.relu(layers.norm(train, self.dtype, name="norm1")(y))
        y = layers.norm(train, self.dtype, name="norm2")(conv(name="conv2")(y))
        return nn.relu(_shortcut(x, y, self.stride, train) + y)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, the stride in the 3x3 one (v1.5)."""

    filters: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        strides = (self.stride, self.stride)
        conv1x1 = functools.partial(layers.conv1x1, dtype=self.dtype)
        y = conv1x1(self.filters, name="conv1")(x)
        y = nn.relu(layers.norm(train, self.dtype, name="norm1")(y))
        y = layers.conv(self.filters, (3, 3), strides=strides, dtype=self.dtype, name="conv2")(y)
        y = nn.relu(layers.norm(train, self.dtype, name="norm2")(y))
        y = conv1x1(4 * self.filters, name="conv3")(y)
        # The last scale starts at 0, so that each block starts as its shortcut (Goyal et al. 2017).
        zeros = nn.initializers.zeros
        y = layers.norm(train, self.dtype, scale_init=zeros, name="norm3")(y)
        return nn.relu(_shortcut(x, y, self.stride, train) + y)


class PreActivationBlock(nn.Module):
    """Batch norm and ReLU before each of two 3x3 convolutions."""

    filters: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        strides = (self.stride, self.stride)
        conv = functools.partial(layers.conv, self.filters, (3, 3), dtype=self.dtype)
        y = nn.relu(layers.norm(train, self.dtype, name="norm1")(x))
        if x.shape[-1] != self.filters:
            x = layers.conv1x1(self.filters, strides=strides, dtype=self.dtype, name="shortcut")(y)
        y = conv(strides=strides, name="conv1")(y)
        y = nn.relu(layers.norm(train, self.dtype, name="norm2")(y))
        return x + conv(name="conv2")(y)


class ResNet(nn.Module):
    """A stem, stages of blocks that halve the image from the second stage on, and a classifier."""

    num_classes: int
    block: Callable[..., nn.Module]
    blocks: tuple[int, ...]  # in each stage
    filters: tuple[int, ...]  # in each stage
    stem_filters: int
    imagenet_stem: bool = False  # 7x7 with stride 2 and max pooling, instead of 3x3
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        conv = functools.partial(layers.conv, self.stem_filters, dtype=self.dtype, name="stem")
        pre_activation = self.block is PreActivationBlock
        x = conv((7, 7), strides=(2, 2), padding=3)(x) if self.imagenet_stem else conv((3, 3))(x)
        if not pre_activation:
            x = nn.relu(layers.norm(train, self.dtype, name="norm_stem")(x))
        if self.imagenet_stem:
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for stage, (blocks, filters) in enumerate(zip(self.blocks, self.filters, strict=True)):
            for i in range(blocks):
                stride = 2 if stage > 0 and i == 0 else 1
                name = f"stage{stage + 1}_{i + 1}"
                x = self.block(filters, stride, self.dtype, name=name)(x, train)
        if pre_activation:
            x = nn.relu(layers.norm(train, self.dtype, name="norm_last")(x))
        return nn.Dense(self.num_classes, name="fc")(x.mean((1, 2)))


resnet20 = functools.partial(
    ResNet, block=BasicBlock, blocks=(3, 3, 3), filters=(16, 32, 64), stem_filters=16
)
wrn_22_2 = functools.partial(
    ResNet, block=PreActivationBlock, blocks=(3, 3, 3), filters=(32, 64, 128), stem_filters=16
)
resnet50_cifar = functools.partial(
    ResNet,
    block=Bottleneck,
    blocks=(3, 4, 6, 3),
    filters=(64, 128, 256, 512),
    stem_filters=64,
)
resnet50 = functools.partial(resnet50_cifar, imagenet_stem=True)
