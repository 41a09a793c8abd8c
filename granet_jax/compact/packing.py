"""Dense trees to slots and back."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from granet_jax import trees
from granet_jax.compact import layouts as _layouts
from granet_jax.compact import native
from granet_jax.compact.layouts import Layout, Layouts
from granet_jax.kernels.block import check_block
from granet_jax.masks import check_dense, check_masks, is_known
from granet_jax.types import MaskState, PyTree


def pack(
    params: PyTree,
    masks: PyTree,
    prunable: trees.Rules = (),
    *,
    capacity: Mapping[str, int] | None = None,
    num_inputs: Mapping[str, int] | None = None,
    kernels: bool | None = None,
    block: tuple[int, int] | None = None,
) -> tuple[PyTree, Layouts]:
    """Puts the live weights of each prunable leaf into slots, in the order of their index.

    Args:
      params: tree of dense arrays.
      masks: bool tree, total; matched with the params by path.
      prunable: the path rules that the method was given.
      capacity: ``{path: slots of a layer}``; None = as many as the fullest layer of each leaf has
        live weights. Required under ``jit``, where the values of masks are unknown; see
        :func:`capacities`.
      num_inputs: ``{path: number}``, how many leading axes of a layer products sum over, for leaves
        where it is not all but the last; see :func:`granet_jax.compact.num_inputs`.
      kernels: whether to make lists for the native kernels; None = if they run here.
      block: stores leaves with ``granet_jax.structures.block(block)`` as whole blocks, for
        :mod:`granet_jax.kernels`, if their layers have two axes and the block divides them. Their
        masks have to be constant within blocks.

    Returns:
      ``(values, layouts)``. ``values`` is a tree like ``params``, with vectors of slots
      ``(*stack, capacity)`` for prunable leaves and copies of the others. ``layouts`` is
      ``{path: granet_jax.compact.Layout}`` for the prunable leaves.

    Raises:
      ValueError: masks of another tree, or masks that are off in a leaf that is not prunable; a
        capacity below the live weights, or missing under ``jit``; a layer of 2^31 weights or more;
        blocks that are live in part.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"bias": jnp.ones(2), "kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
      >>> masks = {"bias": jnp.ones(2, bool), "kernel": jnp.array([[False, True], [True, False]])}
      >>> values, layouts = pack(params, masks)
      >>> values["kernel"].tolist(), layouts["kernel"].index.tolist()
      ([2.0, 3.0], [1, 2])
    """
    leaves = trees.describe(params, prunable)
    masks = check_masks(masks, params)
    check_dense(masks, leaves)
    block = None if block is None else check_block(block)
    live = trees.paths(masks)
    if capacity is None:
        capacity = capacities(masks, leaves)
    if lacking := {x.path for x in leaves if x.prunable} - capacity.keys():
        raise ValueError(f"Give the capacity of {', '.join(sorted(lacking))}, too.")
    layouts: dict[str, Layout] = {}
    for leaf in leaves:
        if leaf.prunable:
            num = (num_inputs or {}).get(leaf.path, len(leaf.layer_shape) - 1)
            mask, most = live[leaf.path], capacity[leaf.path]
            layouts[leaf.path] = _lay_out(mask, leaf, most, num, kernels, block)
    return to_slots(params, layouts), layouts


def capacities(masks: PyTree, leaves: tuple[trees.Leaf, ...]) -> dict[str, int]:
    """The number of live weights in the fullest layer of each prunable leaf, at least 1.

    Args:
      masks: bool tree, not traced.
      leaves: from :func:`granet_jax.trees.describe`.

    Returns:
      ``{path: int}``, for ``capacity=``.

    Raises:
      ValueError: the masks are traced.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jnp.array([[0.0, 2.0], [3.0, 4.0]])}
      >>> capacities({"kernel": params["kernel"] != 0}, trees.describe(params))
      {'kernel': 3}
    """
    found = trees.paths(masks)
    if not all(is_known(x) for x in found.values()):
        raise ValueError(
            "How many slots there are follows from masks, which are traced here. Give the capacity "
            "of each leaf by path, from masks made outside of jit: "
            "compact.capacities(masks, granet_jax.trees.describe(params, prunable))."
        )
    return {
        x.path: max(1, int(jnp.sum(found[x.path].reshape(x.num_layers, -1), axis=1).max()))
        for x in leaves
        if x.prunable
    }


def to_slots(tree: PyTree, layouts: Layouts, params: PyTree | None = None) -> PyTree:
    """Turns dense leaves into slots; leaves without a layout are copied.

    Args:
      tree: a dense tree with the params' paths; or, with ``params``, a tree that holds such trees,
        such as the state of an optimizer.
      layouts: by path.
      params: dense arrays or ``ShapeDtypeStruct``, to find the leaves that mirror a parameter; None
        = ``tree`` has the paths of the params.

    Returns:
      A tree of the structure of ``tree``.

    Raises:
      ValueError: a layout whose path is no leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jnp.array([[0.0, 2.0], [3.0, 0.0]])}
      >>> _, layouts = pack(params, {"kernel": params["kernel"] != 0})
      >>> to_slots({"kernel": jnp.array([[5.0, 6.0], [7.0, 8.0]])}, layouts)["kernel"].tolist()
      [6.0, 7.0]
    """
    return _map(lambda x, layout: _layouts.slots(x, layout), tree, layouts, params, copy=True)


def unpack(tree: PyTree, layouts: Layouts, values: PyTree | None = None) -> PyTree:
    """Turns slots into dense leaves, 0 where no weight is live. Undoes :func:`to_slots`.

    Args:
      tree: a tree of slots with the params' paths; or, with ``values``, a tree that holds such
        trees, such as the state of an optimizer, whose moments become dense.
      layouts: by path.
      values: the tree of slots, to find the leaves that mirror it; None = ``tree`` has the paths of
        the params.

    Returns:
      A tree of the structure of ``tree``.

    Raises:
      ValueError: a layout whose path is no leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jnp.array([[0.0, 2.0], [3.0, 0.0]])}
      >>> values, layouts = pack(params, {"kernel": params["kernel"] != 0})
      >>> unpack(values, layouts)["kernel"].tolist()
      [[0.0, 2.0], [3.0, 0.0]]
    """
    return _map(lambda x, layout: _layouts.dense(x, layout), tree, layouts, values)


def masks(values: PyTree, layouts: Layouts) -> PyTree:
    """The dense masks of a tree of slots.

    Args:
      values: the tree of slots.
      layouts: by path.

    Returns:
      A bool tree of the params' shapes; all True in leaves that are not compact.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jnp.array([[0.0, 2.0], [3.0, 0.0]])}
      >>> values, layouts = pack(params, {"kernel": params["kernel"] != 0})
      >>> masks(values, layouts)["kernel"].tolist()
      [[False, True], [True, False]]
    """

    def mask(path: str, x: jax.Array) -> jax.Array:
        if path not in layouts:
            return jnp.ones_like(x, dtype=bool)
        return _layouts.dense(_layouts.live(layouts[path]), layouts[path])

    return map_by_path(mask, values)


def abstract_params(values: PyTree, layouts: Layouts) -> PyTree:
    """Shapes and dtypes of the dense parameters.

    Args:
      values: the tree of slots; arrays or ``ShapeDtypeStruct``.
      layouts: by path.

    Returns:
      A tree of ``ShapeDtypeStruct``.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jnp.array([[0.0, 2.0], [3.0, 0.0]])}
      >>> values, layouts = pack(params, {"kernel": params["kernel"] != 0})
      >>> values["kernel"].shape, abstract_params(values, layouts)["kernel"].shape
      ((2,), (2, 2))
    """

    def shape(path: str, x: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(layouts[path].shape if path in layouts else x.shape, x.dtype)

    return map_by_path(shape, values)


@jax.jit  # called outside of jit it is one program, too
def reslot(layout: Layout, mask: jax.Array, keep: jax.Array) -> tuple[Layout, jax.Array, jax.Array]:
    """Slots for a new mask.

    Weights in ``keep`` keep their slots. The other weights in ``mask`` take the free slots, in the
    order of their index. The slots left over are dead.

    Args:
      layout: of the leaf.
      mask: bool, dense.
      keep: bool, dense; a subset of ``mask``, and of the weights that have slots.

    Returns:
      The new layout; bool ``(*stack, capacity)``, the slots whose weight stayed; int32, how many
      weights got no slot (and so are off).
    """
    index = layout.index.reshape(-1, layout.index.shape[-1])
    dense = (_of_units(x, layout) for x in (mask, keep))
    kernels = layout.by_output is not None
    one = native.reslot if kernels else _reslot
    if len(index) == 1:  # avoids a loop of one iteration
        new, stays, outgrown = one(index[0], *(x[0] for x in dense))
    else:
        new, stays, outgrown = jax.vmap(one)(index, *dense)
    layout = layout._replace(index=new.reshape(layout.index.shape))
    layout = native.lists(layout) if kernels else layout
    stays = jnp.repeat(stays, layout.unit, axis=-1).reshape(layout.slots_shape)
    return layout, stays, jnp.sum(outgrown, dtype=jnp.int32) * layout.unit


def _of_units(mask: jax.Array, layout: Layout) -> jax.Array:
    """The mask of units, ``(layers, units)``, from a dense mask."""
    flat = mask.reshape(math.prod(layout.stack), layout.layer_size)
    if not layout.block:
        return flat
    return jax.vmap(lambda x: _layouts.units(x, layout)[:, 0])(flat)


def _reslot(
    index: jax.Array, mask: jax.Array, keep: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    size = mask.shape[0]
    stays = keep.at[index].get(mode="fill", fill_value=False)
    grown = mask & ~keep
    (places,) = jnp.nonzero(grown, size=len(index), fill_value=size)
    free = jnp.cumsum(~stays, dtype=jnp.int32) - 1
    new = jnp.where(stays, index, places.astype(jnp.int32).at[free].get(mode="clip"))
    num_free = jnp.sum(~stays, dtype=jnp.int32)
    return new, stays, jnp.maximum(jnp.sum(grown, dtype=jnp.int32) - num_free, 0)


def _lay_out(
    mask: jax.Array,
    leaf: trees.Leaf,
    capacity: int,
    num_inputs: int,
    kernels: bool | None,
    block: tuple[int, int] | None,
) -> Layout:
    size = math.prod(leaf.layer_shape)
    if size >= 2**31:
        raise ValueError(
            f"{leaf.path} has layers of {size} weights; slots tell their places in int32. Split "
            "the leaf, or keep it dense by a rule."
        )
    if not 0 <= num_inputs <= len(leaf.layer_shape):
        raise ValueError(
            f"num_inputs={num_inputs} of {leaf.path}: its layers {leaf.layer_shape} have not so "
            "many axes."
        )
    stack, shape = leaf.shape[: leaf.stack_axes], leaf.layer_shape
    sides = block if block and _has_blocks(mask, leaf, num_inputs, block) else ()
    sizes = _layouts.written(stack, shape[:num_inputs], shape[num_inputs:], block=tuple(sides))
    unit = math.prod(sides)
    num_units = max(1, -(-capacity // unit)) if sides else capacity
    dead = jnp.full((*stack, num_units), size // unit, jnp.int32)
    layout = Layout(dead, None, None, sizes)
    layout, _, outgrown = reslot(layout, mask, jnp.zeros_like(mask))
    if is_known(outgrown) and int(outgrown):
        raise ValueError(
            f"The capacity of {leaf.path} is {capacity}, but {int(outgrown)} more of its weights "
            "are live. Give it the live weights of its fullest layer."
        )
    if sides or kernels is False or not native.available():
        return layout
    return native.lists(layout)


def _has_blocks(mask: jax.Array, leaf: trees.Leaf, num_inputs: int, block: tuple[int, int]) -> bool:
    """Whether a leaf can be stored as blocks."""
    if leaf.structure is None or leaf.structure.block != block:
        return False
    if len(leaf.layer_shape) != 2 or num_inputs != 1:
        return False
    (rows, columns), (a, b) = leaf.layer_shape, block
    if rows % a or columns % b:
        return False
    parts = mask.reshape(-1, rows // a, a, columns // b, b)
    if is_known(mask) and not bool(jnp.all(parts == parts[:, :, :1, :, :1])):
        raise ValueError(
            f"Blocks of {leaf.path} are live in part. block={block} is for masks of that structure:"
            f" prunable=[..., ('', granet_jax.structures.block({block}))]."
        )
    return True


def map_by_path(f: Callable[[str, Any], Any], tree: PyTree) -> PyTree:
    """``f(path, leaf)`` for each leaf."""
    new = [f(path, x) for path, x in trees.paths(tree).items()]
    return jax.tree.unflatten(jax.tree.structure(tree), new)


def _map(
    f: Callable[[jax.Array, Layout], jax.Array],
    tree: PyTree,
    layouts: Layouts,
    like: PyTree | None,
    copy: bool = False,
) -> PyTree:
    """``f(leaf, layout)`` for the leaves that have one."""
    same = jnp.copy if copy else lambda x: x

    def leaf(path: str, x: Any) -> Any:
        return f(x, layouts[path]) if path in layouts else same(x)

    if like is None:
        if odd := layouts.keys() - trees.paths(tree).keys():
            raise ValueError(
                f"The layouts are of another tree, which has {', '.join(sorted(odd))}."
            )
        return map_by_path(leaf, tree)
    return map_mirrors(leaf, tree, like, same)


def map_mirrors(
    f: Callable[[str, Any], Any], tree: PyTree, like: PyTree, rest: Callable[[Any], Any]
) -> PyTree:
    """``f(path, leaf)`` for leaves that mirror a leaf of ``like``, ``rest(leaf)`` for the others.

    Layouts do not change, nor does the state of a method, which is dense.
    """
    path_of = dict(zip(trees.by_path(like), trees.paths(like), strict=True))

    def leaf(x: Any, owner: trees.Owner | None) -> Any:
        return f(path_of[owner.names], x) if owner is not None and owner.same_shape else rest(x)

    def is_left(x: Any) -> bool:
        return isinstance(x, Layout | MaskState)

    return jax.tree.map(
        lambda old, new: old if is_left(old) else new,
        tree,
        trees.map_with_owner(leaf, tree, like),
        is_leaf=is_left,
    )
