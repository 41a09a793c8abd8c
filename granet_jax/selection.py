"""Exact top-k masks without sorting.

Sorting 25 million scores takes seconds on a CPU and, on sharded arrays, gathers them all. Here the
k-th largest score is found by counting: floats are mapped to integers of the same order and width,
and a bracket around the k-th largest closes by asking how many integers are above a candidate.
Candidates come from a small sample, then from interpolation between counts, and from bisection
where neither gets on; whatever they are, the mask is the same. Ties are settled by the same search
over linear indices. Only counts ever leave a device, so the same scores give the same mask on any
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

from granet_jax import sortable
from granet_jax.types import PyTree

_ROW = 256
_SHORT_ROW = 32  # rows up to this length are ranked by comparing all pairs
_SMALL = 2**20  # stacks of fewer entries are copied together: fewer kernels to compile
_SAMPLE = 8192  # scores sampled from all layers for one ranking
_SAMPLE_OF_LAYER = 1024  # from each, for a ranking within each


def top_k_mask(scores: jax.Array, k: Any, eligible: jax.Array | None = None) -> jax.Array:
    """True for the ``k`` largest entries of one array, exactly.

    Args:
      scores: any shape and float dtype; float64 is compared as such, all else in float32. NaN
        ranks below every number, and -0 equals +0.
      k: how many to select, an int or a scalar of ints, which may be traced. Above the number of
        eligible entries, all those are selected; at or below 0, none.
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
        them is of that, else in float32.
      num_keep: int scalar, the number kept over all stacks; or ints ``(sum of layers_i,)``, the
        number kept in each layer. May be traced.
      eligible: bool arrays of the same shapes; None = all entries.

    Returns:
      bool arrays of the scores' shapes with exactly ``num_keep`` entries True (fewer where fewer
      are eligible). Ties go to the earlier stack, then the earlier layer, then the smaller index.

    Raises:
      ValueError: one ranking over 2^31 entries or more: its counts would overflow int32; or
        complex scores.

    Example: the best three of all, then the best one of each.
      >>> import jax.numpy as jnp
      >>> stacks = [jnp.array([[5.0, 4.0, 3.0]]), jnp.array([[2.0, 1.0]])]
      >>> [m.tolist() for m in top_k(stacks, 3)]
      [[[True, True, True]], [[False, False]]]
      >>> [m.tolist() for m in top_k(stacks, jnp.array([1, 1]))]
      [[[True, False, False]], [[True, False]]]
    """
    entries = [None] * len(scores) if eligible is None else eligible
    stacks = [Stack(*x) for x in zip(scores, entries, strict=True)]
    return top_k_of(lambda stacks: stacks, stacks, num_keep)


def top_k_of_rows(scores: jax.Array, k: jax.Array, eligible: jax.Array) -> jax.Array:
    """Selects within each row, the last axis of an array.

    Args:
      scores: ``(..., n)``, any float dtype; compared as by :func:`top_k`.
      k: ints ``(...)``, how many to select in each row; may be traced.
      eligible: bool ``(..., n)``.

    Returns:
      bool ``(..., n)``, as :func:`top_k` of each row.

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
    keys = _keys(Stack(sortable.exactly(scores, sortable.widest([scores])), eligible))
    index = jax.lax.broadcasted_iota(jnp.int32, keys.shape, keys.ndim - 1)
    num_better = jnp.zeros_like(keys, jnp.int32)
    for i in range(length):
        other = keys[..., i : i + 1]
        num_better += ((other > keys) | ((other == keys) & (i < index))).astype(jnp.int32)
    return eligible & (num_better < _counts(k)[..., None])


class Stack(NamedTuple):
    """Scores of layers of one shape, and which of their entries may be selected."""

    scores: jax.Array  # (layers, *layer_shape), any float dtype
    eligible: jax.Array | None  # bool of that shape; None = all


