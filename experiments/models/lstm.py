"""LSTM that reads an image row by row, for MNIST."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class LSTM(nn.Module):
    """LSTM layers over the rows of an image, and a dense layer on the last output.

    On 28x28 images, 28 steps of 28 inputs: the network of Dynamic Sparse Training (Liu et al.
    2020). Each cell has eight matrices, four of which (``ii if ig io``) read its input and four
    (``hi hf hg ho``) its state. The state starts at zero for each batch; the paper's code carries
    it over from batch to batch.
    """

    num_classes: int
    dtype: Any = jnp.float32
    hidden: int = 128
    layers: int = 2

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        bound = self.hidden**-0.5
        init = functools.partial(_uniform, bound)
        rows: Any = x.reshape(*x.shape[:2], -1)  # (batch, steps, inputs)
        for i in range(1, self.layers + 1):
            cell = nn.OptimizedLSTMCell(
                self.hidden,
                kernel_init=init,
                recurrent_kernel_init=init,
                dtype=self.dtype,
                name=f"lstm{i}",
            )
            rows = nn.RNN(cell)(rows)
        return nn.Dense(self.num_classes, kernel_init=init, name="fc")(rows[:, -1])


def _uniform(bound: float, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.uniform(key, shape, dtype, -bound, bound)


lstm_a = functools.partial(LSTM, hidden=128)
lstm_b = functools.partial(LSTM, hidden=256)
