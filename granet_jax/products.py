"""What a traced function does with its parameters: which of them its products contract.

:func:`uses` walks the jaxpr of any apply function and follows each leaf of ``params`` to the matrix
products and convolutions that read it. Nothing is computed. :mod:`granet_jax.flops` adds up the
cost of these products, and :func:`prunable_from` makes path rules of them.
"""

import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from granet_jax import jaxprs, trees
from granet_jax.types import PyTree

_Axes: TypeAlias = frozenset[tuple[int, int]]  # axes of leaves, as (leaf, axis)


class Origin(NamedTuple):
    """The leaves of params from which a value is made; a constant or a mask has none."""

    entries: dict[int, int]  # how many came from each leaf; their ratio matters
    axes: tuple[_Axes, ...]  # what each axis of the value runs along


_Origin: TypeAlias = Origin | None  # None = data: any value that depends on a batch
_CONSTANT = Origin({}, ())


class Use(NamedTuple):
    """A product, or another use of leaves of params."""

    how: str  # "contracted" with data; "multiplied" otherwise; "looked up"; "lost"
    entries: dict[int, int]  # by leaf, as in :class:`Origin`
    macs: float  # multiply-adds, 0 for other uses; inf in a while_loop
    outputs: float  # entries of the product's result
    within: _Axes  # axes of leaves that are contracted or are outputs; the others stack layers

    def times(self, n: float) -> "Use":
        """In a loop of ``n`` trips."""
        macs, outputs = (n * x if x else 0 for x in (self.macs, self.outputs))
        return self._replace(macs=macs, outputs=outputs)


def uses(
    apply_fn: Callable[..., Any], params: PyTree, *args: Any
) -> tuple[dict[str, tuple[int, ...]], list[Use]]:
    """The shapes of the leaves of params by path, in leaf order, and all uses of them.

    Raises:
      ValueError: a product is done inside a primitive that hides its shapes (``shard_map``, Pallas
        kernels).

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"bias": jnp.ones((1, 3)), "kernel": jnp.ones((4, 3))}
      >>> shapes, (use,) = uses(lambda p, x: x @ p["kernel"] + p["bias"], params, jnp.ones((2, 4)))
      >>> list(shapes), use.how, use.entries, use.macs
      (['bias', 'kernel'], 'contracted', {1: 12}, 24)
    """
    paths = list(trees.paths(params))
    jaxpr = jaxprs.opened(jaxprs.trace(apply_fn, params, *args)[0])
    avals: list[Any] = [var.aval for var in jaxpr.invars]
    shapes = [aval.shape for aval in avals[: len(paths)]]
    origins: list[_Origin] = [
        Origin({i: math.prod(shape)}, tuple(frozenset([(i, axis)]) for axis in range(len(shape))))
        for i, shape in enumerate(shapes)
    ]
    _, found = _walk(jaxpr, origins + [_from_outside(aval) for aval in avals[len(paths) :]])
    return dict(zip(paths, shapes, strict=True)), found


