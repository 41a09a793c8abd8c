"""A small vision transformer."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class ViT(nn.Module):
    """Pre-norm transformer on patches, mean pooling, no class token (Beyer et al. 2022).

    Every kernel but that of the patches has two axes, so that ERK and path rules see a head's
    weights as columns of one matrix.
    """

    num_classes: int
    dtype: Any = jnp.float32
    patch: int = 4
    width: int = 192
    depth: int = 6
    heads: int = 3

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        size = (self.patch, self.patch)
        if x.shape[1] % self.patch or x.shape[2] % self.patch:
            raise ValueError(
                f"the ViT needs images whose sides are multiples of {self.patch}, "
                f"got {x.shape[1]}x{x.shape[2]}."
            )
        x = nn.Conv(self.width, size, strides=size, dtype=self.dtype, name="patches")(x)
        x = x.reshape(len(x), -1, self.width)
        init = nn.initializers.normal(0.02)
        position = self.param("position_embedding", init, (1, x.shape[1], self.width))
        x = x + position.astype(self.dtype)
        for i in range(self.depth):
            x = Block(self.heads, self.dtype, name=f"block{i + 1}")(x)
        x = nn.LayerNorm(dtype=self.dtype, name="norm")(x).mean(1)
        return nn.Dense(self.num_classes, name="fc")(x)


class Block(nn.Module):
    """Self-attention and a perceptron with one hidden layer, each with a residual."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, tokens, width = x.shape

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, dtype=self.dtype, name=name)

        y = nn.LayerNorm(dtype=self.dtype, name="norm1")(x)
        query, key, value = (
            dense(width, name)(y).reshape(batch, tokens, self.heads, -1)
            for name in ("query", "key", "value")
        )
        y = jax.nn.dot_product_attention(query, key, value)
        x = x + dense(width, "out")(y.reshape(batch, tokens, width))
        y = nn.LayerNorm(dtype=self.dtype, name="norm2")(x)
        return x + dense(width, "fc2")(nn.gelu(dense(4 * width, "fc1")(y)))
