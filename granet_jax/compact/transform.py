"""``compact.sparsify``: any elementwise optax optimizer, training live weights alone."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from granet_jax import jaxprs, moments, trees
from granet_jax import transform as masked
from granet_jax.checkpoint import exportable
from granet_jax.compact import elementwise, packing
from granet_jax.compact import layouts as _layouts
from granet_jax.compact.layouts import Layout, Layouts, Lists
from granet_jax.types import Event, Method, PyTree


class CompactState(NamedTuple):
    """State of :func:`sparsify`: plain arrays, for any kind of file."""

    mask_step: jax.Array  # int32 scalar, updates done
    method: Any  # the method's state without its masks, which follow from the layouts
    inner: Any  # the wrapped optimizer's state, on slots
    layouts: dict[str, Layout]  # by path
    outgrown: jax.Array  # int32 scalar, weights whose mask could not be followed so far, see check
    mistimed: jax.Array  # int32 scalar, steps whose event= differed from the method's schedule
    written_by: dict[str, None]  # {name of the method: None}


for _kind in (CompactState, Layout, Lists):
    exportable(_kind)


def sparsify(
    inner: optax.GradientTransformation,
    method: Method,
    prunable: trees.Rules = (),
    *,
    capacity: Mapping[str, int] | None = None,
    num_inputs: Mapping[str, int] | None = None,
    kernels: bool | None = None,
    block: tuple[int, int] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that it trains live weights alone, under the masks of ``method``.

    The counterpart of :func:`granet_jax.sparsify`, on slots: given the same dense gradients at
    events, both choose the same masks and do the same to each live weight. ``init`` takes the
    *dense* parameters; everything else works on slots::

        state = tx.init(params)
        layouts = compact.get_layouts(state)
        values = compact.to_slots(params, layouts)
        loss, grads = jax.value_and_grad(compact.sparse(loss_fn))(values, layouts, batch)
        updates, state = tx.update(grads, state, values, dense_grads=thunk)
        values = optax.apply_updates(values, updates)

    At an event, masks and weights become dense for that step, and the method decides. Weights in
    its ``keep`` keep their slots, and their values and moments bit for bit. Grown weights take the
    slots of dropped ones, in the order of their index, with value 0 and the moments of the start.
    Slots left over are dead.

    ``update`` takes two arguments besides those of ``inner``:

    * ``dense_grads``: a function without arguments that returns the gradients of this batch for
      the dense parameters, best by :func:`granet_jax.compact.value_and_dense_grad`. It is traced
      only in the branch of the event. Methods that do not grow by gradients do not need it.
    * ``event``: None = one program decides by the step. True or False is for loops that call
      ``method.is_update_step(step)`` themselves and compile two programs: the program without an
      event is faster and does not need an event's memory.

    As with masks, ``optax.MultiSteps`` and ``optax.apply_if_finite`` stand outside, clipping
    inside. If the ``init`` of a wrapper has copied the dense parameters,
    ``compact.to_slots(state, layouts, params)`` turns the copies into slots.

    Args:
      inner: an elementwise optax transformation, which treats all weights alike.
      method: a method, such as :func:`granet_jax.granet` returns.
      prunable: the path rules that the method was given.
      capacity: see :func:`granet_jax.compact.pack`; required if ``init`` runs under ``jit``.
      num_inputs: see :func:`granet_jax.compact.pack`.
      kernels: whether to keep lists for the native kernels; None = if they run here.
      block: the block of the method's ``structures.block``. Slots then hold whole blocks, which
        :mod:`granet_jax.kernels` multiplies on GPUs and TPUs; see :func:`granet_jax.compact.pack`.

    Returns:
      A ``GradientTransformationExtraArgs`` whose state is :class:`CompactState`.

    Raises:
      TypeError: ``inner`` is no optax transformation, or ``method`` no method.
      ValueError: in ``init``, as :func:`granet_jax.sparsify`, and for a method that keeps dense
        averages (``snfs``) or an optimizer that depends on the shapes of parameters (muon,
        adafactor, means over a leaf, weight decay for matrices only). In ``update``, without
        ``values``, with a state of another method or model, or without ``dense_grads`` if the
        method grows by gradients.

    Note:
      Norms over a leaf (LAMB, clipping) are those of its live weights, as under masks.
      An optimizer that draws noise draws it for slots.

    Example:
      >>> import granet_jax as gj, jax, jax.numpy as jnp, optax
      >>> params = {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}
      >>> method = gj.static(sparsity=0.75, key=jax.random.key(0))
      >>> tx = gj.compact.sparsify(optax.adam(1e-3), method)
      >>> state = tx.init(params)
      >>> values = gj.compact.to_slots(params, gj.compact.get_layouts(state))
      >>> updates, state = tx.update(values, state, values)
      >>> {name: x.shape for name, x in optax.apply_updates(values, updates).items()}
      {'bias': (4,), 'kernel': (4,)}
    """
    masked.sparsify(inner, method)  # raises where one is something else
    inner = moments.told_keep(inner)

    def init(params: PyTree) -> CompactState:
        masked.check_params(params)
        method_state = method.init(params)
        _check_method(method, method_state, params)
        values, layouts = packing.pack(
            params,
            method_state[0],
            prunable,
            capacity=capacity,
            num_inputs=num_inputs,
            kernels=kernels,
            block=block,
        )
        inner_state = inner.init(values)
        moments.check_maskable(inner_state, values)
        elementwise.check(inner, params, values, layouts)
        dense_state = jax.eval_shape(inner.init, params)
        masked.check_frozen(inner, dense_state, method, method_state, params)
        step, mistimed = (jnp.zeros([], jnp.int32) for _ in range(2))
        outgrown = _num_left_out(method_state[0], layouts)
        without = _with_masks(method_state, ())
        return CompactState(
            step, without, inner_state, dict(layouts), outgrown, mistimed, {method.name: None}
        )

    def update(
        grads: PyTree,
        state: CompactState,
        params: PyTree | None = None,
        *,
        dense_grads: Callable[[], PyTree] | None = None,
        event: bool | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, CompactState]:
        values = params  # optax's wrappers call them params
        _check_update(grads, state, values, method)
        initial = inner.init(jax.tree.map(jnp.zeros_like, values))
        moments.check_same_optimizer(state.inner, initial, values)
        step = optax.safe_increment(state.mask_step)
        is_event = jnp.asarray(method.is_update_step(step))
        live = _live(values, state.layouts)

        def change(carry: Any, live: PyTree) -> tuple[Any, PyTree]:
            method_state, layouts, inner_state, outgrown = carry
            live_grads = masked.where(live, grads)
            provisional, _ = inner.update(live_grads, inner_state, values, keep=live, **extra_args)
            after = masked.where(live, optax.apply_updates(values, provisional))
            of_batch = _dense_gradients(dense_grads, method, carry, values, extra_args)
            # Dense weights are made after the gradients, so that they can reuse their memory.
            after, of_batch = jax.lax.optimization_barrier((after, of_batch))
            weights = packing.unpack(after, layouts)
            masks = packing.masks(values, layouts)
            dense = packing.unpack(inner_state, layouts, values)  # compiled only if it is read
            seen = Event(weights, of_batch, masks, step, None, dense, extra_args)
            whole, keep = method.update(_with_masks(method_state, masks), seen)
            new_layouts, stays, more = _reslot(live, layouts, whole[0], keep)
            mirrored = moments.mirrors(inner.init, initial, values)
            inner_state = moments.reset(inner_state, initial, mirrored, stays)
            return (_with_masks(whole, ()), new_layouts, inner_state, outgrown + more), stays

        carry = state.method, state.layouts, state.inner, state.outgrown
        if event is None:
            carry, stays = masked.do_if(is_event, change, (carry, live), step)
        else:
            carry, stays = change(carry, live) if event else (carry, live)
        method_state, layouts, inner_state, outgrown = carry
        kept_grads, kept = (_apart(masked.where(stays, x), layouts, step) for x in (grads, values))
        updates, inner_state = inner.update(kept_grads, inner_state, kept, keep=stays, **extra_args)
        updates = _apart(jax.tree.map(masked.to_zero, stays, updates, values), layouts, step)
        wrong = jnp.zeros_like(is_event) if event is None else is_event != event
        mistimed = state.mistimed + wrong.astype(jnp.int32)
        return updates, CompactState(
            step, method_state, inner_state, layouts, outgrown, mistimed, state.written_by
        )

    return optax.GradientTransformationExtraArgs(init, update)


