"""What is inside traces (jaxprs). Only this module knows how versions of JAX differ in it.

JAX 0.12 has one type for jaxprs with and without constants; older versions have two. It also names
the parts of a ``scan`` and some calls differently.
"""

import contextvars
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.extend.core import Literal as Literal

_is_read = contextvars.ContextVar("granet_jax_is_read", default=False)


def _in_metadata(_: bool) -> Any:
    from jax.experimental.xla_metadata import set_xla_metadata

    return set_xla_metadata(granet_jax="read")


# A context that JAX knows: in it nothing comes from its caches of traces made outside.
_anew: Any = jax.make_user_context(False) if hasattr(jax, "make_user_context") else _in_metadata


def trace(function: Callable[..., Any], *args: Any) -> tuple[Any, Any]:
    """The closed jaxpr of a function that is to be read, and the shapes of its results.

    While it is traced :func:`is_read` is true.

    Example:
      >>> closed, shape = trace(lambda x: x * 2, 1.0)
      >>> [name(eqn) for eqn in closed.eqns], shape.shape
      (['mul'], ())
    """
    token = _is_read.set(True)
    try:
        with _anew(True):
            return jax.make_jaxpr(function, return_shape=True)(*args)
    finally:
        _is_read.reset(token)


def is_read() -> bool:
    """Whether :func:`trace` is at work: functions with kernels of ours are then JAX's own."""
    return _is_read.get()


def are_known(shape: Sequence[Any]) -> bool:
    """Whether all sizes are numbers, not the symbols of ``jax.export``."""
    return all(isinstance(n, int) for n in shape)


class Scan(NamedTuple):
    """A ``scan`` equation; its inputs are the constants, the carry, and the scanned arrays."""

    body: Any  # a jaxpr
    num_consts: int
    num_carry: int  # among the inputs; the first outputs are the new carry
    length: int


class While(NamedTuple):
    """A ``while`` equation; its inputs are constants of the test, of the body, and the carry."""

    test: Any  # a jaxpr of its constants and the carry
    body: Any  # the same
    num_test: int  # constants
    num_body: int


def scan(eqn: Any) -> Scan:
    """The parts of a ``scan``. Scanned arrays have one axis more outside than in the body.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> def repeat(c, x, xs):
      ...     return jax.lax.scan(lambda x, y: (x + c * y, None), x, xs)
      >>> closed = jax.make_jaxpr(repeat)(1.0, 2.0, jnp.ones(5))
      >>> parts = scan(closed.eqns[-1])
      >>> parts.num_consts, parts.num_carry, parts.length
      (1, 1, 5)
    """
    body = opened(eqn.params["jaxpr"])
    (ins, outs), (inner_ins, inner_outs) = shapes(eqn), shapes(body)
    num_carry = sum(a == b for a, b in zip(outs, inner_outs, strict=True))
    num_kept = sum(a == b for a, b in zip(ins, inner_ins, strict=True))
    return Scan(body, num_kept - num_carry, num_carry, eqn.params["length"])


def while_loop(eqn: Any) -> While:
    """The parts of a ``while``."""
    params = eqn.params
    test, body = opened(params["cond_jaxpr"]), opened(params["body_jaxpr"])
    return While(test, body, params["cond_nconsts"], params["body_nconsts"])


def inner(eqn: Any) -> list[Any]:
    """All jaxprs in an equation: bodies, branches of a ``cond``, functions that it calls."""
    values = eqn.params.values()
    flat = [x for value in values for x in (value if isinstance(value, tuple) else (value,))]
    return [opened(x) for x in flat if hasattr(x, "eqns")]


_CALLS = {  # all plain calls
    *("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2"),
    *("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"),
}


def called(eqn: Any) -> Any:
    """The closed jaxpr of a call that does nothing else (jit, remat, custom derivatives); or None.

    Example:
      >>> import jax
      >>> [called(eqn) is None for eqn in jax.make_jaxpr(lambda x: jax.jit(abs)(x) + 1)(-2.0).eqns]
      [False, True]
    """
    if eqn.primitive.name not in _CALLS:
        return None
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        jaxpr = eqn.params.get(name)
        if jaxpr is not None and len(opened(jaxpr).invars) == len(eqn.invars):
            return jaxpr if hasattr(jaxpr, "consts") else ClosedJaxpr(jaxpr, ())
    return None


