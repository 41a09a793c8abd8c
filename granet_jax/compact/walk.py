"""Walking a trace equation by equation, with views in place of some arrays."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from granet_jax import jaxprs
from granet_jax.compact.views import View


class Use(NamedTuple):
    """One use of a compact leaf, a line of :func:`granet_jax.compact.table`."""

    path: str
    product: str  # its shape, if it is one
    way: str
    why: str


Rule = Callable[["Walk", Any, list[Any]], Any]  # -> list of results, or a str: why there are none


class Walk(NamedTuple):
    """Settings and results of a walk, and its place in the trace."""

    rules: Mapping[str, "Rule"]  # by name of the equation; used if it gets views
    native: bool | None
    zeros: Mapping[str, Any]  # by path, stand-ins for whole dense leaves, see :class:`View`
    sums: dict[str, Any]  # rules add to these, here and inside loops
    uses: dict[tuple[Any, ...], Use]  # by place in the trace, as loop bodies are walked repeatedly
    cuts: dict[str, int]  # by path, how many leading axes the first product sums over
    within: tuple[int, ...] = ()  # the equations around this place

    def inside(self, eqn: Any) -> "Walk":
        return self._replace(within=(*self.within, id(eqn)))

    def dense(self, place: Any, name: str, given: Sequence[Any], why: str) -> list[Any]:
        """The values, with views unpacked."""
        for i, x in enumerate(given):
            if isinstance(x, View):
                use = Use(x.path, "", f"unpacked: {name}", why)
                self.uses[(*self.within, place, i)] = use
        return [x.unpacked() if isinstance(x, View) else x for x in given]


def begin(
    rules: Mapping[str, Rule],
    native: bool | None = False,
    zeros: Mapping[str, Any] | None = None,
    sums: Mapping[str, Any] | None = None,
) -> Walk:
    """A walk at its start."""
    return Walk(rules, native, zeros or {}, dict(sums or {}), {}, {})


def run(walk: Walk, jaxpr: Any, given: Sequence[Any]) -> list[Any]:
    """The outputs of a jaxpr, with or without constants. Views may come in and out."""
    opened = jaxprs.opened(jaxpr)
    env = dict(zip(opened.constvars, jaxprs.consts(jaxpr), strict=True))
    env |= dict(zip(opened.invars, given, strict=True))
    last = {x: len(opened.eqns) for x in opened.outvars if not isinstance(x, jaxprs.Literal)}
    for i, eqn in reversed(list(enumerate(opened.eqns))):  # where each value is last read
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


def inside(
    walk: Walk, eqn: Any, jaxpr: Any, given: Sequence[Any], sums: dict[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """The outputs of a jaxpr inside an equation, all dense, and the sums after it."""
    walk = walk.inside(eqn)._replace(sums=dict(sums))
    place = id(jaxprs.opened(jaxpr))  # a conditional has several
    outs = walk.dense(place, jaxprs.name(eqn), run(walk, jaxpr, given), "returned")
    return outs, walk.sums


def _equation(walk: Walk, jaxpr: Any, eqn: Any, given: list[Any], read: list[int]) -> list[Any]:
    """Those results of an equation that something reads."""
    if any(isinstance(x, View) for x in given):
        name = jaxprs.name(eqn)
        rule = walk.rules.get(name)
        outs = rule(walk, eqn, given) if rule else "no product"
        if not isinstance(outs, str):
            return [outs[k] for k in read]
        given = walk.dense(id(eqn), name, given, outs)
    return jaxprs.function_of(jaxpr, eqn, read)(*given)
