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
from granet_jax.export.graph import Known, Program, Step, check_inputs, flatten, kinds
from granet_jax.export.products import Product
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
    ways: Sequence[str] = ("native", "convolve", "bcsr", "bcsr2", "bcsr4", "gather"),
) -> SparseApply:
    """Compiles a model for inference, each product in the way that is fastest on this machine.

    Weights that are computed from parameters alone (casts, transpositions, scaled kernels) are
    computed once. Products in loops, of two inputs, or batched over weights stay dense.

    Args:
      apply_fn: ``(params, *inputs) -> outputs``, deterministic.
      params: the trained parameters, and anything else in ``apply_fn``'s first argument.
      masks: bool tree, matched with the params by path. None = zeros count as pruned.
      *example: inputs of the shapes and dtypes to compile for; their values do not matter.
      ways: the ways to try besides the dense product: "native" and, for convolutions, "convolve",
        if the kernels are built; "bcsr"; "bcsr2" and "bcsr4", the same in two and four tiles if
        there are many inputs; "gather".

    Returns:
      A function of the inputs. Its outputs are those of ``apply_fn``, except that sums are added up
      in another order. Its field ``choices`` holds the timings; see :func:`choices_table`. If the
      whole is not faster than the dense model, it is the dense model.

    Raises:
      ValueError: an unknown way, or a mask without a parameter of its shape; when called, other
        shapes or dtypes.

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
        product = Product.of(step)
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

    wanted = kinds(example)

    @jax.jit
    def run(weights: list[Any], *inputs: Any) -> Any:
        check_inputs(inputs, wanted, "compiled")
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


# --- Ways ---


class _Ready(NamedTuple):
    """A product done in one way."""

    arrays: Any
    run: Callable[[Any, jax.Array], list[jax.Array]]  # (arrays, x) -> [output]


def _native(product: Product) -> _Ready | None:
    """The kernel for live weights."""
    num_inputs, num_outputs = product.weights.shape
    made = _slots(product, (num_inputs,))
    if made is None:
        return None

    def run(parts: Any, x: jax.Array) -> list[jax.Array]:
        rows = product.to_rows(x).astype(jnp.float32)
        return [product.from_rows(native.multiply(parts[0], num_outputs, rows, parts[1]))]

    return _Ready(made, run)


def _convolve(product: Product) -> _Ready | None:
    """The kernel for convolutions with live weights."""
    images = product.images
    if images is None:
        return None
    made = _slots(product, (*images.window.sizes, images.window.inputs))
    if made is None:
        return None

    def run(parts: Any, x: jax.Array) -> list[jax.Array]:
        x = images.to_images(x).astype(jnp.float32)
        y = native.convolve(parts[0], images.window, False, x, parts[1])
        return [images.from_images(y)]

    return _Ready(made, run)


def _slots(product: Product, inputs: tuple[int, ...]) -> tuple[layouts.Lists, jax.Array] | None:
    """The lists and live weights that kernels take; None where these do not run."""
    if not native.available() or product.weights.dtype != np.float32:
        return None
    index = np.flatnonzero(product.weights)
    values = product.weights.reshape(-1)[index]
    if not index.size:  # XLA knows what to do with nothing
        return None
    sizes = layouts.written((), inputs, product.weights.shape[1:])
    layout = native.lists(layouts.Layout(jnp.asarray(index, jnp.int32), None, None, sizes))
    assert layout.by_output is not None
    return layout.by_output, jnp.asarray(values)


def _bcsr(product: Product, num_tiles: int = 1) -> _Ready | None:
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


def _gather(product: Product) -> _Ready | None:
    """Each output gathers its inputs, as many for all as the fullest one has."""
    fan_in = max(int(np.count_nonzero(product.weights, axis=0).max()), 1)
    num_rows = _num_rows(product)
    if num_rows * fan_in * product.weights.shape[1] > _LARGEST_GATHER:
        return None
    order = np.argsort(product.weights == 0, axis=0, kind="stable")[:fan_in]
    values = np.take_along_axis(product.weights, order, axis=0)
    narrow = jnp.uint16 if len(product.weights) < 2**16 else jnp.int32  # less to read
    parts = jnp.asarray(order.T.copy(), narrow), jnp.asarray(values.T.copy())
    dtype = product.dtype  # of terms and sums; short floats would be rounded, and overflow
    if jnp.issubdtype(dtype, jnp.inexact):
        dtype = jnp.promote_types(dtype, jnp.float32)

    def run(parts: Any, x: jax.Array) -> list[jax.Array]:
        index, values = parts
        rows = product.to_rows(x)
        gathered = rows.at[:, index.astype(jnp.int32)].get(mode="promise_in_bounds")
        each = gathered.astype(dtype) * values[None].astype(dtype)
        # A product with ones adds up faster than a sum on CPU.
        return [product.from_rows(each @ jnp.ones(values.shape[1], dtype))]

    return _Ready(parts, run)


_SMALLEST_TILE = 2**16  # entries, 256 KiB: fits in any core's second cache
_LARGEST_GATHER = 2**26  # entries; more of them are never fast
_WAYS: dict[str, Callable[[Product], _Ready | None]] = {
    "native": _native,
    "convolve": _convolve,
    "bcsr": _bcsr,
    "bcsr2": functools.partial(_bcsr, num_tiles=2),
    "bcsr4": functools.partial(_bcsr, num_tiles=4),
    "gather": _gather,
}


def _fastest(product: Product, step: Step, ways: Sequence[str]) -> tuple[_Ready, Choice]:
    """Tries all ways on random inputs, in turns."""

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


def _num_rows(product: Product) -> int:
    return int(jax.eval_shape(product.to_rows, _shape_of(product)).shape[0])


def _shape_of(product: Product) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(product.shape, product.weights.dtype)


def _custom_calls() -> list[Any]:
    """Calls of our kernel and of XLA's own sparse ones, whose names are not promised to stay."""
    check = jax.export.DisabledSafetyCheck.custom_call
    of_xla, ours = ("cpu_csr_sparse_dense_ffi", "cusparse_csr_matmat_ffi"), ("multiply", "convolve")
    return [check(name) for name in (*of_xla, *map(native.target, ours))]
