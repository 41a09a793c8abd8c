"""Sparse execution: products with pruned weights, done in the way that is fastest.

:func:`compile` traces a model and finds the products and convolutions with known weights. For each
it takes the fastest of several ways, timed on this machine: dense, the kernel for live weights of
:mod:`granet_jax.compact`, BCSR (XLA:CPU has a kernel for it), or gathering each output's inputs.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from granet_jax import report
from granet_jax.compact import layouts, native
from granet_jax.export.graph import Known, Program, Step, flatten
from granet_jax.masks import apply_masks
from granet_jax.types import PyTree

_ROUNDS = 15  # timings of each candidate; the shortest counts
_CLEARLY = 0.95  # another way than the dense one has to take at most this share of its time


class Choice(NamedTuple):
    """One product, and the way in which it is done."""

    product: str  # e.g. "(64, 2048) x (2048, 2048)"
    density: float  # of its weights
    milliseconds: dict[str, float]  # of each way that was tried, on this machine
    taken: str  # the fastest


@dataclasses.dataclass(frozen=True, eq=False)  # jit needs weak references; tuples have none
class SparseApply:
    """A compiled model: call it with the model's inputs. Made by :func:`compile`.

    Inputs have the shapes and dtypes of the example. It may be called inside ``jit`` and ``vmap``.
    """

    run: Callable[..., Any]  # (weights, *inputs) -> outputs
    weights: list[Any]  # arrays
    choices: tuple[Choice, ...]

    def __call__(self, *inputs: Any) -> Any:
        return self.run(self.weights, *inputs)


def compile(
    apply_fn: Callable[..., Any],
    params: PyTree,
    masks: PyTree | None,
    *example: Any,
    ways: Sequence[str] = ("native", "bcsr", "bcsr2", "bcsr4", "gather"),
) -> SparseApply:
    """Compiles a model for inference, each product in the way that is fastest on this machine.

    Weights that are computed from parameters alone (casts, transpositions, scaled kernels) are
    computed once. Products in loops, of two inputs, or batched over weights stay dense.

    Args:
      apply_fn: ``(params, *inputs) -> outputs``, deterministic.
      params: the trained parameters, and anything else in ``apply_fn``'s first argument.
      masks: bool tree, matched with the params by path. None = zeros count as pruned.
      *example: inputs of the shapes and dtypes to compile for; their values do not matter.
      ways: the ways to try besides the dense product: "native", if the kernels are built; "bcsr";
        "bcsr2" and "bcsr4", the same in two and four tiles if there are many inputs; "gather".

    Returns:
      A function of the inputs. Its outputs are those of ``apply_fn``, except that sums are added up
      in another order. Its field ``choices`` holds the timings; see :func:`choices_table`. If the
      whole is not faster than the dense model, it is the dense model.

    Raises:
      ValueError: an unknown way, or masks of another tree; when called, other shapes or dtypes.

    Example:
      >>> import granet_jax as gj, jax, jax.numpy as jnp
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 32)), "bias": jnp.ones(32)}
      >>> masks = gj.static(sparsity=0.9, key=jax.random.key(1)).init(params).masks
      >>> def apply_fn(params, x):
      ...     return x @ params["kernel"] + params["bias"][None]
      >>> x = jax.random.normal(jax.random.key(2), (4, 64))
      >>> sparse_apply = gj.export.compile(apply_fn, params, masks, x)
      >>> dense = apply_fn(gj.apply_masks(params, masks), x)
      >>> bool(jnp.allclose(sparse_apply(x), dense, rtol=1e-5, atol=1e-5))
      True
    """
    if unknown := set(ways) - set(_WAYS):
        raise ValueError(f"Unknown ways {sorted(unknown)}; expected some of {sorted(_WAYS)}.")
    if masks is not None:
        params = apply_masks(params, masks)
    closed, shapes = jax.make_jaxpr(lambda *inputs: apply_fn(params, *inputs), return_shape=True)(
        *example
    )
    program = _partially_evaluate(flatten(closed))
    out_tree = jax.tree.structure(shapes)
    ready, choices = {}, []
    for i, step in enumerate(program.steps):
        product = _Product.of(step)
        if product is not None:
            way, choice = _fastest(product, step, ways)
            choices.append(choice)
            if choice.taken != "dense":
                ready[i] = way
    chosen = SparseApply(*_assemble(program, ready, example, out_tree), tuple(choices))
    if not ready:
        return chosen
    dense = SparseApply(
        *_assemble(program, {}, example, out_tree),
        tuple(choice._replace(taken="dense") for choice in choices),
    )
    return chosen if _is_faster(chosen, dense, example) else dense


def _assemble(
    program: Program, ready: dict[int, "_Ready"], example: Any, out_tree: Any
) -> tuple[Callable[..., Any], list[Any]]:
    """The program as a function of its weights and inputs; ``ready`` replaces some steps."""
    weights = [
        ready[i].arrays if i in ready else step.known() for i, step in enumerate(program.steps)
    ]

    @jax.jit
    def run(weights: list[Any], *inputs: Any) -> Any:
        _check_inputs(inputs, example)
        slots = dict(enumerate(jax.tree.leaves(inputs)))
        for i, (step, arrays) in enumerate(zip(program.steps, weights, strict=True)):
            if i in ready:
                (slot,) = step.slots()
                outs = ready[i].run(arrays, slots[slot])
            else:
                known = iter(arrays)
                outs = step.function(
                    *(slots[x] if isinstance(x, int) else next(known) for x in step.inputs)
                )
            slots |= dict(zip(step.outputs, outs, strict=True))
        outs = [slots[x] if isinstance(x, int) else x.value for x in program.outputs]
        return jax.tree.unflatten(out_tree, outs)

    return run, weights


def choices_table(choices: Sequence[Choice]) -> str:
    """A table with a line for each product: density, milliseconds of each way, the way taken.

    Args:
      choices: the field of :class:`SparseApply`.

    Returns:
      Lines of text, joined.

    Example:
      >>> choice = Choice("(1, 8) x (8, 4)", 0.25, {"dense": 2.0, "bcsr": 1.0}, "bcsr")
      >>> print(choices_table([choice]))
      product          density  dense (ms)  bcsr (ms)  taken  times faster
      (1, 8) x (8, 4)  0.2500       2.0000     1.0000   bcsr          2.00
    """
    names = [n for n in ("dense", *_WAYS) if any(n in choice.milliseconds for choice in choices)]
    rows = [("product", "density", *(f"{name} (ms)" for name in names), "taken", "times faster")]
    for choice in choices:
        each = [choice.milliseconds.get(name) for name in names]
        gain = choice.milliseconds["dense"] / choice.milliseconds[choice.taken]
        rows.append(
            (
                choice.product,
                f"{choice.density:.4f}",
                *("-" if ms is None else f"{ms:.4f}" for ms in each),
                choice.taken,
                f"{gain:.2f}",
            )
        )
    return report.aligned(rows)


def serialize(sparse_apply: SparseApply, *example: Any) -> bytes:
    """The compiled model with its weights, as bytes. Needs the package flatbuffers.

    Args:
      sparse_apply: from :func:`compile`.
      *example: inputs of the shapes and dtypes that it was compiled for.

    Raises:
      ValueError: other shapes or dtypes.
    """
    exported = jax.export.export(
        jax.jit(lambda *inputs: sparse_apply(*inputs)), disabled_checks=_custom_calls()
    )(*example)
    return bytes(exported.serialize())


def deserialize(data: bytes) -> Callable[..., Any]:
    """The function that :func:`serialize` wrote, for the same inputs and the same platform.

    Args:
      data: the bytes.
    """
    native.available()  # tells XLA of the kernels
    return jax.export.deserialize(bytearray(data)).call


def _partially_evaluate(program: Program) -> Program:
    """Computes all that does not depend on the inputs."""
    known = {slot: Known(x) for slot, x in program.consts.items()}

    def look_up(x: int | Known) -> int | Known:
        return known.get(x, x) if isinstance(x, int) else x

    steps = []
    for step in program.steps:
        step = step._replace(inputs=[look_up(x) for x in step.inputs])
        if step.slots():
            steps.append(step)
        else:
            outs = zip(step.outputs, step.function(*step.known()), strict=True)
            known |= {slot: Known(x) for slot, x in outs}
    outputs = [look_up(x) for x in program.outputs]
    return Program(program.num_inputs, steps, {}, outputs)


def _check_inputs(inputs: Any, example: Any) -> None:
    got, wanted = (
        [(jnp.shape(x), jnp.result_type(x)) for x in jax.tree.leaves(tree)]
        for tree in (inputs, example)
    )
    if got != wanted:
        raise ValueError(
            f"This model was compiled for inputs {wanted}; got {got}. Compile it for those."
        )


# --- Products ---


class _Product(NamedTuple):
    """A product with known weights, as ``x (rows, inputs) @ weights (inputs, outputs)``."""

    weights: np.ndarray
    shape: tuple[int, ...]  # of x
    dtype: Any  # of the sums
    to_rows: Callable[[jax.Array], jax.Array]
    from_rows: Callable[[jax.Array], jax.Array]

    @classmethod
    def of(cls, step: Step) -> "_Product | None":
        """None where the step is no product, or its weights are not known."""
        known = [isinstance(x, Known) for x in step.inputs]
        if step.eqn.primitive.name == "dot_general" and sum(known) == 1:
            return _of_dot(step, known.index(True))
        if step.eqn.primitive.name == "conv_general_dilated" and known == [False, True]:
            return _of_convolution(step)
        return None


def _of_dot(step: Step, side: int) -> _Product | None:
    contracted, batch = step.eqn.params["dimension_numbers"]
    value = np.asarray(step.known()[0])
    is_float = jnp.issubdtype(value.dtype, jnp.floating)
    if batch[0] or not contracted[0] or not is_float or not value.size:
        return None
    axes, x_axes = contracted[side], contracted[1 - side]
    weights = np.moveaxis(value, axes, range(len(axes)))
    inputs, free = weights.shape[: len(axes)], weights.shape[len(axes) :]
    aval = step.eqn.invars[1 - side].aval
    rows = tuple(n for i, n in enumerate(aval.shape) if i not in x_axes)
    dtype = step.eqn.outvars[0].aval.dtype

    def to_rows(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, x_axes, range(-len(x_axes), 0))
        return x.reshape(-1, math.prod(inputs))

    def from_rows(y: jax.Array) -> jax.Array:
        y = y.astype(dtype)
        if side == 1:
            return y.reshape(*rows, *free)
        return y.T.reshape(*free, *rows)

    two_axes = weights.reshape(math.prod(inputs), -1)
    return _Product(two_axes, aval.shape, dtype, to_rows, from_rows)


def _of_convolution(step: Step) -> _Product | None:
    """The inputs of each output position laid out in a row, as ``im2col`` does."""
    params = step.eqn.params
    numbers = params["dimension_numbers"]
    if (
        params["feature_group_count"] * params["batch_group_count"] > 1
        or math.prod(params["lhs_dilation"]) > 1
    ):
        return None
    # The kernel as (*window, in, out), the input as (batch, *space, in).
    kernel = np.transpose(
        np.asarray(step.known()[0]), (*numbers.rhs_spec[2:], *numbers.rhs_spec[1::-1])
    )
    *window, num_in, num_out = kernel.shape
    out = step.eqn.outvars[0].aval
    out_shape = [out.shape[i] for i in (numbers.out_spec[0], *numbers.out_spec[2:])]
    aval = step.eqn.invars[0].aval

    def to_rows(x: jax.Array) -> jax.Array:
        x = jnp.transpose(x, (numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1]))
        edges = [(0, 0, 0), *((low, high, 0) for low, high in params["padding"]), (0, 0, 0)]
        x = jax.lax.pad(x, jnp.zeros([], x.dtype), edges)
        places = []
        for place in np.ndindex(*window):
            start = [i * d for i, d in zip(place, params["rhs_dilation"], strict=True)]
            limit = [
                s + (n - 1) * stride + 1
                for s, n, stride in zip(start, out_shape[1:], params["window_strides"], strict=True)
            ]
            places.append(
                jax.lax.slice(
                    x,
                    (0, *start, 0),
                    (len(x), *limit, num_in),
                    (1, *params["window_strides"], 1),
                )
            )
        return jnp.concatenate(places, axis=-1).reshape(-1, math.prod(window) * num_in)

    def from_rows(y: jax.Array) -> jax.Array:
        y = y.astype(out.dtype).reshape(*out_shape, num_out)
        order = (numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1])
        return jnp.transpose(y, tuple(order.index(i) for i in range(len(order))))

    weights = kernel.reshape(-1, num_out)
    return _Product(weights, aval.shape, out.dtype, to_rows, from_rows)


class _Ready(NamedTuple):
    """A product done in one way."""

    arrays: Any
    run: Callable[[Any, jax.Array], list[jax.Array]]  # (arrays, x) -> [output]


def _native(product: _Product) -> _Ready | None:
    """The kernel for live weights."""
    if not native.available() or product.weights.dtype != np.float32:
        return None
    num_inputs, num_outputs = product.weights.shape
    index = np.flatnonzero(product.weights)
    values = product.weights.reshape(-1)[index]
    if not index.size:  # without live weights, the dense way is free
        return None
    sizes = layouts.written((), (num_inputs,), (num_outputs,))
    layout = native.lists(layouts.Layout(jnp.asarray(index, jnp.int32), None, None, sizes))
    assert layout.by_output is not None

    def run(parts: Any, x: jax.Array) -> list[jax.Array]:
        rows = product.to_rows(x).astype(jnp.float32)
        return [product.from_rows(native.multiply(parts[0], num_outputs, rows, parts[1]))]

    return _Ready((layout.by_output, jnp.asarray(values)), run)


def _bcsr(product: _Product, num_tiles: int = 1) -> _Ready | None:
    """A sparse matrix times a dense one: a kernel of XLA:CPU; on a GPU cuSPARSE.

    For each weight the kernel reads one input of all rows. If the inputs do not fit a core's cache,
    tiles of them are faster, each for all outputs. The sum over tiles is a product with ones: XLA
    would fuse any other sum with the transposition, which is slow.
    """
    num_inputs, num_outputs = product.weights.shape
    small = num_tiles > 1 and _num_rows(product) * num_inputs < num_tiles * _SMALLEST_TILE
    if small or product.weights.dtype != np.float32:
        return None
    outputs, inputs = np.nonzero(product.weights.T)
    tiles = inputs * num_tiles // max(num_inputs, 1)
    order = np.argsort(tiles, kind="stable")
    values = product.weights[inputs, outputs][order]
    rows = (tiles * num_outputs + outputs)[order]
    matrices = [(values, inputs[order], rows, (num_tiles * num_outputs, num_inputs))]
    if num_tiles > 1:
        ones = np.ones(num_tiles * num_outputs, np.float32)
        rows, tiles = np.divmod(np.arange(len(ones)), num_tiles)
        matrices.append((ones, tiles * num_outputs + rows, rows, (num_outputs, len(ones))))
    parts = [
        (jnp.asarray(values), jnp.asarray(columns, jnp.int32), _ends_of_rows(rows, shape))
        for values, columns, rows, shape in matrices
    ]

    def run(parts: Any, x: jax.Array) -> list[jax.Array]:
        y = product.to_rows(x).T
        for part, (*_, shape) in zip(parts, matrices, strict=True):
            y = _sparse_times_dense(part, shape, y)
        return [product.from_rows(y.T)]

    return _Ready(parts, run)


def _ends_of_rows(rows: np.ndarray, shape: tuple[int, int]) -> jax.Array:
    """Where each row's values begin among all values, and where the last row ends."""
    ends = np.cumsum(np.bincount(rows, minlength=shape[0]))
    return jnp.asarray(np.concatenate([[0], ends]), jnp.int32)


