"""Exact top-k masks without sorting.

Sorting 25 million scores takes seconds on a CPU and, on sharded arrays, gathers them all. Here the
k-th largest score is found by counting: floats are mapped to integers of the same order and width,
and a bracket around the k-th largest is narrowed by counting the integers above a candidate.
Candidates come from a small sample, then from interpolation between counts, and from bisection
if neither makes progress. The mask does not depend on the candidates. Ties are settled by the same
search over linear indices. Only counts leave a device, so the same scores give the same mask on any
number of devices.

Scores come as *stacks*: arrays ``(layers, *layer_shape)``. The number of weights to keep is either
a scalar, for one ranking over all stacks, or one int for each layer, for a ranking within each.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from granet_jax import blocks, sortable

MOST = 2**31 - 1  # an int32 counts so far
_SHORT_ROW = 32  # rows up to this length are ranked by comparing all pairs
_SAMPLE = 8192  # scores sampled from all layers for one ranking
_SAMPLE_OF_LAYER = 1024  # scores sampled from each layer for a ranking within each


def top_k_mask(scores: jax.Array, k: Any, eligible: jax.Array | None = None) -> jax.Array:
    """True for the ``k`` largest entries of one array, exactly.

    Args:
      scores: any shape and float dtype; float64 is compared in float64, all other dtypes in
        float32. NaN ranks below every number, and -0 equals +0.
      k: how many to select, an int or an integer scalar, which may be traced. If it exceeds the
        number of eligible entries, all of them are selected; at or below 0, none.
      eligible: bool, shape of ``scores``; None = all.

    Returns:
      bool, shape of ``scores``. Ties go to the smaller linear (row-major) index.

    Raises:
      ValueError: complex scores, or 2^31 of them or more.

    Example:
      >>> import jax.numpy as jnp
      >>> top_k_mask(jnp.array([[3.0, 1.0], [2.0, 2.0]]), 2).tolist()
      [[True, False], [True, False]]
    """
    return top_k([scores[None]], k, None if eligible is None else [eligible[None]])[0][0]


def top_k(
    scores: Sequence[jax.Array],
    num_keep: Any,
    eligible: Sequence[jax.Array] | None = None,
) -> list[jax.Array]:
    """Selects the best of stacks of layers, exactly.

    Args:
      scores: arrays ``(layers_i, *layer_shape_i)``, any float dtype; compared in float64 if one of
        them is float64, else in float32.
      num_keep: int scalar, the number kept over all stacks; or ints ``(sum of layers_i,)``, the
        number kept in each layer. May be traced.
      eligible: bool arrays of the same shapes; None = all entries.

    Returns:
      bool arrays of the scores' shapes with exactly ``num_keep`` entries True (fewer where fewer
      are eligible). Ties go to the earlier stack, then the earlier layer, then the smaller index.

    Raises:
      ValueError: complex scores; or one ranking over 2^31 entries or more, whose counts would
        overflow int32.

    Example: the best three of all, then the best one of each layer.
      >>> import jax.numpy as jnp
      >>> stacks = [jnp.array([[5.0, 4.0, 3.0]]), jnp.array([[2.0, 1.0]])]
      >>> [m.tolist() for m in top_k(stacks, 3)]
      [[[True, True, True]], [[False, False]]]
      >>> [m.tolist() for m in top_k(stacks, jnp.array([1, 1]))]
      [[[True, False, False]], [[True, False]]]
    """
    layout = blocks.lay_out([x.shape for x in scores])
    marks = None if eligible is None else blocks.to_blocks(eligible, layout)
    given = [Scores(lambda x: x[0], [x]) for x in scores]
    return blocks.to_stacks(top_k_of(given, num_keep, layout, marks), layout)


def top_k_of_rows(scores: jax.Array, k: jax.Array, eligible: jax.Array) -> jax.Array:
    """Selects within each row, the last axis of an array.

    Args:
      scores: ``(..., n)``, any float dtype; compared as by :func:`top_k`.
      k: ints ``(...)``, how many to select in each row; may be traced.
      eligible: bool ``(..., n)``.

    Returns:
      bool ``(..., n)``, what :func:`top_k` gives for each row.

    Example:
      >>> import jax.numpy as jnp
      >>> scores = jnp.array([[1.0, 3.0, 2.0], [5.0, 5.0, 4.0]])
      >>> top_k_of_rows(scores, jnp.array([2, 1]), scores > 0).tolist()
      [[False, True, True], [True, False, False]]
    """
    length = scores.shape[-1]
    if length > _SHORT_ROW:
        rows = scores.reshape(-1, length), eligible.reshape(-1, length)
        return top_k([rows[0]], k.reshape(-1), [rows[1]])[0].reshape(scores.shape)
    keys = _keys(_Block(sortable.exactly(scores, sortable.widest([scores])), eligible))
    index = jax.lax.broadcasted_iota(jnp.int32, keys.shape, keys.ndim - 1)
    num_better = jnp.zeros_like(keys, jnp.int32)
    for i in range(length):
        other = keys[..., i : i + 1]
        num_better += ((other > keys) | ((other == keys) & (i < index))).astype(jnp.int32)
    return eligible & (num_better < _counts(k)[..., None])


class Scores(NamedTuple):
    """The scores of a stack, and what they are computed from, entry by entry."""

    of: Callable[[list[jax.Array]], jax.Array]  # inputs -> scores, whatever the shape
    inputs: list[jax.Array]  # (layers, *layer_shape)

    def computed(self) -> jax.Array:
        """``(layers, *layer_shape)``, any float dtype."""
        return self.of(self.inputs)


class _Block(NamedTuple):
    """Scores in rows, and which of their entries may be selected."""

    scores: jax.Array  # (rows, ...), any float dtype
    eligible: jax.Array | None  # bool of that shape; None = all


class _Given(NamedTuple):
    """The arrays from which a block is computed; they have the block's rows."""

    inputs: list[jax.Array]  # of the scores
    eligible: jax.Array | None


