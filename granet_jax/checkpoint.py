"""States in files: checks of restored states, and registering states for ``jax.export``."""

from collections.abc import Iterable
from typing import Any, TypeVar

import jax
import jax.export
import jax.numpy as jnp

from granet_jax import trees
from granet_jax.types import MaskState, PyTree, SparseState

T = TypeVar("T")


def check_restored(restored: PyTree, example: PyTree) -> PyTree:
    """Returns ``restored`` in the structure of ``example``, if it has its paths, shapes and dtypes.

    Readers of checkpoints are lenient. If a leaf is missing in the checkpoint, Orbax returns None
    without an error; and it casts bool masks to any dtype it is asked for. With missing or wrong
    masks, pruned weights would grow back. Masks are part of the optimizer state, so one call on the
    whole restored state checks them too.

    Leaves are matched by path. So ``restored`` may hold dicts and lists instead of NamedTuples and
    tuples (Orbax without an abstract tree, ``flax.serialization.to_state_dict``), or be a flat dict
    by whole paths, as .npz and safetensors files are (``granet_jax.trees.paths(state)``; such a
    file cannot hold the name of the method). ``grew``, which earlier versions lack, is filled in. A
    typed key matches its raw data, and the other way
    round, so that checkpoints of earlier versions can be read by Orbax without an abstract tree.

    Args:
      restored: what the reader returned; its leaves are arrays of JAX or numpy.
      example: the state of the current model: arrays or ``ShapeDtypeStruct``, as from
        ``jax.eval_shape``.

    Returns:
      The leaves of ``restored`` in the structure of ``example``.

    Raises:
      ValueError: a leaf is missing, None, unexpected, or of another shape or dtype, or another
        method wrote the state; the message names up to five of these.

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
    for path, x in expected.items():  # True is right for any state
        if path.endswith("grew") and f"{path[:-4]}mask_step" in expected and path not in found:
            leaves[path] = jnp.ones(x.shape, bool)
    kinds = {path: _kind(x) for path, x in leaves.items()}
    wrong = [
        f"{path} is {kinds.get(path, 'missing')}, expected {_kind(x)}"
        for path, x in expected.items()
        if kinds.get(path) != _kind(x)
    ]
    more = [f"{path} is {x}, expected nothing" for path, x in kinds.items() if path not in expected]
    wrong = [*more[:2], *wrong, *more[2:]]  # both are shown where names differ
    writers = _writers(example)
    for words, writer in _writers(restored).items():
        if writer != writers.get(words, writer):
            wrong.insert(0, f"it was written by the method {writer}, expected {writers[words]}")
    sizes = _layer_sizes(example)
    for words, size in _layer_sizes(restored).items():
        if size != sizes.get(words, size):
            wrong.insert(0, f"{'/'.join(words)} is of {size}, expected {sizes[words]}")
    if _has_lists(found) != _has_lists(expected):
        wrong.insert(0, _LISTS)
    if wrong:
        others = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(
            f"The checkpoint does not fit the model: {'; '.join(wrong[:5])}{others}. "
            "Build the model, optimizer and method that it was saved with."
        )
    structure: Any = jax.tree.structure(example)
    in_order = [leaves[path] for path in expected]
    as_it_is = zip(in_order, jax.tree.leaves(restored), strict=True)
    if structure == jax.tree.structure(restored) and all(x is y for x, y in as_it_is):
        return restored
    return jax.tree.unflatten(structure, in_order)


def _writers(tree: PyTree) -> dict[tuple[str, ...], str]:
    """The names of methods in a tree's states of ``sparsify``, by path."""
    return {words[:-1]: words[-1] for words in _nones(tree) if words[-2:-1] == ("written_by",)}


def _layer_sizes(tree: PyTree) -> dict[tuple[str, ...], str]:
    """Stack, inputs, outputs and block in a tree's compact layouts, by path."""
    told = {}
    for words in _nones(tree):
        if words[-2:-1] == ("sizes",):
            sizes = words[-1].split("|")
            block = f"blocks {sizes[3]}" if "".join(sizes[3:]) else "single weights"
            told[words[:-2]] = f"layers {'|'.join(sizes[:3])} in {block}"
    return told


def _has_lists(paths: Iterable[str]) -> bool:
    return any(path.split("/")[-2:-1] in (["by_output"], ["by_input"]) for path in paths)


_LISTS = (
    "only one of the two has lists for the native kernels of live weights, which run on some "
    "machines: granet_jax.compact.relist(state, kernels=False) leaves them out for a file"
)


def _nones(tree: PyTree) -> list[tuple[str, ...]]:
    """Paths whose last name is text that a state keeps in its structure."""
    nones = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: x is None)
    return [trees.names(path) for path, x in nones if x is None]


def _as_example(leaf: Any, example: Any) -> Any:
    """A key as raw data, or raw data as a key, if the example has it so."""
    kinds = tuple(str(getattr(x, "dtype", None)).split("<")[0] for x in (leaf, example))
    if kinds == ("key", "uint32"):
        return jax.random.key_data(leaf)
    if kinds == ("uint32", "key"):
        return jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(example))
    return leaf


def _kind(leaf: Any) -> str:
    return f"{leaf.dtype} {leaf.shape}" if hasattr(leaf, "dtype") else type(leaf).__name__


def register_for_jax_export(tree: PyTree) -> None:
    """Registers the NamedTuples in a tree with ``jax.export``, so that steps can be serialised.

    ``jax.export`` serialises a function only if the types of all its inputs and outputs are
    registered. Importing this library registers its own states. Optax's states are not registered:
    call this with the whole optimizer state, both where a step is exported and where it is read.
    (``serialize`` needs the package flatbuffers.)

    Args:
      tree: any pytree, such as the result of ``tx.init`` or ``jax.eval_shape(tx.init, params)``.
        Types that are already registered do not change.

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
        if "registration for type" not in str(error):  # another type has this name
            raise
    return kind


exportable(SparseState)
exportable(MaskState)