def _sparse_times_dense(parts: Any, shape: tuple[int, ...], x: jax.Array) -> jax.Array:
    """The product by JAX's experimental sparse module, which is used only here."""
    from jax.experimental import sparse

    product: jax.Array = sparse.BCSR(parts, shape=shape) @ x
    return product


def _gather(product: _Product) -> _Ready | None:
    """Each output gathers its inputs; all gather as many as the fullest output has."""
    fan_in = max(int(np.count_nonzero(product.weights, axis=0).max()), 1)
    num_rows = _num_rows(product)
    if num_rows * fan_in * product.weights.shape[1] > _LARGEST_GATHER:
        return None
    order = np.argsort(product.weights == 0, axis=0, kind="stable")[:fan_in]
    values = np.take_along_axis(product.weights, order, axis=0)
    narrow = jnp.uint16 if len(product.weights) < 2**16 else jnp.int32  # less to read
    parts = jnp.asarray(order.T.copy(), narrow), jnp.asarray(values.T.copy())

    def run(parts: Any, x: jax.Array) -> list[jax.Array]:
        index, values = parts
        rows = product.to_rows(x)
        gathered = rows.at[:, index.astype(jnp.int32)].get(mode="promise_in_bounds")
        each = gathered.astype(product.dtype) * values[None].astype(product.dtype)
        # A product with ones adds up faster than a sum on CPU.
        return [product.from_rows(each @ jnp.ones(values.shape[1], product.dtype))]

    return _Ready(parts, run)


