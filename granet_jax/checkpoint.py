"""States in files: a check that what came back is what went in, and states of exported steps."""

from typing import Any, TypeVar

import jax
import jax.export

from granet_jax import trees
from granet_jax.types import MaskState, PyTree, SparseState

T = TypeVar("T")


def check_restored(restored: PyTree, example: PyTree) -> PyTree:
    """Returns ``restored`` in the structure of ``example``, if it has its paths, shapes and dtypes.

    Readers of checkpoints are lenient: where the checkpoint holds None, or less than the model
    asks for, Orbax gives None without a word, and casts bool masks to what it is asked for. Masks
    that are gone or belong to another model then let pruned weights grow back. Masks live in the
    optimizer state, so one call on the whole restored state checks them too.

    Leaves find their place by path. So dicts and lists are as good as NamedTuples and tuples (what
    Orbax gives without an abstract tree, ``flax.serialization.to_state_dict``), and so is a flat
    dict of whole paths, as .npz and safetensors files hold (``granet_jax.trees.paths(state)``; the
    name of the method is no array and gets lost there). A typed key is as good as its raw data, and
    the other way round: so checkpoints of before are read, by Orbax without an abstract tree.

    Args:
      restored: what the reader returned; its leaves are arrays, of numpy, too.
      example: the state of the model at hand: arrays or ``ShapeDtypeStruct``, as from
        ``jax.eval_shape``.

    Raises:
      ValueError: a leaf is missing, None, unexpected, or of another shape or dtype, or another
        method wrote the state; the message names up to five.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> example = {"masks": {"kernel": jax.ShapeDtypeStruct((2, 3), bool)}}
      >>> check_restored({"masks": {"kernel": None}}, example)  # doctest: +ELLIPSIS
      Traceback (most recent call last):
        ...
      ValueError: The checkpoint does not fit the model: masks/kernel is missing, expected bool...

      An optimizer state as a flat dict, and back:
      >>> state = optax.adam(1e-3).init({"kernel": jnp.ones((2, 3))})
      >>> flat = trees.paths(state)
      >>> list(flat)
      ['0/count', '0/mu/kernel', '0/nu/kernel']
      >>> type(check_restored(flat, state)[0]).__name__
      'ScaleByAdamState'
    """
    found, expected = trees.paths(restored), trees.paths(example)
    leaves = {path: _as_example(x, expected.get(path)) for path, x in found.items()}
    kinds = {path: _kind(x) for path, x in leaves.items()}
    wrong = [
        f"{path} is {kinds.get(path, 'missing')}, expected {_kind(x)}"
        for path, x in expected.items()
        if kinds.get(path) != _kind(x)
    ]
    wrong += [f"{path} is {kinds[path]}, expected nothing" for path in kinds.keys() - expected]
    writers = _writers(example)
    for words, writer in _writers(restored).items():
        if writer != writers.get(words, writer):
            wrong.insert(0, f"it was written by the method {writer}, expected {writers[words]}")
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(
            f"The checkpoint does not fit the model: {'; '.join(wrong[:5])}{more}. "
            "Build the model, optimizer and method that it was saved with."
        )
    structure: Any = jax.tree.structure(example)
    in_order = [leaves[path] for path in expected]
    as_it_is = zip(in_order, jax.tree.leaves(restored), strict=True)
    if structure == jax.tree.structure(restored) and all(x is y for x, y in as_it_is):
        return restored
    return jax.tree.unflatten(structure, in_order)


def _writers(tree: PyTree) -> dict[tuple[str, ...], str]:
    """The methods that a tree's states of ``sparsify`` name, by path."""
    nones = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: x is None)
    found = [trees.names(path) for path, x in nones if x is None]
    return {words[:-1]: words[-1] for words in found if words[-2:-1] == ("written_by",)}


def _as_example(leaf: Any, example: Any) -> Any:
    """A key as raw data, or raw data as a key, where the example has the other."""
    kinds = tuple(str(getattr(x, "dtype", None)).split("<")[0] for x in (leaf, example))
    if kinds == ("key", "uint32"):
        return jax.random.key_data(leaf)
    if kinds == ("uint32", "key"):
        return jax.random.wrap_key_data(leaf)
    return leaf


def _kind(leaf: Any) -> str:
    return f"{leaf.dtype} {leaf.shape}" if hasattr(leaf, "dtype") else type(leaf).__name__


def register_for_jax_export(tree: PyTree) -> None:
    """Tells ``jax.export`` of the NamedTuples in a tree, so that steps on them can be serialised.

    ``jax.export`` serialises a function only if it knows the types of all that goes in and comes
    out. It knows the states of this library once that is imported. It does not know optax's: call
    this with the whole optimizer state, where a step is exported and where it is read.
    (``serialize`` needs the package flatbuffers.)

    Args:
      tree: any pytree, say what ``tx.init`` or ``jax.eval_shape(tx.init, params)`` returns. Types
        that are registered already, by whomever, stay as they are.

    Raises:
      ValueError: two types have the same module and name.

    Example:
      >>> import granet_jax as gj, jax, jax.numpy as jnp, optax
      >>> params = {"kernel": jnp.ones((4, 4))}
      >>> tx = gj.sparsify(optax.adam(1e-3), gj.static(sparsity=0.5, key=jax.random.key(0)))
      >>> state = tx.init(params)
      >>> register_for_jax_export(state)
      >>> exported = jax.export.export(jax.jit(tx.update))(params, state, params)
      >>> content = exported.serialize()  # doctest: +SKIP
      >>> exported = jax.export.deserialize(content)  # doctest: +SKIP
      >>> updates, state = exported.call(params, state, params)
      >>> int(state.mask_step)
      1
    """

    def register(node: Any) -> bool:
        if hasattr(node, "_fields"):
            exportable(type(node))
        return False

    jax.tree.leaves(tree, is_leaf=register)  # shows it every node


def exportable(kind: type[T]) -> type[T]:
    """Registers a NamedTuple with ``jax.export``, once; a class decorator."""
    name = f"{kind.__module__}.{kind.__qualname__}"
    try:
        jax.export.register_namedtuple_serialization(kind, serialized_name=name)
    except ValueError as error:
        if "registration for type" not in str(error):  # but for its name, which another type has
            raise
    return kind


exportable(SparseState)
exportable(MaskState)