def top_k_of(
    scores: Sequence[Scores],
    num_keep: Any,
    layout: blocks.Layout,
    eligible: Sequence[jax.Array] | None,
) -> list[jax.Array]:
    """As :func:`top_k`, but in blocks, and without storing the scores of large stacks.

    Each count computes them again: counting is limited by memory, not by arithmetic.

    Args:
      scores: of the stacks of ``layout``.
      num_keep: as for ``top_k``.
      layout: where the stacks lie in the blocks.
      eligible: bool blocks, False in padding; None = all entries.

    Returns:
      bool blocks, False in padding.
    """
    dtype = sortable.widest([jax.eval_shape(x.computed) for x in scores])
    sizes = blocks.layer_sizes(layout)
    num_keep = _counts(num_keep)
    by_layer = num_keep.ndim == 1
    ranked = sizes if by_layer else sizes.sum(keepdims=True)  # how many entries a ranking has
    if not sizes.sum():
        return blocks.to_blocks([jnp.zeros_like(x.computed(), bool) for x in scores], layout)
    if ranked.max() >= 2**31:
        raise ValueError(
            f"One ranking over {ranked.max()} weights does not fit int32 counts (at most "
            "2^31 - 1); use a distribution that gives each layer its own count."
        )
    rows = blocks.rows(layout)
    num_rows = [len(x.layer) for x in rows]
    starts = blocks.starts(num_rows)
    layer = np.concatenate([x.layer for x in rows])
    # In a ranking of all, the entries of the layers before each one.
    before = np.zeros_like(sizes) if by_layer else np.cumsum(sizes) - sizes
    before_row = (before[layer] + np.concatenate([x.start for x in rows])).astype(np.uint32)
    made, given = _in_blocks(scores, layout, eligible, dtype)

    def best(given: list[_Given], cut: _Cut) -> list[jax.Array]:
        keys = jnp.broadcast_to(sortable.from_position(cut.key), sizes.shape)[layer]
        ends = jnp.maximum(jnp.broadcast_to(cut.end, sizes.shape)[layer], before_row) - before_row
        of_rows = (blocks.split(x, starts, num_rows) for x in (keys, ends))
        return [_is_best(*x) for x in zip(made(given), *of_rows, strict=True)]

    def num_best(cut: _Cut) -> jax.Array:
        # Without the barriers XLA would compute the keys once and store them.
        renewed = jax.tree.map(lambda x: jax.lax.optimization_barrier((x, cut))[0], given)
        counts = blocks.count(best(renewed, cut), layout)
        return counts if by_layer else jnp.sum(counts, keepdims=True, dtype=jnp.int32)

    wanted = jnp.clip(jnp.atleast_1d(num_keep), 0, ranked.astype(np.int32))
    most = ranked.astype(f"u{dtype.itemsize}")
    guesses: tuple[jax.Array, ...] = ()
    if jax.device_count() == 1:  # several would have to collect a sample
        guesses = _of_stored(
            lambda given: _guess(*_sample(given, made, layout, by_layer), wanted, ranked),
            lambda _: (jnp.zeros_like(wanted, most.dtype),) * 2,
            given,
        )
    cut = _search(num_best, wanted, most, guesses, all_eligible=eligible is None)
    return _of_stored(
        lambda given: best(given, cut), lambda given: [_none(x) for x in made(given)], given
    )


