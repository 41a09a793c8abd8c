"""The kernels in C++ as JAX functions, where pip could build them.

They run on CPU, on XLA's own threads, with the same bits for any number of them.
"""

import ctypes
import functools
import logging
import pathlib
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from granet_jax.compact.layouts import Layout, Lists, sides

_FILE = pathlib.Path(__file__).with_name("native.kernels")  # setup.py builds it
_KERNELS = (
    *("multiply", "sample", "convolve", "sample_convolution", "sample_all"),
    *("reslot", "lists"),
)
_TILE = 512  # kTile of native.h


class Window(NamedTuple):
    """What a convolution of images is, but for sizes; pairs are of rows and columns.

    Output ``o`` of place ``k`` of the window is input ``(o * stride + k * spread - pad) / gap``,
    where that is whole.
    """

    sizes: tuple[int, int]
    strides: tuple[int, int]
    gaps: tuple[int, int]  # between inputs, as ``lhs_dilation``; 1 where the stride is not
    spread: tuple[int, int]  # of the window's places, as ``rhs_dilation``
    pads: tuple[int, int]  # before the first input
    groups: int
    inputs: int  # channels of a group
    outputs: int  # channels
    image: tuple[int, int]  # height and width of the inputs
    result: tuple[int, int]  # the same of the outputs

    def shape(self, images: int, of_inputs: bool) -> tuple[int, ...]:
        """Of that many images, ``(images, height, width, channels)``: inputs, or outputs."""
        if of_inputs:
            return images, *self.image, self.groups * self.inputs
        return images, *self.result, self.outputs


@functools.cache
def available() -> bool:
    """Whether the kernels run here: the default backend is a CPU, and they are built.

    That they are not built is logged, once.

    Warns:
      UserWarning: they are built, but this JAX cannot load them.
    """
    if jax.default_backend() != "cpu":
        return False
    if not _FILE.exists():
        logging.getLogger(__name__).warning(
            "The kernels for live weights are not built here: products are dense, which is slower. "
            "pip builds them where there is a C++ compiler (GCC 11, Clang 14 or newer)."
        )
        return False
    try:
        library = ctypes.CDLL(str(_FILE))
        for name in _KERNELS:
            capsule = jax.ffi.pycapsule(getattr(library, f"granet_jax_{name}"))
            jax.ffi.register_ffi_target(target(name), capsule, platform="cpu")
    except Exception as error:
        warnings.warn(
            f"The kernels for live weights cannot be used ({error}); products fall back to dense "
            "ones, which are slower. Build them again for this JAX: pip install --force-reinstall "
            "--no-deps granet_jax.",
            stacklevel=2,
        )
        return False
    return True


def multiply(lists: Lists, num_outputs: int, x: jax.Array, values: jax.Array) -> jax.Array:
    """``x @ w``.

    Args:
      lists: of one layer, by output of this product.
      num_outputs: of this product.
      x: float32 ``(n, inputs)``.
      values: float32 ``(capacity,)``.

    Returns:
      float32 ``(n, num_outputs)``.
    """

    def one(lists: Lists, x: jax.Array, values: jax.Array) -> jax.Array:
        return _call("multiply", _f32(len(x), num_outputs))(x, values, *lists)

    return _of_rows(one)(lists, x, values)


def sample(lists: Lists, capacity: int, x: jax.Array, y: jax.Array) -> jax.Array:
    """The entries of ``x.T @ y`` at the slots.

    Args:
      lists: of one layer, by output.
      capacity: slots of the layer; those in no list have 0.
      x: float32 ``(n, inputs)``.
      y: float32 ``(n, outputs)``.

    Returns:
      float32 ``(capacity,)``.
    """
    return _mapped(_call("sample", _f32(capacity)))(x, y, *lists)


def convolve(
    lists: Lists, window: Window, is_transposed: bool, x: jax.Array, values: jax.Array
) -> jax.Array:
    """A convolution of images, or the gradient of its inputs.

    Args:
      lists: of one layer, a kernel ``(rows, columns, inputs of a group, outputs)``: by output; by
        input where it is transposed.
      window: of the convolution.
      is_transposed: whether it is the gradient of the inputs, given that of the outputs.
      x: float32 ``(images, height, width, channels)``.
      values: float32 ``(capacity,)``.

    Returns:
      float32 ``(images, height, width, channels)``.
    """

    def one(lists: Lists, x: jax.Array, values: jax.Array) -> jax.Array:
        call = _call("convolve", _f32(*window.shape(len(x), is_transposed)))
        out: jax.Array = call(x, values, *lists, **_told(window, is_transposed))
        return out

    return _of_rows(one)(lists, x, values)