_SMALLEST_TILE = 2**16  # entries, 256 KiB: fits in any core's second cache
_LARGEST_GATHER = 2**26  # entries; larger ones are never fast
_WAYS: dict[str, Callable[[_Product], _Ready | None]] = {
    "native": _native,
    "bcsr": _bcsr,
    "bcsr2": functools.partial(_bcsr, num_tiles=2),
    "bcsr4": functools.partial(_bcsr, num_tiles=4),
    "gather": _gather,
}


def _fastest(product: _Product, step: Step, ways: Sequence[str]) -> tuple[_Ready, Choice]:
    """The fastest way of a product, timed on random inputs."""

    def dense(known: Any, x: jax.Array) -> list[jax.Array]:
        rest = iter(known)
        return step.function(*(x if isinstance(i, int) else next(rest) for i in step.inputs))

    tried = {"dense": _Ready(step.known(), dense)}
    density = float(np.count_nonzero(product.weights) / max(product.weights.size, 1))
    if density < 1:
        made = {name: _WAYS[name](product) for name in ways}
        tried |= {name: way for name, way in made.items() if way is not None}
    shape = _shape_of(product)
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape.shape), shape.dtype)
    runs = {name: functools.partial(jax.jit(way.run), way.arrays, x) for name, way in tried.items()}
    best = _shortest(runs)
    taken = min(best, key=lambda name: best[name])
    if best[taken] > _CLEARLY * best["dense"]:
        taken = "dense"
    described = f"{product.shape} x {product.weights.shape}"
    milliseconds = {name: 1e3 * seconds for name, seconds in best.items()}
    return tried[taken], Choice(described, density, milliseconds, taken)