def top_k_of(
    rank: Callable[[PyTree], Sequence[Stack]],
    inputs: PyTree,
    num_keep: Any,
) -> list[jax.Array]:
    """As :func:`top_k` of ``rank(inputs)``, without storing what that computes.

    Each count computes the scores anew, for counts wait for memory, not for arithmetic.

    Args:
      rank: arithmetic on entries, the same whatever their shapes, from ``inputs`` to stacks.
      inputs: tree of arrays ``(layers, ...)``.
      num_keep: as for ``top_k``.
    """
    scores = [x.scores for x in jax.eval_shape(rank, inputs)]
    shapes, dtype = [x.shape for x in scores], sortable.widest(scores)
    sizes = np.array([math.prod(x[1:]) for x in shapes for _ in range(x[0])], np.int64)
    num_keep = _counts(num_keep)
    by_layer = num_keep.ndim == 1
    ranked = sizes if by_layer else sizes.sum(keepdims=True)  # how many entries a ranking has
    if not sizes.sum():
        return [jnp.zeros_like(x.scores, bool) for x in rank(inputs)]
    if ranked.max() >= 2**31:
        raise ValueError(
            f"One ranking over {ranked.max()} weights does not fit int32 counts (at most "
            "2^31 - 1); use a distribution that gives each layer its own count."
        )
    # In a ranking of all, the entries of the layers before each one.
    before = np.zeros_like(sizes) if by_layer else np.cumsum(sizes) - sizes
    groups = [[i] for i in range(len(shapes))]
    if jax.device_count() == 1:  # on several, this would move weights between them
        inputs = jax.tree.map(lambda x: x.reshape(len(x), -1), inputs)
        groups = _groups(shapes)
    made = _ranked(rank, inputs, dtype)
    merged = [_merge([made[i] for i in group]) for group in groups if len(group) > 1]
    alone = [group[0] for group in groups if len(group) == 1]
    first = np.cumsum([0] + [shape[0] for shape in shapes])
    order = np.concatenate([np.arange(first[i], first[i + 1]) for group in groups for i in group])
    if by_layer:
        num_keep, ranked = num_keep[order], ranked[order]

    def stacks(inputs: PyTree, merged: list[Stack]) -> list[Stack]:
        made = _ranked(rank, inputs, dtype)
        return [made[i] for i in alone] + merged

    def best(stacks: list[Stack], cut: _Cut) -> list[jax.Array]:
        keys = jnp.broadcast_to(sortable.from_position(cut.key), order.shape)
        start = before[order].astype(np.uint32)
        ends = jnp.maximum(cut.end, start) - start
        values = zip(stacks, _by_stack(stacks, keys), _by_stack(stacks, ends), strict=True)
        return [
            _keys(x) + (_linear_index(x.scores) < end).astype(key.dtype) > key
            for x, key, end in values
        ]

    def num_best(cut: _Cut) -> jax.Array:
        # Without the barriers XLA would compute the keys once and store them.
        def renewed(x: jax.Array) -> jax.Array:
            return jax.lax.optimization_barrier((x, cut))[0]

        counts = count(best(stacks(*jax.tree.map(renewed, (inputs, merged))), cut))
        return counts if by_layer else jnp.sum(counts, keepdims=True, dtype=jnp.int32)

    wanted = jnp.clip(jnp.atleast_1d(num_keep), 0, ranked.astype(np.int32))
    most = ranked.astype(f"u{dtype.itemsize}")
    guesses: tuple[jax.Array, ...] = ()
    if jax.device_count() == 1:  # several would have to collect a sample
        guesses = _of_stored(
            lambda args: _guess(stacks(*args), wanted, ranked, by_layer),
            lambda args: (jnp.zeros_like(wanted, most.dtype),) * 2,
            (inputs, merged),
        )
    all_eligible = all(x.eligible is None for x in made)
    cut = _search(num_best, wanted, most, guesses, all_eligible)
    masks = _of_stored(
        lambda args: best(stacks(*args), cut),
        lambda args: [_none(x) for x in stacks(*args)],
        (inputs, merged),
    )
    each = [
        part
        for group, mask in zip(groups, masks, strict=True)
        for part in _split(mask, [shapes[i][0] for i in group])
    ]
    in_order = dict(zip([i for group in groups for i in group], each, strict=True))
    return [in_order[i].reshape(shape) for i, shape in enumerate(shapes)]


