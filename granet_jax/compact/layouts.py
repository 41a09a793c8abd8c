"""How live weights are stored: slots, and where each of them belongs.

A prunable leaf of ``params`` becomes a vector of *slots*, ``(*stack, capacity)``, where ``stack``
are its axes of stacked layers, if any. A slot holds one live weight, or it is *dead*: its value is
0, and no list has it. A weight stays in its slot as long as it is live, so moments and gradients
are vectors of slots, too. If weights are pruned in blocks, a block is a *unit* of consecutive
slots, row by row.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp


class Lists(NamedTuple):
    """The live weights of each layer, in the order in which a product reads them.

    The inputs of a product are divided into tiles that fit a cache. List number ``tile * outputs +
    output`` holds the weights from that tile to that output, in the order of the inputs. Only the
    native kernels read the lists; :func:`granet_jax.compact.pack` makes them.
    """

    ends: jax.Array  # int32 (*stack, tiles * outputs + 1), starts of lists; last, the end
    places: jax.Array  # int32 (*stack, capacity), the input of each entry
    slots: jax.Array  # int32 (*stack, capacity), the slot of each entry


class Layout(NamedTuple):
    """Where the slots of one leaf belong; plain arrays, for any kind of file.

    ``index`` is the row-major place of each slot in its layer; the size of the layer marks a dead
    slot. With blocks it is the place of each unit among the layer's blocks. The lists are None
    where the native kernels do not run.

    Example:
      >>> import jax.numpy as jnp
      >>> from granet_jax import compact
      >>> params = {"kernel": jnp.array([[0.0, 2.0], [3.0, 0.0]])}
      >>> _, layouts = compact.pack(params, {"kernel": params["kernel"] != 0})
      >>> layouts["kernel"].shape, layouts["kernel"].capacity, layouts["kernel"].index.tolist()
      ((2, 2), 2, [1, 2])
    """

    index: jax.Array  # type: ignore[assignment]  # int32 (*stack, capacity / weights of a unit)
    by_output: Lists | None  # of x @ w
    by_input: Lists | None  # of y @ w.T, whose outputs are the inputs of w
    sizes: dict[str, None]  # {"stack|inputs|outputs|block": None}, a part of the tree's structure

    @property
    def stack(self) -> tuple[int, ...]:
        """Sizes of the axes of stacked layers."""
        return self._sizes(0)

    @property
    def inputs(self) -> tuple[int, ...]:
        """Sizes of the axes that ``x @ w`` sums over."""
        return self._sizes(1)

    @property
    def outputs(self) -> tuple[int, ...]:
        """Sizes of the other axes, which stay in ``x @ w``."""
        return self._sizes(2)

    @property
    def block(self) -> tuple[int, ...]:
        """Rows and columns of a block; ``()`` if weights are pruned one by one."""
        return self._sizes(3)

    @property
    def unit(self) -> int:
        """Number of weights of a unit; 1 without blocks."""
        return math.prod(self.block)

    @property
    def grid(self) -> tuple[int, int]:
        """How many rows and columns of blocks a layer has, as a matrix."""
        rows, columns = self.block
        return math.prod(self.inputs) // rows, math.prod(self.outputs) // columns

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """Shape of one dense layer."""
        return self.inputs + self.outputs

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense leaf."""
        return self.stack + self.layer_shape

    @property
    def layer_size(self) -> int:
        """Weights of one dense layer."""
        return math.prod(self.layer_shape)

    @property
    def capacity(self) -> int:
        """Slots of one layer."""
        return self.index.shape[-1] * self.unit

    @property
    def slots_shape(self) -> tuple[int, ...]:
        """Shape of the leaf of slots."""
        return *self.index.shape[:-1], self.capacity

    @property
    def density(self) -> float:
        """Share of slots among the weights of a layer."""
        return self.capacity / max(self.layer_size, 1)

    def _sizes(self, i: int) -> tuple[int, ...]:
        (written,) = self.sizes
        parts = written.split("|")  # files of old versions do not give the block
        return tuple(int(n) for n in parts[i].split("x") if n) if i < len(parts) else ()


Layouts: TypeAlias = Mapping[str, Layout]  # by path, of the leaves that are compact


def written(*sizes: tuple[int, ...], block: tuple[int, ...] = ()) -> dict[str, None]:
    """Sizes of stack, inputs, outputs and block (if any), in the form of :class:`Layout`."""
    sizes = (*sizes, block) if block else sizes
    return {"|".join("x".join(map(str, each)) for each in sizes): None}


@jax.jit
def dense(values: jax.Array, layout: Layout) -> jax.Array:
    """The dense leaf of some slots; zeros where no weight is live."""

    def scatter(index: jax.Array, values: jax.Array) -> jax.Array:
        if not layout.block:
            flat = jnp.zeros(layout.layer_size, values.dtype)
            return flat.at[index].set(values, mode="drop", unique_indices=True)
        whole = jnp.zeros((math.prod(layout.grid), layout.unit), values.dtype)
        values = values.reshape(len(index), layout.unit)
        whole = whole.at[index].set(values, mode="drop", unique_indices=True)
        return whole.reshape(*layout.grid, *layout.block).swapaxes(1, 2).reshape(-1)

    return _by_layer(scatter, layout, layout.index, values).reshape(layout.shape)


@jax.jit
def slots(leaf: jax.Array, layout: Layout) -> jax.Array:
    """The slots of a dense leaf; 0, or False, in dead ones."""

    def gather(index: jax.Array, flat: jax.Array) -> jax.Array:
        return units(flat, layout).at[index].get(mode="fill", fill_value=0).reshape(-1)

    flat = leaf.reshape(*layout.stack, layout.layer_size)
    return _by_layer(gather, layout, layout.index, flat)


def live(layout: Layout) -> jax.Array:
    """Which slots are not dead, bool ``(*stack, capacity)``."""
    alive = layout.index < layout.layer_size // layout.unit
    return jnp.repeat(alive, layout.unit, axis=-1) if layout.block else alive


def units(flat: jax.Array, layout: Layout) -> jax.Array:
    """The units of one dense layer: its weights, or ``(blocks, weights of a block)``."""
    if not layout.block:
        return flat
    (rows, columns), (a, b) = layout.grid, layout.block
    return flat.reshape(rows, a, columns, b).swapaxes(1, 2).reshape(rows * columns, a * b)


def sides(layout: Layout) -> tuple[int, int]:
    """How many inputs and outputs a layer has, as a matrix."""
    return math.prod(layout.inputs), math.prod(layout.outputs)


def _by_layer(f: Callable[..., jax.Array], layout: Layout, *arrays: jax.Array) -> jax.Array:
    for _ in layout.stack:
        f = jax.vmap(f)
    return f(*arrays)
