"""``sparsify``: any optax optimizer, training sparse. The only file that knows optimizer state."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from granet_jax import trees
from granet_jax.masks import check_masks
from granet_jax.types import Method, PyTree, SparseState

# Buffers of optax that are shaped like the parameters but are no moments: the base iterate of
# schedule-free; the starting points of prodigy, madgrad, mechanic, DoG and COCOB; the running mean
# of gradients of MultiSteps, which growth needs.
_NOT_MOMENTS = frozenset({"z", "params0", "x0", "init_params", "init_particles", "acc_grads"})


def sparsify(
    inner: optax.GradientTransformation, method: Method
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that it trains sparse, as ``method`` says.

    One ``update``, in order, where t is the step now being taken (the first is 1):

    1. Where t is an event, ``inner`` takes a provisional step on masked gradients. The method sees
       the weights after it, ``where(mask, p + u, 0)``, and the raw gradients of this batch, and
       returns new masks and ``keep``, the weights that live through the event. At other steps
       ``keep`` is the masks.
    2. ``inner`` takes the step, on gradients, moments and weights that are 0 outside ``keep``. An
       optimizer that turns zeros into zeros so leaves moments of exactly 0 there (adafactor leaves
       its epsilon of 1e-30, ``add_noise`` its noise, until the next step). To the weights in
       ``keep`` it does what the provisional step did; where an update depends on other weights
       (norms, factored moments), those in ``keep`` count.
    3. The updates returned are ``where(keep, u, -p)``: plain ``optax.apply_updates`` leaves exact
       zeros where weights are masked, and newly grown weights start at exactly 0.

    The result is an optax transformation like any other. Put gradient clipping *inside*, so that
    the norm counts live weights only; put ``optax.MultiSteps`` and ``optax.apply_if_finite``
    *outside*; nothing after it in a chain may touch the updates. For a sparse start also mask the
    initial parameters once, ``apply_masks(params, get_masks(opt_state))``; without that the first
    forward pass is dense and the first update sets the zeros.

    Moments are the leaves of the inner state that end in a parameter's path and have its shape.
    Factored moments (adafactor) have other shapes and stay as they are, and so do buffers that are
    no moments (schedule-free's ``z``, prodigy's ``params0``, accumulated gradients). So
    initialise schedule-free on masked parameters, and ``apply_masks`` what its
    ``schedule_free_eval_params`` returns.

    Args:
      inner: any optax transformation that ends in parameter updates.
      method: what :func:`granet_jax.granet` and its kin return.

    Returns:
      A ``GradientTransformationExtraArgs`` whose state is :class:`granet_jax.types.SparseState`.
      Updates have the dtype of ``inner``'s, or the parameters' where that is wider (``-p`` has to
      be exact).

    Raises:
      TypeError: ``inner`` or ``method`` is something else.
      ValueError: in ``init``, where the inner state holds large buffers that cannot be matched
        with parameters (flattened or limited-memory optimizers); in ``update``, without
        ``params``.

    Note:
      A parameter that is NaN or infinite cannot be brought to 0 by adding to it. Counts and masks
      stay right; ``apply_masks`` cleans such weights, ``optax.apply_if_finite`` keeps them out.

    Example:
      >>> import granet_jax as gj, jax, jax.numpy as jnp, optax
      >>> params = {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}
      >>> method = gj.static(sparsity=0.75, key=jax.random.key(0))
      >>> tx = gj.sparsify(optax.adam(1e-3), method)
      >>> state = tx.init(params)
      >>> params = gj.apply_masks(params, gj.get_masks(state))
      >>> updates, state = tx.update(params, state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> int((params["kernel"] != 0).sum()), int((params["bias"] != 0).sum())
      (4, 4)
    """
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            f"sparsify wraps an optax transformation, got {type(inner).__name__}. "
            "Call it as sparsify(optax.sgd(0.1), method)."
        )
    if not isinstance(method, Method):
        raise TypeError(
            f"sparsify needs a Method, got {type(method).__name__}. "
            "Call the method first: sparsify(inner, granet_jax.granet(...))."
        )
    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> SparseState:
        inner_state = inner.init(params)
        _check_maskable(inner_state, params)
        method_state = method.init(params)
        keep = jax.tree.map(jnp.copy, method_state[0])
        return SparseState(jnp.zeros([], jnp.int32), method_state, inner_state, keep)

    def update(
        grads: PyTree, state: SparseState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, SparseState]:
        if params is None:
            raise ValueError(
                "sparsify needs the parameters: call tx.update(grads, opt_state, params)."
            )
        step = optax.safe_increment(state.mask_step)
        method_state = state.method
        if method.observe is not None:
            method_state = method.observe(method_state, grads)

        def event(method_state: Any, _: PyTree) -> tuple[Any, PyTree]:
            # Computed here, in the rare branch: XLA would materialise it as an operand. And the
            # masks come from the operand: their other uses would have them copied at every step.
            masks = method_state[0]
            live_grads = _where(masks, grads)
            provisional, _ = inner.update(live_grads, state.inner, params, **extra_args)
            weights = _where(masks, optax.apply_updates(params, provisional))
            return method.update(method_state, weights, grads, step)

        def catch_up(method_state: Any, _: PyTree) -> tuple[Any, PyTree]:
            return method_state, jax.tree.map(jnp.copy, method_state[0])

        # What the last event grew is not in its keep; it takes part from the next step on.
        operands = _do_if(method.is_update_step(step - 1), catch_up, (method_state, state.keep))
        method_state, keep = _do_if(method.is_update_step(step), event, operands)
        updates, inner_state = inner.update(
            _where(keep, grads),
            _mask_moments(state.inner, params, keep),
            _where(keep, params),
            **extra_args,
        )
        updates = jax.tree.map(_to_zero, keep, updates, params)
        return updates, SparseState(step, method_state, inner_state, keep)

    return optax.GradientTransformationExtraArgs(init, update)


