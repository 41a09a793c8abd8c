"""Stacks of layers laid out as few blocks of rows, so that little is compiled for many layers.

A *block* is an array of rows (its first axis); each row belongs to one layer. On one device all
small stacks share one block of rows of equal length, where the last row of each layer is padded. A
large stack is a block of its own, with one row for each layer, and is not copied. On several
devices each stack is a block as it is, because anything else would move entries between devices.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_ROW = 256  # length of the rows in which the CPU counts
_SMALL = 2**18  # stacks of at most this many entries share a block
_WIDTHS = (2048, 256, 32, 8)  # of the rows of that block: the first that pads little is taken


class Rows(NamedTuple):
    """What the rows of a block hold."""

    layer: np.ndarray  # int32 (rows,)
    start: np.ndarray  # uint32 (rows,), how many entries of the layer are in earlier rows
    length: np.ndarray  # uint32 (rows,), how many entries are not padding


class Layout(NamedTuple):
    """Which stack lies where; made by :func:`lay_out`."""

    shapes: tuple[tuple[int, ...], ...]  # of the stacks, (layers, *layer_shape)
    alone: tuple[int, ...]  # the stacks with a block of their own; these blocks come first
    together: tuple[int, ...]  # the stacks that share the last block; () = there is no such block
    width: int  # of the shared block's rows


def lay_out(shapes: Sequence[tuple[int, ...]]) -> Layout:
    """A layout for stacks of these shapes, ``(layers, *layer_shape)``.

    Example:
      >>> layout = lay_out([(1, 3, 3), (2, 8)])
      >>> sorted(layout.alone + layout.together)
      [0, 1]
    """
    small = [i for i, shape in enumerate(shapes) if math.prod(shape) <= _SMALL]
    if jax.device_count() > 1 or len(shapes) == 1:
        small = []
    alone = tuple(i for i in range(len(shapes)) if i not in small)
    size = sum(math.prod(shapes[i]) for i in small)

    def padded(width: int) -> int:
        return sum(width * _num_rows(shapes[i], width) for i in small)

    width = next((x for x in _WIDTHS if padded(x) <= 1.1 * size), _WIDTHS[-1])
    return Layout(tuple(map(tuple, shapes)), alone, tuple(small), width)


def rows(layout: Layout) -> list[Rows]:
    """The rows of each block."""
    first = np.cumsum([0] + [shape[0] for shape in layout.shapes])

    def of(i: int, width: int) -> Rows:
        num_layers, size = layout.shapes[i][0], layer_size(layout.shapes[i])
        start = np.arange(0, max(size, 1), width or max(size, 1))
        layer = np.repeat(np.arange(first[i], first[i + 1]), len(start))
        length = np.minimum(size - start, width or size)
        each = layer, np.tile(start, num_layers), np.tile(length, num_layers)
        return Rows(each[0].astype(np.int32), *(x.astype(np.uint32) for x in each[1:]))

    found = [of(i, 0) for i in layout.alone]
    if layout.together:
        parts = [of(i, layout.width) for i in layout.together]
        found.append(Rows(*map(np.concatenate, zip(*parts, strict=True))))
    return found


def layer_sizes(layout: Layout) -> np.ndarray:
    """Entries of each layer, int64 ``(layers of all stacks,)``."""
    sizes = [layer_size(shape) for shape in layout.shapes for _ in range(shape[0])]
    return np.array(sizes, np.int64)


def to_blocks(stacks: Sequence[jax.Array], layout: Layout) -> list[jax.Array]:
    """Lays out stacks as blocks; padding is 0, or False.

    Example:
      >>> import jax.numpy as jnp
      >>> stacks = [jnp.ones((1, 3)), jnp.ones((1, 2, 2))]
      >>> layout = lay_out([x.shape for x in stacks])
      >>> [x.shape for x in to_stacks(to_blocks(stacks, layout), layout)]
      [(1, 3), (1, 2, 2)]
    """
    parts = [stacks[i] for i in layout.together]
    return [*(flat(stacks[i]) for i in layout.alone), *together(parts, layout)]


def flat(stack: jax.Array) -> jax.Array:
    """The stack as ``(layers, entries)``, so that kernels depend on sizes alone; on one device."""
    return stack.reshape(len(stack), layer_size(stack.shape)) if jax.device_count() == 1 else stack


def together(stacks: Sequence[jax.Array], layout: Layout) -> list[jax.Array]:
    """A list with the shared block; an empty list if no stacks share one."""
    each = [_to_rows(stack, layout.width) for stack in stacks]
    return [jnp.concatenate(each)] if each else []


def to_stacks(blocks: Sequence[jax.Array], layout: Layout) -> list[jax.Array]:
    """Undoes :func:`to_blocks`."""
    stacks = dict(zip(layout.alone, blocks, strict=False))
    if layout.together:
        lengths = [_num_rows(layout.shapes[i], layout.width) for i in layout.together]
        parts = split(blocks[-1], starts(lengths), lengths)
        for i, part in zip(layout.together, parts, strict=True):
            num_layers, size = layout.shapes[i][0], layer_size(layout.shapes[i])
            stacks[i] = part.reshape(num_layers, part.size // num_layers)[:, :size]
    return [stacks[i].reshape(shape) for i, shape in enumerate(layout.shapes)]


def all_but_padding(layout: Layout) -> list[jax.Array | None]:
    """For each block a bool block, False in padding; None for a block without padding."""
    found: list[jax.Array | None] = [None for _ in layout.alone]
    if layout.together:
        length = rows(layout)[-1].length
        place = jax.lax.broadcasted_iota(jnp.uint32, (len(length), layout.width), 1)
        found.append(place < length[:, None] if length.min() < layout.width else None)
    return found


def but(excluded: Sequence[jax.Array], layout: Layout) -> list[jax.Array]:
    """Bool blocks, True where ``excluded`` is False, except in padding."""
    pairs = zip(excluded, all_but_padding(layout), strict=True)
    return [~x if real is None else real & ~x for x, real in pairs]


def count(blocks: Sequence[jax.Array], layout: Layout) -> jax.Array:
    """How many entries of each layer are True: bool blocks -> int32 ``(layers of all stacks,)``."""
    layers = [x.layer for x in rows(layout)]
    if jax.default_backend() == "cpu" and jax.device_count() == 1:
        sums, repeats = _sums_on_cpu(blocks)
        layers = [np.repeat(x, n) for x, n in zip(layers, repeats, strict=True)]
    else:
        each = [jnp.sum(x, axis=tuple(range(1, x.ndim)), dtype=jnp.int32) for x in blocks]
        sums = jnp.concatenate([replicated(x) for x in each])
    layer = np.concatenate(layers)
    num_layers = sum(shape[0] for shape in layout.shapes)
    if np.array_equal(layer, np.arange(num_layers)):
        return sums
    return jax.ops.segment_sum(sums, layer, num_layers)


def _sums_on_cpu(blocks: Sequence[jax.Array]) -> tuple[jax.Array, list[int]]:
    """Sums of parts of rows, and how many parts each row of a block has.

    XLA:CPU is slow at summing booleans, but adds up the eighths of an array at the speed of memory.
    The result is laid out in rows of its own. Barriers keep the steps apart, because XLA would
    simplify them into one slow step.
    """
    apart = jax.lax.optimization_barrier
    found, repeats = [], []
    for x in blocks:
        ones = x.astype(jnp.uint8)
        length = ones.shape[1] // 8
        eighths = ones[:, : 8 * length].reshape(len(x), 8, length)
        parts = [jnp.sum(eighths, axis=1, dtype=jnp.uint8), ones[:, 8 * length :]]
        num_rows = -(-sum(part.shape[1] for part in parts) // _ROW)
        padding = num_rows * _ROW - sum(part.shape[1] for part in parts)
        parts.append(jnp.zeros((len(x), padding), jnp.uint8))
        found.append(jnp.concatenate(apart(parts), axis=1).reshape(len(x) * num_rows, _ROW))
        repeats.append(num_rows)
    return jnp.sum(apart(jnp.concatenate(found)), axis=1, dtype=jnp.int32), repeats


def replicated(counts: jax.Array) -> jax.Array:
    """Counts of layers, copied to every device of an explicit mesh that shards the layers."""
    if any(axis is not None for axis in jax.typeof(counts).sharding.spec):
        return jax.sharding.reshard(counts, jax.sharding.PartitionSpec())
    return counts


def starts(lengths: Sequence[int]) -> list[jax.Array]:
    """Where parts of these lengths begin, uint32, hidden from XLA by a conditional.

    So parts of one shape share one kernel, which is compiled once, and so do later operations on
    them.
    """
    ends = np.cumsum(lengths)
    known = [np.uint32(end - length) for end, length in zip(ends, lengths, strict=True)]
    if len(known) == 1:
        return [jnp.uint32(0)]
    return jax.lax.cond(
        jax.lax.optimization_barrier(jnp.array(True)),
        lambda x: x,
        lambda x: [jnp.zeros_like(y) for y in x],
        known,
    )


def split(x: jax.Array, starts: Sequence[jax.Array], lengths: Sequence[int]) -> list[jax.Array]:
    """Parts along the first axis, as ``jnp.split`` gives them."""
    if len(lengths) == 1:
        return [x]
    pairs = zip(starts, lengths, strict=True)
    return [jax.lax.dynamic_slice_in_dim(x, start, length) for start, length in pairs]


def _to_rows(stack: jax.Array, width: int) -> jax.Array:
    size, num_rows = layer_size(stack.shape), _num_rows(stack.shape, width)
    padding = num_rows * width // len(stack) - size
    return jnp.pad(stack.reshape(len(stack), size), ((0, 0), (0, padding))).reshape(-1, width)


def _num_rows(shape: tuple[int, ...], width: int) -> int:
    return shape[0] * max(1, -(-layer_size(shape) // width))


def layer_size(shape: tuple[int, ...]) -> int:
    """Entries of each layer of a stack of this shape."""
    return math.prod(shape[1:])
