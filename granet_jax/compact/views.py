"""Stand-ins for dense arrays: a compact leaf, transposed, reshaped, sliced or cast; its products.

A :class:`View` records what is done to a leaf, and computes only what the slots need. A
:class:`Dot` is a ``dot_general`` of a view and an array.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from granet_jax.compact import layouts, products
from granet_jax.compact.layouts import Layout

_Part: TypeAlias = tuple[int, int]  # of an axis of a leaf: its stride in the leaf, its size
_Axes: TypeAlias = tuple[tuple[_Part, ...], ...]
_Arrays: TypeAlias = tuple[Any, Layout, Any]


@jax.tree_util.register_pytree_node_class
class View:
    """A compact leaf as its equations see it.

    Each axis of a view runs along some axes of the leaf, or along parts of them, in row-major
    order; an axis of size 1 runs along none. The stride identifies a part, and shows whether it
    stacks layers. The arrays have one axis for each part that stacks layers, the largest stride
    first.

    If dense gradients are wanted, ``zeros`` ``(*stack, size)`` are added to the whole leaf, at no
    cost. Their gradient is then the gradient of all weights of the leaf.
    """

    def __init__(self, values: Any, layout: Layout, zeros: Any, path: str, axes: _Axes) -> None:
        self.values, self.layout, self.zeros = values, layout, zeros
        self.path, self.axes = path, axes

    def tree_flatten(self) -> tuple[_Arrays, tuple[str, _Axes]]:
        """The arrays, and the static data."""
        return (self.values, self.layout, self.zeros), (self.path, self.axes)

    @classmethod
    def tree_unflatten(cls, static: tuple[str, _Axes], arrays: _Arrays) -> "View":
        """The view of other arrays of the same shapes."""
        return cls(*arrays, *static)

    @classmethod
    def of_leaf(cls, path: str, values: Any, layout: Layout, zeros: Any = None) -> "View":
        """The view of a whole leaf."""
        shape = layout.shape
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        axes = [((s, n),) if n != 1 else () for s, n in zip(strides, shape, strict=True)]
        num, stack = len(layout.stack), tuple(n for n in layout.stack if n != 1)
        arrays = jax.tree.map(lambda a: a.reshape(stack + a.shape[num:]), (values, layout, zeros))
        return cls.tree_unflatten((path, ()), arrays).with_axes(axes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense array."""
        return tuple(math.prod(n for _, n in axis) for axis in self.axes)

    def with_axes(self, axes: Sequence[tuple[_Part, ...]], arrays: Any = None) -> "View":
        """The view with other axes, and with other arrays if its layers change."""
        values, layout, zeros = arrays or (self.values, self.layout, self.zeros)
        parts = in_leaf(part for axis in axes for part in axis)
        stack = tuple(n for stride, n in parts if stride >= layout.layer_size)
        sizes = layouts.written(stack, layout.inputs, layout.outputs, block=layout.block)
        return type(self)(values, layout._replace(sizes=sizes), zeros, self.path, tuple(axes))

    def map(self, f: Callable[[Any], Any]) -> "View":
        """The view of ``f`` of the values; it has to be linear."""
        zeros = None if self.zeros is None else f(self.zeros)
        return View(f(self.values), self.layout, zeros, self.path, self.axes)

    def stacks(self, i: int) -> bool:
        """Whether an axis runs along one axis of layers, and nothing else."""
        return len(self.axes[i]) == 1 and self.axes[i][0][0] >= self.layout.layer_size

    def moved(self, i: int) -> Any:
        """The arrays, with the axis along which the view's axis ``i`` runs moved to the front."""
        return self._each(i, lambda a, axis: jnp.moveaxis(a, axis, 0))

    def without(self, i: int, arrays: Any = None) -> "View":
        """The view without an axis of size 1; or without an axis of layers, at one layer."""
        return self.with_axes(self.axes[:i] + self.axes[i + 1 :], arrays)

    def cut(self, i: int, cut: Callable[[Any, int], Any], size: int) -> "View":
        """The view with fewer layers along its axis ``i``: ``cut(array, axis)`` of the arrays."""
        axes = list(self.axes)
        if size == 1:
            axes[i] = ()
            return self.with_axes(axes, self._each(i, lambda a, axis: cut(a, axis).squeeze(axis)))
        axes[i] = ((self.axes[i][0][0], size),)
        return self.with_axes(axes, self._each(i, cut))

    def reshaped(self, shape: Sequence[int]) -> "View | None":
        """The view in another shape; None if that splits an axis of layers, or in unequal parts."""
        left = [part for axis in self.axes for part in axis][::-1]
        axes = []
        for n in shape:
            axis = []
            while n != 1:
                stride, size = left.pop()
                if n < size and size % n == 0 and stride < self.layout.layer_size:
                    left.append((stride, size // n))
                    stride, size = stride * (size // n), n
                if n % size:
                    return None
                axis.append((stride, size))
                n //= size
            axes.append(tuple(axis))
        return self.with_axes(axes)

    def unpacked(self) -> jax.Array:
        """The dense array."""
        parts = [part for axis in self.axes for part in axis]
        dense = layouts.dense(self.values, self.layout)
        if self.zeros is not None:
            dense += self.zeros.reshape(dense.shape)
        return from_leaf(dense.reshape([n for _, n in in_leaf(parts)]), parts).reshape(self.shape)

    def _each(self, i: int, f: Callable[[Any, int], Any]) -> Any:
        parts = in_leaf(part for axis in self.axes for part in axis)
        axis = parts.index(self.axes[i][0])  # layers have the largest strides
        return jax.tree.map(lambda a: f(a, axis), (self.values, self.layout, self.zeros))


class Dot(NamedTuple):
    """A ``dot_general`` of a view and an array: the axes of both that it sums over and batches.

    Axes of the array are in the order of the corresponding axes of the view.
    """

    how: products.How
    is_first: bool  # the view is the left operand
    sums: tuple[int, ...]
    batch: tuple[int, ...]
    x_sums: tuple[int, ...]
    x_batch: tuple[int, ...]


def obstacle(view: View, dot: Dot) -> str:
    """Why a product cannot be done with live weights; "" if it can."""
    for i, axis in enumerate(view.axes):
        stacked = any(stride >= view.layout.layer_size for stride, _ in axis)
        if stacked and i in dot.sums:
            return "sums over layers"
        if stacked and not view.stacks(i):
            return "layers are merged"
        if i in dot.batch and axis and not stacked:
            return "batched along a layer"
    return "sums over other axes" if is_transposed(view, dot) is None else ""


def cut(view: View, dot: Dot) -> int | None:
    """How many leading axes of a layer are inputs, so that this is ``x @ w`` or ``y @ w.T``.

    None = there is no such number.
    """
    shape = view.layout.layer_shape
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    summed = [part for i in dot.sums for part in view.axes[i]]
    size, least = math.prod(n for _, n in summed), min((s for s, _ in summed), default=0)
    if not summed or max(s * n for s, n in summed) > view.layout.layer_size:
        return None
    if size * least == view.layout.layer_size:  # the leading axes
        return sum(stride >= least for stride in strides) if least in strides else None
    if least == 1 and max(s * n for s, n in summed) == size and size in strides:  # the last ones
        return sum(stride >= size for stride in strides)
    return None


def is_transposed(view: View, dot: Dot) -> bool | None:
    """Whether a product sums over all outputs of the leaf; False = all inputs; None = neither."""
    inputs, outputs = layouts.sides(view.layout)
    summed = [part for i in dot.sums for part in view.axes[i]]
    size = math.prod(n for _, n in summed)
    if size == inputs and all(stride >= outputs for stride, _ in summed):
        return False
    return True if size == outputs and all(stride < outputs for stride, _ in summed) else None


def multiplied(view: View, x: Any, dot: Dot) -> Any:
    """A product that has no :func:`obstacle`, layer by layer, with the axes of ``dot_general``."""
    if dot.batch:
        (i, *batch), (j, *x_batch) = dot.batch, dot.x_batch
        sums, x_sums = _less(dot.sums, i), _less(dot.x_sums, j)
        inner = Dot(dot.how, dot.is_first, sums, _less(batch, i), x_sums, _less(x_batch, j))
        if not view.axes[i]:
            return multiplied(view.without(i), x.squeeze(j), inner)[None]
        each = view.moved(i), jnp.moveaxis(x, j, 0)
        return jax.lax.map(lambda one: multiplied(view.without(i, one[0]), one[1], inner), each)
    free = [i for i in range(len(view.axes)) if i not in dot.sums]
    stacked = [i for i in free if view.stacks(i)]
    if not stacked:
        return _of_layer(view, x, dot, free)
    i = stacked[0]
    inner = dot._replace(sums=_less(dot.sums, i))
    y = jax.lax.map(lambda one: multiplied(view.without(i, one), x, inner), view.moved(i))
    return jnp.moveaxis(y, 0, free.index(i) + (0 if dot.is_first else x.ndim - len(dot.x_sums)))


def _of_layer(view: View, x: Any, dot: Dot, free: list[int]) -> Any:
    """A product with one layer: a product of matrices, with axes in the order of the leaf."""
    summed = [part for i in dot.sums for part in view.axes[i]]
    kept = [part for i in free for part in view.axes[i]]
    x_free = [j for j in range(x.ndim) if j not in dot.x_sums]
    sizes = [x.shape[j] for j in x_free]
    rows = math.prod(sizes)
    x = x.transpose(*x_free, *dot.x_sums).reshape(rows, *(n for _, n in summed))
    x = to_leaf(x, summed)
    x = x.reshape(rows, math.prod(n for _, n in summed))
    y = product(view, x, dot.how, bool(is_transposed(view, dot)))
    y = from_leaf(y.reshape(rows, *(n for _, n in in_leaf(kept))), kept)
    y = y.reshape(*sizes, *(view.shape[i] for i in free))
    last = list(range(-len(sizes), 0))
    return jnp.moveaxis(y, list(range(len(sizes))), last) if dot.is_first else y


def product(view: View, x: Any, how: products.How, transposed: bool = False) -> Any:
    """With the one layer of a view, of rows; or of images, where it :func:`is_kernel`."""
    if view.zeros is not None:
        given = view.values, view.layout, view.zeros, x
        return products.multiply_and_sample_all(how, transposed, *given)
    multiply = products.multiply_transposed if transposed else products.multiply
    return multiply(how, view.values, view.layout, x)


def is_kernel(view: View, order: Sequence[int]) -> bool:
    """Whether axes in this order are those of one layer, whose last alone is of its outputs."""
    layout = view.layout
    if len(order) != len(layout.layer_shape) or len(layout.outputs) != 1:
        return False
    shape = layout.layer_shape
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    axes = [((s, n),) if n != 1 else () for s, n in zip(strides, shape, strict=True)]
    return [view.axes[i] for i in order] == axes


def in_leaf(parts: Any) -> list[_Part]:
    """Parts in the order of the leaf."""
    return sorted(parts, reverse=True)


def from_leaf(x: Any, parts: list[_Part]) -> Any:
    """Reorders the last axes of an array from the order of the leaf to that of ``parts``."""
    places, first = in_leaf(parts), x.ndim - len(parts)
    return x.transpose(*range(first), *(first + places.index(part) for part in parts))


def to_leaf(x: Any, parts: list[_Part]) -> Any:
    """Reorders the last axes of an array from the order of ``parts`` to that of the leaf."""
    first = x.ndim - len(parts)
    return x.transpose(*range(first), *(first + parts.index(part) for part in in_leaf(parts)))


def _less(axes: Sequence[int], gone: int) -> tuple[int, ...]:
    return tuple(i - (i > gone) for i in axes)