_NAMES = {  # of old versions
    "pjit": "jit",
    "remat": "checkpoint",
    "remat2": "checkpoint",
    "custom_vjp_call_jaxpr": "custom_vjp_call",
}


def name(eqn: Any) -> str:
    """The name of an equation's primitive, the same in all versions of JAX.

    Example:
      >>> import jax
      >>> [name(eqn) for eqn in jax.make_jaxpr(jax.checkpoint(abs))(-2.0).eqns]
      ['checkpoint']
    """
    return _NAMES.get(eqn.primitive.name, eqn.primitive.name)


def opened(jaxpr: Any) -> Any:
    """A jaxpr without its constants, if it has them."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def consts(jaxpr: Any) -> Sequence[Any]:
    """The constants of a jaxpr, if it has them."""
    return getattr(jaxpr, "consts", ())


def as_function(jaxpr: Any) -> Callable[..., list[Any]]:
    """A closed jaxpr as a function of its inputs that returns the list of its outputs."""
    return jaxpr_as_fun(jaxpr)


def reads(jaxpr: Any) -> list[bool]:
    """Which inputs the outputs of a jaxpr depend on; all inputs of a loop count as read.

    Example:
      >>> import jax
      >>> reads(jax.make_jaxpr(lambda x, y: (y * 2, x + 1)[1])(1.0, 2.0))
      [True, False]
    """
    jaxpr = opened(jaxpr)
    needed = set(map(id, jaxpr.outvars))
    for eqn in reversed(jaxpr.eqns):
        if not any(id(x) in needed for x in eqn.outvars):
            continue
        bodies = [reads(x) for x in inner(eqn)]
        read = [True] * len(eqn.invars)
        if name(eqn) == "cond":
            read = [True, *map(any, zip(*bodies, strict=True))]
        elif called(eqn) is not None:
            (read,) = bodies
        needed.update(id(x) for x, is_read in zip(eqn.invars, read, strict=True) if is_read)
    return [id(x) in needed for x in jaxpr.invars]


def function_of(jaxpr: Any, eqn: Any, read: list[int]) -> Callable[..., list[Any]]:
    """One equation of a jaxpr as a function of its inputs that returns the results in ``read``.

    Example:
      >>> import jax
      >>> jaxpr = opened(jax.make_jaxpr(lambda x: (x + 1.0) * x)(2.0))
      >>> [float(y) for y in function_of(jaxpr, jaxpr.eqns[0], [0])(3.0, 1.0)]
      [4.0]
    """
    places = {id(atom): atom for atom in eqn.invars if not isinstance(atom, Literal)}
    alone = jaxpr.replace(
        constvars=[],
        invars=list(places.values()),
        outvars=[eqn.outvars[i] for i in read],
        eqns=[eqn],
        effects=eqn.effects,
    )
    evaluate = as_function(ClosedJaxpr(alone, ()))

    def function(*values: Any) -> list[Any]:
        by_place = {
            id(atom): x
            for atom, x in zip(eqn.invars, values, strict=True)
            if not isinstance(atom, Literal)
        }
        return list(evaluate(*(by_place[place] for place in places)))

    return function


def shapes(x: Any) -> tuple[list[Any], list[Any]]:
    """Shapes of the inputs and outputs of an equation or a jaxpr; None for what has no shape."""
    ins, outs = ([getattr(v.aval, "shape", None) for v in vs] for vs in (x.invars, x.outvars))
    return ins, outs


def runs(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Splits two shapes of one total size into the shortest runs of axes of equal sizes.

    If the size is 0, all axes are one run.

    Example:
      >>> runs((2, 3, 4), (6, 2, 2))
      [([0, 1], [0]), ([2], [1, 2])]
    """
    if 0 in before:
        return [(list(range(len(before))), list(range(len(after))))]
    found = []
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
        found.append((left, right))
    return found
