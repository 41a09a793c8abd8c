"""Rules for equations that get views. A rule returns results, or why the views must be unpacked."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from granet_jax import jaxprs, kernels
from granet_jax.compact import convolutions, products, views
from granet_jax.compact.views import View
from granet_jax.compact.walk import Rule, Use, Walk, inside, run

MOST_DENSE = 0.4  # share of a layer's weights that may be live; above it, unpacking is faster
MOST_DENSE_IMAGES = 0.7  # the same of convolutions, which XLA does not do as well as products


def _own_derivative(walk: Walk, eqn: Any, given: list[Any]) -> str:
    return "its own derivative"


def _dot_general(walk: Walk, eqn: Any, given: list[Any]) -> Any:
    if all(isinstance(x, View) for x in given):
        side = max((0, 1), key=lambda i: math.prod(given[i].shape))
        (x,) = walk.dense((id(eqn), 1 - side), "dot_general", [given[1 - side]], "of two leaves")
    else:
        side = 0 if isinstance(given[0], View) else 1
        x = given[1 - side]
    view, (sums, batch), precision = given[side], *map(eqn.params.get, _OF_DOT)
    if side == 0 and isinstance(precision, tuple):
        precision = precision[::-1]
    dtype = eqn.outvars[0].aval.dtype
    way, why = _way(walk, view, x, dtype, precision)
    backend, interpret = _of_blocks(walk) if way == "blocks" else (None, False)
    how = products.How(way == "native", dtype, precision, backend, interpret)
    dot = views.Dot(how, side == 0, sums[side], batch[side], sums[1 - side], batch[1 - side])
    if not all(jnp.issubdtype(array.dtype, jnp.inexact) for array in (view.values, x)):
        return "no floats"
    if eqn.params.get("out_sharding") is not None:
        return "sharded"
    if (cut := views.cut(view, dot)) is not None:
        walk.cuts.setdefault(view.path, cut)
    if obstacle := views.obstacle(view, dot):
        return obstacle
    rows = math.prod(n for j, n in enumerate(x.shape) if j not in (*dot.x_sums, *dot.x_batch))
    num_summed = math.prod(x.shape[j] for j in dot.x_sums)
    product = f"({rows}, {num_summed}) x ({num_summed}, {view.layout.layer_size // num_summed})"
    use = Use(view.path, product, way, why)
    walk.uses[(*walk.within, id(eqn), side)] = use
    return [views.multiplied(view, x, dot)]


_OF_DOT = ("dimension_numbers", "precision")


def _convolution(walk: Walk, eqn: Any, given: list[Any]) -> Any:
    x, view = given
    if isinstance(x, View) or not isinstance(view, View):
        return "of two leaves" if isinstance(view, View) else "no kernel of weights"
    out, numbers = eqn.outvars[0].aval, eqn.params["dimension_numbers"]
    window = convolutions.window_of(eqn.params, x.shape, view.shape, out.shape)
    if isinstance(window, str):
        return window
    order = (*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0])
    if not views.is_kernel(view, order):
        return "other axes"
    if not all(jnp.issubdtype(array.dtype, jnp.inexact) for array in (view.values, x)):
        return "no floats"
    most = MOST_DENSE if convolutions.is_wide(window) else MOST_DENSE_IMAGES
    way, why = _way(walk, view, x, out.dtype, eqn.params["precision"], most)
    kernels = walk.native is not False and view.layout.by_output is not None
    how = products.How(
        way == "native", out.dtype, eqn.params["precision"], window=window, kernels=kernels
    )
    shape = f"{tuple(x.shape)} x {view.shape}"
    walk.uses[(*walk.within, id(eqn), 1)] = Use(view.path, shape, way, why)
    y = views.product(view, convolutions.in_order(x, numbers.lhs_spec), how)
    return [convolutions.out_of_order(y, numbers.out_spec)]


def _way(
    walk: Walk, view: View, x: Any, dtype: Any, precision: Any, most: float = MOST_DENSE
) -> tuple[str, str]:
    """The kernels by which a product is done, or "dense" and the reason."""
    if walk.native is False:
        return "dense", "native=False"
    if not jaxprs.are_known(x.shape):
        return "dense", "sizes that are not known"
    way = "blocks" if view.layout.block else "native"
    if view.layout.block:
        backend, interpret = _of_blocks(walk)
        if backend is None or not backend.takes(view.layout.block, interpret):
            return "dense", "no kernel" if backend is None else f"blocks of {view.layout.block}"
        if {view.values.dtype, x.dtype} != {dtype} or dtype not in backend.dtypes:
            return "dense", f"{view.values.dtype}, {x.dtype} -> {dtype}"
        if dtype == jnp.float32 and precision not in (None, (jax.lax.Precision.DEFAULT,) * 2):
            return "dense", "precision"
    elif view.layout.by_output is None:
        return "dense", "no kernel"
    else:
        for one in (view.values.dtype, x.dtype, dtype):
            if one not in (jnp.float32, jnp.bfloat16, jnp.float16):
                return "dense", str(one)
    if walk.native is None and view.layout.density > most:
        return "dense", "density"
    return way, ""


def _of_blocks(walk: Walk) -> tuple[kernels.Backend | None, bool]:
    """The kernels for blocks, and whether they are interpreted (on CPUs, with native=True)."""
    found = kernels.of_the_device()
    return (kernels.tpu, True) if found is None and walk.native else (found, False)


def _of_slots(walk: Walk, eqn: Any, given: list[Any]) -> Any:
    """Applies an operation to the slots: one that keeps zeros, with at most a number besides."""
    if len(given) == 2 and jaxprs.name(eqn) == "mul" and isinstance(given[1], View):
        given = given[::-1]
    view, *numbers = given
    if not isinstance(view, View) or any(isinstance(x, View) or jnp.shape(x) for x in numbers):
        return "no product"
    return [view.map(lambda x: eqn.primitive.bind(x, *numbers, **eqn.params))]


def _barrier(walk: Walk, eqn: Any, given: list[Any]) -> Any:
    return list(jax.lax.optimization_barrier(tuple(given)))


def _cast(walk: Walk, eqn: Any, given: list[Any]) -> Any:
    return [given[0].map(lambda x: x.astype(eqn.params["new_dtype"]))]


def _transpose(walk: Walk, eqn: Any, given: list[Any]) -> Any:
    return [given[0].with_axes([given[0].axes[i] for i in eqn.params["permutation"]])]


def _reshape(walk: Walk, eqn: Any, given: list[Any]) -> Any:
    view, order = given[0], eqn.params.get("dimensions")
    if order is not None:  # Fortran's
        view = view.with_axes([view.axes[i] for i in order])
    view = view.reshaped(eqn.outvars[0].aval.shape)
    return [view] if view else "other axes"


def _broadcast(walk: Walk, eqn: Any, given: list[Any]) -> Any:
    """Only new axes of size 1 are recorded; any other broadcast unpacks."""
    shape, places = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    if math.prod(shape) != math.prod(given[0].shape):
        return "no product"
    axes = dict(zip(places, given[0].axes, strict=True))
    return [given[0].with_axes([axes.get(i, ()) for i in range(len(shape))])]


def _squeeze(walk: Walk, eqn: Any, given: list[Any]) -> Any:
    gone = eqn.params["dimensions"]
    return [given[0].with_axes([x for i, x in enumerate(given[0].axes) if i not in gone])]


def _slice(walk: Walk, eqn: Any, given: list[Any]) -> Any:
    params = eqn.params
    steps = params["strides"] or (1,) * len(params["start_indices"])
    bounds = zip(params["start_indices"], params["limit_indices"], steps, strict=True)
    each = [functools.partial(_sliced, *bound) for bound in bounds]
    return _cut(given[0], each, eqn.outvars[0].aval.shape)


def _sliced(start: int, stop: int, step: int, array: Any, axis: int) -> Any:
    return jax.lax.slice_in_dim(array, start, stop, step, axis)


def _dynamic_slice(walk: Walk, eqn: Any, given: list[Any]) -> Any:
    view, *starts = given
    sizes = eqn.params["slice_sizes"]
    each = [functools.partial(_sliced_at, *bound) for bound in zip(starts, sizes, strict=True)]
    return _cut(view, each, sizes)


def _sliced_at(start: Any, size: int, array: Any, axis: int) -> Any:
    start = jnp.clip(start, 0, array.shape[axis] - size)  # negative starts are already resolved
    return jax.lax.dynamic_slice_in_dim(array, start, size, axis)


def _cut(view: View, each: Sequence[Callable[..., Any]], shape: Sequence[int]) -> Any:
    for i, (cut, size) in enumerate(zip(each, shape, strict=True)):
        if size != view.shape[i]:
            if not view.stacks(i) or size == 0:
                return "cuts a layer"
            view = view.cut(i, cut, size)
    return [view]


def _unstack(walk: Walk, eqn: Any, given: list[Any]) -> Any:
    view, axis = given[0], eqn.params["axis"]
    if not view.stacks(axis):
        return "cuts a layer"
    layers, every = range(view.shape[axis]), view.moved(axis)
    return [view.without(axis, jax.tree.map(lambda a, i=i: a[i], every)) for i in layers]


def _call(walk: Walk, eqn: Any, given: list[Any]) -> Any:
    return run(walk.inside(eqn), jaxprs.called(eqn), given)


def _checkpoint(walk: Walk, eqn: Any, given: list[Any]) -> Any:
    """Applies ``jax.checkpoint`` again, so that the gradient stores no more than before."""
    prevent_cse = eqn.params["prevent_cse"]
    if eqn.params["differentiated"] and prevent_cse:  # part of a gradient: a second computation
        given = _barrier(walk, eqn, given)

    def function(sums: dict[str, Any], *given: Any) -> Any:
        return inside(walk, eqn, jaxprs.called(eqn), given, sums)

    again = jax.checkpoint(function, prevent_cse=prevent_cse, policy=eqn.params["policy"])
    outs, sums = again(walk.sums, *given)
    walk.sums.update(sums)
    return outs


def _cond(walk: Walk, eqn: Any, given: list[Any]) -> Any:
    branches = [functools.partial(_branch, walk, eqn, x) for x in eqn.params["branches"]]
    outs, sums = jax.lax.switch(given[0], branches, walk.sums, *given[1:])
    walk.sums.update(sums)
    return outs


def _branch(walk: Walk, eqn: Any, jaxpr: Any, sums: dict[str, Any], *given: Any) -> Any:
    return inside(walk, eqn, jaxpr, given, sums)


def _while(walk: Walk, eqn: Any, given: list[Any]) -> Any:
    parts = jaxprs.while_loop(eqn)
    n, m = parts.num_test, parts.num_test + parts.num_body
    carry = walk.dense(id(eqn), "while", given[m:], "carried")

    def test(state: Any) -> Any:
        (is_on,), _ = inside(walk, eqn, parts.test, [*given[:n], *state[0]], state[1])
        return is_on

    def body(state: Any) -> Any:
        return inside(walk, eqn, parts.body, [*given[n:m], *state[0]], state[1])

    outs, sums = jax.lax.while_loop(test, body, (carry, walk.sums))
    walk.sums.update(sums)
    return outs


def _scan(walk: Walk, eqn: Any, given: list[Any]) -> Any:
    parts = jaxprs.scan(eqn)
    n, m = parts.num_consts, parts.num_consts + parts.num_carry
    carry = walk.dense(id(eqn), "scan", given[n:m], "carried")
    scanned = given[m:]
    for i, x in enumerate(scanned):
        if isinstance(x, View) and x.axes[0] and not x.stacks(0):
            (scanned[i],) = walk.dense((id(eqn), i), "scan", [x], "cuts a layer")

    def arrays(x: Any) -> Any:
        if isinstance(x, View):
            return x.moved(0) if x.axes[0] else None
        return x

    def body(state: Any, xs: list[Any]) -> Any:
        carry, sums = state
        pairs = zip(scanned, xs, strict=True)
        inner = [x.without(0, one) if isinstance(x, View) else one for x, one in pairs]
        outs, sums = inside(walk, eqn, parts.body, [*given[:n], *carry, *inner], sums)
        return (outs[: parts.num_carry], sums), outs[parts.num_carry :]

    steps = {"length": parts.length, "reverse": eqn.params["reverse"]}
    xs = [arrays(x) for x in scanned]
    state = carry, walk.sums
    (carry, sums), ys = jax.lax.scan(body, state, xs, **steps, unroll=eqn.params["unroll"])
    walk.sums.update(sums)
    return [*carry, *ys]


RULES: dict[str, Rule] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    "convert_element_type": _cast,
    "optimization_barrier": _barrier,
    "transpose": _transpose,
    "reshape": _reshape,
    "broadcast_in_dim": _broadcast,
    "squeeze": _squeeze,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "unstack": _unstack,
    **dict.fromkeys(("neg", "mul", "div", "copy", "name", "stop_gradient"), _of_slots),
    **dict.fromkeys(("jit", "closed_call", "core_call"), _call),
    **dict.fromkeys(("custom_jvp_call", "custom_vjp_call"), _own_derivative),
    "checkpoint": _checkpoint,
    "cond": _cond,
    "while": _while,
    "scan": _scan,
}
