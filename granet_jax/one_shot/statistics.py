"""Calibration: statistics of the inputs of each product over batches, for any function of params.

The trace is walked as for live weights (:mod:`granet_jax.compact.walk`), with whole leaves instead
of slots: through transpositions, reshapes, casts, slices of stacks, ``scan``, ``remat`` and
branches. If a product reads a leaf, a statistic of its other operand is summed.
"""

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from granet_jax import jaxprs, trees
from granet_jax.compact import views
from granet_jax.compact.layouts import Layout, written
from granet_jax.compact.rules import RULES
from granet_jax.compact.views import View
from granet_jax.compact.walk import Walk, begin, run
from granet_jax.types import PyTree

StatisticFn = Callable[[jax.Array], jax.Array]  # float32 (rows, inputs) -> array; it is added up


def squares(x: jax.Array) -> jax.Array:
    """The sum of squares of each input, for Wanda and RIA.

    Args:
      x: float32 ``(rows, inputs)``.

    Returns:
      float32 ``(inputs,)``.

    Example:
      >>> import jax.numpy as jnp
      >>> squares(jnp.array([[1.0, 0.0], [2.0, 3.0]])).tolist()
      [5.0, 9.0]
    """
    return jnp.sum(x * x, axis=0)


def gram(x: jax.Array) -> jax.Array:
    """The Gram matrix ``x.T @ x``, for SparseGPT and ALPS.

    Args:
      x: float32 ``(rows, inputs)``.

    Returns:
      float32 ``(inputs, inputs)``.

    Example:
      >>> import jax.numpy as jnp
      >>> gram(jnp.array([[1.0, 0.0], [2.0, 3.0]])).tolist()
      [[5.0, 6.0], [6.0, 9.0]]
    """
    return jnp.matmul(x.T, x, precision="highest")


class Statistic(NamedTuple):
    """A statistic of the inputs of the products that read one leaf; see :func:`calibrate`.

    Attributes:
      values: float32 ``(layers, ...)``, a sum over rows for each layer that the leaf stacks.
      rows: float32 ``(layers,)``, how many rows there were (tokens, positions of a convolution).
      inputs: the axes of a layer that products sum over; the other axes are outputs.
    """

    values: jax.Array
    rows: jax.Array
    inputs: tuple[int, ...]


def calibrate(
    apply_fn: Callable[[PyTree, Any], Any],
    params: PyTree,
    batches: Iterable[Any],
    statistic: StatisticFn = squares,
    *,
    prunable: trees.Rules = (),
) -> dict[str, Statistic]:
    """Sums a statistic of the inputs of each product that reads a prunable leaf, over batches.

    Every row counts, also rows of padding. Each stacked layer (``Stacked`` rules) gets its own
    statistic, in a ``scan``, sliced, or batched as experts. If several products read a leaf, it
    gets the sum. The rows of a convolution are its patches. Products in the test of a
    ``while_loop`` are left out.

    Args:
      apply_fn: ``(params, batch) -> anything``, the forward pass of any library.
      params: tree of arrays.
      batches: of one or a few shapes; each is a pytree of arrays.
      statistic: ``squares``, ``gram`` or your own: a function of float32 rows ``(rows, inputs)`` of
        one product, whose results are summed.
      prunable: path rules, see :func:`granet_jax.trees.describe`.

    Returns:
      ``{path: Statistic}`` of all prunable leaves.

    Warns:
      UserWarning: an operation that is no product also reads a leaf; its inputs are not in the sum.

    Raises:
      ValueError: no batch; no product reads a prunable leaf, or the trace does not show which (the
        message gives its path and the reason); two products sum over different axes of a leaf.

    Example: two rows, three inputs.
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> batch = jnp.array([[1.0, 0.0, 2.0], [1.0, 0.0, 0.0]])
      >>> found = calibrate(lambda p, x: x @ p["kernel"], params, [batch])
      >>> found["kernel"].values.tolist(), found["kernel"].rows.tolist()
      ([[2.0, 0.0, 4.0]], [2.0])
    """
    leaves, sums, inputs = trees.describe(params, prunable), None, {}
    for batch in batches:
        if sums is None:
            inputs = plan(apply_fn, params, batch, leaves)
            sums = {path: _zeros(x, statistic) for path, x in inputs.items()}
            add = jax.jit(functools.partial(_add, apply_fn, leaves, statistic), donate_argnums=2)
        sums = add(params, batch, sums)
    if sums is None:
        raise ValueError("calibrate needs a batch at least; got none.")
    return {path: Statistic(*sums[path], inputs[path].axes) for path in inputs}


