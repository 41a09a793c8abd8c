"""Checks that an optimizer is elementwise, so that it can train slots."""

from collections import Counter
from collections.abc import Container, Iterator
from typing import Any

import jax

from granet_jax import jaxprs, trees
from granet_jax.types import PyTree

# Operations that follow from shapes alone.
_SHAPES = frozenset({"reshape", "squeeze", "broadcast_in_dim", "expand_dims", "transpose"})


def check(inner: Any, params: PyTree, values: PyTree, compact: Container[str]) -> None:
    """Refuses an optimizer that treats slots differently from dense parameters.

    It compares the operations that the optimizer does to slots and to dense parameters. Leaves of
    slots, whose paths are in ``compact``, are two longer there, so that they never have the size
    of the dense ones.

    Raises:
      ValueError: they differ; the message names the operations.
    """

    def what_it_does(tree: PyTree) -> Any:
        tree = abstract(tree)
        state = jax.eval_shape(inner.init, tree)
        keep = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, bool), tree)
        update = jax.make_jaxpr(lambda g, s, p, keep: inner.update(g, s, p, keep=keep))
        trace = update(tree, state, tree, keep)
        owners = trees.owners(state, tree)
        kept = {path: x is not None and x.same_shape for path, x in owners.items()}
        return Counter(op for op in _operations(trace) if op[0] not in _SHAPES), kept

    try:
        of_params = what_it_does(params)
    except Exception:  # an optimizer that needs more than gradients: nothing is known
        return
    longer = {
        path: jax.ShapeDtypeStruct((*x.shape[:-1], x.shape[-1] + 2), x.dtype)
        if path in compact
        else x
        for path, x in trees.paths(abstract(values)).items()
    }
    of_slots = what_it_does(jax.tree.unflatten(jax.tree.structure(values), longer.values()))
    if of_params == of_slots:
        return
    odd = (of_params[0] - of_slots[0]) + (of_slots[0] - of_params[0])
    told = ", ".join(sorted({" ".join(op) for op in odd})[:3]) or "the shapes of its state"
    raise ValueError(
        "This optimizer treats slots, which are vectors, in another way than the dense parameters: "
        f"{told} differ. It looks at their shapes, as muon, adafactor, means over a leaf and a "
        "weight decay for matrices alone (mask=lambda p: p.ndim > 1) do. Choose leaves by path "
        "instead, or use granet_jax.sparsify."
    )


def _operations(jaxpr: Any) -> Iterator[tuple[str, ...]]:
    """The primitive of each equation and its numeric parameters, in inner jaxprs too."""
    for eqn in jaxprs.opened(jaxpr).eqns:
        numbers = [str(x.val) for x in eqn.invars if isinstance(x, jaxprs.Literal)]
        if len(eqn.params.get("axes", ())) not in (0, getattr(eqn.invars[0].aval, "ndim", 0)):
            numbers.append("over some axes")
        yield eqn.primitive.name, *numbers
        for inner in jaxprs.inner(eqn):
            yield from _operations(inner)


def abstract(tree: PyTree) -> PyTree:
    """Shapes and dtypes of the arrays of a tree."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