def get_masks(opt_state: Any) -> PyTree:
    """The masks inside an optimizer state, however deep ``sparsify`` is nested in it.

    Args:
      opt_state: state of a transformation that contains one ``sparsify``.

    Returns:
      bool tree with the structure of params.

    Raises:
      ValueError: there is no ``sparsify`` inside, or more than one.
    """
    return get_method_state(opt_state)[0]


def get_method_state(opt_state: Any) -> Any:
    """The method's own state inside an optimizer state: masks and whatever the method tracks.

    Raises:
      ValueError: there is no ``sparsify`` inside, or more than one.
    """
    states = [x for x in jax.tree.leaves(opt_state, is_leaf=_is_sparse) if _is_sparse(x)]
    if len(states) != 1:
        raise ValueError(
            f"Expected one sparsify state in the optimizer state, found {len(states)} in a "
            f"{type(opt_state).__name__}. Pass the state that tx.init returned; of several "
            "(optax.partition), pass the one you mean."
        )
    return states[0].method


def set_masks(opt_state: Any, masks: PyTree) -> Any:
    """Puts other masks into an optimizer state: pruning by hand, between two steps.

    Use this rather than ``optax.tree.set``, for the state also holds what the last update kept. The
    next ``update`` brings to 0 what the new masks switch off, moments included; apply the
    masks to the parameters at once with ``apply_masks`` if they are used before that. Under a
    dynamic method the masks change again at its next event.

    Args:
      opt_state: state of a transformation that contains one ``sparsify``.
      masks: bool tree; its leaves find their parameters by path.

    Raises:
      ValueError: as ``get_masks``; or the masks are of another tree.

    Example: prune to the larger half, once.
      >>> import granet_jax as gj, jax.numpy as jnp, optax
      >>> params = {"kernel": jnp.array([[3.0, 1.0], [-2.0, 0.5]])}
      >>> tx = gj.sparsify(optax.sgd(0.1), gj.static())
      >>> state = tx.init(params)
      >>> masks = {"kernel": gj.top_k_mask(jnp.abs(params["kernel"]), 2)}
      >>> state = gj.set_masks(state, masks)
      >>> gj.apply_masks(params, gj.get_masks(state))["kernel"].tolist()
      [[3.0, 0.0], [-2.0, 0.0]]
    """
    masks = check_masks(masks, get_masks(opt_state))

    def replace(state: Any) -> Any:
        if not _is_sparse(state):
            return state
        keep = jax.tree.map(jnp.copy, masks)
        return state._replace(method=state.method._replace(masks=masks), keep=keep)

    return jax.tree.map(replace, opt_state, is_leaf=_is_sparse)


