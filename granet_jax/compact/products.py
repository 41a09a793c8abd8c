"""Products with live weights: ``x @ w``, ``y @ w.T`` and the gradient of the slots.

Of matrices, or, where there is a window, of images: a convolution, its transposition, and the
gradient of its slots.

Each is linear in both of its arguments, and the derivatives of one product are the other two
products. So they can be differentiated any number of times.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from granet_jax.compact import convolutions, layouts, native
from granet_jax.compact.layouts import Layout
from granet_jax.kernels import Backend, packed


class How(NamedTuple):
    """How a product is done."""

    native: bool  # by the kernels for live weights; False = with dense weights made for it
    dtype: Any  # of the result
    precision: Any = None  # of a dense product
    backend: Backend | None = None  # the kernels for live blocks; None = do not use them
    interpret: bool = False
    window: native.Window | None = None  # of a convolution
    kernels: bool = False  # whether a dense convolution may have kernels of ours


def multiply(how: How, values: jax.Array, layout: Layout, x: jax.Array) -> jax.Array:
    """``x (n, inputs) @ w (inputs, outputs)``; the layout is that of one layer, without a stack.

    With a window ``x`` is ``(images, height, width, channels)``, and so is the result.
    """
    return _multiply(how, False, values, layout, x)


def multiply_transposed(how: How, values: jax.Array, layout: Layout, y: jax.Array) -> jax.Array:
    """``y (n, outputs) @ w.T (outputs, inputs)``."""
    return _multiply(how, True, values, layout, y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def multiply_and_sample_all(
    how: How, transposed: bool, values: jax.Array, layout: Layout, zeros: jax.Array, x: jax.Array
) -> jax.Array:
    """The product with ``w + zeros``; the gradient of ``zeros (inputs * outputs,)`` is dense."""
    return _multiply(how, transposed, values, layout, x)


def _all_forward(how: How, transposed: bool, *args: Any) -> Any:
    values, layout, _, x = args
    return _multiply(how, transposed, values, layout, x), (values, layout, x)


def _all_backward(how: How, transposed: bool, args: Any, y: jax.Array) -> Any:
    values, layout, x = args
    inputs, outputs = (y, x) if transposed else (x, y)
    of_all = _of_all(how._replace(dtype=values.dtype), inputs, outputs)
    of_x = _multiply(how._replace(dtype=x.dtype), not transposed, values, layout, y)
    return layouts.slots(of_all, layout), None, of_all.reshape(-1), of_x


multiply_and_sample_all.defvjp(_all_forward, _all_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _multiply(
    how: How, transposed: bool, values: jax.Array, layout: Layout, x: jax.Array
) -> jax.Array:
    if how.native:
        lists = layout.by_input if transposed else layout.by_output
        assert lists is not None  # native products are for layouts that have them
        num_outputs = layouts.sides(layout)[0 if transposed else 1]
        f32 = (z.astype(jnp.float32) for z in (x, values))
        if how.window is not None:
            return native.convolve(lists, how.window, transposed, *f32).astype(how.dtype)
        return native.multiply(lists, num_outputs, *f32).astype(how.dtype)
    if how.backend is not None:
        given = how.backend, values, layout.index, layout.grid, layout.block, x
        return packed.multiply(*given, transposed=transposed, interpret=how.interpret)
    w = layouts.dense(values, layout)
    if how.window is not None:
        w = w.reshape(*how.window.sizes, how.window.inputs, how.window.outputs)
        return convolutions.multiply(_dense(how), transposed, w, x)
    w = w.reshape(layouts.sides(layout))
    w = w.T if transposed else w
    return jnp.dot(x, w, precision=how.precision, preferred_element_type=how.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sample(how: How, layout: Layout, x: jax.Array, y: jax.Array) -> jax.Array:
    """``(x.T @ y)`` in the places of the slots, for ``x (n, inputs)``, ``y (n, outputs)``."""
    if how.native:
        assert layout.by_output is not None
        f32 = (z.astype(jnp.float32) for z in (x, y))
        if how.window is not None:
            return convolution_of_slots(how.window, layout, *f32).astype(how.dtype)
        return native.sample(layout.by_output, layout.capacity, *f32).astype(how.dtype)
    if how.backend is not None:
        given = how.backend, layout.index, layout.grid, layout.block, x, y
        return packed.sample(*given, interpret=how.interpret)
    return layouts.slots(_of_all(how, x, y), layout)


def _dense(how: How) -> convolutions.How:
    assert how.window is not None
    return convolutions.How(how.window, how.dtype, how.precision, how.kernels)


def _of_all(how: How, x: jax.Array, y: jax.Array) -> jax.Array:
    """``x.T @ y``, the gradient of all weights."""
    if how.window is not None:
        return convolutions.sample(_dense(how), x, y)
    return jnp.dot(x.T, y, precision=how.precision, preferred_element_type=how.dtype)


def convolution_of_slots(
    window: native.Window, layout: Layout, x: jax.Array, y: jax.Array
) -> jax.Array:
    """The gradient of the slots of a convolution, by its kernel, which knows of no gaps.

    Seen from its outputs, gaps between the inputs are a stride.
    """
    assert layout.by_output is not None
    assert layout.by_input is not None
    if max(window.gaps) > 1:
        return native.sample_convolution(layout.by_input, window, True, layout.capacity, y, x)
    return native.sample_convolution(layout.by_output, window, False, layout.capacity, x, y)


def _multiply_forward(how: How, transposed: bool, *args: Any) -> Any:
    return _multiply(how, transposed, *args), args


def _multiply_backward(how: How, transposed: bool, args: Any, y: jax.Array) -> Any:
    values, layout, x = args
    # Dense weights are made again, because storing those of all layers would take too much memory.
    if not how.native and how.backend is None:
        values = jax.lax.optimization_barrier(values)
    inputs, outputs = (y, x) if transposed else (x, y)
    of_values = _sample(how._replace(dtype=values.dtype), layout, inputs, outputs)
    of_x = _multiply(how._replace(dtype=x.dtype), not transposed, values, layout, y)
    return of_values, None, of_x


def _sample_forward(how: How, *args: Any) -> Any:
    return _sample(how, *args), args


def _sample_backward(how: How, args: Any, values: jax.Array) -> Any:
    layout, x, y = args
    of_x = _multiply(how._replace(dtype=x.dtype), True, values, layout, y)
    return None, of_x, _multiply(how._replace(dtype=y.dtype), False, values, layout, x)


_multiply.defvjp(_multiply_forward, _multiply_backward)
_sample.defvjp(_sample_forward, _sample_backward)
