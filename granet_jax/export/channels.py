"""Which channels of a traced model belong together, and which of them are dead.

Each element of each axis of each array gets an id. Operations join ids: an addition those of its
operands, a product those of the axes that it contracts, so that in the end all places that would
have to be cut together have one id. An id is *fixed* where cutting would change what an operation
means (inputs, outputs, axes that are sorted, normalised by softmax, reshaped together with others),
and it is *needed* where a contraction or a sum reads something that is not known to be 0. All other
ids may go. What is known to be 0 follows from zeros in the parameters: 0 * x, relu(0), 0 + 0.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from granet_jax.export.graph import Known, Program, Step
from granet_jax.export.ids import Channels, Value


def trace(channels: Channels, program: Program, given: Sequence[Value]) -> dict[int, Value]:
    """Walks through a program: what is known of the array in each slot. Outputs are fixed."""
    values = dict(enumerate(given))
    for slot, const in program.consts.items():
        values[slot] = of_array(channels, np.asarray(const))

    def look_up(x: int | Known) -> Value:
        return values[x] if isinstance(x, int) else _of_known(channels, x.value)

    for step in program.steps:
        rule = _RULES.get(step.eqn.primitive.name, _unknown)
        outs = rule(channels, step, [look_up(x) for x in step.inputs])
        values |= dict(zip(step.outputs, (outs[i] for i in step.read), strict=True))
    for x in program.outputs:
        _fix(channels, look_up(x), "an output of the model")
    return values


def of_array(channels: Channels, x: np.ndarray) -> Value:
    """Of a parameter: ids of its own, zeros as they are."""
    is_zero = x == 0
    axes = range(x.ndim)
    zero = [is_zero.all(tuple(j for j in axes if j != i)) for i in axes]
    return Value([channels.new(n) for n in x.shape], zero if x.ndim else [is_zero.reshape(1)])


def of_input(channels: Channels, shape: tuple[int, ...]) -> Value:
    """Of an input: nothing of it can be cut."""
    return _opaque(channels, shape, "an input of the model")


def _of_known(channels: Channels, x: Any) -> Value:
    value = of_array(channels, np.asarray(x))
    _fix(channels, value, "a constant in the model")
    return value


def _opaque(channels: Channels, shape: Sequence[int], why: str) -> Value:
    value = Value([channels.new(n) for n in shape], [np.zeros(n, bool) for n in shape or (1,)])
    _fix(channels, value, why)
    return value


def _fix(channels: Channels, value: Value, why: str) -> None:
    for ids in value.ids:
        channels.fix(ids, why)


def _shape(step: Step, i: int = 0) -> tuple[int, ...]:
    return step.eqn.outvars[i].aval.shape


def _unknown(channels: Channels, step: Step, given: list[Value]) -> list[Value]:
    why = f"{step.eqn.primitive.name} reads or makes it"
    for value in given:
        _fix(channels, value, why)
    return [_opaque(channels, var.aval.shape, why) for var in step.eqn.outvars]


# --- Entry by entry ---


def _elementwise(zero_if: Callable[[list[np.ndarray]], np.ndarray | bool]) -> Any:
    """Of arrays of one rank, and numbers. ``zero_if`` tells from which zeros a zero comes."""

    def rule(channels: Channels, step: Step, given: list[Value]) -> list[Value]:
        arrays = [x for x in given if x.ids]
        shape = _shape(step)
        if not arrays:
            zero = zero_if([x.zero[0] for x in given])
            return [Value([], [np.broadcast_to(np.asarray(zero), 1)])]
        ids, zeros = [], []
        for axis, length in enumerate(shape):  # an axis of length 1 meets all of a longer one
            long = [x.ids[axis] for x in arrays if len(x.ids[axis]) == length]
            for other in long[1:]:
                channels.join(long[0], other)
            each = [x.zero[axis if x.ids else 0] for x in given]
            zero = zero_if([np.broadcast_to(z, length) for z in each])
            ids.append(long[0])
            zeros.append(np.broadcast_to(np.asarray(zero), length))
        return [Value(ids, zeros)]

    return rule


def _never(zeros: list[np.ndarray]) -> bool:
    return False


def _first(zeros: list[np.ndarray]) -> np.ndarray:
    return zeros[0]


def _all(zeros: list[np.ndarray]) -> np.ndarray:
    return np.logical_and.reduce(zeros)


def _any(zeros: list[np.ndarray]) -> np.ndarray:
    return np.logical_or.reduce(zeros)


def _all_but_first(zeros: list[np.ndarray]) -> np.ndarray:
    return np.logical_and.reduce(zeros[1:])


def _integer_pow(channels: Channels, step: Step, given: list[Value]) -> list[Value]:
    return _elementwise(_first if step.eqn.params["y"] > 0 else _never)(channels, step, given)


def _bound(sign: int) -> Any:
    """``max`` and ``min``: 0 stays 0 under a number that does not lie on the other side of it."""

    def rule(channels: Channels, step: Step, given: list[Value]) -> list[Value]:
        passes = [
            isinstance(x, Known) and bool(np.all(sign * np.asarray(x.value) <= 0))
            for x in step.inputs
        ]

        def zero_if(zeros: list[np.ndarray]) -> np.ndarray:
            return _all([z | p for z, p in zip(zeros, passes, strict=True)])

        return _elementwise(_all if all(passes) else zero_if)(channels, step, given)

    return rule


def _clamp(channels: Channels, step: Step, given: list[Value]) -> list[Value]:
    low, _, high = step.inputs
    holds_zero = (
        isinstance(low, Known)
        and isinstance(high, Known)
        and bool(np.all(np.asarray(low.value) <= 0))
        and bool(np.all(np.asarray(high.value) >= 0))
    )
    return _elementwise((lambda zeros: zeros[1]) if holds_zero else _never)(channels, step, given)


# --- Products ---


def _dot_general(channels: Channels, step: Step, given: list[Value]) -> list[Value]:
    (contracted, batch), (lhs, rhs) = step.eqn.params["dimension_numbers"], given
    _contract(channels, lhs, rhs, zip(*contracted, strict=True))
    ids, zeros = [], []
    for i, j in zip(*batch, strict=True):
        channels.join(lhs.ids[i], rhs.ids[j])
        ids.append(lhs.ids[i])
        zeros.append(lhs.zero[i] | rhs.zero[j])
    for value, used in ((lhs, (*contracted[0], *batch[0])), (rhs, (*contracted[1], *batch[1]))):
        free = [i for i in range(len(value.ids)) if i not in used]
        ids += [value.ids[i] for i in free]
        zeros += [value.zero[i] for i in free]
    return [Value(ids, zeros if ids else [np.array([lhs.is_zero or rhs.is_zero])])]


def _contract(channels: Channels, lhs: Value, rhs: Value, axes: Any) -> None:
    for i, j in axes:
        channels.join(lhs.ids[i], rhs.ids[j])
        channels.need(lhs.ids[i], ~(lhs.zero[i] | rhs.zero[j]), "a product reads it")


def is_depthwise(step: Step) -> bool:
    """Whether a convolution has one filter for each channel."""
    params = step.eqn.params
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    lhs, rhs = (var.aval.shape for var in step.eqn.invars)
    return groups > 1 and groups == lhs[numbers.lhs_spec[1]] == rhs[numbers.rhs_spec[0]]


def _convolution(channels: Channels, step: Step, given: list[Value]) -> list[Value]:
    params = step.eqn.params
    numbers, (lhs, rhs) = params["dimension_numbers"], given
    inputs, outputs = numbers.lhs_spec[1], numbers.rhs_spec[0]
    if is_depthwise(step):
        channels.join(lhs.ids[inputs], rhs.ids[outputs])
        zero = lhs.zero[inputs] | rhs.zero[outputs]
    elif params["feature_group_count"] * params["batch_group_count"] == 1:
        _contract(channels, lhs, rhs, [(inputs, numbers.rhs_spec[1])])
        zero = rhs.zero[outputs]
    else:
        return _unknown(channels, step, given)
    for value, places in ((lhs, numbers.lhs_spec[2:]), (rhs, numbers.rhs_spec[2:])):
        for i in places:
            channels.fix(value.ids[i], "a place in space")
    out = _opaque(channels, _shape(step), "a place in space")
    batch, features = numbers.out_spec[:2]
    ids, zeros = list(out.ids), list(out.zero)
    ids[batch], ids[features] = lhs.ids[numbers.lhs_spec[0]], rhs.ids[outputs]
    zeros[features] = zero
    return [Value(ids, zeros)]


# --- Reductions ---


def _reduce(keeps_zero: bool, sums: bool) -> Any:
    def rule(channels: Channels, step: Step, given: list[Value]) -> list[Value]:
        (value,) = given
        for i in step.eqn.params["axes"]:
            if sums:
                channels.need(value.ids[i], ~value.zero[i], "a sum reads it")
            else:
                channels.fix(value.ids[i], f"{step.eqn.primitive.name} over it")
        left = [i for i in range(len(value.ids)) if i not in step.eqn.params["axes"]]
        zeros = [value.zero[i] & keeps_zero for i in left]
        whole = [np.array([keeps_zero and value.is_zero])]
        return [Value([value.ids[i] for i in left], zeros if left else whole)]

    return rule


def _window(channels: Channels, step: Step, given: list[Value]) -> list[Value]:
    """Pooling: axes that no window spans stay as they are."""
    value, params = given[0], step.eqn.params
    out = _opaque(channels, _shape(step), "a place in space")
    ids, zeros = list(out.ids), list(out.zero)
    numbers = zip(
        params["window_dimensions"],
        params["window_strides"],
        params["padding"],
        params["base_dilation"],
        params["window_dilation"],
        strict=True,
    )
    for i, (size, stride, padding, *dilations) in enumerate(numbers):
        if size == stride == 1 and tuple(padding) == (0, 0) and dilations == [1, 1]:
            ids[i], zeros[i] = value.ids[i], value.zero[i]
        else:
            channels.fix(value.ids[i], "a place in space")
    return [Value(ids, zeros)]


# --- Shapes ---


def _transpose(channels: Channels, step: Step, given: list[Value]) -> list[Value]:
    order, (value,) = step.eqn.params["permutation"], given
    return [Value([value.ids[i] for i in order], [value.zero[i] for i in order])]


def _reverse(channels: Channels, step: Step, given: list[Value]) -> list[Value]:
    turned, (value,) = step.eqn.params["dimensions"], given
    both = zip(value.ids, value.zero, strict=True)
    each = [(a[::-1], z[::-1]) if i in turned else (a, z) for i, (a, z) in enumerate(both)]
    return [Value([a for a, _ in each], [z for _, z in each])]


def _squeeze(channels: Channels, step: Step, given: list[Value]) -> list[Value]:
    (value,) = given
    left = [i for i in range(len(value.ids)) if i not in step.eqn.params["dimensions"]]
    zeros = [value.zero[i] for i in left] if left else [np.array([value.is_zero])]
    return [Value([value.ids[i] for i in left], zeros)]


def _broadcast(channels: Channels, step: Step, given: list[Value]) -> list[Value]:
    """Where an axis is new or grows from 1, its elements are free to go with what they meet."""
    value, shape = given[0], _shape(step)
    ids, zeros = [], []
    from_axis = dict(
        zip(step.eqn.params["broadcast_dimensions"], range(len(value.ids)), strict=True)
    )
    for i, length in enumerate(shape):
        source = from_axis.get(i)
        if source is not None and len(value.ids[source]) == length:
            ids.append(value.ids[source])
            zeros.append(value.zero[source])
        else:
            ids.append(channels.new(length))
            zeros.append(np.full(length, value.is_zero))
    return [Value(ids, zeros)]


def _reshape(channels: Channels, step: Step, given: list[Value]) -> list[Value]:
    """Axes that stay, and axes merged into one of which only one can be cut (``flatten``)."""
    (value,) = given
    if step.eqn.params.get("dimensions") is not None:
        return _unknown(channels, step, given)
    out_shape = _shape(step)
    ids: list[np.ndarray] = []
    zeros: list[np.ndarray] = []
    for before, after in _parts([len(a) for a in value.ids], list(out_shape)):
        long = [i for i in before if len(value.ids[i]) > 1]
        long_after = [i for i in after if out_shape[i] > 1]
        movable = [i for i in long if not channels.is_fixed(value.ids[i])]
        for i in after:
            if i not in long_after:
                ids.append(_fixed_axis(channels, 1, "an axis of length 1"))
                zeros.append(np.array([value.is_zero]))
            elif len(long) == 1 == len(long_after):
                ids.append(value.ids[long[0]])
                zeros.append(value.zero[long[0]])
            elif len(long_after) == 1 and len(movable) <= 1:
                shape = [len(value.ids[i]) for i in long]
                axis = long.index(movable[0]) if movable else 0
                index = np.indices(shape)[axis].ravel()
                ids.append(value.ids[long[axis]][index])
                zeros.append(value.zero[long[axis]][index])
            else:
                for j in long:
                    channels.fix(value.ids[j], "a reshape splits it or merges it with others")
                ids.append(_fixed_axis(channels, out_shape[i], "a reshape makes it"))
                zeros.append(np.full(out_shape[i], value.is_zero))
    return [Value(ids, zeros if ids else [np.array([value.is_zero])])]


def _fixed_axis(channels: Channels, length: int, why: str) -> np.ndarray:
    ids = channels.new(length)
    channels.fix(ids, why)
    return ids


def _parts(before: list[int], after: list[int]) -> list[tuple[list[int], list[int]]]:
    """Splits two shapes of one size into the shortest runs of axes of equal sizes."""
    parts = []
    i = j = 0
    while i < len(before) or j < len(after):
        left, right = [], []
        if i < len(before):
            left, i = [i], i + 1
        if j < len(after):
            right, j = [j], j + 1
        while math.prod(before[k] for k in left) != math.prod(after[k] for k in right):
            if math.prod(before[k] for k in left) < math.prod(after[k] for k in right):
                left, i = [*left, i], i + 1
            else:
                right, j = [*right, j], j + 1
        parts.append((left, right))
    return parts


def _concatenate(channels: Channels, step: Step, given: list[Value]) -> list[Value]:
    axis = step.eqn.params["dimension"]
    ids, zeros = [], []
    for i in range(len(given[0].ids)):
        if i == axis:
            ids.append(np.concatenate([x.ids[i] for x in given]))
            zeros.append(np.concatenate([x.zero[i] for x in given]))
            continue
        for other in given[1:]:
            channels.join(given[0].ids[i], other.ids[i])
        ids.append(given[0].ids[i])
        zeros.append(_all([x.zero[i] for x in given]))
    return [Value(ids, zeros)]


def _slice(channels: Channels, step: Step, given: list[Value]) -> list[Value]:
    (value,), params = given, step.eqn.params
    ids, zeros = [], []
    strides = params["strides"] or (1,) * len(value.ids)
    bounds = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    for i, (start, limit, stride) in enumerate(bounds):
        if stride != 1:
            channels.fix(value.ids[i], "a slice with strides")
        ids.append(value.ids[i][start:limit:stride])
        zeros.append(value.zero[i][start:limit:stride])
    return [Value(ids, zeros)]


def _split(channels: Channels, step: Step, given: list[Value]) -> list[Value]:
    (value,), axis = given, step.eqn.params["axis"]
    ends = np.cumsum(step.eqn.params["sizes"])[:-1]
    pairs = zip(np.split(value.ids[axis], ends), np.split(value.zero[axis], ends), strict=True)
    return [
        Value(
            [*value.ids[:axis], ids, *value.ids[axis + 1 :]],
            [*value.zero[:axis], zero, *value.zero[axis + 1 :]],
        )
        for ids, zero in pairs
    ]


def _pad(channels: Channels, step: Step, given: list[Value]) -> list[Value]:
    value, filling = given
    ids, zeros = [], []
    for i, edges in enumerate(step.eqn.params["padding_config"]):
        if tuple(edges) == (0, 0, 0):
            ids.append(value.ids[i])
            zeros.append(value.zero[i] & filling.is_zero)
        else:
            channels.fix(value.ids[i], "a padded axis")
            length = _shape(step)[i]
            ids.append(_fixed_axis(channels, length, "a padded axis"))
            zeros.append(np.full(length, value.is_zero and filling.is_zero))
    return [Value(ids, zeros)]


_RULES: dict[str, Any] = {
    **dict.fromkeys(
        (
            *("neg", "abs", "sign", "sqrt", "cbrt", "square", "tanh", "sin", "tan", "asin", "atan"),
            *("sinh", "asinh", "atanh", "erf", "expm1", "log1p", "floor", "ceil", "round", "real"),
            *("imag", "convert_element_type", "reduce_precision", "copy", "copy_p", "div"),
            *("optimization_barrier", "device_put", "sharding_constraint"),
        ),
        _elementwise(_first),
    ),
    **dict.fromkeys(
        (
            *("exp", "exp2", "log", "logistic", "rsqrt", "cos", "cosh", "acos", "acosh", "erf_inv"),
            *("erfc", "eq", "ne", "lt", "le", "gt", "ge", "not", "is_finite", "pow", "rem"),
            *("nextafter", "lgamma", "digamma"),
        ),
        _elementwise(_never),
    ),
    **dict.fromkeys(("add", "add_any", "sub", "or", "xor", "atan2"), _elementwise(_all)),
    **dict.fromkeys(("mul", "and"), _elementwise(_any)),
    "select_n": _elementwise(_all_but_first),
    "max": _bound(1),
    "min": _bound(-1),
    "integer_pow": _integer_pow,
    "clamp": _clamp,
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    "reduce_sum": _reduce(keeps_zero=True, sums=True),
    **dict.fromkeys(("reduce_max", "reduce_min"), _reduce(keeps_zero=True, sums=False)),
    **dict.fromkeys(
        ("reduce_prod", "reduce_and", "reduce_or", "argmax", "argmin"),
        _reduce(keeps_zero=False, sums=False),
    ),
    **dict.fromkeys(("reduce_window_sum", "reduce_window_max", "reduce_window_min"), _window),
    "transpose": _transpose,
    "rev": _reverse,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "concatenate": _concatenate,
    "slice": _slice,
    "split": _split,
    "pad": _pad,
}