def _is_sparse(state: Any) -> bool:
    return isinstance(state, SparseState)


def _where(masks: PyTree, tree: PyTree) -> PyTree:
    return jax.tree.map(_select, masks, tree)


def _to_zero(keep: jax.Array, update: jax.Array, param: jax.Array) -> jax.Array:
    """The update where a weight is kept; elsewhere the one that brings it to 0."""
    dtype = jnp.promote_types(update.dtype, param.dtype)
    return _select(keep, update.astype(dtype), -param.astype(dtype))


def _select(mask: jax.Array, x: jax.Array, otherwise: jax.Array | None = None) -> jax.Array:
    """``where(mask, x, otherwise)``, by default 0, on bits: XLA:CPU vectorises that far better."""
    if x.dtype.itemsize not in (2, 4) or not jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.where(mask, x, jnp.zeros_like(x) if otherwise is None else otherwise)
    integer = jnp.int32 if x.dtype.itemsize == 4 else jnp.int16
    as_bits = functools.partial(jax.lax.bitcast_convert_type, new_dtype=integer)
    ones = -mask.astype(integer)  # all bits, where True
    bits = as_bits(x) & ones
    if otherwise is not None:
        bits |= as_bits(otherwise) & ~ones
    return jax.lax.bitcast_convert_type(bits, x.dtype)


def _do_if(
    predicate: Any, f: Callable[..., tuple[Any, PyTree]], operands: tuple[Any, PyTree]
) -> tuple[Any, PyTree]:
    """``f(*operands)`` where the predicate holds; else the operands, left in their place.

    A conditional copies what it merely passes on; a loop of no trips does not. From a loop, XLA
    moves what does not change to where every step would pay for it; a conditional holds it back.
    """

    def once(carry: Any) -> Any:
        pending, operands = carry
        changed = jax.lax.cond(pending, lambda x: f(*x), lambda x: x, operands)
        return jnp.zeros_like(pending), changed

    start = (jnp.asarray(predicate), operands)
    return jax.lax.while_loop(lambda carry: carry[0], once, start)[1]


def _mask_moments(inner_state: Any, params: PyTree, keep: PyTree) -> Any:
    """``where(keep, s, 0)`` for the leaves of the inner state that are moments of a parameter."""
    masks = trees.by_path(keep)

    def mask(leaf: Any, owner: trees.Owner | None) -> Any:
        if owner is None or not owner.same_shape or owner.field in _NOT_MOMENTS:
            return leaf
        return _select(masks[owner.names], leaf)

    return trees.map_with_owner(mask, inner_state, params)


def _check_maskable(inner_state: Any, params: PyTree) -> None:
    """Refuses a state with buffers of a parameter's size that mirror no parameter."""
    sizes = {path: x.size for path, x in trees.by_path(params).items()}
    matrices = (x.size for x in jax.tree.leaves(params) if len(x.shape) >= 2)
    largest = max(matrices, default=None)
    if largest is None:
        return
    owners = trees.owners(inner_state, params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(inner_state):
        owner = owners[path]
        if owner is not None and (owner.same_shape or leaf.size < sizes[owner.names]):
            continue  # a moment, or a factored one
        if leaf.size >= largest:
            raise ValueError(
                f"The state of this optimizer cannot be masked: {_type_on_path(inner_state, path)}"
                f" holds {'/'.join(trees.names(path))} of shape {leaf.shape}, which mirrors no "
                "parameter. Use an optimizer whose moments have the parameters' shapes (not "
                "flattened, no limited-memory history)."
            )


def _type_on_path(state: Any, path: tuple[Any, ...]) -> str:
    """The name of the innermost NamedTuple on the way to a leaf."""
    name = type(state).__name__
    for key in path:
        if not isinstance(key, jax.tree_util.GetAttrKey | jax.tree_util.SequenceKey):
            break
        state = getattr(state, key.name) if hasattr(key, "name") else state[key.idx]
        name = type(state).__name__ if hasattr(state, "_fields") else name
    return name
