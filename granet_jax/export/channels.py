"""Which channels of a traced model belong together, and which of them are dead.

Each element of each axis of each array gets an id. Operations join ids: an addition those of its
operands, a product those of the axes that it contracts, so that in the end all places that would
have to be cut together have one id. An id is *fixed* where cutting would change what an operation
means (inputs, outputs, axes that are sorted, normalised by softmax, reshaped together with others),
and it is *needed* where a contraction or a sum reads something that is not known to be 0. All other
ids may go. What is 0 or another number whatever the inputs follows from the parameters: 0 * x is, a
bias over a filter of zeros, and functions of such numbers.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from granet_jax.export.fold import Fold
from granet_jax.export.graph import Known, Program, Step
from granet_jax.export.ids import Channels, Value


def trace(
    channels: Channels, program: Program, given: Sequence[Value], folds: Mapping[int, Fold]
) -> dict[int, Value]:
    """Walks through a program: what is known of the array in each slot. Outputs are fixed.

    Products in ``folds`` do not need inputs that are numbers.
    """
    values = dict(enumerate(given))
    for slot, const in program.consts.items():
        values[slot] = of_array(channels, np.asarray(const))

    def look_up(x: int | Known) -> Value:
        return values[x] if isinstance(x, int) else _of_known(channels, x.value)

    for step in program.steps:
        rule = _RULES.get(step.eqn.primitive.name, _unknown)
        ins = [look_up(x) for x in step.inputs]
        if step.outputs and (fold := folds.get(step.outputs[0])):
            ins[fold.operand] = fold.without_numbers(ins[fold.operand])
        outs = rule(channels, step, ins)
        values |= dict(zip(step.outputs, (outs[i] for i in step.read), strict=True))
    for x in program.outputs:
        _fix(channels, look_up(x), "an output of the model")
    return values


def of_array(channels: Channels, x: np.ndarray) -> Value:
    """Of a parameter: ids of its own, numbers as they are."""
    if not np.issubdtype(x.dtype, np.number) and x.dtype != bool:  # bfloat16 and its like
        x = x.astype(np.float32)
    if not x.size or np.iscomplexobj(x):
        return Value([channels.new(n) for n in x.shape], [np.full(n, math.nan) for n in x.shape])
    const = []
    for i in range(x.ndim):
        rows = np.moveaxis(x, i, 0).reshape(x.shape[i], -1)
        const.append(np.where((rows == rows[:, :1]).all(1), rows[:, 0], math.nan))
    return Value([channels.new(n) for n in x.shape], const or [np.asarray([x], np.float64)])


def of_input(channels: Channels, shape: tuple[int, ...]) -> Value:
    """Of an input: nothing of it can be cut."""
    return _opaque(channels, shape, "an input of the model")


def _of_known(channels: Channels, x: Any) -> Value:
    value = of_array(channels, np.asarray(x))
    _fix(channels, value, "a constant in the model")
    return value


def _opaque(channels: Channels, shape: Sequence[int], why: str) -> Value:
    value = Value([channels.new(n) for n in shape], [np.full(n, math.nan) for n in shape or (1,)])
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


def _elementwise(is_zero: Callable[[list[np.ndarray]], np.ndarray] | None = None) -> Any:
    """Of arrays of one rank, and numbers.

    Where all operands are known the result is computed; ``is_zero`` tells from which zeros a zero
    comes besides.
    """

    def rule(channels: Channels, step: Step, given: list[Value]) -> list[Value]:
        arrays = [x for x in given if x.ids]
        ids, consts = [], []
        for axis, length in enumerate(_shape(step)):  # an axis of length 1 meets all of a longer
            long = [x.ids[axis] for x in arrays if len(x.ids[axis]) == length]
            for other in long[1:]:
                channels.join(long[0], other)
            ids.append(long[0])
            each = [x.const[axis if x.ids else 0] for x in given]
            consts.append(result(step, [np.broadcast_to(c, length) for c in each]))
        return [Value(ids, consts or [result(step, [x.const[0] for x in given])])]

    def result(step: Step, consts: list[np.ndarray]) -> np.ndarray:
        out = np.full(consts[0].shape, math.nan)
        known = ~np.isnan(consts).any(0)
        if known.any() and not jnp.issubdtype(step.eqn.outvars[0].aval.dtype, jnp.complexfloating):
            dtypes = [var.aval.dtype for var in step.eqn.invars]
            pairs = zip(consts, dtypes, strict=True)
            (computed,) = step.function(*(jnp.asarray(c[known], dtype) for c, dtype in pairs))
            out[known] = np.asarray(computed).astype(np.float64)
        if is_zero is not None:
            out[is_zero([c == 0 for c in consts])] = 0
        return out

    return rule


def _first(zeros: list[np.ndarray]) -> np.ndarray:
    return zeros[0]


def _any(zeros: list[np.ndarray]) -> np.ndarray:
    return np.logical_or.reduce(zeros)


def _all_but_first(zeros: list[np.ndarray]) -> np.ndarray:
    return np.logical_and.reduce(zeros[1:])


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
    zeros = zeros or [np.array([lhs.whole == 0 or rhs.whole == 0])]
    return [Value(ids, [np.where(zero, 0.0, math.nan) for zero in zeros])]


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
    ids, consts = list(out.ids), list(out.const)
    ids[batch], ids[features] = lhs.ids[numbers.lhs_spec[0]], rhs.ids[outputs]
    consts[features] = np.where(zero, 0.0, math.nan)
    return [Value(ids, consts)]


# --- Reductions ---


def _reduce(over: Callable[[np.ndarray], np.ndarray], sums: bool) -> Any:
    """``over`` tells what becomes of a number that is repeated."""

    def rule(channels: Channels, step: Step, given: list[Value]) -> list[Value]:
        (value,), axes = given, step.eqn.params["axes"]
        for i in axes:
            if sums:
                channels.need(value.ids[i], ~value.zero[i], "a sum reads it")
            else:
                channels.fix(value.ids[i], f"{step.eqn.primitive.name} over it")
        left = [i for i in range(len(value.ids)) if i not in axes]
        consts = [over(value.const[i]) for i in left] or [over(np.array([value.whole]))]
        return [Value([value.ids[i] for i in left], consts)]

    return rule


def _same(const: np.ndarray) -> np.ndarray:
    return const


def _zero_or_unknown(const: np.ndarray) -> np.ndarray:
    return np.where(const == 0, 0.0, math.nan)


def _unknown_result(const: np.ndarray) -> np.ndarray:
    return np.full_like(const, math.nan)


def _window(channels: Channels, step: Step, given: list[Value]) -> list[Value]:
    """Pooling: axes that no window spans stay as they are."""
    value, params = given[0], step.eqn.params
    out = _opaque(channels, _shape(step), "a place in space")
    ids, consts = list(out.ids), list(out.const)
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
            ids[i] = value.ids[i]
            consts[i] = _zero_or_unknown(value.const[i])  # sums at the edges have fewer terms
        else:
            channels.fix(value.ids[i], "a place in space")
    return [Value(ids, consts)]


# --- Shapes ---


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
    """Where an axis is new or grows from 1, its elements are free to go with what they meet."""
    value, shape = given[0], _shape(step)
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
    """Axes that stay, and axes merged into one of which only one can be cut (``flatten``)."""
    (value,) = given
    if step.eqn.params.get("dimensions") is not None:
        return _unknown(channels, step, given)
    out_shape = _shape(step)
    ids: list[np.ndarray] = []
    consts: list[np.ndarray] = []
    for before, after in _parts([len(a) for a in value.ids], list(out_shape)):
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
    """The number that all have, or NaN."""
    return np.where(np.all(np.stack(consts) == consts[0], axis=0), consts[0], math.nan)


def _slice(channels: Channels, step: Step, given: list[Value]) -> list[Value]:
    (value,), params = given, step.eqn.params
    ids, consts = [], []
    strides = params["strides"] or (1,) * len(value.ids)
    bounds = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    for i, (start, limit, stride) in enumerate(bounds):
        if stride != 1:
            channels.fix(value.ids[i], "a slice with strides")
        ids.append(value.ids[i][start:limit:stride])
        consts.append(value.const[i][start:limit:stride])
    return [Value(ids, consts)]


def _split(channels: Channels, step: Step, given: list[Value]) -> list[Value]:
    (value,), axis = given, step.eqn.params["axis"]
    ends = np.cumsum(step.eqn.params["sizes"])[:-1]
    pairs = zip(np.split(value.ids[axis], ends), np.split(value.const[axis], ends), strict=True)
    return [
        Value(
            [*value.ids[:axis], ids, *value.ids[axis + 1 :]],
            [*value.const[:axis], const, *value.const[axis + 1 :]],
        )
        for ids, const in pairs
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
            length = _shape(step)[i]
            ids.append(_fixed_axis(channels, length, "a padded axis"))
            consts.append(
                np.full(length, value.whole if value.whole == filling.whole else math.nan)
            )
    return [Value(ids, consts)]


_RULES: dict[str, Any] = {
    **dict.fromkeys(
        (
            *(
                "neg",
                "abs",
                "sign",
                "sqrt",
                "rsqrt",
                "cbrt",
                "square",
                "integer_pow",
                "exp",
                "exp2",
            ),
            *("expm1", "log", "log1p", "logistic", "tanh", "sin", "cos", "tan", "asin", "acos"),
            *("atan", "sinh", "cosh", "asinh", "acosh", "erf", "erfc", "erf_inv", "lgamma"),
            *(
                "digamma",
                "floor",
                "ceil",
                "round",
                "is_finite",
                "not",
                "eq",
                "ne",
                "lt",
                "le",
                "gt",
            ),
            *("ge", "add", "add_any", "sub", "max", "min", "clamp", "pow", "rem", "atan2", "or"),
            *("xor", "nextafter", "convert_element_type", "reduce_precision"),
        ),
        _elementwise(),
    ),
    **dict.fromkeys(
        ("copy", "copy_p", "optimization_barrier", "device_put", "sharding_constraint"),
        lambda channels, step, given: given,
    ),
    **dict.fromkeys(("mul", "and"), _elementwise(_any)),
    "div": _elementwise(_first),
    "select_n": _elementwise(_all_but_first),
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    "reduce_sum": _reduce(_zero_or_unknown, sums=True),
    **dict.fromkeys(
        ("reduce_max", "reduce_min", "reduce_and", "reduce_or"), _reduce(_same, sums=False)
    ),
    **dict.fromkeys(("reduce_prod", "argmax", "argmin"), _reduce(_unknown_result, sums=False)),
    **dict.fromkeys(("reduce_window_sum", "reduce_window_max", "reduce_window_min"), _window),
    "transpose": _transpose,
    "rev": _reverse,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "concatenate": _concatenate,
    "stack": _stack,
    "slice": _slice,
    "split": _split,
    "pad": _pad,
}
