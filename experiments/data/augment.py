"""Augmentation on the device, inside the jitted step."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def crop_and_flip(key: jax.Array, images: jax.Array, mode: str) -> jax.Array:
    """Pads by 4 pixels, crops at random to the old size, and mirrors half of the images.

    Args:
      key: typed key; each image draws its own.
      images: ``(batch, height, width, channels)``, any dtype.
      mode: of ``jnp.pad``: reflect (CIFAR-10 in the GraNet code) or constant (zeros; CIFAR-100).
    """
    batch, height, width, _ = images.shape
    crop_key, flip_key = jax.random.split(key)
    corners = jax.random.randint(crop_key, (batch, 2), 0, 9)
    flips = jax.random.bernoulli(flip_key, 0.5, (batch,))
    padded = jnp.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)), mode=mode)
    # One gather of rows and one of columns; a column index that runs backwards mirrors.
    rows = corners[:, :1] + jnp.arange(height)[None]
    columns = jnp.arange(width)[None]
    columns = corners[:, 1:] + jnp.where(flips[:, None], width - 1 - columns, columns)
    return padded[jnp.arange(batch)[:, None, None], rows[:, :, None], columns[:, None, :]]


AUGMENTATIONS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "none": lambda key, images: images,
    "reflect": lambda key, images: crop_and_flip(key, images, "reflect"),
    "zero": lambda key, images: crop_and_flip(key, images, "constant"),
}