def prunable_from(
    apply_fn: Callable[..., Any], params: PyTree, *args: Any
) -> tuple[tuple[str, bool | trees.Stacked], ...]:
    """Path rules from the trace of a model: the leaves that its products contract are prunable.

    A leaf is prunable if a matrix product or a convolution sums over it and data. A leaf stays
    dense if it is added, if it scales (a kernel with one input for each output also does), or if
    nothing reads it. A leaf that is looked up by an index stays dense even if it is multiplied as
    well (tied embeddings). If one parameter scales another, the larger one is the kernel. Leading
    axes that stack kernels for ``lax.scan``, slices or a batched product (layers, experts, members
    of an ensemble) become :class:`granet_jax.trees.Stacked`.

    Args:
      apply_fn: the forward pass, ``(params, *args) -> anything``; it is traced, not run. It has to
        close over arguments that are not arrays.
      params: tree of arrays or ``ShapeDtypeStruct``.
      *args: arrays or ``ShapeDtypeStruct``; a batch of two or more. Masks among them are bool.

    Returns:
      One ``(pattern, decision)`` pair for each leaf, in leaf order, for ``prunable=``. The first
      pattern that matches decides, so put your own rules first: ``[("head", False), *rules]``.

    Warns:
      UserWarning: a leaf of two or more axes is combined with data or another parameter before it
        is multiplied, so the trace does not show whether it is a kernel. It stays dense.

    Raises:
      ValueError: a product is done inside a primitive that hides its shapes (``shard_map``, Pallas
        kernels).

    Example: a model whose names and ranks do not show what is a kernel.
      >>> import jax, jax.numpy as jnp
      >>> params = {"a": jnp.ones((9, 4)), "b": jnp.ones((5, 4, 4)), "c": jnp.ones((1, 4))}
      >>> def apply_fn(params, tokens):
      ...     x = params["a"][tokens] * params["c"]
      ...     return jax.lax.scan(lambda x, kernel: (x @ kernel, None), x, params["b"])[0]
      >>> for pattern, decision in prunable_from(apply_fn, params, jnp.arange(2)):
      ...     print(pattern, decision if isinstance(decision, bool) else decision.axes)
      ^a$ False
      ^b$ 1
      ^c$ False
    """
    shapes, found = uses(apply_fn, params, *args)
    leaves = {how: {i for use in found if use.how == how for i in use.entries} for how in _HOW}
    floats = {
        i
        for i, leaf in enumerate(jax.tree.leaves(params))
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    }
    kernels = (leaves["contracted"] - leaves["looked up"]) & floats
    lost = (leaves["lost"] - leaves["contracted"] - leaves["looked up"]) & floats
    if lost:
        named = ", ".join(f"{path} {shapes[path]}" for i, path in enumerate(shapes) if i in lost)
        warnings.warn(
            f"The trace lost {named}: data or another parameter comes in before a product, so that "
            "it cannot be told whether these are kernels. They stay dense; if they are, put a rule "
            "before those of the trace, e.g. [('name', True), *rules].",
            stacklevel=2,
        )
    within = frozenset[tuple[int, int]]().union(*(u.within for u in found if u.how == "contracted"))
    rules = []
    for i, (path, shape) in enumerate(shapes.items()):
        inside = [axis for axis in range(len(shape)) if (i, axis) in within]
        stacked = min(inside, default=0)
        kernel = trees.Stacked(stacked, prunable=True) if stacked else True
        rules.append((f"^{re.escape(path)}$", kernel if i in kernels else False))
    return tuple(rules)


_HOW = ("contracted", "looked up", "lost")


def _walk(jaxpr: Any, given: Sequence[_Origin]) -> tuple[list[_Origin], list[Use]]:
    """Origins of a jaxpr's outputs, from those of its inputs, and the uses on the way."""
    origins = dict(zip(jaxpr.invars, given, strict=True))
    origins |= {var: _from_outside(var.aval) for var in jaxpr.constvars}

    def origin(atom: Any) -> _Origin:
        if isinstance(atom, jaxprs.Literal):  # a number, or an array that was closed over
            aval: Any = atom.aval
            return _from_outside(aval) if aval.shape else _CONSTANT
        return origins[atom]

    found = []
    for eqn in jaxpr.eqns:
        outs, done = _walk_eqn(eqn, [origin(atom) for atom in eqn.invars])
        # What a single float (the norm of a kernel, a temperature) scales does not become data.
        origins |= {
            var: _CONSTANT if _is_float_scalar(var.aval) else out
            for var, out in zip(eqn.outvars, outs, strict=True)
        }
        found += done
    return [origin(atom) for atom in jaxpr.outvars], found


def _walk_eqn(eqn: Any, given: list[_Origin]) -> tuple[list[_Origin], list[Use]]:
    name, inner, (ins, outs) = eqn.primitive.name, jaxprs.inner(eqn), jaxprs.shapes(eqn)
    if name in ("dot_general", "conv_general_dilated"):
        return [None], _product(eqn, given)
    if name == "scan":
        return _walk_scan(jaxprs.scan(eqn), given)
    if name == "while":
        return _walk_while(jaxprs.while_loop(eqn), given)
    if name == "cond":
        return _walk_cond(inner, given[1:])
    if len(inner) == 1 and jaxprs.shapes(inner[0]) == (ins, outs):  # jit, remat, custom_vjp ...
        return _walk(inner[0], given)
    if any(use.macs for jaxpr in inner for use in _walk(jaxpr, [_CONSTANT] * len(jaxpr.invars))[1]):
        raise ValueError(
            f"Convolutions or matrix products inside {name} cannot be counted. Count a function "
            "that does the same without it (for shard_map: on whole arrays)."
        )
    if ins == outs and name != "transpose":  # also several: optimization_barrier, device_put
        return given, []
    if None in given:
        return [None] * len(outs), _met(name, given, ins, outs[0])
    known = [origin for origin in given if origin is not None]
    entries = _largest(known)
    if name == "concatenate":
        entries = _concatenated([x.entries for x in known], [math.prod(shape) for shape in ins])
    return [
        Origin(entries, _axes(eqn, known, shape)) if entries else _CONSTANT for shape in outs
    ], []


