"""Functions of dense params, computed with live weights: the trace is walked, products replaced.

:func:`sparse` traces a function with abstract dense params and evaluates the trace with slots. A
product or convolution with a compact leaf becomes one of :mod:`granet_jax.compact.products`.
Transpositions, reshapes, casts and slices of stacks are recorded in a
:class:`granet_jax.compact.views.View`. For any other operation the leaf is unpacked. :func:`table`
lists what happens.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from granet_jax import jaxprs, report, trees
from granet_jax.compact.layouts import Layout, Layouts, written
from granet_jax.compact.rules import RULES
from granet_jax.compact.views import View
from granet_jax.compact.walk import Use, Walk, begin, run
from granet_jax.types import PyTree


def sparse(fn: Callable[..., Any], *, native: bool | None = None) -> Callable[..., Any]:
    """Turns ``fn(params, *args)`` into a function ``(values, layouts, *args)`` of live weights.

    Like ``fn``, it can be compiled, batched, scanned and differentiated with respect to the values
    (in reverse mode, any number of times). Arrays among the arguments are traced; other arguments
    (numbers, flags, functions) are passed to ``fn`` as they are.

    Args:
      fn: any function of a tree of params; it sees arrays of the dense shapes.
      native: which products run on live weights. None = those of layers of which at most 40 % of
        the weights are live (70 % of those of convolutions), by the kernels for live weights if the
        layout has lists, or by the kernels for blocks if it has blocks and the device is a GPU or a
        TPU. True = all products with lists or blocks (blocks on a CPU in JAX's interpreter: for
        tests). False = none.

    Returns:
      ``(values, layouts, *args, **kwargs) -> what fn returns``. It raises a ValueError if values
      and layouts do not fit together.

    Example: two weights of six are live, and one slot is dead.
      >>> import jax.numpy as jnp
      >>> from granet_jax.compact.layouts import written
      >>> index = jnp.array([4, 0, 6])  # in 3 inputs times 2 outputs
      >>> layouts = {"w": Layout(index, None, None, written((), (3,), (2,)))}
      >>> values = {"w": jnp.array([5.0, 7.0, 0.0]), "b": jnp.ones((1, 2))}
      >>> apply_fn = sparse(lambda params, x: x @ params["w"] + params["b"])
      >>> apply_fn(values, layouts, jnp.array([[1.0, 2.0, 3.0]])).tolist()
      [[23.0, 1.0]]
    """

    @functools.wraps(fn)
    def of_slots(values: PyTree, layouts: Layouts, *args: Any, **kwargs: Any) -> Any:
        return on_slots(begin(RULES, native), fn, values, layouts, args, kwargs)

    return of_slots


def table(
    fn: Callable[..., Any],
    values: PyTree,
    layouts: Layouts,
    *args: Any,
    native: bool | None = None,
    **kwargs: Any,
) -> str:
    """A table with a line for each use of a compact leaf by ``sparse(fn)``; nothing is computed.

    The columns are: path; shape of the product; share of slots among the weights of a layer; way;
    and why not a faster way. ``native`` = by the kernels for live weights; ``blocks`` = by the
    kernels for blocks; ``dense`` = the layer is unpacked for this product; ``unpacked`` = it is
    unpacked for an operation that is no product. A use inside a loop has one line.

    Args:
      fn: as for :func:`sparse`.
      values: the tree of slots; arrays or ``ShapeDtypeStruct``.
      layouts: by path.
      *args: arguments of ``fn``.
      native: as for :func:`sparse`.
      **kwargs: arguments of ``fn``.

    Returns:
      Lines of text, joined.

    Example:
      >>> import jax.numpy as jnp
      >>> layouts = {"w": Layout(jnp.arange(2), None, None, {"|3|2": None})}
      >>> def loss(params, x):
      ...     return jnp.sum(x @ params["w"]) + jnp.sum(jnp.abs(params["w"]))
      >>> print(table(loss, {"w": jnp.ones(2)}, layouts, jnp.ones((5, 3))))
      leaf  product          density  way            why
      w     (5, 3) x (3, 2)   0.3333  dense          no kernel
      w                       0.3333  unpacked: abs  no product
    """
    walk = begin(RULES, native)
    flat, tree = jax.tree.flatten((values, layouts, args, kwargs))

    def function(arrays: list[Any]) -> Any:
        values, layouts, args, kwargs = jax.tree.unflatten(tree, _merged(flat, arrays))
        return on_slots(walk, fn, values, layouts, args, kwargs)

    jax.eval_shape(function, _arrays(flat))
    rows = [("leaf", "product", "density", "way", "why")]
    for path in trees.paths(values):
        if path in layouts:
            uses = [use for use in walk.uses.values() if use.path == path]
            density = f"{layouts[path].density:.4f}"
            uses = uses or [Use(path, "", "not read", "")]
            rows += [(path, use.product, density, use.way, use.why) for use in uses]
    return report.aligned(rows, left=(0, 1, 3, 4))


def num_inputs(
    fn: Callable[..., Any], params: PyTree, *args: Any, prunable: trees.Rules = (), **kwargs: Any
) -> dict[str, int]:
    """How many leading axes of a layer the products of ``fn`` sum over, by path of the leaf.

    :func:`granet_jax.compact.pack` needs these numbers for kernels of more than two axes, such as
    ``(in, heads, dim)`` of attention: it makes lists for one way to see a leaf as a matrix. Nothing
    is computed.

    Args:
      fn: ``(params, *args) -> anything``.
      params: dense, arrays or ``ShapeDtypeStruct``.
      *args: arguments of ``fn``, arrays or ``ShapeDtypeStruct``.
      prunable: path rules, see :func:`granet_jax.trees.describe`.
      **kwargs: arguments of ``fn``.

    Returns:
      ``{path: number}``, without the leaves that no product reads as a whole.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"query": jnp.ones((8, 2, 4)), "out": jnp.ones((2, 4, 8))}
      >>> def apply_fn(params, x):
      ...     y = jnp.einsum("bi,ihd->bhd", x, params["query"])
      ...     return jnp.einsum("bhd,hdo->bo", y, params["out"])
      >>> num_inputs(apply_fn, params, jnp.ones((3, 8)))
      {'query': 1, 'out': 2}
    """
    walk, layouts, values = begin(RULES), {}, []
    for leaf, x in zip(trees.describe(params, prunable), jax.tree.leaves(params), strict=True):
        stack, shape = leaf.shape[: leaf.stack_axes], leaf.layer_shape
        slots: Any = jax.ShapeDtypeStruct((*stack, 1), jnp.int32)
        if leaf.prunable:
            layouts[leaf.path] = Layout(slots, None, None, written(stack, shape[:-1], shape[-1:]))
        shape = slots.shape if leaf.prunable else x.shape
        values.append(jax.ShapeDtypeStruct(shape, x.dtype))
    given = jax.tree.unflatten(jax.tree.structure(params), values), layouts, args, kwargs
    jax.eval_shape(functools.partial(on_slots, walk, fn), *given)
    return walk.cuts


def on_slots(
    walk: Walk,
    fn: Callable[..., Any],
    values: PyTree,
    layouts: Layouts,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """What :func:`sparse` does, for a given walk; leaves that have a layout are slots."""
    found = trees.paths(values)
    _check(found, layouts)
    flat, tree = jax.tree.flatten((values, args, kwargs))
    given = list(flat)
    for i, (path, leaf) in enumerate(found.items()):
        if path in layouts:
            given[i] = View.of_leaf(path, jnp.asarray(leaf), layouts[path], walk.zeros.get(path))
            flat[i] = jax.ShapeDtypeStruct(layouts[path].shape, leaf.dtype)

    def function(*arrays: Any) -> Any:
        params, args, kwargs = jax.tree.unflatten(tree, _merged(flat, arrays))
        return fn(params, *args, **kwargs)

    jaxpr, shapes = jaxprs.trace(function, *_arrays(flat))
    outs = run(walk, jaxpr, _arrays(given))
    outs = walk.dense("output", "output", outs, "returned")
    outs = [x if isinstance(x, jax.Array) else jnp.asarray(x) for x in outs]  # numbers of a trace
    return jax.tree.unflatten(jax.tree.structure(shapes), outs)


def _check(values: Mapping[str, Any], layouts: Layouts) -> None:
    for path, layout in layouts.items():
        if path not in values:
            raise ValueError(
                f"A layout for {path!r}, which is no leaf of the values; these are: "
                f"{', '.join(values)}. Values and layouts are made together, by pack."
            )
        shape, slots = jnp.shape(values[path]), layout.slots_shape
        if shape != slots:
            raise ValueError(
                f"{path} has shape {shape}; expected the slots of its layout, {slots}. Values and "
                "layouts are made together, by pack, which makes slots of dense params."
            )


def _is_array(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype") and not isinstance(x, type)


def _arrays(leaves: Sequence[Any]) -> list[Any]:
    return [x for x in leaves if isinstance(x, View) or _is_array(x)]


def _merged(leaves: Sequence[Any], arrays: Sequence[Any]) -> list[Any]:
    left = iter(arrays)
    return [next(left) if _is_array(x) else x for x in leaves]
