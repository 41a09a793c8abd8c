"""What an optimizer's state holds for each parameter, and the rules by which ``sparsify`` finds it.

A leaf of the state *mirrors* a parameter if it has the parameter's shape, and its path ends in the
parameter's path, or lies one step below such a path. This finds moments, step sizes and copies of
the parameters in any optax optimizer, without a list of optimizers.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from granet_jax import jaxprs, trees
from granet_jax.types import PyTree


def told_keep(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The optimizer with an argument ``keep=``, passed on if it takes it.

    Optax asks transformations with extra arguments to accept unknown ones. SAM and line searches do
    not, nor do wrappers that pass all of them on to a plain transformation.
    """
    inner = optax.with_extra_args_support(inner)

    def update(grads: PyTree, state: Any, params: PyTree, *, keep: PyTree, **extra: Any) -> Any:
        try:
            return inner.update(grads, state, params, **extra, keep=keep)
        except TypeError as error:
            if "'keep'" not in str(error):
                raise
        return inner.update(grads, state, params, **extra)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def reset(state: Any, initial: Any, mirrored: dict[Any, Any], keep: PyTree) -> Any:
    """``where(keep, leaf, initial)`` for the leaves of a state that mirror a parameter.

    Args:
      state: of the optimizer.
      initial: the state at the start, for parameters that are 0; leaves are matched by path.
      mirrored: from :func:`mirrors`.
      keep: bool tree of params.
    """
    masks, first = trees.by_path(keep), trees.by_path(initial)

    def masked(path: Any, leaf: Any) -> Any:
        words = trees.names(path)
        if words not in mirrored:
            return leaf
        return select(masks[mirrored[words]], leaf, first[words])

    return jax.tree_util.tree_map_with_path(masked, state)


@jax.jit  # so that it is traced once for all leaves of a shape
def select(mask: jax.Array, x: jax.Array, otherwise: jax.Array | None = None) -> jax.Array:
    """``where(mask, x, otherwise)`` on bits, which XLA:CPU vectorises far better; None = 0."""
    if x.dtype.itemsize not in (2, 4) or not jnp.issubdtype(x.dtype, jnp.floating):
        other = jnp.zeros_like(x) if otherwise is None else otherwise.astype(x.dtype)
        return jnp.where(mask, x, other)
    integer = jnp.int32 if x.dtype.itemsize == 4 else jnp.int16
    as_bits = functools.partial(jax.lax.bitcast_convert_type, new_dtype=integer)
    ones = -mask.astype(integer)  # all bits, where True
    bits = as_bits(x) & ones
    if otherwise is not None:
        bits |= as_bits(otherwise.astype(x.dtype)) & ~ones
    return jax.lax.bitcast_convert_type(bits, x.dtype)


def mirrors(init: Callable[[PyTree], Any], state: Any, params: PyTree) -> dict[Any, Any]:
    """The names of the leaves of a state that mirror a parameter, with the parameter's names.

    A square matrix of statistics looks like a moment of a square kernel. To tell them apart,
    ``init`` is called on kernels that are not square.
    """
    owners = trees.owners(state, params)
    found = {trees.names(k): x.names for k, x in owners.items() if x is not None and x.same_shape}
    altered = jax.tree.map(_with_unequal_axes, params)
    pairs = zip(jax.tree.leaves(altered), jax.tree.leaves(params), strict=True)
    if all(x.shape == p.shape for x, p in pairs):
        return found
    try:
        other = trees.by_path(jax.eval_shape(init, altered))
    except Exception:  # it works for these shapes only: nothing is known
        return found
    shapes = {path: x.shape for path, x in trees.by_path(altered).items()}

    def is_moment(words: Any, owner: Any) -> bool:
        shape = other[words].shape if words in other else shapes[owner]
        return shape == shapes[owner] or len(shape) != len(shapes[owner])

    return {words: owner for words, owner in found.items() if is_moment(words, owner)}


def check_maskable(state: Any, params: PyTree) -> None:
    """Refuses a state with buffers of a parameter's size that mirror no parameter.

    Raises:
      ValueError: flattened parameters, or a history of them.
    """
    ranks = {path: x.ndim for path, x in trees.by_path(params).items()}
    largest = max((x.size for x in jax.tree.leaves(params) if x.ndim >= 2), default=None)
    if largest is None:
        return
    owners = trees.owners(state, params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        owner = owners[path]
        if owner is not None and leaf.ndim <= ranks[owner.names]:
            continue  # a moment, or a factored one, or statistics of its axes
        if leaf.size >= largest:
            raise ValueError(
                f"The state of this optimizer cannot be masked: {type_on_path(state, path)}"
                f" holds {'/'.join(trees.names(path))} of shape {leaf.shape}, which mirrors no "
                "parameter. Use an optimizer whose moments have the parameters' shapes (not "
                "flattened, no limited-memory history)."
            )


def check_same_optimizer(state: Any, initial: Any, params: PyTree) -> None:
    """Refuses a state that another optimizer wrote.

    Raises:
      ValueError: a leaf is missing, or a parameter has one leaf too many; the message names the
        leaf and the state that holds it.
    """
    found, expected = (
        {trees.names(path): (path, x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (state, initial)
    )
    more = found.keys() - expected.keys()
    owners = trees.owners(state, params) if more else {}
    odd = [(state, *found[k], "unexpected") for k in more if owners[found[k][0]] is not None]
    odd += [(initial, *expected[k], "missing") for k in expected.keys() - found.keys()]
    if odd:
        told = min(
            f"{'/'.join(trees.names(path))} of {type_on_path(tree, path)} is {what}"
            for tree, path, _, what in odd
        )
        raise ValueError(
            f"The state was written by another optimizer, or for other parameters: {told}. "
            "Start anew, with the old masks: "
            "granet_jax.set_masks(tx.init(params), granet_jax.get_masks(old_state))."
        )


def frozen(inner: optax.GradientTransformation, state: Any, params: PyTree) -> list[str]:
    """The paths of the parameters whose updates depend on nothing, as after ``set_to_zero``."""
    try:
        keep = jax.tree.map(lambda p: jnp.ones(p.shape, bool), params)
        trace = jax.make_jaxpr(lambda g, s, p, k: inner.update(g, s, p, keep=k)[0])
        jaxpr = jaxprs.opened(trace(params, state, params, keep))
    except Exception:  # an optimizer that needs more than gradients: nothing is known
        return []
    moving = set(map(id, jaxpr.invars))
    for eqn in jaxpr.eqns:
        if any(id(x) in moving for x in eqn.invars):
            moving.update(map(id, eqn.outvars))
    pairs = zip(trees.paths(params), jaxpr.outvars, strict=False)
    return [path for path, var in pairs if id(var) not in moving]


def type_on_path(state: Any, path: tuple[Any, ...]) -> str:
    """The name of the innermost NamedTuple on the way to a leaf."""
    name = type(state).__name__
    for key in path:
        if not isinstance(key, jax.tree_util.GetAttrKey | jax.tree_util.SequenceKey):
            break
        state = getattr(state, key.name) if hasattr(key, "name") else state[key.idx]
        name = type(state).__name__ if hasattr(state, "_fields") else name
    return name


def _with_unequal_axes(p: Any) -> jax.ShapeDtypeStruct:
    shape: list[int] = []
    for n in p.shape:
        while n in shape:
            n += 1
        shape.append(n)
    return jax.ShapeDtypeStruct(tuple(shape), p.dtype)
