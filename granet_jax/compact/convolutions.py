"""Convolutions of images ``(images, height, width, channels)`` with dense kernels.

What stands in for the kernels for live weights where these are not faster, and the gradient of all
weights.
"""

from typing import Any

import jax

from granet_jax.compact.native import Window

_NUMBERS = ("NHWC", "HWIO", "NHWC")


def multiply(
    window: Window, w: jax.Array, x: jax.Array, transposed: bool, precision: Any = None
) -> jax.Array:
    """The convolution of inputs, or the gradient of these, given that of the outputs."""
    w = w.reshape(*window.sizes, window.inputs, window.outputs)
    if not transposed:
        return _convolve(window, x, w, precision)
    inputs = jax.ShapeDtypeStruct(window.shape(len(x), True), x.dtype)
    (of_inputs,) = jax.linear_transpose(lambda x: _convolve(window, x, w, precision), inputs)(x)
    return of_inputs


def sample(window: Window, x: jax.Array, y: jax.Array, precision: Any = None) -> jax.Array:
    """The gradient of the kernel, ``(rows, columns, inputs of a group, outputs)``."""
    w = jax.ShapeDtypeStruct((*window.sizes, window.inputs, window.outputs), x.dtype)
    (of_w,) = jax.linear_transpose(lambda w: _convolve(window, x, w, precision), w)(y)
    return of_w


def _convolve(window: Window, x: jax.Array, w: jax.Array, precision: Any) -> jax.Array:
    # After the last input as many places as the last output needs.
    reach = zip(window.image, window.result, window.sizes, *window[1:5], strict=True)
    edges = [
        (pad, (out - 1) * stride + (size - 1) * spread + 1 - pad - ((n - 1) * gap + 1))
        for n, out, size, stride, gap, spread, pad in reach
    ]
    return jax.lax.conv_general_dilated(
        x,
        w,
        window.strides,
        edges,
        window.gaps,
        window.spread,
        _NUMBERS,
        feature_group_count=window.groups,
        precision=precision,
    )


def window_of(params: Any, x: Any, w: Any, y: Any) -> Window | str:
    """The window of a ``conv_general_dilated`` of arrays of such shapes; or why there is none.

    Args:
      params: of the equation.
      x: the shape of its images.
      w: that of its kernel.
      y: that of its result.
    """
    numbers = params["dimension_numbers"]
    if len(x) not in (3, 4):
        return f"{len(x) - 2} axes of places"
    if params["batch_group_count"] > 1:
        return "groups of images"

    def pair(sizes: Any, default: int = 1) -> tuple[int, int]:
        *_, rows, columns = default, *(int(n) for n in sizes)
        return rows, columns

    strides, gaps = pair(params["window_strides"]), pair(params["lhs_dilation"])
    if max(strides) > 1 and max(gaps) > 1:
        return "a stride and gaps"
    return Window(
        pair(w[i] for i in numbers.rhs_spec[2:]),
        strides,
        gaps,
        pair(params["rhs_dilation"]),
        pair((low for low, _ in params["padding"]), 0),
        params["feature_group_count"],
        w[numbers.rhs_spec[1]],
        w[numbers.rhs_spec[0]],
        pair(x[i] for i in numbers.lhs_spec[2:]),
        pair(y[i] for i in numbers.out_spec[2:]),
    )


def is_product(window: Window) -> bool:
    """Whether it is one of matrices, of every place or of some."""
    reach = zip(window.image, window.result, window.strides, strict=True)
    rest = window.sizes, window.gaps, window.pads, (window.groups, 1)
    return rest == ((1, 1), (1, 1), (0, 0), (1, 1)) and all(
        -(-n // stride) == out for n, out, stride in reach
    )


def in_order(array: jax.Array, spec: Any) -> jax.Array:
    """Images as ``(images, height, width, channels)``, given where these axes are."""
    array = array.transpose(spec[0], *spec[2:], spec[1])
    return array[:, None] if array.ndim == 3 else array


def out_of_order(array: jax.Array, spec: Any) -> jax.Array:
    """The way back."""
    array = array[:, 0] if len(spec) == 3 else array
    order = (spec[0], *spec[2:], spec[1])
    return array.transpose([order.index(i) for i in range(len(order))])
