"""Products with known weights in a traced model: of matrices, and convolutions as such."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from granet_jax.compact import convolutions, native
from granet_jax.export.graph import Known, Step


class Product(NamedTuple):
    """A product with known weights, as ``x (rows, inputs) @ weights (inputs, outputs)``."""

    weights: np.ndarray
    shape: tuple[int, ...]  # of x
    dtype: Any  # of the sums
    to_rows: Callable[[jax.Array], jax.Array]
    from_rows: Callable[[jax.Array], jax.Array]
    images: "Images | None" = None  # where it is a convolution that our kernel takes

    @classmethod
    def of(cls, step: Step) -> "Product | None":
        """None where the step is no product, or its weights are not known."""
        known = [isinstance(x, Known) for x in step.inputs]
        if step.eqn.primitive.name == "dot_general" and sum(known) == 1:
            return _of_dot(step, known.index(True))
        if step.eqn.primitive.name == "conv_general_dilated" and known == [False, True]:
            return _of_convolution(step)
        return None


class Images(NamedTuple):
    """How a convolution is done as one, its kernel's window as the rows of the weights."""

    window: native.Window
    to_images: Callable[[jax.Array], jax.Array]
    from_images: Callable[[jax.Array], jax.Array]


def _of_dot(step: Step, side: int) -> Product | None:
    contracted, batch = step.eqn.params["dimension_numbers"]
    value = np.asarray(step.known()[0])
    is_float = jnp.issubdtype(value.dtype, jnp.floating)
    if batch[0] or not contracted[0] or not is_float or not value.size:
        return None
    axes, x_axes = contracted[side], contracted[1 - side]
    weights = np.moveaxis(value, axes, range(len(axes)))
    inputs, free = weights.shape[: len(axes)], weights.shape[len(axes) :]
    aval = step.eqn.invars[1 - side].aval
    rows = tuple(n for i, n in enumerate(aval.shape) if i not in x_axes)
    dtype = step.eqn.outvars[0].aval.dtype

    def to_rows(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, x_axes, range(-len(x_axes), 0))
        return x.reshape(-1, math.prod(inputs))

    def from_rows(y: jax.Array) -> jax.Array:
        y = y.astype(dtype)
        if side == 1:
            return y.reshape(*rows, *free)
        return y.T.reshape(*free, *rows)

    two_axes = weights.reshape(math.prod(inputs), -1)
    return Product(two_axes, aval.shape, dtype, to_rows, from_rows)


def _of_convolution(step: Step) -> Product | None:
    """The inputs of each output position laid out in a row, as ``im2col`` does."""
    params = step.eqn.params
    numbers = params["dimension_numbers"]
    if (
        0 in step.eqn.outvars[0].aval.shape
        or params["feature_group_count"] * params["batch_group_count"] > 1
        or math.prod(params["lhs_dilation"]) > 1
    ):
        return None
    # The kernel as (*window, in, out), the input as (batch, *space, in).
    kernel = np.transpose(
        np.asarray(step.known()[0]), (*numbers.rhs_spec[2:], *numbers.rhs_spec[1::-1])
    )
    *window, num_in, num_out = kernel.shape
    out = step.eqn.outvars[0].aval
    out_shape = [out.shape[i] for i in (numbers.out_spec[0], *numbers.out_spec[2:])]
    aval = step.eqn.invars[0].aval

    def to_rows(x: jax.Array) -> jax.Array:
        x = jnp.transpose(x, (numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1]))
        edges = [(0, 0, 0), *((low, high, 0) for low, high in params["padding"]), (0, 0, 0)]
        x = jax.lax.pad(x, jnp.zeros([], x.dtype), edges)
        places = []
        for place in np.ndindex(*window):
            start = [i * d for i, d in zip(place, params["rhs_dilation"], strict=True)]
            limit = [
                s + (n - 1) * stride + 1
                for s, n, stride in zip(start, out_shape[1:], params["window_strides"], strict=True)
            ]
            places.append(
                jax.lax.slice(
                    x,
                    (0, *start, 0),
                    (len(x), *limit, num_in),
                    (1, *params["window_strides"], 1),
                )
            )
        return jnp.concatenate(places, axis=-1).reshape(-1, math.prod(window) * num_in)

    def from_rows(y: jax.Array) -> jax.Array:
        y = y.astype(out.dtype).reshape(*out_shape, num_out)
        order = (numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1])
        return jnp.transpose(y, tuple(order.index(i) for i in range(len(order))))

    weights = kernel.reshape(-1, num_out)
    kernel_shape = step.known()[0].shape
    images, seen = None, convolutions.window_of(params, aval.shape, kernel_shape, out.shape)
    if not isinstance(seen, str):

        def to_images(x: jax.Array) -> jax.Array:
            return convolutions.in_order(x, numbers.lhs_spec)

        def from_images(y: jax.Array) -> jax.Array:
            return convolutions.out_of_order(y.astype(out.dtype), numbers.out_spec)

        images = Images(seen, to_images, from_images)
    return Product(weights, aval.shape, out.dtype, to_rows, from_rows, images)