class Inputs(NamedTuple):
    """The inputs of the products that read a leaf."""

    number: int  # of the leaf, in the order of first products
    axes: tuple[int, ...]  # the axes of a layer that products sum over
    size: int  # inputs of a layer
    num_layers: int


def plan(
    apply_fn: Callable[[PyTree, Any], Any],
    params: PyTree,
    batch: Any,
    leaves: Sequence[trees.Leaf],
) -> dict[str, Inputs]:
    """The prunable leaves in the order in which products read them; nothing is computed.

    It warns and raises as :func:`calibrate`.
    """
    seen: dict[str, tuple[int, ...]] = {}
    uses: dict[Any, Any] = {}

    def note(view: View, x: Any, axes: tuple[int, ...], rows: Any, sums: Any) -> None:
        if seen.setdefault(view.path, axes) != axes:
            raise ValueError(
                f"{view.path} is summed over axes {seen[view.path]} in one product and over {axes} "
                "in another, so its weights have no inputs of their own. Keep it dense by a rule."
            )

    jax.eval_shape(functools.partial(_walk, apply_fn, leaves, note, uses), params, batch, {})
    ways: dict[str, set[str]] = {leaf.path: set() for leaf in leaves if leaf.prunable}
    for use in uses.values():
        ways[use.path].add(f"{use.way}, {use.why}")
    told = {path: "; ".join(sorted(each)) or "not read" for path, each in ways.items()}
    if lost := [f"{path} ({why})" for path, why in told.items() if path not in seen]:
        raise ValueError(
            f"The trace finds no product that reads {', '.join(lost)}; its inputs are not known. "
            "Keep it dense by a rule; where axes stack layers, say so by gj.Stacked(n); where "
            "something is done to it first, do that to the parameters before."
        )
    if partly := [f"{path} ({why})" for path, why in told.items() if ways[path]]:
        warnings.warn(
            f"Some leaves are read by what is no product, too: {', '.join(partly)}. What they meet "
            "there is not in their statistics.",
            stacklevel=3,
        )
    by_path = {leaf.path: leaf for leaf in leaves}
    return {
        path: Inputs(
            number,
            axes,
            math.prod(by_path[path].layer_shape[i] for i in axes),
            by_path[path].num_layers,
        )
        for number, (path, axes) in enumerate(seen.items())
    }


def _zeros(x: Inputs, statistic: StatisticFn) -> tuple[jax.Array, jax.Array]:
    one = jax.eval_shape(statistic, jax.ShapeDtypeStruct((1, x.size), jnp.float32))
    return jnp.zeros((x.num_layers, *one.shape), one.dtype), jnp.zeros(x.num_layers, jnp.float32)


def _add(
    apply_fn: Callable[..., Any],
    leaves: Sequence[trees.Leaf],
    statistic: StatisticFn,
    params: PyTree,
    batch: Any,
    sums: dict[str, Any],
) -> dict[str, Any]:
    """The sums, with those of a batch added."""

    def note(view: View, x: jax.Array, axes: Any, rows: Any, sums: dict[str, Any]) -> None:
        values, count = sums[view.path]
        layers = view.zeros.reshape(-1)
        found = jax.vmap(statistic)(_stack(rows))
        found = jnp.broadcast_to(found, (len(layers), *found.shape[1:]))
        sums[view.path] = values.at[layers].add(found), count.at[layers].add(rows.shape[-2])

    return _walk(apply_fn, leaves, note, {}, params, batch, sums)


def of_layer(
    apply_fn: Callable[..., Any],
    leaves: Sequence[trees.Leaf],
    statistic: StatisticFn,
    numbers: Mapping[str, int],
) -> Callable[..., Any]:
    """``(params, batch, sums, (number, layer)) -> sums`` for one layer of one leaf, both traced.

    ``sums`` holds one statistic for each size of inputs. So memory is needed for one layer at a
    time, and one program serves all layers.
    """

    def add(params: PyTree, batch: Any, sums: dict[str, Any], which: Any) -> dict[str, Any]:
        def note(view: View, x: Any, axes: Any, rows: jax.Array, sums: dict[str, Any]) -> None:
            key = str(rows.shape[-1])
            layers = view.zeros.reshape(-1)
            is_this = (layers == which[1]) & (numbers[view.path] == which[0])
            stacked = _stack(rows)

            def added(state: Any) -> Any:
                place = jnp.argmax(is_this) if len(stacked) > 1 else 0
                return state[0] + statistic(stacked[place]), state[1] + rows.shape[-2]

            sums[key] = jax.lax.cond(jnp.any(is_this), added, lambda state: state, sums[key])

        return _walk(apply_fn, leaves, note, {}, params, batch, sums)

    return jax.jit(add, donate_argnums=2)