def _in_blocks(
    scores: Sequence[Scores],
    layout: blocks.Layout,
    eligible: Sequence[jax.Array] | None,
    dtype: np.dtype,
) -> tuple[Callable[[list[_Given]], list[_Block]], list[_Given]]:
    """A function that makes blocks of scores, and its inputs; small stacks are scored here."""
    stored = [sortable.exactly(scores[i].computed(), dtype) for i in layout.together]
    inputs = [[blocks.flat(x) for x in scores[i].inputs] for i in layout.alone]
    inputs += [[x] for x in blocks.together(stored, layout)]
    functions = [scores[i].of for i in layout.alone] + [lambda x: x[0]] * bool(stored)
    marks = blocks.all_but_padding(layout) if eligible is None else eligible

    def made(given: list[_Given]) -> list[_Block]:
        pairs = zip(functions, given, strict=True)
        return [_Block(sortable.exactly(of(x.inputs), dtype), x.eligible) for of, x in pairs]

    return made, [_Given(*x) for x in zip(inputs, marks, strict=True)]


def count(stacks: Sequence[jax.Array]) -> jax.Array:
    """How many entries of each layer are True: bool stacks -> int32 ``(sum of layers_i,)``."""
    layout = blocks.lay_out([x.shape for x in stacks])
    return blocks.count(blocks.to_blocks(stacks, layout), layout)


def total(flags: Sequence[jax.Array]) -> jax.Array:
    """How many entries are True in all arrays, an int32 scalar; ``MOST`` stands for more."""
    exact = sum((jnp.sum(x, dtype=jnp.int32) for x in flags), start=jnp.zeros([], jnp.int32))
    if sum(x.size for x in flags) <= MOST:
        return exact
    rows = (jnp.sum(x, axis=-1, dtype=jnp.int32).astype(jnp.float32) for x in flags if x.ndim)
    rough = sum((jnp.sum(x) for x in rows), start=jnp.zeros([]))
    return jnp.where(rough > MOST * (1 - 2.0**-10), MOST, exact)  # the exact sum may have overflown


def _of_stored(f: Callable[[Any], Any], unused: Callable[[Any], Any], args: Any) -> Any:
    """``f(args)`` of exactly the bits that the counts read.

    Outside a conditional XLA may compute the arguments again and round them differently, or store
    intermediate results. The barrier hides from XLA that the condition is always true.
    """
    return jax.lax.cond(jax.lax.optimization_barrier(jnp.array(True)), f, unused, args)


class _Cut(NamedTuple):
    """Selected are the entries with a higher key, and those with this key before the end."""

    key: jax.Array  # uint32 or uint64 (rankings,), see :func:`sortable.to_position`
    end: jax.Array  # uint32 (rankings,)


class _Bracket(NamedTuple):
    """Two positions in each ranking, between which the cut lies, and the number selected at each.

    Positions are keys at first. If nothing is left between ``low`` and ``high``, the entries with
    the key ``high`` tie, and from then on positions are indices. These are counted from the end, so
    that a higher position selects fewer entries, as with keys. All fields are ``(rankings,)``;
    positions are uint32, or uint64 for float64 scores.
    """

    wanted: jax.Array  # int32
    low: jax.Array
    high: jax.Array
    at_low: jax.Array  # int32, not fewer than wanted
    at_high: jax.Array  # int32, not more than wanted
    gap: jax.Array  # int32, at_low - at_high one round ago
    gap_before: jax.Array  # int32, two rounds ago
    is_tie: jax.Array  # bool, are positions indices?
    key: jax.Array  # of those that tie, as a position


_NO_GAP = np.int32(2**31 - 1)


