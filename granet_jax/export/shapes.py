"""Rules for ids and constants where only shapes change: transpose, reshape, slice and others."""

import math
from collections.abc import Sequence

import numpy as np

from granet_jax import jaxprs
from granet_jax.export.graph import Step
from granet_jax.export.ids import Channels, Value


def opaque(channels: Channels, shape: Sequence[int], why: str) -> Value:
    """An array about which nothing is known, and which cannot be cut."""
    value = Value([channels.new(n) for n in shape], [np.full(n, math.nan) for n in shape or (1,)])
    fix(channels, value, why)
    return value


def fix(channels: Channels, value: Value, why: str) -> None:
    """Fixes all elements of a value."""
    for ids in value.ids:
        channels.fix(ids, why)


def shape_of(step: Step, i: int = 0) -> tuple[int, ...]:
    """The shape of a result."""
    return step.eqn.outvars[i].aval.shape


def unknown(channels: Channels, step: Step, given: list[Value]) -> list[Value]:
    """The rule for operations without a rule of their own."""
    why = f"{step.eqn.primitive.name} reads or makes it"
    for value in given:
        fix(channels, value, why)
    return [opaque(channels, var.aval.shape, why) for var in step.eqn.outvars]


def _transpose(channels: Channels, step: Step, given: list[Value]) -> list[Value]:
    order, (value,) = step.eqn.params["permutation"], given
    return [Value([value.ids[i] for i in order], [value.const[i] for i in order])]


def _reverse(channels: Channels, step: Step, given: list[Value]) -> list[Value]:
    turned, (value,) = step.eqn.params["dimensions"], given
    both = zip(value.ids, value.const, strict=True)
    each = [(a[::-1], c[::-1]) if i in turned else (a, c) for i, (a, c) in enumerate(both)]
    return [Value([a for a, _ in each], [c for _, c in each])]


def _squeeze(channels: Channels, step: Step, given: list[Value]) -> list[Value]:
    (value,) = given
    left = [i for i in range(len(value.ids)) if i not in step.eqn.params["dimensions"]]
    consts = [value.const[i] for i in left] if left else [np.array([value.whole])]
    return [Value([value.ids[i] for i in left], consts)]


def _broadcast(channels: Channels, step: Step, given: list[Value]) -> list[Value]:
    """An axis that is new or grows from 1 gets new ids, which later operations may join."""
    value, shape = given[0], shape_of(step)
    ids, consts = [], []
    from_axis = dict(
        zip(step.eqn.params["broadcast_dimensions"], range(len(value.ids)), strict=True)
    )
    for i, length in enumerate(shape):
        source = from_axis.get(i)
        if source is not None and len(value.ids[source]) == length:
            ids.append(value.ids[source])
            consts.append(value.const[source])
        else:
            ids.append(channels.new(length))
            consts.append(np.full(length, value.whole))
    return [Value(ids, consts)]


def _reshape(channels: Channels, step: Step, given: list[Value]) -> list[Value]:
    """Axes may stay, or merge into one if at most one of them can be cut (``flatten``)."""
    (value,) = given
    out_shape = shape_of(step)
    if step.eqn.params.get("dimensions") is not None or 0 in out_shape:
        return unknown(channels, step, given)
    ids: list[np.ndarray] = []
    consts: list[np.ndarray] = []
    for before, after in jaxprs.runs([len(a) for a in value.ids], out_shape):
        long = [i for i in before if len(value.ids[i]) > 1]
        long_after = [i for i in after if out_shape[i] > 1]
        movable = [i for i in long if not channels.is_fixed(value.ids[i])]
        for i in after:
            if i not in long_after:
                ids.append(_fixed_axis(channels, 1, "an axis of length 1"))
                consts.append(np.array([value.whole]))
            elif len(long) == 1 == len(long_after):
                ids.append(value.ids[long[0]])
                consts.append(value.const[long[0]])
            elif len(long_after) == 1 and len(movable) <= 1:
                shape = [len(value.ids[i]) for i in long]
                axis = long.index(movable[0]) if movable else 0
                index = np.indices(shape)[axis].ravel()
                ids.append(value.ids[long[axis]][index])
                consts.append(value.const[long[axis]][index])
            else:
                for j in long:
                    channels.fix(value.ids[j], "a reshape splits it or merges it with others")
                ids.append(_fixed_axis(channels, out_shape[i], "a reshape makes it"))
                consts.append(np.full(out_shape[i], value.whole))
    return [Value(ids, consts if ids else [np.array([value.whole])])]