def order(
    apply_fn: Callable[..., Any],
    params: PyTree,
    batch: Any,
    leaves: Sequence[trees.Leaf],
    found: Mapping[str, Inputs],
) -> list[tuple[str, int]]:
    """Layers ``(path, place in the stack)`` in the order in which a batch reaches them.

    A counter is carried through loops and branches. Layers that are not reached come last.
    """

    def note(view: View, x: Any, axes: Any, rows: Any, sums: dict[str, Any]) -> None:
        layers = view.zeros.reshape(-1)
        sums[view.path] = sums[view.path].at[layers].min(sums[_CLOCK])
        sums[_CLOCK] += 1

    last = jnp.iinfo(jnp.int32).max
    clocks = {path: jnp.full(x.num_layers, last, jnp.int32) for path, x in found.items()}
    start = {**clocks, _CLOCK: jnp.zeros([], jnp.int32)}
    times = jax.jit(functools.partial(_walk, apply_fn, leaves, note, {}))(params, batch, start)
    layers = [
        (int(time), x.number, path, i)
        for path, x in found.items()
        for i, time in enumerate(times[path])
    ]
    return [(path, i) for _, _, path, i in sorted(layers, key=lambda layer: (*layer[:2], layer[3]))]


_CLOCK = "\0"  # a key that is no path


def zeros_by_size(found: Mapping[str, Inputs], statistic: StatisticFn) -> dict[str, Any]:
    """The sums with which :func:`of_layer` starts."""
    each = {str(x.size): _zeros(x._replace(num_layers=1), statistic) for x in found.values()}
    return {size: (values[0], rows[0]) for size, (values, rows) in each.items()}


Note = Callable[[View, Any, tuple[int, ...], Any, dict[str, Any]], None]


def _walk(
    apply_fn: Callable[..., Any],
    leaves: Sequence[trees.Leaf],
    note: Note,
    uses: dict[Any, Any],
    params: PyTree,
    batch: Any,
    sums: dict[str, Any],
) -> dict[str, Any]:
    """Evaluates a function; ``note(view, x, axes, rows, sums)`` is called for its products."""
    walk = begin(RULES | _rules(note), sums=sums)._replace(uses=uses)
    flat, tree = jax.tree.flatten((params, batch))
    given = list(flat)
    for i, leaf in enumerate(leaves):
        if leaf.prunable:
            stack = leaf.shape[: leaf.stack_axes]
            layout = Layout(None, None, None, written(stack, leaf.layer_shape, ()))  # type: ignore[arg-type]
            index = jnp.arange(leaf.num_layers).reshape(stack)
            given[i] = Whole.of_leaf(leaf.path, flat[i], layout, index)

    def function(*arrays: Any) -> Any:
        return apply_fn(*jax.tree.unflatten(tree, arrays))

    jaxpr, _ = jaxprs.trace(function, *flat)
    walk.dense("output", "output", run(walk, jaxpr, given), "returned")
    return walk.sums


@jax.tree_util.register_pytree_node_class
class Whole(View):
    """A dense leaf as equations see it; ``zeros`` identify its layers."""

    def map(self, f: Callable[[Any], Any]) -> "Whole":
        """The view of ``f`` of the weights."""
        return Whole(f(self.values), self.layout, self.zeros, self.path, self.axes)

    def unpacked(self) -> jax.Array:
        """The array."""
        parts = [part for axis in self.axes for part in axis]
        return views.from_leaf(
            self.values.reshape([n for _, n in views.in_leaf(parts)]), parts
        ).reshape(self.shape)


def _rules(note: Note) -> dict[str, Any]:
    """Rules for products, and for equations that compact leaves handle differently."""

    def call(walk: Walk, eqn: Any, given: list[Any]) -> Any:
        return run(walk.inside(eqn), jaxprs.called(eqn), given)

    inlined = dict.fromkeys(("custom_jvp_call", "custom_vjp_call"), call)
    return {
        "dot_general": functools.partial(_dot_general, note),
        "conv_general_dilated": functools.partial(_convolution, note),
        **inlined,
    }


def _dot_general(note: Note, walk: Walk, eqn: Any, given: list[Any]) -> Any:
    if all(isinstance(x, View) for x in given):
        return "of two leaves"
    side = 0 if isinstance(given[0], View) else 1
    view, x = given[side], given[1 - side]
    sums, batch = eqn.params["dimension_numbers"]
    axes = _summed_axes(view, sums[side], x)
    if isinstance(axes, str):
        return axes
    if any(view.axes[i] and not view.stacks(i) for i in batch[side]):
        return "batched along a layer: stack it by a rule, gj.Stacked(1)"
    if any(view.axes[i] for i in batch[side]) and _merges_layers(view, batch[side]):
        return "some of its axes of layers are batched, and others merged with outputs"
    note(view, x, axes, _rows(view, x, side, sums, batch), walk.sums)
    operands = (view.unpacked(), x) if side == 0 else (x, view.unpacked())
    return [eqn.primitive.bind(*operands, **eqn.params)]