def _search(
    num_best: Callable[[_Cut], jax.Array],
    wanted: jax.Array,
    sizes: np.ndarray,
    guesses: Sequence[jax.Array],
    all_eligible: bool,
) -> _Cut:
    """Narrows a bracket until exactly ``wanted`` entries are selected; each round counts them all.

    Positions have the dtype of ``sizes``, the lengths of the rankings. The first round counts the
    eligible entries, which limits ``wanted``. The next rounds try the guesses, then interpolation
    between the counts. The bracket is halved instead if its gap is still wide, or has not fallen to
    a quarter in two rounds; so the search ends for any scores.
    """

    def cut_at(b: _Bracket, position: jax.Array) -> _Cut:
        end = jnp.where(b.is_tie, sizes - position, 0)
        return _Cut(jnp.where(b.is_tie, b.key, position), end.astype(jnp.uint32))

    def is_open(b: _Bracket) -> jax.Array:
        return (b.at_low != b.wanted) & (b.at_high != b.wanted)

    def close(carry: tuple[jax.Array, _Bracket]) -> tuple[jax.Array, _Bracket]:
        turn, b = carry
        gap = b.at_low - b.at_high
        is_wide = ~b.is_tie & (gap > (sizes // 8).astype(np.int32))
        halve = is_wide | (gap > b.gap_before // 4)
        position = b.low + jnp.where(halve, (b.high - b.low) // 2, _interpolate(b))
        for i, guess in enumerate(guesses, start=1):
            position = jnp.where((turn == i) & (b.low < guess) & (guess < b.high), guess, position)
        position = jnp.clip(position, b.low + 1, b.high - 1)
        position = jnp.where(turn == 0, b.low, position)
        found = num_best(cut_at(b, position))
        wanted = jnp.where(turn == 0, jnp.minimum(b.wanted, found), b.wanted)
        enough = found >= wanted
        closer = b._replace(
            wanted=wanted,
            low=jnp.where(enough, position, b.low),
            high=jnp.where(enough, b.high, position),
            at_low=jnp.where(enough, found, b.at_low),
            at_high=jnp.where(enough, b.at_high, found),
            gap=jnp.where(halve, _NO_GAP, gap),
            gap_before=jnp.where(halve, _NO_GAP, b.gap),
        )
        closer = _where(is_open(closer) & (closer.high - closer.low == 1), to_ties(closer), closer)
        return turn + 1, _where(is_open(b), closer, b)

    def to_ties(b: _Bracket) -> _Bracket:
        none = jnp.full_like(b.gap, _NO_GAP)
        low, high = jnp.zeros_like(b.low), jnp.broadcast_to(sizes, b.high.shape)
        yes = jnp.ones_like(b.is_tie)
        return _Bracket(b.wanted, low, high, b.at_low, b.at_high, none, none, yes, key=b.high)

    no_key, none = jnp.zeros_like(wanted, sizes.dtype), jnp.full_like(wanted, _NO_GAP)
    highest = jnp.full_like(no_key, sortable.highest_position(sizes.dtype))
    no = jnp.zeros_like(wanted, bool)
    all_of_them = jnp.broadcast_to(sizes.astype(np.int32), wanted.shape)
    zero = jnp.zeros_like(wanted)
    start = _Bracket(wanted, no_key, highest, all_of_them, zero, none, none, no, no_key)
    turn = jnp.int32(1 if all_eligible else 0)
    _, b = jax.lax.while_loop(lambda carry: jnp.any(is_open(carry[1])), close, (turn, start))
    return cut_at(b, jnp.where(b.at_high == b.wanted, b.high, b.low))


def _interpolate(b: _Bracket) -> jax.Array:
    """The distance above ``low`` at which ``wanted`` are selected, if counts fall linearly.

    It aims a little further, away from the nearer end, by as much as chance moves a count. So both
    ends of the bracket come close.
    """
    from_low = (b.at_low - b.wanted).astype(jnp.float32)
    from_high = (b.wanted - b.at_high).astype(jnp.float32)
    past = 0.7 * jnp.sqrt(jnp.minimum(from_low, from_high))
    aim = from_low + jnp.where(from_low < from_high, past, -past)
    share = jnp.clip(aim / jnp.maximum(from_low + from_high, 1), 0, 1)
    distance = share * (b.high - b.low).astype(jnp.float32)
    bits = 8 * b.high.dtype.itemsize
    largest = 2.0**bits - 2.0 ** (bits - 24)  # that float32 has below 2^bits
    return jnp.minimum(distance, largest).astype(b.high.dtype)


def _sample(
    given: list[_Given],
    made: Callable[[list[_Given]], list[_Block]],
    layout: blocks.Layout,
    by_layer: bool,
) -> tuple[jax.Array, np.ndarray]:
    """Keys of some entries of each ranking, and how many of them are not padding.

    Strides are odd, so that the sample is not one column of a matrix.
    """
    rows, sizes = blocks.rows(layout), blocks.layer_sizes(layout)
    if not by_layer:
        stride = -(-int(sizes.sum()) // _SAMPLE) | 1
        some = made(jax.tree.map(lambda x: x.reshape(1, -1)[:, ::stride], given))
        num_drawn = 0
        for x, of in zip(given, rows, strict=True):
            width = x.inputs[0].shape[1]
            place = np.arange(0, len(of.layer) * width, stride)
            num_drawn += int(np.sum(place % width < of.length[place // width]))
        return jnp.concatenate([_keys(x) for x in some], axis=1), np.array([num_drawn])
    strides = -(-sizes // _SAMPLE_OF_LAYER) | 1
    drawn = -(-sizes // strides)
    is_drawn = np.arange(drawn.max()) < drawn[:, None]

    def draw(x: jax.Array, of: blocks.Rows) -> jax.Array:
        first = np.flatnonzero(of.start == 0)
        if np.all(sizes[of.layer] == x.shape[1]):  # whole layers: a slice is faster
            y = x[:, :: int(strides[of.layer[0]])]
            return jnp.pad(y, ((0, 0), (0, drawn.max() - y.shape[1])))
        steps = strides[of.layer[first], None] * np.arange(drawn.max())
        place = first[:, None] * x.shape[1] + steps
        return jnp.take(x.reshape(-1), place.astype(np.uint32), mode="clip")

    pairs = zip(given, rows, strict=True)
    some = made([jax.tree.map(lambda y: draw(y, of), x) for x, of in pairs])  # noqa: B023
    order = np.argsort(np.concatenate([of.layer[of.start == 0] for of in rows]))
    keys = jnp.concatenate([_keys(x) for x in some])[order]
    return jnp.where(is_drawn, keys, sortable.lowest(keys.dtype)), drawn


def _guess(
    sample: jax.Array, drawn: np.ndarray, wanted: jax.Array, sizes: np.ndarray
) -> tuple[jax.Array, jax.Array]:
    """Two keys of each ranking that most likely enclose the wanted one, from a sample.

    If the sample holds all entries, they certainly do.
    """
    best_last = jnp.sort(sample, axis=1)
    rank = wanted.astype(jnp.float32) * (drawn / np.maximum(sizes, 1)).astype(np.float32)
    margin = 2.5 * jnp.sqrt(rank * jnp.maximum(0, 1 - rank / np.maximum(drawn, 1))) + 1
    margin = jnp.where(drawn < sizes, margin, 0)

    def key_at(rank: jax.Array) -> jax.Array:
        position = sample.shape[1] - 1 - rank.astype(jnp.int32)[:, None]
        keys = jnp.take_along_axis(best_last, position, axis=1, mode="clip")[:, 0]
        return jnp.where((rank >= 0) & (rank < drawn), sortable.to_position(keys), 0)

    above = key_at(jnp.floor(rank - 1 - margin))
    below = key_at(jnp.ceil(rank - 1 + margin))
    return above, below - (below > 0).astype(below.dtype)


def _where(condition: jax.Array, a: _Bracket, b: _Bracket) -> _Bracket:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)


def _counts(num_keep: Any) -> jax.Array:
    """Ints of any width as int32, clipped to its range."""
    if isinstance(num_keep, int):
        num_keep = min(max(num_keep, 0), MOST)
    elif getattr(num_keep, "dtype", None) in ("uint32", "int64", "uint64"):
        num_keep = num_keep.clip(0, MOST)
    return jnp.asarray(num_keep, jnp.int32)


def _keys(block: _Block) -> jax.Array:
    """Ints of the scores' shape, width and order; the lowest key where not eligible."""
    key = sortable.keys(block.scores)
    if block.eligible is None:
        return key
    return jnp.where(block.eligible, key, sortable.lowest(key.dtype))


def _none(block: _Block) -> jax.Array:
    """An array of the shape and dtype of a block's mask, at no cost."""
    return jnp.zeros_like(block.scores, bool) if block.eligible is None else block.eligible


def _is_best(block: _Block, key: jax.Array, end: jax.Array) -> jax.Array:
    """The mask of a block, given a key and an end for each row."""
    key, end = (x.reshape(-1, *[1] * (block.scores.ndim - 1)) for x in (key, end))
    return _keys(block) + (_linear_index(block.scores) < end).astype(key.dtype) > key


def _linear_index(x: jax.Array) -> jax.Array:
    """Row-major position of each entry within its layer, uint32, made of iotas (never gathered)."""
    shape = x.shape[1:]
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = np.uint32(math.prod(shape[axis + 1 :]))
        index += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis + 1) * stride
    return index
