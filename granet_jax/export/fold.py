"""Folding channels that are constant for all inputs into the bias after a product."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from granet_jax.export.graph import Program, Step
from granet_jax.export.ids import Value


class Fold(NamedTuple):
    """A product of data with weights, followed by a bias."""

    operand: int  # the operand of the product that holds the data: 0 or 1
    axis: int  # the contracted axis of the data
    weights_axis: int  # the contracted axis of the weights
    slots: tuple[int, int]  # of the data and the weights
    features: int  # the axis of the weights that becomes the outputs
    bias: int  # index of the bias among the parameters

    def without_numbers(self, value: Value) -> Value:
        """The data, with constants along the contracted axis replaced by 0."""
        const = list(value.const)
        const[self.axis] = np.where(np.isnan(const[self.axis]), math.nan, 0.0)
        return value._replace(const=const)

    def into_bias(self, data: Value, is_gone: np.ndarray, weights: Any) -> np.ndarray:
        """What the channels that are cut add to each output, float64 ``(outputs,)``."""
        numbers = np.where(is_gone & ~np.isnan(data.const[self.axis]), data.const[self.axis], 0.0)
        weights = np.moveaxis(
            np.asarray(weights, np.float64), (self.weights_axis, self.features), (0, -1)
        )
        return numbers @ weights.sum(tuple(range(1, weights.ndim - 1)))


def find(program: Program, shapes: Sequence[tuple[int, ...]]) -> dict[int, Fold]:
    """The products that can take constants into their bias, by the slot of their output.

    Such a product contracts one axis of the data with an axis of weights that do not depend on the
    inputs. A convolution has no padding. Only the addition of a bias reads the output. The bias is
    a parameter (``shapes`` are those of the parameters): a vector with one element for each output,
    at least as precise as the product, that nothing else reads.
    """
    uses = Counter(slot for step in program.steps for slot in step.slots())
    uses.update(x for x in program.outputs if isinstance(x, int))
    maker = {slot: step for step in program.steps for slot in step.outputs}
    reader = {slot: step for step in program.steps for slot in step.slots()}
    data = set(range(len(shapes), program.num_inputs))
    folds = {}
    for step in program.steps:
        if not data.intersection(step.slots()):
            continue
        data.update(step.outputs)
        product = _product_of(step, data)
        if product is None or sum(uses[slot] for slot in step.outputs) != 1:
            continue
        (out,) = step.outputs
        addition = reader.get(out)
        if addition is None or addition.eqn.primitive.name != "add":
            continue
        fold, out_axis = product
        other = 1 if addition.inputs[0] == out else 0
        sums, added = step.eqn.outvars[0].aval, addition.eqn.invars[other].aval
        if added.ndim != sums.ndim or not _is_as_precise(added.dtype, sums.dtype):
            continue
        bias = _source_along(out_axis, addition.inputs[other], maker, uses, sums.dtype)
        if bias is None or bias >= len(shapes):
            continue
        if shapes[bias] == (added.shape[out_axis],) == (sums.shape[out_axis],):
            folds[out] = fold._replace(bias=bias)
    return folds


def _product_of(step: Step, data: set[int]) -> tuple[Fold, int] | None:
    """The product, without its bias yet, and the axis of its outputs."""
    name, params = step.eqn.primitive.name, step.eqn.params
    if name not in ("dot_general", "conv_general_dilated") or len(step.slots()) < 2:
        return None
    first, second = step.slots()
    if (first in data) == (second in data):
        return None
    operand = 0 if first in data else 1
    slots = (first, second) if operand == 0 else (second, first)
    if name == "dot_general":
        contracted, batch = params["dimension_numbers"]
        weights_shape = step.eqn.invars[1 - operand].aval.shape
        if batch[0] or len(contracted[0]) != 1 or len(weights_shape) != 2:
            return None
        (axis,), (weights_axis,) = contracted[operand], contracted[1 - operand]
        out_axis = len(step.eqn.outvars[0].aval.shape) - 1 if operand == 0 else 0
        return Fold(operand, axis, weights_axis, slots, 1 - weights_axis, -1), out_axis
    numbers = params["dimension_numbers"]
    has_edges = any(tuple(edges) != (0, 0) for edges in params["padding"])
    has_edges |= math.prod(params["lhs_dilation"]) > 1
    if operand == 1 or has_edges or params["feature_group_count"] * params["batch_group_count"] > 1:
        return None
    outputs, inputs = numbers.rhs_spec[:2]
    return Fold(0, numbers.lhs_spec[1], inputs, slots, outputs, -1), numbers.out_spec[1]


def _is_as_precise(dtype: Any, as_dtype: Any) -> bool:
    if not jnp.issubdtype(dtype, jnp.floating) or not jnp.issubdtype(as_dtype, jnp.floating):
        return False
    return bool(dtype == as_dtype or jnp.finfo(dtype).bits > jnp.finfo(as_dtype).bits)


def _source_along(
    out_axis: int, slot: Any, maker: dict[int, Step], uses: Counter[int], dtype: Any
) -> int | None:
    """The slot of a vector that ``slot`` is, broadcast along an axis; None = it is something else.

    On the way it may be cast, but not to a lower precision than ``dtype``.
    """
    axis = out_axis
    while isinstance(slot, int) and uses[slot] == 1:
        step = maker.get(slot)
        if step is None:
            return slot
        (before,) = (var.aval.shape for var in step.eqn.invars[:1])
        after = step.eqn.outvars[0].aval.shape
        name = step.eqn.primitive.name
        if name == "broadcast_in_dim":
            dims = step.eqn.params["broadcast_dimensions"]
            if axis not in dims or before[dims.index(axis)] != after[axis]:
                return None
            axis = dims.index(axis)
        elif name == "reshape" and math.prod(after) == after[axis] > 1:
            axis = before.index(after[axis]) if after[axis] in before else -1
        elif name != "convert_element_type":
            return None
        if not _is_as_precise(step.eqn.invars[0].aval.dtype, dtype):
            return None
        slot = step.inputs[0]
    return None


def evaluator(program: Program, params: Sequence[Any]) -> Callable[[int], Any]:
    """A function from slots that do not depend on the inputs to their arrays."""
    known: dict[int, Any] = dict(enumerate(params)) | program.consts
    maker = {slot: step for step in program.steps for slot in step.outputs}

    def value(slot: int) -> Any:
        if slot not in known:
            step = maker[slot]
            inputs = (value(x) if isinstance(x, int) else x.value for x in step.inputs)
            known.update(zip(step.outputs, step.function(*inputs), strict=True))
        return known[slot]

    return value