def _merges_layers(view: View, batch: Sequence[int]) -> bool:
    """Whether an axis that is not batched has both layers and a part of a layer."""
    rest = [axis for i, axis in enumerate(view.axes) if i not in batch and not view.stacks(i)]
    return any(stride >= view.layout.layer_size for axis in rest for stride, _ in axis)


def _summed_axes(view: View, sums: Sequence[int], x: Any) -> tuple[int, ...] | str:
    """The axes of a layer that a product with x sums over; or a str, why they are unknown."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return "complex inputs"
    shape = view.layout.layer_shape
    summed = [part for i in sums for part in view.axes[i]]
    if any(stride >= view.layout.layer_size for stride, _ in summed):
        return "sums over layers: stack no axis of it by a rule"
    axes = []
    for i, n in enumerate(shape):
        stride = math.prod(shape[i + 1 :])
        within = math.prod(m for s, m in summed if stride <= s < stride * n)
        if within == n > 1:
            axes.append(i)
        elif within > 1:
            return "sums over a part of an axis"
    if math.prod(shape[i] for i in axes) != math.prod(m for _, m in summed):
        return "sums over a part of an axis"
    return tuple(axes)


def _stack(rows: jax.Array) -> jax.Array:
    """Rows as ``(layers, rows, inputs)``, from any number of axes of layers."""
    return rows.reshape(math.prod(rows.shape[:-2]), *rows.shape[-2:])


def _rows(view: View, x: Any, side: int, sums: Any, batch: Any) -> jax.Array:
    """The data of a product as ``(*layers, rows, inputs)``, inputs in the order of the leaf."""
    parts = [part for i in sums[side] for part in view.axes[i]]
    x_sums, x_batch = sums[1 - side], batch[1 - side]
    stacked = sorted(  # batched layers, the largest stride first as in the view's arrays
        (pair for pair in zip(batch[side], x_batch, strict=True) if view.axes[pair[0]]),
        key=lambda pair: -view.axes[pair[0]][0][0],
    )
    layers = [j for _, j in stacked]
    rest = [j for j in range(x.ndim) if j not in layers and j not in x_sums]
    x = x.astype(jnp.float32).transpose(*layers, *rest, *x_sums)
    lead = x.shape[: len(layers)]
    num_rows = math.prod(x.shape[len(lead) : len(lead) + len(rest)])
    x = views.to_leaf(x.reshape(*lead, num_rows, *(n for _, n in parts)), parts)
    x = x.reshape(*lead, num_rows, math.prod(n for _, n in parts))
    if not stacked:
        return x  # of all layers
    free = [i for i, axis in enumerate(view.axes) if view.stacks(i) and i not in batch[side]]
    strides = [view.axes[i][0][0] for i, _ in stacked]
    for i in free:  # layers that share an input, such as experts
        place = sum(stride > view.axes[i][0][0] for stride in strides)
        strides.append(view.axes[i][0][0])
        x = jnp.broadcast_to(
            jnp.expand_dims(x, place), (*x.shape[:place], view.shape[i], *x.shape[place:])
        )
    return x


def _convolution(note: Note, walk: Walk, eqn: Any, given: list[Any]) -> Any:
    x, view = given
    params = eqn.params
    if not isinstance(view, View) or isinstance(x, View):
        return "as the image of a convolution"
    if params["feature_group_count"] * params["batch_group_count"] > 1:
        return "a grouped convolution"
    numbers = params["dimension_numbers"]
    _, *rest = numbers.rhs_spec  # output, input, space
    axes = _summed_axes(view, rest, x)
    if isinstance(axes, str):
        return axes
    patches = jax.lax.conv_general_dilated_patches(
        x.astype(jnp.float32),
        [view.shape[i] for i in rest[1:]],
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        numbers,
        precision=jax.lax.Precision.HIGHEST,
    )  # channels (input, space), as rest has them
    patches = jnp.moveaxis(patches, numbers.out_spec[1], -1)
    parts = [part for i in rest for part in view.axes[i]]
    num_rows, num_inputs = math.prod(patches.shape[:-1]), patches.shape[-1]
    rows = views.to_leaf(patches.reshape(num_rows, *(n for _, n in parts)), parts)
    note(view, x, axes, rows.reshape(num_rows, num_inputs), walk.sums)
    return [eqn.primitive.bind(x, view.unpacked(), **params)]
