"""Keys: integers with the order and the width of floats, which selection searches bit by bit.

Keys are made from the bits of a float, because comparing or converting floats may flush denormals
to zero. float64 has keys of 64 bits; all narrower floats are ranked as float32.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def widest(scores: Sequence[Any]) -> np.dtype:
    """The dtype in which arrays are ranked together: float64 if one of them is, else float32.

    Raises:
      ValueError: complex scores.
    """
    if any(jnp.issubdtype(x.dtype, jnp.complexfloating) for x in scores):
        raise ValueError("Complex scores have no order; rank their size, jnp.abs(scores).")
    return np.dtype(np.float64 if any(x.dtype == np.float64 for x in scores) else np.float32)


def exactly(scores: jax.Array, dtype: np.dtype) -> jax.Array:
    """Scores as float32 or float64, without loss: XLA:CPU would widen float32 denormals to 0.

    Example:
      >>> import jax.numpy as jnp
      >>> exactly(jnp.array([0.5], jnp.bfloat16), np.dtype("float32")).dtype.name
      'float32'
    """
    if scores.dtype == dtype:
        return scores
    scores = scores.astype(jnp.float32)
    if dtype == np.float32:
        return scores
    bits = jax.lax.bitcast_convert_type(scores, jnp.int32)
    magnitude = bits & 0x7FFFFFFF
    denormal = magnitude.astype(dtype) * 2.0**-149
    denormal = jnp.where(bits < 0, -denormal, denormal)
    return jnp.where(magnitude < 0x00800000, denormal, scores.astype(dtype))


@jax.jit  # so that it is traced once for all arrays of a shape
def keys(scores: jax.Array) -> jax.Array:
    """Maps float32 to int32 of the same order, float64 to int64; NaN lowest, -0 equal to +0.

    No score has the key :func:`lowest`; infinity has the highest.

    Example:
      >>> import jax.numpy as jnp
      >>> keys(jnp.array([jnp.nan, -jnp.inf, -1e-45, -0.0, 0.0], jnp.float32)).tolist()
      [-2147483647, -2139095040, -1, 0, 0]
    """
    signed = np.dtype(f"i{scores.dtype.itemsize}")
    infinity = np.array(np.inf, scores.dtype).view(signed)
    bits = jax.lax.bitcast_convert_type(scores, signed)
    magnitude = bits & signed.type(np.iinfo(signed).max)
    ordered = jnp.where(bits < 0, -magnitude, magnitude)
    return jnp.where(magnitude > infinity, lowest(signed) + 1, ordered)


def lowest(signed: np.dtype) -> Any:
    """A key below the keys of all scores."""
    return signed.type(np.iinfo(signed).min)


def highest_position(unsigned: np.dtype) -> np.ndarray:
    """The position of infinity, see :func:`to_position`."""
    return np.array(np.inf, f"f{unsigned.itemsize}").view(unsigned) | _top_bit(unsigned)


def to_position(key: jax.Array) -> jax.Array:
    """Signed to unsigned ints of the same width and order."""
    unsigned = np.dtype(f"u{key.dtype.itemsize}")
    return jax.lax.bitcast_convert_type(key, unsigned) ^ _top_bit(unsigned)


def from_position(position: jax.Array) -> jax.Array:
    """Undoes :func:`to_position`."""
    signed = np.dtype(f"i{position.dtype.itemsize}")
    return jax.lax.bitcast_convert_type(position ^ _top_bit(position.dtype), signed)


def _top_bit(unsigned: np.dtype) -> np.ndarray:
    return np.array(1 << (8 * unsigned.itemsize - 1), unsigned)
