"""Which channels of a traced model belong together, and which of them are dead.

Each element of each axis of each array gets an id. Operations join ids: an addition joins those of
its operands, a product those of the axes that it contracts. In the end all elements that have to be
cut together have one id. An id is *fixed* if cutting it would change what an operation means
(inputs, outputs, axes that are sorted, normalised by softmax, or reshaped together with others). It
is *needed* if a contraction or a sum reads a value that is neither known to be 0 nor a constant
that goes into a bias (:mod:`granet_jax.export.fold`). All other ids may be cut. Which values are
constant for all inputs follows from the parameters: ``0 * x``, a bias over a filter of zeros, and
functions of constants.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from granet_jax.export import shapes
from granet_jax.export.fold import Fold
from granet_jax.export.graph import Known, Program, Step
from granet_jax.export.ids import Channels, Value
from granet_jax.export.shapes import fix, opaque, shape_of, unknown


def trace(
    channels: Channels, program: Program, given: Sequence[Value], folds: Mapping[int, Fold]
) -> dict[int, Value]:
    """Walks through a program and collects what is known about the array in each slot.

    Outputs are fixed. Products in ``folds`` do not need inputs that are constants.
    """
    values = dict(enumerate(given))
    for slot, const in program.consts.items():
        values[slot] = of_array(channels, const)

    def look_up(x: int | Known) -> Value:
        return values[x] if isinstance(x, int) else _of_known(channels, x.value)

    for step in program.steps:
        rule = _RULES.get(step.eqn.primitive.name, unknown)
        ins = [look_up(x) for x in step.inputs]
        if step.outputs and (fold := folds.get(step.outputs[0])):
            ins[fold.operand] = fold.without_numbers(ins[fold.operand])
        outs = rule(channels, step, ins)
        values |= dict(zip(step.outputs, (outs[i] for i in step.read), strict=True))
    for x in program.outputs:
        fix(channels, look_up(x), "an output of the model")
    return values


def of_array(channels: Channels, x: Any) -> Value:
    """The value of a parameter: new ids, and its constants."""
    if jnp.issubdtype(jnp.result_type(x), jax.dtypes.extended):
        return opaque(channels, jnp.shape(x), "random keys")
    x = _numbers(np.asarray(x))
    if not x.size:
        return Value([channels.new(n) for n in x.shape], [np.full(n, math.nan) for n in x.shape])
    const = []
    for i in range(x.ndim):
        rows = np.moveaxis(x, i, 0).reshape(x.shape[i], -1)
        const.append(np.where((rows == rows[:, :1]).all(1), rows[:, 0], math.nan))
    return Value([channels.new(n) for n in x.shape], const or [np.asarray([x], np.float64)])


def _numbers(x: np.ndarray) -> np.ndarray:
    """An array as float64; of complex numbers only zeros are known."""
    return np.where(x == 0, 0.0, math.nan) if np.iscomplexobj(x) else x.astype(np.float64)


def of_input(channels: Channels, shape: tuple[int, ...]) -> Value:
    """The value of an input: none of it can be cut."""
    return opaque(channels, shape, "an input of the model")


def _of_known(channels: Channels, x: Any) -> Value:
    value = of_array(channels, x)
    fix(channels, value, "a constant in the model")
    return value


# --- Entry by entry ---


def _elementwise(is_zero: Callable[[list[np.ndarray]], np.ndarray] | None = None) -> Any:
    """A rule for arrays of one rank, and numbers.

    If all operands are constant, the result is computed. ``is_zero`` says for which zeros among the
    operands the result is 0 even so.
    """

    def rule(channels: Channels, step: Step, given: list[Value]) -> list[Value]:
        arrays = [x for x in given if x.ids]
        ids, consts = [], []
        for axis, length in enumerate(shape_of(step)):  # an axis of length 1 is broadcast
            long = [x.ids[axis] for x in arrays if len(x.ids[axis]) == length]
            for other in long[1:]:
                channels.join(long[0], other)
            ids.append(long[0])
            each = [x.const[axis if x.ids else 0] for x in given]
            consts.append(result(step, [np.broadcast_to(c, length) for c in each]))
        return [Value(ids, consts or [result(step, [x.const[0] for x in given])])]

    def result(step: Step, consts: list[np.ndarray]) -> np.ndarray:
        known = ~np.isnan(consts).any(0)
        out = np.full(known.shape, math.nan)
        if is_zero is not None:
            out[is_zero([c == 0 for c in consts])] = 0
        if known.any():  # compute all: a new number of elements would be compiled again
            dtypes = [var.aval.dtype for var in step.eqn.invars]
            full = [np.where(np.isnan(c), 1, c) for c in consts]
            (computed,) = step.function(*map(jnp.asarray, full, dtypes))
            out[known] = _numbers(np.asarray(computed))[known]
        return out

    return rule


def _first(zeros: list[np.ndarray]) -> np.ndarray:
    return zeros[0]


def _any(zeros: list[np.ndarray]) -> np.ndarray:
    return np.any(zeros, axis=0)


def _all_but_first(zeros: list[np.ndarray]) -> np.ndarray:
    return np.all(zeros[1:], axis=0)


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
        return unknown(channels, step, given)
    for value, places in ((lhs, numbers.lhs_spec[2:]), (rhs, numbers.rhs_spec[2:])):
        for i in places:
            channels.fix(value.ids[i], "a place in space")
    out = opaque(channels, shape_of(step), "a place in space")
    batch, features = numbers.out_spec[:2]
    ids, consts = list(out.ids), list(out.const)
    ids[batch], ids[features] = lhs.ids[numbers.lhs_spec[0]], rhs.ids[outputs]
    consts[features] = np.where(zero, 0.0, math.nan)
    return [Value(ids, consts)]


# --- Reductions ---


def _reduce(over: Callable[[np.ndarray], np.ndarray], sums: bool) -> Any:
    """A rule for reductions; ``over`` gives the result for a constant that is repeated."""

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
    """Pooling: axes along which windows have length 1 stay as they are."""
    value, params = given[0], step.eqn.params
    edges = zip(params["padding"], params["window_dimensions"], strict=True)
    of_windows = _same
    if step.eqn.primitive.name == "reduce_window_sum":
        of_windows = _zero_or_unknown  # at the edges there are fewer terms
    elif any(max(padding) >= size for padding, size in edges) or any(
        n > 1 for n in (*params["base_dilation"], *params["window_dilation"])
    ):
        of_windows = _unknown_result  # a window of padding or holes alone is -inf
    out = opaque(channels, shape_of(step), "a place in space")
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
            consts[i] = of_windows(value.const[i])
        else:
            channels.fix(value.ids[i], "a place in space")
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
            *("atan", "sinh", "cosh", "asinh", "acosh", "atanh", "erf", "erfc", "erf_inv"),
            *("lgamma", "digamma", "floor", "ceil", "round", "real", "imag", "is_finite", "not"),
            *("eq", "ne", "lt", "le", "gt", "ge", "add", "add_any", "sub", "max", "min", "clamp"),
            *("pow", "rem", "atan2", "or", "xor", "nextafter", "convert_element_type"),
            "reduce_precision",
        ),
        _elementwise(),
    ),
    **dict.fromkeys(
        (
            *("copy", "copy_p", "optimization_barrier", "device_put", "sharding_constraint"),
            "stop_gradient",
        ),
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
    **shapes.RULES,
}