def _is_faster(a: SparseApply, b: SparseApply, example: Any) -> bool:
    """Whether one whole model is clearly faster: timings of single products ignore caches."""
    inputs = jax.tree.map(lambda x: jnp.zeros(jnp.shape(x), jnp.result_type(x)), example)
    best = _shortest({"a": lambda: a(*inputs), "b": lambda: b(*inputs)})
    return best["a"] < _CLEARLY * best["b"]


def _shortest(runs: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """The seconds of the fastest of some rounds. Runs take turns, after one run to warm up."""
    for run in runs.values():
        jax.block_until_ready(run())
    best = dict.fromkeys(runs, math.inf)
    for _ in range(_ROUNDS):
        for name, run in runs.items():
            started = time.perf_counter()
            jax.block_until_ready(run())
            best[name] = min(best[name], time.perf_counter() - started)
    return best


def _num_rows(product: _Product) -> int:
    return int(jax.eval_shape(product.to_rows, _shape_of(product)).shape[0])


def _shape_of(product: _Product) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(product.shape, product.weights.dtype)


def _custom_calls() -> list[Any]:
    """Calls of our kernel and of XLA's own sparse ones, whose names are not promised to stay."""
    check = jax.export.DisabledSafetyCheck.custom_call
    names = "cpu_csr_sparse_dense_ffi", "cusparse_csr_matmat_ffi", native.target("multiply")
    return [check(name) for name in names]