def count(stacks: Sequence[jax.Array]) -> jax.Array:
    """How many entries of each layer are True: bool stacks -> int32 ``(sum of layers_i,)``."""
    if jax.default_backend() != "cpu" or jax.device_count() > 1:
        each = [jnp.sum(x, axis=tuple(range(1, x.ndim)), dtype=jnp.int32) for x in stacks]
        return jnp.concatenate([replicated(x) for x in each])
    # XLA:CPU is slow to sum booleans, but as fast as memory to add up eighths of an array. What
    # remains is laid out in rows, each of one layer. Barriers keep the steps apart: simplified into
    # one, they are slow again.
    apart = jax.lax.optimization_barrier
    rows, owners, num_layers = [], [], 0
    for x in stacks:
        ones = x.reshape(len(x), _layer_size(x)).astype(jnp.uint8)
        length = ones.shape[1] // 8
        eighths = ones[:, : 8 * length].reshape(len(x), 8, length)
        parts = [jnp.sum(eighths, axis=1, dtype=jnp.uint8), ones[:, 8 * length :]]
        num_rows = -(-sum(part.shape[1] for part in parts) // _ROW)
        padding = num_rows * _ROW - sum(part.shape[1] for part in parts)
        parts.append(jnp.zeros((len(x), padding), jnp.uint8))
        rows.append(jnp.concatenate(apart(parts), axis=1).reshape(len(x) * num_rows, _ROW))
        owners.append(np.repeat(num_layers + np.arange(len(x)), num_rows))
        num_layers += len(x)
    sums = jnp.sum(apart(jnp.concatenate(rows)), axis=1, dtype=jnp.int32)
    owner = np.concatenate(owners).astype(np.int32)
    return jax.ops.segment_sum(sums, owner, num_layers, indices_are_sorted=True)


def replicated(counts: jax.Array) -> jax.Array:
    """One number for each layer, on every device of an explicit mesh that shares the layers."""
    if any(axis is not None for axis in jax.typeof(counts).sharding.spec):
        return jax.sharding.reshard(counts, jax.sharding.PartitionSpec())
    return counts


def _of_stored(f: Callable[[Any], Any], unused: Callable[[Any], Any], args: Any) -> Any:
    """``f(args)`` of the very bits that the counts read.

    Outside of a conditional XLA may compute the arguments again, rounded otherwise, or store what
    they are computed from. The barrier hides that it always holds.
    """
    return jax.lax.cond(jax.lax.optimization_barrier(jnp.array(True)), f, unused, args)


def _groups(shapes: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """Which stacks to merge: those alone first, then small ones with layers of one size."""
    groups: dict[Any, list[int]] = {}
    for i, shape in enumerate(shapes):
        size = math.prod(shape[1:])
        groups.setdefault(size if math.prod(shape) <= _SMALL else (i, size), []).append(i)
    return sorted(groups.values(), key=lambda group: len(group) > 1)


def _merge(stacks: Sequence[Stack]) -> Stack:
    return jax.tree.map(lambda *x: jnp.concatenate(x), *stacks)


class _Cut(NamedTuple):
    """Best are the entries of a higher key, and of this very key those before the end."""

    key: jax.Array  # uint32 or uint64 (rankings,), see :func:`sortable.to_position`
    end: jax.Array  # uint32 (rankings,)


class _Bracket(NamedTuple):
    """Two positions in each ranking, between which the cut lies, and how many are best there.

    Positions are keys at first. Where nothing is left between ``low`` and ``high`` and the entries
    of the key ``high`` tie for what is wanted, they are indices from there on: told from the end,
    so that fewer are best the higher the position, as with keys. All ``(rankings,)``; positions are
    uint32, or uint64 where scores are float64.
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
    """Closes a bracket until exactly as many are best as wanted; a count of all in each round.

    Positions have the dtype of ``sizes``, the lengths of the rankings. The first round tells how
    many are eligible at all; there are no more to want. Then positions are tried as the guesses
    say, then as the counts suggest; but the bracket is halved where its gap is still wide or has
    not fallen to a quarter in two rounds, so that it closes whatever the scores.
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
    """How far above ``low`` as many are best as wanted, if counts fall in a straight line.

    Aims past that, away from the nearer end, by as much as chance moves a count: so both ends
    come close.
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


def _guess(
    stacks: list[Stack], wanted: jax.Array, sizes: np.ndarray, by_layer: bool
) -> tuple[jax.Array, jax.Array]:
    """Two keys of each ranking that most likely have the wanted one between them: from a sample.

    Where all entries are in the sample, that is certain.
    """
    rows = []
    for stack in stacks:
        row = stack.scores.shape[1]
        stride = -(-row // _SAMPLE_OF_LAYER) if by_layer else -(-int(sizes[0]) // _SAMPLE)
        stride |= 1  # odd, lest the sample be of one column of a matrix
        rows.append(_keys(jax.tree.map(lambda x: x[:, ::stride], stack)))  # noqa: B023
    if by_layer:
        drawn = np.array([x.shape[1] for x in rows for _ in range(len(x))])
        lowest = sortable.lowest(rows[0].dtype)
        rows = [
            jnp.pad(x, ((0, 0), (0, drawn.max() - x.shape[1])), constant_values=lowest)
            for x in rows
        ]
        sample = jnp.concatenate(rows)
    else:
        sample = jnp.concatenate([x.reshape(1, -1) for x in rows], axis=1)
        drawn = np.array([sample.shape[1]])
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
    """int32 of ints of any width: more than all is all."""
    limit = 2**31 - 1
    if isinstance(num_keep, int):
        num_keep = min(max(num_keep, 0), limit)
    elif getattr(num_keep, "dtype", None) in ("uint32", "int64", "uint64"):
        num_keep = num_keep.clip(0, limit)
    return jnp.asarray(num_keep, jnp.int32)


def _ranked(
    rank: Callable[[PyTree], Sequence[Stack]], inputs: PyTree, dtype: np.dtype
) -> list[Stack]:
    return [Stack(sortable.exactly(x.scores, dtype), x.eligible) for x in rank(inputs)]


def _keys(stack: Stack) -> jax.Array:
    """Ints of the scores' shape, width and order, the lowest where not eligible."""
    key = sortable.keys(stack.scores)
    if stack.eligible is None:
        return key
    return jnp.where(stack.eligible, key, sortable.lowest(key.dtype))


def _none(stack: Stack) -> jax.Array:
    """Something of the type of a stack's mask, at no cost."""
    keys = _keys(stack)
    return keys < keys if stack.eligible is None else stack.eligible


def _by_stack(stacks: Sequence[Stack], values: jax.Array) -> list[jax.Array]:
    """One value for each layer -> one array for each stack, shaped to broadcast."""
    parts = _split(values, [len(x.scores) for x in stacks])
    return [v.reshape(-1, *[1] * (x.scores.ndim - 1)) for v, x in zip(parts, stacks, strict=True)]


def _split(x: jax.Array, lengths: Sequence[int]) -> list[jax.Array]:
    """Parts of the given lengths along the first axis, as of :func:`jnp.split`.

    Where each begins is hidden from XLA: so parts of one shape, and what is made of them, share a
    kernel, which is compiled once.
    """
    if len(lengths) == 1:
        return [x]
    starts = [np.uint32(end - length) for end, length in zip(np.cumsum(lengths), lengths)]
    starts = _of_stored(lambda x: x, lambda x: [jnp.zeros_like(y) for y in x], starts)
    return [
        jax.lax.dynamic_slice_in_dim(x, start, length)
        for start, length in zip(starts, lengths, strict=True)
    ]


def _linear_index(x: jax.Array) -> jax.Array:
    """Row-major position of each entry within its layer, uint32, made of iotas (never gathered)."""
    shape = x.shape[1:]
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = np.uint32(math.prod(shape[axis + 1 :]))
        index += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis + 1) * stride
    return index


def _layer_size(x: jax.Array) -> int:
    return math.prod(x.shape[1:])