def get_state(opt_state: Any) -> CompactState:
    """The :class:`CompactState` inside an optimizer state, however deep it is nested.

    Args:
      opt_state: state of a transformation that contains one ``compact.sparsify``.

    Returns:
      The state itself, not a copy.

    Raises:
      ValueError: there is none, or more than one.

    Example:
      >>> import granet_jax as gj, jax.numpy as jnp, optax
      >>> tx = optax.chain(gj.compact.sparsify(optax.sgd(0.1), gj.static()))
      >>> int(get_state(tx.init({"kernel": jnp.ones((2, 2))})).outgrown)
      0
    """
    states = [x for x in jax.tree.leaves(opt_state, is_leaf=is_compact) if is_compact(x)]
    if len(states) != 1:
        raise ValueError(
            f"Expected one state of compact.sparsify in the optimizer state, found {len(states)} "
            f"in a {type(opt_state).__name__}. Pass the state that tx.init returned."
        )
    return states[0]


def get_layouts(opt_state: Any) -> dict[str, Layout]:
    """The layouts inside an optimizer state.

    Args:
      opt_state: as for :func:`get_state`.

    Returns:
      ``{path: Layout}`` for the leaves that are compact.

    Raises:
      ValueError: as :func:`get_state`.

    Example:
      >>> import granet_jax as gj, jax.numpy as jnp, optax
      >>> tx = gj.compact.sparsify(optax.sgd(0.1), gj.static())
      >>> layouts = get_layouts(tx.init({"bias": jnp.ones(2), "kernel": jnp.ones((2, 2))}))
      >>> {path: layout.capacity for path, layout in layouts.items()}
      {'kernel': 4}
    """
    return get_state(opt_state).layouts


