"""Other layouts of the same weights: fewer slots for methods that prune, lists for this machine."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from granet_jax.compact import native, packing
from granet_jax.compact.layouts import Layout, Layouts, live
from granet_jax.compact.transform import get_layouts, is_compact
from granet_jax.types import PyTree


def shrink(
    tree: PyTree, opt_state: Any, values: PyTree, capacity: Mapping[str, int] | None = None
) -> PyTree:
    """Repacks to fewer slots: as many as the fullest layer of each leaf has live weights.

    For methods that prune in training (GraNet, GMP). Live weights keep their order, values and
    moments. Shapes change, so compiled steps are compiled again.

    Args:
      tree: what to repack: ``(values, opt_state)``, or the whole training state.
      opt_state: its layouts say which slots are dead; concrete arrays.
      values: the tree of slots.
      capacity: ``{path: slots of a layer}``, at least :func:`num_live`; other leaves stay as they
        are. None = that number of all leaves.

    Returns:
      ``tree`` with fewer slots.

    Raises:
      ValueError: ``capacity`` names no leaf with slots, or fewer slots than there are live weights.

    Example:
      >>> import granet_jax as gj, jax, jax.numpy as jnp, optax
      >>> params = {"kernel": jnp.arange(1.0, 9.0).reshape(2, 4)}
      >>> tx = gj.compact.sparsify(optax.sgd(0.1), gj.magnitude(sparsity=0.75, at=1))
      >>> state = tx.init(params)
      >>> values = gj.compact.to_slots(params, gj.compact.get_layouts(state))
      >>> updates, state = tx.update(jax.tree.map(jnp.zeros_like, values), state, values)
      >>> values = optax.apply_updates(values, updates)
      >>> values, state = gj.compact.shrink((values, state), state, values)
      >>> values["kernel"].tolist()
      [7.0, 8.0]
    """
    layouts = get_layouts(opt_state)
    if capacity is None:
        capacity = {path: num_live(x) for path, x in layouts.items()}
    else:
        _check_capacity(capacity, layouts)
    orders = {path: _order(x, capacity.get(path)) for path, x in layouts.items()}

    def take(path: str, x: jax.Array) -> jax.Array:
        """The slots that stay, unit by unit."""
        unit = layouts[path].unit
        units = x.reshape(*x.shape[:-1], x.shape[-1] // unit, unit)
        taken = jnp.take_along_axis(units, orders[path][..., None], axis=-2)
        return taken.reshape(*x.shape[:-1], orders[path].shape[-1] * unit)

    def relay(node: Any) -> Any:
        if not is_compact(node):
            return node
        smaller = {}
        for path, layout in node.layouts.items():
            index = jnp.take_along_axis(layout.index, orders[path], axis=-1)
            new = layout._replace(index=index)
            smaller[path] = relist(new) if layout.by_output is not None else new
        return node._replace(layouts=smaller)

    tree = packing.map_mirrors(
        lambda path, x: take(path, x) if path in orders else x, tree, values, lambda x: x
    )
    return jax.tree.map(relay, tree, is_leaf=is_compact)


def relist(tree: PyTree, kernels: bool | None = None) -> PyTree:
    """Makes the lists for the native kernels anew, or leaves them out.

    The lists follow from the places of the slots, so a file needs none. A state without them can be
    restored on any machine; there, make them again.

    Args:
      tree: any tree with layouts inside, such as an optimizer state or a whole training state.
        Without lists as the result, its arrays may be abstract.
      kernels: False = no lists; otherwise lists if the kernels run here. Layouts of blocks never
        have lists.

    Returns:
      The tree with other lists; all other arrays are those of ``tree``.

    Example: to a file, and back.
      >>> import granet_jax as gj, jax, jax.numpy as jnp, optax
      >>> tx = gj.compact.sparsify(optax.sgd(0.1), gj.static(sparsity=0.5, key=jax.random.key(0)))
      >>> state = tx.init({"kernel": jnp.ones((2, 4))})
      >>> portable = gj.compact.relist(state, kernels=False)
      >>> list(gj.trees.paths(portable.layouts["kernel"]))
      ['index']
      >>> again = gj.compact.relist(portable)
      >>> jax.tree.structure(again) == jax.tree.structure(state)
      True
    """
    has_lists = kernels is not False and native.available()

    def listed(node: Any) -> Any:
        if not isinstance(node, Layout):
            return node
        if not has_lists or node.block:
            return node._replace(by_output=None, by_input=None)
        lists = native.lists
        for _ in range(node.index.ndim - 1 - len(node.stack)):  # axes of vmapped states
            lists = jax.vmap(lists)
        return lists(node)

    return jax.tree.map(listed, tree, is_leaf=lambda x: isinstance(x, Layout))


def _check_capacity(capacity: Mapping[str, int], layouts: Layouts) -> None:
    for path, slots in capacity.items():
        if path not in layouts:
            raise ValueError(
                f"capacity has {path!r}, which is no leaf with slots; these are: "
                f"{', '.join(layouts)}."
            )
        if isinstance(layouts[path].index, jax.core.Tracer):
            continue  # only shapes are asked for
        if slots < (num := num_live(layouts[path])):
            raise ValueError(
                f"capacity has {slots} slots for a layer of {path}, in which {num} weights are "
                "live; they would be lost."
            )


def num_live(layout: Layout) -> int:
    """The number of live weights in the fullest layer of a leaf, at least 1.

    Args:
      layout: of the leaf; concrete arrays.

    Returns:
      An int.

    Example: one of two slots is dead.
      >>> import jax.numpy as jnp
      >>> from granet_jax.compact.layouts import written
      >>> num_live(Layout(jnp.array([4, 6]), None, None, written((), (3,), (2,))))
      1
    """
    return max(1, int(jnp.sum(live(layout), axis=-1).max()))


def _order(layout: Layout, capacity: int | None) -> jax.Array:
    """Indices of the units that stay: the live ones in order, then dead ones."""
    alive = live(layout)[..., :: layout.unit]
    most = None if capacity is None else -(-capacity // layout.unit)
    return jnp.argsort(~alive, axis=-1, stable=True)[..., :most]
