"""Functions of dense params, done with live weights: traces are walked, and products replaced.

:func:`sparse` traces a function with abstract dense params, then does it with the slots. A product
with a compact leaf becomes one of :mod:`granet_jax.compact.products`; transpositions, reshapes,
casts and slices of stacks are noted down in a :class:`granet_jax.compact.views.View`; anything
else sees the leaf unpacked. :func:`table` tells which.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from granet_jax import jaxprs, report, trees
from granet_jax.compact import products, views
from granet_jax.compact.layouts import Layout, Layouts, written
from granet_jax.compact.views import View
from granet_jax.types import PyTree

MOST_DENSE = 0.4  # of a layer's weights may be live; beyond that it is faster to unpack them


class _Use(NamedTuple):
    """What reads a compact leaf."""

    path: str
    product: str  # its shape, if it is one
    way: str
    why: str


class Walk(NamedTuple):
    """What holds for a whole walk, and where it is."""

    native: bool | None
    uses: dict[tuple[Any, ...], _Use]  # by place in the trace: bodies of loops are walked again
    cuts: dict[str, int]  # by path, how many axes the first product sums over
    zeros: dict[str, Any]  # by path, what stands for dense leaves, see :class:`View`
    within: tuple[int, ...] = ()
    rules: Mapping[str, "_Rule"] = MappingProxyType({})  # that come before those of this module
    sums: dict[str, Any] = {}  # noqa: RUF012  # what rules add to, here and inside loops

    def rule(self, eqn: Any) -> "_Rule":
        """For an equation that is given views."""
        name = jaxprs.name(eqn)
        return self.rules.get(name) or _RULES.get(name, _no_product)

    def inside(self, eqn: Any) -> "Walk":
        return self._replace(within=(*self.within, id(eqn)))

    def dense(self, place: Any, name: str, given: Sequence[Any], why: str) -> list[Any]:
        """Values with the views among them unpacked."""
        for i, x in enumerate(given):
            if isinstance(x, View):
                use = _Use(x.path, "", f"unpacked: {name}", why)
                self.uses[(*self.within, place, i)] = use
        return [x.unpacked() if isinstance(x, View) else x for x in given]


def sparse(fn: Callable[..., Any], *, native: bool | None = None) -> Callable[..., Any]:
    """Makes of ``fn(params, *args)`` a function ``(values, layouts, *args)`` of live weights.

    It can be differentiated by the values (in reverse, any number of times), compiled, batched and
    scanned, as ``fn`` can. Arrays among the arguments are traced; what else there is (numbers,
    flags, functions) ``fn`` gets as it is.

    Args:
      fn: any function of a tree of params. What it reads is an array of the dense shape.
      native: None = products are done by the kernels for live weights where the layout has lists
        for these, and at most 40 % of the weights are live; True = wherever it has lists;
        False = never.

    Example: two weights of six are live, and one slot is dead.
      >>> import jax.numpy as jnp
      >>> from granet_jax.compact.layouts import written
      >>> index = jnp.array([4, 0, 6])  # in 3 inputs times 2 outputs
      >>> layouts = {"w": Layout(index, None, None, written((), (3,), (2,)))}
      >>> values = {"w": jnp.array([5.0, 7.0, 0.0]), "b": jnp.ones((1, 2))}
      >>> apply_fn = sparse(lambda params, x: x @ params["w"] + params["b"])
      >>> apply_fn(values, layouts, jnp.array([[1.0, 2.0, 3.0]])).tolist()
      [[23.0, 1.0]]
    """

    @functools.wraps(fn)
    def of_slots(values: PyTree, layouts: Layouts, *args: Any, **kwargs: Any) -> Any:
        return on_slots(Walk(native, {}, {}, {}), fn, values, layouts, args, kwargs)

    return of_slots


def table(
    fn: Callable[..., Any],
    values: PyTree,
    layouts: Layouts,
    *args: Any,
    native: bool | None = None,
    **kwargs: Any,
) -> str:
    """One line for each use of a compact leaf by ``sparse(fn)``; nothing is computed.

    The columns: path, shape of the product, share of slots among the weights of a layer, the way
    it is done, and why. ``native`` = by the kernels for live weights; ``dense`` = the layer is
    unpacked for this product; ``unpacked`` = for an operation that is no product. What is in a loop
    is told once.

    Example:
      >>> import jax.numpy as jnp
      >>> layouts = {"w": Layout(jnp.arange(2), None, None, {"|3|2": None})}
      >>> def loss(params, x):
      ...     return jnp.sum(x @ params["w"]) + jnp.sum(jnp.abs(params["w"]))
      >>> print(table(loss, {"w": jnp.ones(2)}, layouts, jnp.ones((5, 3))))
      leaf  product          density  way            why
      w     (5, 3) x (3, 2)   0.3333  dense          no kernel
      w                       0.3333  unpacked: abs  no product
    """
    walk = Walk(native, {}, {}, {})
    flat, tree = jax.tree.flatten((values, layouts, args, kwargs))

    def function(arrays: list[Any]) -> Any:
        values, layouts, args, kwargs = jax.tree.unflatten(tree, _merged(flat, arrays))
        return on_slots(walk, fn, values, layouts, args, kwargs)

    jax.eval_shape(function, _arrays(flat))
    rows = [("leaf", "product", "density", "way", "why")]
    for path in trees.paths(values):
        if path in layouts:
            uses = [use for use in walk.uses.values() if use.path == path]
            density = f"{_density(layouts[path]):.4f}"
            uses = uses or [_Use(path, "", "not read", "")]
            rows += [(path, use.product, density, use.way, use.why) for use in uses]
    return report.aligned(rows, left=(0, 1, 3, 4))


def num_inputs(
    fn: Callable[..., Any], params: PyTree, *args: Any, prunable: trees.Rules = (), **kwargs: Any
) -> dict[str, int]:
    """How many leading axes of a layer the products of ``fn`` sum over, by path of the leaf.

    For kernels of more than two axes, such as those of attention, ``(in, heads, dim)``: the lists
    of a layout are made for one way to see a leaf as a matrix. Leaves that no product reads whole
    are left out. Nothing is computed.

    Args:
      fn: ``(params, *args) -> anything``.
      params: dense, arrays or ``ShapeDtypeStruct``s.
      *args: the same.
      prunable: path rules.
      **kwargs: as ``args``.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"query": jnp.ones((8, 2, 4)), "out": jnp.ones((2, 4, 8))}
      >>> def apply_fn(params, x):
      ...     y = jnp.einsum("bi,ihd->bhd", x, params["query"])
      ...     return jnp.einsum("bhd,hdo->bo", y, params["out"])
      >>> num_inputs(apply_fn, params, jnp.ones((3, 8)))
      {'query': 1, 'out': 2}
    """
    walk, layouts, values = Walk(False, {}, {}, {}), {}, []
    for leaf, x in zip(trees.describe(params, prunable), jax.tree.leaves(params), strict=True):
        stack, shape = leaf.shape[: leaf.stack_axes], leaf.layer_shape
        slots: Any = jax.ShapeDtypeStruct((*stack, 1), jnp.int32)
        if leaf.prunable:
            layouts[leaf.path] = Layout(slots, None, None, written(stack, shape[:-1], shape[-1:]))
        shape = slots.shape if leaf.prunable else x.shape
        values.append(jax.ShapeDtypeStruct(shape, x.dtype))
    given = jax.tree.unflatten(jax.tree.structure(params), values), layouts, args, kwargs
    jax.eval_shape(functools.partial(on_slots, walk, fn), *given)
    return walk.cuts


def on_slots(
    walk: Walk,
    fn: Callable[..., Any],
    values: PyTree,
    layouts: Layouts,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """What :func:`sparse` does, as a walk says; ``values`` hold slots where there is a layout."""
    found = trees.paths(values)
    _check(found, layouts)
    flat, tree = jax.tree.flatten((values, args, kwargs))
    given = list(flat)
    for i, (path, leaf) in enumerate(found.items()):
        if path in layouts:
            given[i] = View.of_leaf(path, jnp.asarray(leaf), layouts[path], walk.zeros.get(path))
            flat[i] = jax.ShapeDtypeStruct(layouts[path].shape, leaf.dtype)

    def function(*arrays: Any) -> Any:
        params, args, kwargs = jax.tree.unflatten(tree, _merged(flat, arrays))
        return fn(params, *args, **kwargs)

    jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(*_arrays(flat))
    outs = run(walk, jaxpr, _arrays(given))
    outs = walk.dense("output", "output", outs, "returned")
    outs = [x if isinstance(x, jax.Array) else jnp.asarray(x) for x in outs]  # numbers of a trace
    return jax.tree.unflatten(jax.tree.structure(shapes), outs)


def _check(values: Mapping[str, Any], layouts: Layouts) -> None:
    for path, layout in layouts.items():
        if path not in values:
            raise ValueError(
                f"A layout for {path!r}, which is no leaf of the values; these are: "
                f"{', '.join(values)}. Values and layouts are made together, by pack."
            )
        shape, slots = jnp.shape(values[path]), layout.index.shape
        if shape != slots:
            raise ValueError(
                f"{path} has shape {shape}; expected the slots of its layout, {slots}. Values and "
                "layouts are made together, by pack, which makes slots of dense params."
            )


def _is_array(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype") and not isinstance(x, type)


def _arrays(leaves: Sequence[Any]) -> list[Any]:
    return [x for x in leaves if isinstance(x, View) or _is_array(x)]


def _merged(leaves: Sequence[Any], arrays: Sequence[Any]) -> list[Any]:
    left = iter(arrays)
    return [next(left) if _is_array(x) else x for x in leaves]


def _density(layout: Layout) -> float:
    return layout.capacity / max(layout.layer_size, 1)


def run(walk: Walk, jaxpr: Any, given: Sequence[Any]) -> list[Any]:
    """The outputs of a jaxpr, with or without constants. Views may come in and out."""
    opened = jaxprs.opened(jaxpr)
    env = dict(zip(opened.constvars, jaxprs.consts(jaxpr), strict=True))
    env |= dict(zip(opened.invars, given, strict=True))
    last = {x: len(opened.eqns) for x in opened.outvars if not isinstance(x, jaxprs.Literal)}
    for i, eqn in reversed(list(enumerate(opened.eqns))):  # where each is read for the last time
        if eqn.effects or any(x in last for x in eqn.outvars):
            for x in eqn.invars:
                if not isinstance(x, jaxprs.Literal):
                    last.setdefault(x, i)

    def value(atom: Any) -> Any:
        return atom.val if isinstance(atom, jaxprs.Literal) else env[atom]

    for i, eqn in enumerate(opened.eqns):
        read = [k for k, x in enumerate(eqn.outvars) if x in last]
        if read or eqn.effects:
            outs = _equation(walk, opened, eqn, [value(x) for x in eqn.invars], read)
            env |= {eqn.outvars[k]: out for k, out in zip(read, outs, strict=True)}
            for x in eqn.invars:
                if not isinstance(x, jaxprs.Literal) and last[x] == i:
                    env.pop(x, None)
    return [value(x) for x in opened.outvars]


def _inside(
    walk: Walk, eqn: Any, jaxpr: Any, given: Sequence[Any], sums: dict[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """The outputs of a jaxpr of an equation, all of them dense; and sums with what it adds."""
    walk = walk.inside(eqn)._replace(sums=dict(sums))
    place = id(jaxprs.opened(jaxpr))  # a conditional has several
    outs = walk.dense(place, jaxprs.name(eqn), run(walk, jaxpr, given), "returned")
    return outs, walk.sums


def _equation(walk: Walk, jaxpr: Any, eqn: Any, given: list[Any], read: list[int]) -> list[Any]:
    """The results of an equation that are read."""
    if any(isinstance(x, View) for x in given):
        name = jaxprs.name(eqn)
        outs = walk.rule(eqn)(walk, eqn, given)
        if not isinstance(outs, str):
            return [outs[k] for k in read]
        given = walk.dense(id(eqn), name, given, outs)
    return jaxprs.function_of(jaxpr, eqn, read)(*given)


# Rules for equations that are given views: the results; or why it has to see them unpacked.


def _no_product(walk: Walk, eqn: Any, given: list[Any]) -> str:
    return "no product"


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
    native, why = _is_native(walk, view, x)
    how = products.How(native, eqn.outvars[0].aval.dtype, precision)
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
    use = _Use(view.path, product, "native" if native else "dense", why)
    walk.uses[(*walk.within, id(eqn), side)] = use
    return [views.multiplied(view, x, dot)]


_OF_DOT = ("dimension_numbers", "precision")


def _is_native(walk: Walk, view: View, x: Any) -> tuple[bool, str]:
    """Whether the kernels do a product; why not."""
    if walk.native is False:
        return False, "native=False"
    if view.layout.by_output is None:
        return False, "no kernel"
    for array in (view.values, x):
        if array.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            return False, str(array.dtype)
    if walk.native is None and _density(view.layout) > MOST_DENSE:
        return False, "density"
    return True, ""


def _of_slots(walk: Walk, eqn: Any, given: list[Any]) -> Any:
    """Done to the slots: zeros stay zeros, and a second operand is a single number."""
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
    view = given[0].reshaped(eqn.outvars[0].aval.shape)
    return [view] if view else "other axes"


def _broadcast(walk: Walk, eqn: Any, given: list[Any]) -> Any:
    """Only new axes of size 1 are noted down."""
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
    start = jnp.clip(start, 0, array.shape[axis] - size)  # no start counts from the end any more
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
    """Made anew, so that no more is kept for the gradient than before."""
    prevent_cse = eqn.params["prevent_cse"]
    if eqn.params["differentiated"] and prevent_cse:  # part of a gradient, to be computed again
        given = _barrier(walk, eqn, given)

    def function(sums: dict[str, Any], *given: Any) -> Any:
        return _inside(walk, eqn, jaxprs.called(eqn), given, sums)

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
    return _inside(walk, eqn, jaxpr, given, sums)


def _while(walk: Walk, eqn: Any, given: list[Any]) -> Any:
    parts = jaxprs.while_loop(eqn)
    n, m = parts.num_test, parts.num_test + parts.num_body
    carry = walk.dense(id(eqn), "while", given[m:], "carried")

    def test(state: Any) -> Any:
        (is_on,), _ = _inside(walk, eqn, parts.test, [*given[:n], *state[0]], state[1])
        return is_on

    def body(state: Any) -> Any:
        return _inside(walk, eqn, parts.body, [*given[n:m], *state[0]], state[1])

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
        outs, sums = _inside(walk, eqn, parts.body, [*given[:n], *carry, *inner], sums)
        return (outs[: parts.num_carry], sums), outs[parts.num_carry :]

    steps = {"length": parts.length, "reverse": eqn.params["reverse"]}
    xs = [arrays(x) for x in scanned]
    state = carry, walk.sums
    (carry, sums), ys = jax.lax.scan(body, state, xs, **steps, unroll=eqn.params["unroll"])
    walk.sums.update(sums)
    return [*carry, *ys]


_Rule = Callable[[Walk, Any, list[Any]], Any]
_RULES: dict[str, _Rule] = {
    "dot_general": _dot_general,
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