def _fixed_axis(channels: Channels, length: int, why: str) -> np.ndarray:
    ids = channels.new(length)
    channels.fix(ids, why)
    return ids


def _stack(channels: Channels, step: Step, given: list[Value]) -> list[Value]:
    axis = step.eqn.params["axis"]
    each = []
    for value in given:
        ids, const = list(value.ids), list(value.const if value.ids else [])
        ids.insert(axis, _fixed_axis(channels, 1, "an axis of length 1"))
        const.insert(axis, np.array([value.whole]))
        each.append(Value(ids, const))
    return _joined(channels, each, axis)


def _concatenate(channels: Channels, step: Step, given: list[Value]) -> list[Value]:
    return _joined(channels, given, step.eqn.params["dimension"])


def _joined(channels: Channels, given: list[Value], axis: int) -> list[Value]:
    ids, consts = [], []
    for i in range(len(given[0].ids)):
        if i == axis:
            ids.append(np.concatenate([x.ids[i] for x in given]))
            consts.append(np.concatenate([x.const[i] for x in given]))
            continue
        for other in given[1:]:
            channels.join(given[0].ids[i], other.ids[i])
        ids.append(given[0].ids[i])
        consts.append(_where_equal([x.const[i] for x in given]))
    return [Value(ids, consts)]


def _where_equal(consts: list[np.ndarray]) -> np.ndarray:
    """The constant that all have, or NaN."""
    return np.where(np.all(np.stack(consts) == consts[0], axis=0), consts[0], math.nan)


def _slice(channels: Channels, step: Step, given: list[Value]) -> list[Value]:
    (value,), params = given, step.eqn.params
    ids, consts = [], []
    strides = params["strides"] or (1,) * len(value.ids)
    bounds = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    for i, (start, limit, stride) in enumerate(bounds):
        if stride != 1:
            channels.fix(value.ids[i], "a slice with strides")
        if limit - start == 1:
            channels.fix(value.ids[i][start:limit], "an axis of length 1")
        ids.append(value.ids[i][start:limit:stride])
        consts.append(value.const[i][start:limit:stride])
    return [Value(ids, consts)]


def _split(channels: Channels, step: Step, given: list[Value]) -> list[Value]:
    (value,), axis = given, step.eqn.params["axis"]
    ends = np.cumsum(step.eqn.params["sizes"])[:-1]
    parts = np.split(value.ids[axis], ends)
    for ids in parts:
        if len(ids) == 1:
            channels.fix(ids, "an axis of length 1")
    return [
        Value(
            [*value.ids[:axis], ids, *value.ids[axis + 1 :]],
            [*value.const[:axis], const, *value.const[axis + 1 :]],
        )
        for ids, const in zip(parts, np.split(value.const[axis], ends), strict=True)
    ]


def _pad(channels: Channels, step: Step, given: list[Value]) -> list[Value]:
    value, filling = given
    ids, consts = [], []
    for i, edges in enumerate(step.eqn.params["padding_config"]):
        if tuple(edges) == (0, 0, 0):
            ids.append(value.ids[i])
            filled = np.full_like(value.const[i], filling.whole)
            consts.append(_where_equal([value.const[i], filled]))
        else:
            channels.fix(value.ids[i], "a padded axis")
            length = shape_of(step)[i]
            ids.append(_fixed_axis(channels, length, "a padded axis"))
            consts.append(
                np.full(length, value.whole if value.whole == filling.whole else math.nan)
            )
    return [Value(ids, consts)]


RULES = {
    "transpose": _transpose,
    "rev": _reverse,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "stack": _stack,
    "concatenate": _concatenate,
    "slice": _slice,
    "split": _split,
    "pad": _pad,
}