def check(opt_state: Any) -> None:
    """Checks, outside ``jit``, that a run has done what its method asked for.

    Args:
      opt_state: as for :func:`get_state`; concrete arrays.

    Raises:
      ValueError: grown weights got no slot (a method that moves weights between layers needs a
        larger ``capacity``), the method prunes leaves that have no slots (it has other ``prunable``
        rules), or ``event=`` differed from the method's schedule at some steps.

    Example:
      >>> import granet_jax as gj, jax.numpy as jnp, optax
      >>> check(gj.compact.sparsify(optax.sgd(0.1), gj.static()).init({"w": jnp.ones((2, 2))}))
    """
    state = get_state(opt_state)
    if int(jnp.max(state.outgrown)):
        raise ValueError(
            f"{int(jnp.max(state.outgrown))} weights that were to grow found no slot and stayed "
            "off, or were to be pruned in leaves that have no slots. Give compact.sparsify a "
            "larger capacity, or the prunable rules of the method."
        )
    if int(jnp.max(state.mistimed)):
        raise ValueError(
            f"update was told event= at {int(jnp.max(state.mistimed))} steps at which the method "
            "says otherwise. Ask method.is_update_step(step), where the first update is step 1."
        )


def is_compact(x: Any) -> bool:
    """Whether it is a state of :func:`sparsify`."""
    return isinstance(x, CompactState)


def _num_left_out(masks: PyTree, layouts: Layouts) -> jax.Array:
    """How many live weights have no slot; 0 unless the capacity is too small."""
    found = trees.paths(masks)
    each = [
        jnp.sum(found[path], dtype=jnp.int32) - jnp.sum(_layouts.live(x), dtype=jnp.int32)
        for path, x in layouts.items()
    ]
    return sum(each, start=jnp.zeros([], jnp.int32))


def _live(values: PyTree, layouts: Layouts) -> PyTree:
    """Which slots hold a live weight; all True in leaves that are dense."""

    def live(path: str, x: jax.Array) -> jax.Array:
        return _layouts.live(layouts[path]) if path in layouts else jnp.ones_like(x, dtype=bool)

    return packing.map_by_path(live, values)


def _apart(tree: PyTree, layouts: Layouts, step: jax.Array) -> PyTree:
    """The same values, hidden from the compiler, so that it does not fuse products with sums.

    Under :func:`granet_jax.sparsify` masks prevent this; without, rounding would differ.
    """
    zero = jnp.minimum(step, 1) - 1  # steps begin at 1, which the compiler does not know

    def apart(path: str, x: jax.Array) -> jax.Array:
        if path in layouts or x.dtype != jnp.float32:
            return x
        bits = jax.lax.bitcast_convert_type(x, jnp.int32) ^ zero
        return jax.lax.bitcast_convert_type(bits, jnp.float32)

    return packing.map_by_path(apart, tree)