def _walk_scan(parts: jaxprs.Scan, given: list[_Origin]) -> tuple[list[_Origin], list[Use]]:
    kept = parts.num_consts + parts.num_carry
    xs = [x and x._replace(axes=x.axes[1:]) for x in given[kept:]]
    outs, found = _walk_loop(parts.body, [*given[:kept], *xs], parts.num_consts, parts.num_carry)
    ys = [y and y._replace(axes=(frozenset(), *y.axes)) for y in outs[parts.num_carry :]]
    return [*outs[: parts.num_carry], *ys], [use.times(parts.length) for use in found]


def _walk_while(parts: jaxprs.While, given: list[_Origin]) -> tuple[list[_Origin], list[Use]]:
    carry = given[parts.num_test + parts.num_body :]
    outs, found = _walk_loop(parts.body, given[parts.num_test :], parts.num_body, len(carry))
    _, tested = _walk(parts.test, [*given[: parts.num_test], *outs])
    return outs, [use.times(math.inf) for use in [*found, *tested]]


def _walk_cond(branches: list[Any], given: list[_Origin]) -> tuple[list[_Origin], list[Use]]:
    """The costliest branch counts. The other branches only show how parameters are used."""
    walked = [_walk(branch, given) for branch in branches]
    outs = [_combined(origins) for origins in zip(*(outs for outs, _ in walked), strict=True)]
    _, *cheaper = found = sorted((u for _, u in walked), key=lambda u: -sum(x.macs for x in u))
    return outs, [*found[0], *(use.times(0) for each in cheaper for use in each)]


def _walk_loop(
    body: Any, given: list[_Origin], num_consts: int, num_carry: int
) -> tuple[list[_Origin], list[Use]]:
    """Walks the body until the origins of the carry no longer change."""
    consts, xs = given[:num_consts], given[num_consts + num_carry :]
    carry = given[num_consts : num_consts + num_carry]
    while True:
        outs, found = _walk(body, [*consts, *carry, *xs])
        joined = [_combined(pair) for pair in zip(carry, outs[:num_carry], strict=True)]
        if joined == carry:
            return outs, found
        carry = joined


def _product(eqn: Any, given: list[_Origin]) -> list[Use]:
    (lhs, rhs), (out,) = jaxprs.shapes(eqn)
    numbers = eqn.params["dimension_numbers"]
    if eqn.primitive.name == "dot_general":
        contracted, batch = numbers
        num_summed = math.prod(lhs[axis] for axis in contracted[0])
        macs = math.prod(out) * num_summed
    else:  # a position (image, row, column) meets each weight once, in its group of channels
        batch = (), ()
        num_summed = math.prod(rhs) // rhs[numbers.rhs_spec[0]] if math.prod(rhs) else 0
        if math.prod(eqn.params["lhs_dilation"]) > 1:
            size, channels = math.prod(lhs), lhs[numbers.lhs_spec[1]]
            channels *= eqn.params["batch_group_count"]
        else:
            size, channels = math.prod(out), out[numbers.out_spec[1]]
        macs = size * math.prod(rhs) // channels
    read = [(side, x) for side, x in enumerate(given) if x is not None and x.entries]
    if len(read) != 1:
        lost = [Use("lost", x.entries, 0, 0, frozenset()) for _, x in read]
        return [Use("multiplied", {}, macs, math.prod(out), frozenset()), *lost]
    ((side, origin),) = read
    stacked = batch[side] or _leading(eqn, side)
    within = [axes for i, axes in enumerate(origin.axes) if i not in stacked]
    how = "contracted" if given[1 - side] is None and num_summed > 1 else "multiplied"
    return [Use(how, origin.entries, macs, math.prod(out), frozenset().union(*within))]


def _leading(eqn: Any, side: int) -> Sequence[int]:
    """The axes of experts in ``bi,eio->ebo``: those before the inputs, if outputs come after."""
    if eqn.primitive.name != "dot_general":
        return ()
    contracted = eqn.params["dimension_numbers"][0][side]
    first, length = min(contracted, default=0), len(eqn.invars[side].aval.shape)
    return range(first) if length - first > len(contracted) else ()


