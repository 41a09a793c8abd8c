"""Scores of units, stored or computed where they are needed."""

from collections.abc import Callable, Sequence
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
    looks = any(jaxprs.reads(closed)[-len(jax.tree.leaves(abstract)) :])
    event = event._replace(masks=masks() if looks else None)
    refuse_complex("A score", closed.out_avals, leaves)
    is_arithmetic = all(x.primitive.name in _ARITHMETIC for x in closed.eqns) and not any(
        jnp.issubdtype(x.dtype, jnp.complexfloating) for x in closed.in_avals
    )
    is_lazy = is_arithmetic and not looks and not any(jnp.ndim(x) for x in closed.consts)
    if is_lazy:  # a score of one leaf may read another, which is in no stack
        in_stacks = {x.path for x in leaves if x.prunable}
        read = zip(
            (path for x in given for path in trees.paths(x)), jaxprs.reads(closed), strict=False
        )
        is_lazy = all(path in in_stacks for path, is_read in read if is_read)
    if not is_lazy or any(x.structure is not None for x in leaves):
        stored = structures.gather(trees.split(score(event), leaves), leaves)
        if score is scores.random:
            assert event.key is not None  # the score has read it
            stored = structures.drawn(stored, event.key, leaves)
        return [selection.Scores(lambda inputs: inputs[0], [x]) for x in stored]
    found = [pair for tree in given for pair in trees.paths(tree).items()]
    prunable = {x.path: x for x in leaves if x.prunable}
    stacks = {
        var: array.reshape(prunable[path].num_layers, *prunable[path].layer_shape)
        for var, (path, array) in zip(closed.jaxpr.invars, found, strict=False)
        if path in prunable
    }
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