def _reslot(
    live: PyTree, layouts: Layouts, masks: PyTree, keep: PyTree
) -> tuple[dict[str, Layout], PyTree, jax.Array]:
    """New layouts, which slots kept their weight, and how many masks could not be followed."""
    masks, kept, new, outgrown = trees.paths(masks), trees.paths(keep), {}, jnp.zeros([], jnp.int32)
    stays = dict(trees.paths(live))
    for path, mask in masks.items():
        if path in layouts:
            new[path], stays[path], more = packing.reslot(layouts[path], mask, kept[path])
        else:  # dense: a method with rules of its own may prune it
            more = jnp.sum(~mask, dtype=jnp.int32)
        outgrown += more
    return new, packing.map_by_path(lambda path, _: stays[path], live), outgrown


def _with_masks(method_state: Any, masks: PyTree) -> Any:
    """A method's state with other masks; they are its first field."""
    if hasattr(method_state, "_replace"):
        return method_state._replace(**{method_state._fields[0]: masks})
    return (masks, *method_state[1:])


def _dense_gradients(
    thunk: Callable[[], PyTree] | None,
    method: Method,
    carry: tuple[Any, Layouts, Any, Any],
    values: PyTree,
    extra_args: dict[str, Any],
) -> PyTree:
    if thunk is not None:
        return thunk()
    method_state, layouts, inner_state, _ = carry
    params = packing.abstract_params(values, layouts)
    inner = jax.eval_shape(lambda: packing.unpack(inner_state, layouts, values))
    if _reads_gradients(method, method_state, params, inner, extra_args):
        raise ValueError(
            f"The method {method.name} grows weights by gradients, which slots have not. Give "
            "update a function that computes the dense ones, used at events alone: dense_grads="
            "lambda: compact.value_and_dense_grad(loss_fn)(values, layouts, batch)[1]."
        )
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params)


def _reads_gradients(
    method: Method, method_state: Any, params: PyTree, inner: Any, extra_args: dict[str, Any]
) -> bool:
    """Whether the method's trace reads gradients."""
    masks = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, bool), params)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    rest = _with_masks(elementwise.abstract(method_state), masks)
    params = elementwise.abstract(params)

    def update(grads: PyTree, state: Any, params: PyTree, step: jax.Array, inner: Any) -> Any:
        return method.update(state, Event(params, grads, state[0], step, None, inner, extra_args))

    closed = jax.make_jaxpr(update)(params, rest, params, step, elementwise.abstract(inner))
    return any(jaxprs.reads(closed)[: len(jax.tree.leaves(params))])


def _check_method(method: Method, method_state: Any, params: PyTree) -> None:
    """Refuses methods that keep dense floats."""
    rest = _with_masks(method_state, ())
    owners = trees.owners(rest, params)
    dense = [
        "/".join(trees.names(path))
        for path, x in jax.tree_util.tree_leaves_with_path(rest)
        if owners[path] is not None and jnp.issubdtype(x.dtype, jnp.inexact)
    ]
    if method.observe is not None or dense:
        raise ValueError(
            f"The method {method.name} keeps an average of dense gradients"
            f"{', ' + ', '.join(dense[:3]) if dense else ''}, which is as large as the dense "
            "weights and needs dense gradients at every step. Use granet_jax.sparsify, or a method "
            "that looks at gradients at events alone (rigl, granet)."
        )


def _check_update(grads: PyTree, state: Any, values: PyTree | None, method: Method) -> None:
    """Refuses arguments that do not belong together."""
    if values is None:
        raise ValueError("compact.sparsify needs the slots: call tx.update(grads, state, values).")
    if not is_compact(state):
        raise ValueError(
            f"compact.sparsify expects its own state, got a {type(state).__name__}. A state of "
            "granet_jax.sparsify does not become one; a file that is read without an example is "
            "put right by granet_jax.check_restored(restored, example)."
        )
    if state.written_by.keys() != {method.name}:
        raise ValueError(
            f"The state was written by the method {', '.join(state.written_by)}, this one is "
            f"{method.name}."
        )
    found = trees.paths(values)
    for path, layout in state.layouts.items():
        if path not in found or found[path].shape != layout.slots_shape:
            got = found[path].shape if path in found else "nothing"
            raise ValueError(
                f"The layout of {path} has slots {layout.slots_shape}, but values have {got}. "
                "tx.init takes dense parameters; update takes slots, "
                "compact.to_slots(params, compact.get_layouts(state))."
            )
    given = trees.paths(grads)
    for path in sorted(found.keys() | given.keys()):
        shapes = [jnp.shape(x[path]) if path in x else "none" for x in (given, found)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"The gradient of {path} has shape {shapes[0]}, its slots {shapes[1]}. "
                "Differentiate compact.sparse(loss_fn) by its values."
            )