def _met(name: str, given: list[_Origin], shapes: list[Any], result: Any) -> list[Use]:
    """The uses in an operation that is no product: it looks up parameters, or mixes them."""
    found = []
    for i, (origin, shape) in enumerate(zip(given, shapes, strict=True)):
        if origin is None or not origin.entries:
            continue
        long = result if len(result) == len(shape) else shape  # an axis of 1 meets all of a longer
        own = [
            bool(a) and n == m for a, n, m in zip(origin.axes, shape, long, strict=True) if m > 1
        ]
        if name in ("gather", "dynamic_slice") and i == 0:
            found.append(Use("looked up", origin.entries, 0, 0, frozenset()))
        elif len(own) > 1 and all(own):  # else a bias, a scale: short, or repeated for each example
            found.append(Use("lost", origin.entries, 0, 0, frozenset()))
    return found


def _axes(eqn: Any, given: list[Origin], shape: tuple[int, ...]) -> tuple[_Axes, ...]:
    """The axes of leaves along which the axes of a result run; in doubt, all of its operands'."""
    name, params, axes = eqn.primitive.name, eqn.params, given[0].axes
    everything = frozenset[tuple[int, int]]().union(*(a for x in given for a in x.axes))
    if not axes:
        pass
    elif name == "transpose":
        return tuple(axes[i] for i in params["permutation"])
    elif name == "broadcast_in_dim":
        pairs = zip(params["broadcast_dimensions"], axes, eqn.invars[0].aval.shape, strict=True)
        stay = {i: a for i, a, n in pairs if n == shape[i]}
        return tuple(stay.get(i, frozenset()) for i in range(len(shape)))
    elif name == "reshape":
        merged = [frozenset[tuple[int, int]]()] * len(shape)
        old = eqn.invars[0].aval.shape
        order = params.get("dimensions") or range(len(old))  # Fortran's is the other way round
        for before, after in jaxprs.runs([old[i] for i in order], shape):
            for i in after:
                merged[i] = frozenset().union(*(axes[order[j]] for j in before))
        return tuple(merged)
    elif name == "squeeze" or name.startswith(("reduce_", "arg")):
        gone = params.get("dimensions", params.get("axes", ()))
        left = tuple(a for i, a in enumerate(axes) if i not in gone)
        if len(left) == len(shape):
            return left
    ranks = {len(x.axes) for x in given if x.axes}
    if ranks != {len(shape)}:
        return (everything,) * len(shape)
    return _union([x.axes for x in given if x.axes])


def _union(each: Iterable[tuple[_Axes, ...]]) -> tuple[_Axes, ...]:
    return tuple(frozenset().union(*axes) for axes in zip(*each, strict=True))


def _from_outside(aval: Any) -> _Origin:
    """Data, unless it can only be a mask, a key or a factor."""
    is_key = jnp.issubdtype(aval.dtype, jax.dtypes.prng_key)
    return _CONSTANT if is_key or aval.dtype == bool or _is_float_scalar(aval) else None


def _is_float_scalar(aval: Any) -> bool:
    return getattr(aval, "shape", None) == () and bool(jnp.issubdtype(aval.dtype, jnp.floating))


def _combined(origins: Sequence[_Origin]) -> _Origin:
    """The origin of values of one shape, combined: data if one of them is, else the largest."""
    known = [origin for origin in origins if origin is not None]
    if len(known) < len(origins):
        return None
    entries = _largest(known)
    return Origin(entries, _union(x.axes for x in known if x.axes)) if entries else _CONSTANT


def _largest(origins: Sequence[Origin]) -> dict[int, int]:
    return max((x.entries for x in origins), key=lambda x: sum(x.values()), default={})


def _concatenated(entries: Sequence[dict[int, int]], sizes: Sequence[int]) -> dict[int, int]:
    parts: Counter[int] = Counter()
    for each, size in zip(entries, sizes, strict=True):
        parts.update(shares(size, each))
    return dict(parts)


def shares(total: int, entries: dict[int, int]) -> dict[int, int]:
    """Shares of a total in proportion to the entries from each leaf; they add up exactly."""
    bounds = [0, *accumulate(entries.values())]
    edges = [total * bound // max(bounds[-1], 1) for bound in bounds]
    return {i: end - start for i, (start, end) in zip(entries, pairwise(edges), strict=True)}
