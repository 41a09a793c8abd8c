"""Convolutions of images ``(images, height, width, channels)`` with dense kernels.

What stands in for the kernels for live weights where these are not faster, and the gradient of all
weights. XLA does some of it badly on CPU: the gradient of a kernel is done here by a kernel of
``convolutions.cc``, and a window larger than its image by a product of matrices.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from granet_jax import jaxprs
from granet_jax.compact import native
from granet_jax.compact.native import Window

_NUMBERS = ("NHWC", "HWIO", "NHWC")
_LEAST = 512  # images times places: with fewer, XLA is faster than our kernel
_FEW = 4  # rows or columns of places: with no more, XLA is faster


class How(NamedTuple):
    """How a convolution is done."""

    window: Window
    dtype: Any = None  # of the result; None = that of the operands
    precision: Any = None
    kernels: bool = True  # whether those of ``convolutions.cc`` may be used, where they run


def conv_general_dilated(lhs: jax.Array, rhs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
    """``jax.lax.conv_general_dilated`` with its arguments; on a CPU its gradients are faster.

    The gradient of the kernel, by which XLA:CPU loses most of its time in small networks, is as
    fast as the convolution; and so are convolutions whose window is larger than their image, as the
    last ones of VGG are. It is the same function where the default backend is no CPU, on arrays
    other than float32, with groups, or with gaps between inputs. It is not for arrays that lie on
    several devices, and on a CPU it has no forward mode (``jax.jvp``).

    Flax takes it by ``nn.Conv(conv_general_dilated=...)``.

    Args:
      lhs: as in ``jax.lax.conv_general_dilated``, images of one or two axes of places.
      rhs: as there, the kernel.
      *args: as there.
      **kwargs: as there.

    Returns:
      What ``jax.lax.conv_general_dilated`` returns, but for the last bits; and with fewer than 12
      images the gradient of the kernel can be NaN where it is a number there, if inputs at an edge
      are infinite or NaN.

    Raises:
      TypeError, ValueError: as there.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x, w = jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 1))
      >>> numbers = ("NHWC", "HWIO", "NHWC")
      >>> y = conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=numbers)
      >>> y.squeeze().tolist()
      [[9.0, 9.0], [9.0, 9.0]]
    """

    def plain(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(lhs, rhs, *args, **kwargs)

    if jaxprs.is_read() or not native.available():
        return plain(lhs, rhs)
    closed, out = jax.make_jaxpr(plain, return_shape=True)(lhs, rhs)
    params = jaxprs.opened(closed).eqns[-1].params
    window = window_of(params, lhs.shape, rhs.shape, out.shape)
    if isinstance(window, str) or not _is_simple(window) or not _are_floats(lhs, rhs, out):
        return plain(lhs, rhs)
    numbers = params["dimension_numbers"]
    order = (*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0])
    w = rhs.transpose(order).reshape(*window.sizes, window.inputs, window.outputs)
    how = How(window, precision=params["precision"])
    y = multiply(how, False, w, in_order(lhs, numbers.lhs_spec))
    return out_of_order(y, numbers.out_spec)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def multiply(how: How, transposed: bool, w: jax.Array, x: jax.Array) -> jax.Array:
    """The convolution of inputs, or the gradient of these, given that of the outputs.

    Args:
      how: it is done.
      transposed: whether it is the gradient.
      w: ``(rows, columns, inputs of a group, outputs)``.
      x: ``(images, height, width, channels)``.
    """
    window = how.window
    dtype = how.dtype or jnp.promote_types(w.dtype, x.dtype)
    w, x = _of_one_dtype(w, x)
    by_matrices = how.kernels and is_wide(window) and _is_simple(window) and not _is_empty(window)
    convolve = _by_matrices if by_matrices else _convolve
    if not transposed:
        return convolve(how._replace(dtype=dtype), w, x)
    inputs = jax.ShapeDtypeStruct(window.shape(x.shape[0], of_inputs=True), x.dtype)
    forward = functools.partial(convolve, how._replace(dtype=None), w)
    (of_inputs,) = jax.linear_transpose(forward, inputs)(x)
    return of_inputs.astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def sample(how: How, x: jax.Array, y: jax.Array) -> jax.Array:
    """The gradient of the kernel, given inputs and the gradient of outputs."""
    window = how.window
    dtype = how.dtype or jnp.promote_types(x.dtype, y.dtype)
    x, y = _of_one_dtype(x, y)
    if (
        how.kernels
        and _is_simple(window)
        and min(window.result) > _FEW
        and jaxprs.are_known(x.shape)
        and x.shape[0] * math.prod(window.result) >= _LEAST
        and _are_floats(x, y)
        and native.available()
    ):
        return native.sample_all(window, x, y).astype(dtype)
    w = jax.ShapeDtypeStruct((*window.sizes, window.inputs, window.outputs), x.dtype)
    (of_w,) = jax.linear_transpose(lambda w: _convolve(how._replace(dtype=None), w, x), w)(y)
    return of_w.astype(dtype)


def _multiply_forward(how: How, transposed: bool, w: jax.Array, x: jax.Array) -> Any:
    return multiply(how, transposed, w, x), (w, x)


def _multiply_backward(how: How, transposed: bool, args: Any, y: jax.Array) -> Any:
    w, x = args
    inputs, outputs = (y, x) if transposed else (x, y)
    of_w = sample(how._replace(dtype=w.dtype), inputs, outputs)
    return of_w, multiply(how._replace(dtype=x.dtype), not transposed, w, y)


def _sample_forward(how: How, x: jax.Array, y: jax.Array) -> Any:
    return sample(how, x, y), (x, y)


def _sample_backward(how: How, args: Any, w: jax.Array) -> Any:
    x, y = args
    of_x = multiply(how._replace(dtype=x.dtype), True, w, y)
    return of_x, multiply(how._replace(dtype=y.dtype), False, w, x)


multiply.defvjp(_multiply_forward, _multiply_backward)
sample.defvjp(_sample_forward, _sample_backward)


def _of_one_dtype(*arrays: jax.Array) -> list[jax.Array]:
    dtype = jnp.result_type(*arrays)
    return [x.astype(dtype) for x in arrays]


def _are_floats(*arrays: Any) -> bool:
    return all(x.dtype == jnp.float32 for x in arrays)


def _is_simple(window: Window) -> bool:
    return window.groups == 1 and window.gaps == (1, 1)


def _is_empty(window: Window) -> bool:
    return min(*window.result, window.inputs, window.outputs) == 0


def _convolve(how: How, w: jax.Array, x: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x,
        w,
        how.window.strides,
        _edges(how.window),
        how.window.gaps,
        how.window.spread,
        _NUMBERS,
        feature_group_count=how.window.groups,
        precision=how.precision,
        preferred_element_type=how.dtype,
    )


def _by_matrices(how: How, w: jax.Array, x: jax.Array) -> jax.Array:
    """The inputs of each output in a row, times the kernel."""
    window = how.window
    x = jax.lax.pad(
        x, jnp.zeros([], x.dtype), [(0, 0, 0), *((*edge, 0) for edge in _edges(window)), (0, 0, 0)]
    )
    places = []
    for place in ((i, j) for i in range(window.sizes[0]) for j in range(window.sizes[1])):
        start = [i * spread for i, spread in zip(place, window.spread, strict=True)]
        ends = zip(start, window.result, window.strides, strict=True)
        limit = [first + (n - 1) * stride + 1 for first, n, stride in ends]
        steps = (1, *window.strides, 1)
        places.append(jax.lax.slice(x, (0, *start, 0), (x.shape[0], *limit, x.shape[3]), steps))
    rows = jnp.concatenate(places, axis=-1).reshape(-1, math.prod(w.shape[:3]))
    flat = w.reshape(-1, window.outputs)
    y = jnp.dot(rows, flat, precision=how.precision, preferred_element_type=how.dtype)
    return y.reshape(window.shape(x.shape[0], of_inputs=False))


def _edges(window: Window) -> list[tuple[int, int]]:
    """Places before the first input and after the last, at least what the last output needs."""
    edges = []
    reach = zip(window.image, window.result, window.sizes, *window[1:5], strict=True)
    for n, out, size, stride, gap, spread, pad in reach:
        length = pad + max(0, (n - 1) * gap + 1)
        needed = (out - 1) * stride + (size - 1) * spread + 1
        rest = max(needed, 0) - length
        is_unread = out > 0 and -stride < rest < 0  # cutting these inputs off would cost time
        edges.append((pad, 0 if is_unread else rest))
    return edges


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
    if not jaxprs.are_known((*(x[i] for i in numbers.lhs_spec[1:]), *w)):
        return "sizes that are not known"

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


def is_wide(window: Window) -> bool:
    """Whether it is larger than its image."""
    return any(n < size for n, size in zip(window.image, window.sizes, strict=True))


def in_order(array: jax.Array, spec: Any) -> jax.Array:
    """Images as ``(images, height, width, channels)``, given where these axes are."""
    array = array.transpose(spec[0], *spec[2:], spec[1])
    return array[:, None] if array.ndim == 3 else array


def out_of_order(array: jax.Array, spec: Any) -> jax.Array:
    """The way back."""
    array = array[:, 0] if len(spec) == 3 else array
    order = (spec[0], *spec[2:], spec[1])
    return array.transpose([order.index(i) for i in range(len(order))])
