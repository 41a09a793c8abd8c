"""A decoder-only transformer over bytes, its layers stacked for ``lax.scan``."""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

VOCABULARY = 256


class Size(NamedTuple):
    """Width of the residual stream, number of layers, attention heads in each."""

    width: int
    depth: int
    heads: int


SIZES = {  # by the number of weights outside the embedding
    "1m": Size(128, 5, 2),
    "10m": Size(448, 4, 4),
    "100m": Size(768, 14, 8),
    "300m": Size(1024, 24, 8),
    "1b": Size(2048, 20, 16),
}


class Transformer(nn.Module):
    """Bytes ``(batch, time)`` to logits ``(batch, time, 256)`` of the byte that follows, float32.

    RMS norm before each part, rotary positions, causal attention, SwiGLU, no biases; the embedding
    is the output's kernel as well. Every kernel of the layers has three axes, ``(layer, in, out)``.
    Parameters are float32, ``dtype`` is that of the arithmetic.
    """

    size: Size
    dtype: Any = jnp.float32
    remat: bool = False  # compute the inside of a layer again in the backward pass
    sharding: Any = None  # of the residual stream; None = as the compiler likes

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        width, depth, heads = self.size
        init = nn.initializers.normal(1 / math.sqrt(width))
        table = self.param("embedding", init, (VOCABULARY, width)).astype(self.dtype)
        if self.sharding is not None:  # small, and a lookup in a part of it is slow
            whole = NamedSharding(self.sharding.mesh, PartitionSpec())
            table = jax.lax.with_sharding_constraint(table, whole)
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        blocks = nn.scan(
            block,
            variable_axes={"params": 0, "masks": 0},  # masks where dense layers ask for them
            split_rngs={"params": True},
            length=depth,
        )
        x = table[tokens.reshape(-1)] * math.sqrt(width)
        stack = blocks(heads, depth, tokens.shape[1], self.dtype, self.sharding, name="blocks")
        x, _ = stack(x, None)
        x = nn.RMSNorm(dtype=self.dtype, name="norm")(x)
        return (x @ table.T).astype(jnp.float32).reshape(*tokens.shape, -1)


class Block(nn.Module):
    """Attention and a gated perceptron, each with a residual; ``(x, None) -> (x, None)``.

    ``x`` is ``(batch * time, width)``: as matrix products alone, gradients of kernels are more than
    twice as fast on CPU as with a batch axis.
    """

    heads: int
    depth: int  # of the whole network, by which what residuals add is scaled down at first
    time: int
    dtype: Any
    sharding: Any

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        tokens, width = x.shape
        hidden = -(-8 * width // 3 // 128) * 128

        def dense(features: int, name: str, variance: float = 1.0) -> nn.Dense:
            init = nn.initializers.variance_scaling(variance, "fan_in", "normal")
            return nn.Dense(features, use_bias=False, dtype=self.dtype, kernel_init=init, name=name)

        x = self._placed(x)
        y = nn.RMSNorm(dtype=self.dtype, name="norm1")(x)
        query, key, value = (
            dense(width, name)(y).reshape(-1, self.time, self.heads, width // self.heads)
            for name in ("query", "key", "value")
        )
        y = jax.nn.dot_product_attention(rotate(query), rotate(key), value, is_causal=True)
        x = x + dense(width, "out", 0.5 / self.depth)(y.reshape(tokens, width))
        x = self._placed(x)
        y = nn.RMSNorm(dtype=self.dtype, name="norm2")(x)
        y = nn.silu(dense(hidden, "gate")(y)) * dense(hidden, "up")(y)
        return self._placed(x + dense(width, "down", 0.5 / self.depth)(y)), None

    def _placed(self, x: jax.Array) -> jax.Array:
        return x if self.sharding is None else jax.lax.with_sharding_constraint(x, self.sharding)


def rotate(x: jax.Array) -> jax.Array:
    """Turns pairs of features by angles that grow with the position (Su et al. 2021).

    Args:
      x: ``(batch, time, heads, features)``, an even number of features; the first half is paired
        with the second. The product of two rotated vectors depends on their distance alone.
    """
    half = x.shape[-1] // 2
    rates = 10_000.0 ** (-jnp.arange(half) / half)
    angles = jnp.outer(jnp.arange(x.shape[1]), rates)[None, :, None, :]
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)
