"""Scores of units, stored or computed where they are needed."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from granet_jax import jaxprs, scores, selection, structures, trees
from granet_jax.types import Event, PyTree, ScoreFn

# Operations that give the same bits in every kernel. (Not so a product and a sum, which may be
# fused; complex arithmetic has both.)
_ARITHMETIC = frozenset({"abs", "convert_element_type", "mul", "neg"})


def of_units(
    score: ScoreFn, event: Event, leaves: tuple[trees.Leaf, ...], masks: Callable[[], PyTree]
) -> list[selection.Scores]:
    """Scores, computed later where they are needed if they are plain arithmetic on entries.

    Storing them would take 4 bytes for each weight. Other scores (random ones, those of structures)
    are computed here.

    Args:
      score: of weights.
      event: what it sees.
      leaves: of the whole tree.
      masks: makes the current masks, for scores that read them.
    """
    given = event.params, event.grads

    def scored(params: PyTree, grads: PyTree, masks: PyTree) -> list[jax.Array]:
        seen = event._replace(params=params, grads=grads, masks=masks)
        return trees.pick(score(seen), leaves)

    abstract = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, bool), event.params)
    closed = jax.make_jaxpr(scored)(*given, abstract)
    refuse_complex("A score", closed.out_avals, leaves)
    found = [pair for tree in given for pair in trees.paths(tree).items()]
    prunable = {x.path: x for x in leaves if x.prunable}
    whole = {
        var: (array, prunable[path])
        for var, (path, array) in zip(closed.jaxpr.invars, found, strict=False)
        if path in prunable
    }
    read = list(itertools.compress(closed.jaxpr.invars, jaxprs.reads(closed)))
    in_leaves = all(var in whole for var in read)  # no masks, and no leaf that is dense
    if in_leaves and _is_arithmetic(closed) and all(x.structure is None for x in leaves):
        stacks = {var: _stack(array, leaf) for var, (array, leaf) in whole.items()}
        return _later(closed, stacks)
    looks = not set(closed.jaxpr.invars[len(found) :]).isdisjoint(read)
    event = event._replace(masks=masks() if looks else None)
    stored = structures.gather(trees.split(score(event), leaves), leaves)
    if score is scores.random:
        assert event.key is not None  # the score has read it
        stored = structures.drawn(stored, event.key, leaves)
    return [selection.Scores(lambda inputs: inputs[0], [x]) for x in stored]


def _stack(array: jax.Array, leaf: trees.Leaf) -> jax.Array:
    return array.reshape(leaf.num_layers, *leaf.layer_shape)


def _is_arithmetic(closed: Any) -> bool:
    is_complex = any(jnp.issubdtype(x.dtype, jnp.complexfloating) for x in closed.in_avals)
    names = {x.primitive.name for x in closed.eqns}
    return names <= _ARITHMETIC and not is_complex and not any(jnp.ndim(x) for x in closed.consts)


def _later(closed: Any, stacks: Mapping[Any, jax.Array]) -> list[selection.Scores]:
    """The outputs of a trace, each as a function of the stacks that it reads."""
    constants = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    made_by = {x.outvars[0]: x for x in closed.eqns}

    def compute(x: Any, known: dict[Any, jax.Array]) -> jax.Array:
        if isinstance(x, jaxprs.Literal):
            return x.val
        if x not in known:
            operands = [compute(y, known) for y in made_by[x].invars]
            known[x] = made_by[x].primitive.bind(*operands, **made_by[x].params)
        return known[x]

    def needed(x: Any) -> dict[Any, jax.Array]:
        if x in made_by:
            variables = (y for y in made_by[x].invars if not isinstance(y, jaxprs.Literal))
            return dict(pair for y in variables for pair in needed(y).items())
        return {x: stacks[x]} if x in stacks else {}

    def scores_of(x: Any) -> selection.Scores:
        names = list(needed(x))
        return selection.Scores(
            lambda inputs: compute(x, constants | dict(zip(names, inputs, strict=True))),
            [stacks[name] for name in names],
        )

    return [scores_of(x) for x in closed.jaxpr.outvars]


def refuse_complex(what: str, values: Sequence[Any], leaves: tuple[trees.Leaf, ...]) -> None:
    """Raises a ValueError where one of the values, one for each prunable leaf, is complex."""
    pairs = zip(values, [x for x in leaves if x.prunable], strict=True)
    if odd := [x.path for value, x in pairs if jnp.issubdtype(value.dtype, jnp.complexfloating)]:
        raise ValueError(
            f"{what} has to be real, and that of {', '.join(odd)} is complex: complex numbers have "
            "neither sign nor order. Rank their size, as granet_jax.scores does."
        )