def sample_convolution(
    lists: Lists, window: Window, is_transposed: bool, capacity: int, x: jax.Array, y: jax.Array
) -> jax.Array:
    """The gradient of the slots of a convolution.

    Args:
      lists: as of :func:`convolve`.
      window: of the convolution.
      is_transposed: whether ``x`` are outputs and ``y`` inputs; for windows with gaps.
      capacity: slots of the layer; those in no list have 0.
      x: float32, the inputs.
      y: float32, the gradient of the outputs.

    Returns:
      float32 ``(capacity,)``.
    """
    call = _call("sample_convolution", _f32(capacity))
    return _mapped(functools.partial(call, **_told(window, is_transposed)))(x, y, *lists)


def sample_all(window: Window, x: jax.Array, y: jax.Array) -> jax.Array:
    """The gradient of all weights of a convolution, live or not.

    Args:
      window: of the convolution, without groups and gaps.
      x: float32, the inputs.
      y: float32, the gradient of the outputs.

    Returns:
      float32 ``(rows, columns, inputs, outputs)``.
    """
    call = _call("sample_all", _f32(*window.sizes, window.inputs, window.outputs))
    return _mapped(functools.partial(call, numbers=_numbers(window)))(x, y)


def _told(window: Window, is_transposed: bool) -> dict[str, Any]:
    return {"numbers": _numbers(window), "is_transposed": is_transposed}


def _numbers(window: Window) -> np.ndarray:
    return np.array([*sum(window[:5], ()), window.groups, window.inputs], np.int64)


def reslot(
    index: jax.Array, masks: jax.Array, keep: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """New slots for new masks, as :func:`granet_jax.compact.layouts.reslot`, of one layer."""
    num = index.shape[0]
    shapes = [_i32(num), jax.ShapeDtypeStruct((num,), bool), _i32(1)]
    index, stays, outgrown = _mapped(_call("reslot", shapes))(index, masks, keep)
    return index, stays, outgrown[0]


@jax.jit
def lists(layout: Layout) -> Layout:
    """A layout with its lists made from its index."""
    inputs, outputs = sides(layout)
    num = layout.capacity
    shapes = [_i32(-(-inputs // _TILE) * outputs + 1), _i32(num), _i32(num)]
    shapes += [_i32(-(-outputs // _TILE) * inputs + 1), _i32(num), _i32(num)]
    attributes = {"inputs": np.int64(inputs), "outputs": np.int64(outputs)}
    make = _mapped(functools.partial(_call("lists", shapes), **attributes))
    for _ in layout.stack[1:]:
        make = jax.vmap(make)
    parts = (jax.vmap(make) if layout.stack else make)(layout.index)
    return layout._replace(by_output=Lists(*parts[:3]), by_input=Lists(*parts[3:]))


def _of_rows(one: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A product ``(lists, x, values)``; under ``vmap`` over ``x`` alone, one with all its rows."""
    product = jax.custom_batching.custom_vmap(one)

    @product.def_vmap
    def over_a_batch(size: int, in_batched: Any, *args: Any) -> tuple[jax.Array, bool]:
        lists, x, values = args
        if any(jax.tree.leaves((in_batched[0], in_batched[2]))):
            return _one_by_one(product, in_batched, args), True
        rows = x.shape[1]
        y = product(lists, x.reshape(size * rows, *x.shape[2:]), values)
        return y.reshape(size, rows, *y.shape[1:]), True

    return product


def _mapped(f: Callable[..., Any]) -> Callable[..., Any]:
    """Under ``vmap``, one call after the other."""
    mapped = jax.custom_batching.custom_vmap(f)

    @mapped.def_vmap
    def rule(size: int, in_batched: Any, *args: Any) -> Any:
        outs = _one_by_one(mapped, in_batched, args)
        return outs, jax.tree.map(lambda _: True, outs)

    return mapped


def _one_by_one(f: Callable[..., Any], in_batched: Any, args: Any) -> Any:
    flat, tree = jax.tree.flatten(tuple(args))
    batched = jax.tree.leaves(tuple(in_batched))

    def call(mine: list[jax.Array]) -> Any:
        rest = iter(mine)
        each = [next(rest) if b else x for x, b in zip(flat, batched, strict=True)]
        return f(*jax.tree.unflatten(tree, each))

    return jax.lax.map(call, [x for x, b in zip(flat, batched, strict=True) if b])


def _call(name: str, shapes: Any) -> Callable[..., Any]:
    if not available():  # asked anew, for layouts may come from a file: XLA knows no kernels then
        raise RuntimeError(
            "These layouts have lists for the native kernels, which do not run here. Leave the "
            "lists out: layout._replace(by_output=None, by_input=None)."
        )
    return jax.ffi.ffi_call(target(name), shapes)


def target(name: str) -> str:
    """The name by which XLA knows a kernel."""
    return f"granet_jax_{name}"


def _f32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _i32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)
