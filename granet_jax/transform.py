"""``sparsify``: makes any optax optimizer train sparse. The order inside one update is here."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from granet_jax import jaxprs, moments, selection, trees
from granet_jax.masks import apply_masks, check_dense, check_masks
from granet_jax.types import Event, Method, PyTree, SparseState


def sparsify(
    inner: optax.GradientTransformation, method: Method
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that it trains sparse, with the masks of ``method``.

    One ``update``, in order, where t is the step now being taken (the first is 1):

    1. If t is an event, ``inner`` takes a provisional step on masked gradients. The method sees
       the weights after this step, ``where(mask, p + u, 0)``, and the raw gradients of this batch.
       It returns new masks and ``keep``, the weights that survive the event. At other steps
       ``keep`` is the masks.
    2. ``inner`` takes the real step. Outside ``keep``, gradients and weights are 0, and the state
       is that of the start: moments 0, step sizes the initial ones. So an optimizer that turns
       zeros into zeros leaves moments of exactly 0 there. (adafactor leaves its epsilon of 1e-30,
       and ``add_noise`` its noise, until the next step.) Weights in ``keep`` get the same update as
       in the provisional step; but if updates depend on other weights (norms, factored moments,
       distances from the start), only those in ``keep`` count. ``inner`` also gets the extra
       argument ``keep``, for transformations that treat regrown weights differently.
    3. The updates returned are ``where(keep, u, -p)``. With them plain ``optax.apply_updates``
       gives exact zeros where weights are masked, and newly grown weights start at exactly 0.
       Leaves that are not floats get the updates of ``inner``.

    The result is an optax transformation like any other. Its place in a chain matters: clipping
    goes *inside*, so that the norm counts live weights only; ``optax.MultiSteps`` and
    ``optax.apply_if_finite`` go *outside*. Nothing after it in a chain may change the updates.
    Transformations that average or perturb weights (SAM, lookahead, schedule-free) go inside, or
    their results are masked by :func:`apply_masks`. docs/optimizers.md has the details, and
    :func:`check_sparse` finds mistakes.

    ``init`` gives ``inner`` the masked parameters. For a sparse start also mask the parameters
    once, ``apply_masks(params, get_masks(opt_state))``; otherwise the first forward pass is dense,
    and the first update sets the zeros.

    Leaves of the inner state are matched with parameters by path and shape, see
    :mod:`granet_jax.moments`. Factored moments (adafactor) and statistics of axes (Shampoo) have
    other shapes and are not masked.

    Args:
      inner: any optax transformation that ends in parameter updates.
      method: a method, such as :func:`granet_jax.granet` returns.

    Returns:
      A ``GradientTransformationExtraArgs`` whose state is :class:`granet_jax.types.SparseState`.
      Updates have the dtype of ``inner``'s updates, or that of the parameters if it is wider,
      because ``-p`` has to be exact.

    Raises:
      TypeError: ``inner`` is no optax transformation, or ``method`` no method.
      ValueError: in ``init``, if the inner state holds large buffers that cannot be matched with
        parameters (flattened or limited-memory optimizers), if the method would prune parameters
        that the optimizer never updates, or if parameters are pairs (lookahead, or the real and
        imaginary parts of complex numbers); in ``update``, without ``params``, with gradients of
        other shapes, or with a state of another method, optimizer or model.

    Note:
      Adding an update cannot bring a parameter that is NaN or infinite to 0. Counts and masks stay
      right; ``apply_masks`` sets such masked weights to 0, and ``optax.apply_if_finite`` keeps NaN
      out.

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
            "Call the method first: sparsify(inner, granet_jax.granet(...)). Methods of "
            "granet_jax.reparam go around by penalise(inner, method, coefficient)."
        )
    inner = moments.told_keep(inner)

    def init(params: PyTree) -> SparseState:
        check_params(params)
        method_state = method.init(params)
        masks = method_state[0]
        inner_state = inner.init(_masked(params, masks))
        moments.check_maskable(inner_state, params)
        check_frozen(inner, inner_state, method, method_state, params)
        keep = jax.tree.map(jnp.copy, masks)
        step = jnp.zeros([], jnp.int32)
        grew = jnp.zeros([], bool)
        return SparseState(step, method_state, inner_state, keep, {method.name: None}, grew)

    def update(
        grads: PyTree, state: SparseState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, SparseState]:
        _check_update(grads, state, params, method)
        initial = inner.init(jax.tree.map(jnp.zeros_like, params))
        moments.check_same_optimizer(state.inner, initial, params)
        mirrored = moments.mirrors(inner.init, initial, params)
        step = optax.safe_increment(state.mask_step)
        method_state = state.method
        if method.observe is not None:
            method_state = method.observe(method_state, grads)

        def event(method_state: Any, _: PyTree) -> tuple[Any, PyTree]:
            # Computed here, in the rare branch, because XLA would materialise an operand. The masks
            # come from the operand, because other uses of them would cost a copy at every step.
            masks = method_state[0]
            live_grads = where(masks, grads)
            provisional, _ = inner.update(live_grads, state.inner, params, keep=masks, **extra_args)
            weights = where(masks, optax.apply_updates(params, provisional))
            seen = Event(weights, grads, masks, step, None, state.inner, extra_args)
            return method.update(method_state, seen)

        def catch_up(method_state: Any, _: PyTree) -> tuple[Any, PyTree]:
            return method_state, jax.tree.map(jnp.copy, method_state[0])

        # Weights that the last event grew are not in its keep; from the next step on they are.
        operands = do_if(state.grew, catch_up, (method_state, state.keep), step)
        is_event = jnp.asarray(method.is_update_step(step))
        method_state, keep = do_if(is_event, event, operands, step)
        updates, inner_state = inner.update(
            where(keep, grads),
            moments.reset(state.inner, initial, mirrored, keep),
            where(keep, params),
            keep=keep,
            **extra_args,
        )
        updates = jax.tree.map(to_zero, keep, updates, params)
        return updates, SparseState(
            step, method_state, inner_state, keep, state.written_by, is_event
        )

    return optax.GradientTransformationExtraArgs(init, update)


def get_masks(opt_state: Any) -> PyTree:
    """The masks inside an optimizer state, however deep ``sparsify`` is nested in it.

    Args:
      opt_state: state of a transformation that contains one ``sparsify``.

    Returns:
      bool tree with the structure of params.

    Raises:
      ValueError: there is no ``sparsify`` inside, or more than one.

    Example:
      >>> import granet_jax as gj, jax.numpy as jnp, optax
      >>> tx = optax.chain(gj.sparsify(optax.sgd(0.1), gj.static()))
      >>> gj.get_masks(tx.init({"kernel": jnp.ones((1, 2))}))["kernel"].tolist()
      [[True, True]]
    """
    return get_method_state(opt_state)[0]


def get_method_state(opt_state: Any) -> Any:
    """The method's own state inside an optimizer state: masks, and anything else it tracks.

    Args:
      opt_state: state of a transformation that contains one ``sparsify``.

    Returns:
      A :class:`granet_jax.types.MaskState` for the methods of this library.

    Raises:
      ValueError: there is no ``sparsify`` inside, or more than one.

    Example:
      >>> import granet_jax as gj, jax.numpy as jnp, optax
      >>> tx = gj.sparsify(optax.sgd(0.1), gj.track_exploration(gj.static()))
      >>> state = tx.init({"kernel": jnp.ones((1, 2))})
      >>> gj.get_method_state(state).explored["kernel"].tolist()
      [[True, True]]
    """
    states = _sparse_states(opt_state)
    if len(states) != 1:
        raise ValueError(
            f"Expected one sparsify state in the optimizer state, found {len(states)} in a "
            f"{type(opt_state).__name__}. Pass the state that tx.init returned; of several "
            "(optax.partition), pass the one you mean."
        )
    return states[0].method


def check_sparse(params: PyTree, opt_state: Any) -> jax.Array:
    """How many masked weights are not exactly 0, an int32 scalar, at most 2^31 - 1.

    The count is 0 as long as only ``sparsify`` changes weights. It finds mistakes that optax cannot
    refuse: transformations after ``sparsify`` in a chain that change updates (``scale``, ``ema``,
    ``add_decayed_weights``, ``mechanize``, ``conditionally_transform``); weights averaged or
    perturbed outside ``sparsify`` (``lookahead``, ``schedule_free``, SAM, a moving average);
    parameters that were not masked at the start. It costs about as much as reading the weights
    once.

    Args:
      params: the parameters, or any tree that holds copies of them (the fast and slow weights of
        lookahead, a moving average). Leaves are matched by path and shape, see
        :mod:`granet_jax.moments`.
      opt_state: state of a transformation that contains at least one ``sparsify``.

    Returns:
      The count. Check it yourself under ``jit``, where nothing is raised.

    Raises:
      ValueError: outside ``jit``, if the count is not 0; the message names the first such leaf. Or
        the masks are of another tree.

    Example:
      >>> import granet_jax as gj, jax, jax.numpy as jnp, optax
      >>> params = {"kernel": jnp.ones((4, 4))}
      >>> tx = gj.sparsify(optax.sgd(0.1), gj.static(sparsity=0.75, key=jax.random.key(0)))
      >>> state = tx.init(params)
      >>> int(check_sparse(gj.apply_masks(params, gj.get_masks(state)), state))
      0
      >>> check_sparse(params, state)  # doctest: +ELLIPSIS
      Traceback (most recent call last):
        ...
      ValueError: 12 weights of kernel are not 0 though they are pruned...
    """
    states = _sparse_states(opt_state)
    if not states:
        get_masks(opt_state)  # raises
    odd: dict[str, jax.Array] = {}
    leaves: dict[str, Any] = {}
    for state in states:
        masks = trees.by_path(state.method[0])
        owners = trees.owners(params, state.method[0])
        matched = {path: x.names for path, x in owners.items() if x is not None and x.same_shape}
        if missing := masks.keys() - set(matched.values()):
            told = ", ".join(sorted("/".join(words) for words in missing))
            raise ValueError(
                f"The masks are of another tree: params have no {told} of their shape."
            )
        for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
            if keys in matched:
                path = "/".join(trees.names(keys))
                odd[path] = ~masks[matched[keys]] & (leaf != 0)
                leaves[path] = leaf
    total = selection.total(list(odd.values()))
    if not isinstance(total, jax.core.Tracer) and total > 0:
        counts = {path: int(selection.total([x])) for path, x in odd.items()}
        first = next(path for path, count in counts.items() if count)
        cause = (
            "Mask the parameters once after tx.init, params = granet_jax.apply_masks(params, "
            "granet_jax.get_masks(opt_state)), and let nothing after sparsify touch updates or "
            "weights: scaling, decay and averages belong inside."
        )
        if not jnp.all(jnp.isfinite(leaves[first])):
            cause = (
                "Some are NaN or infinite, and no update brings these to 0: apply_masks does, and "
                "optax.apply_if_finite(sparsify(...), n) keeps such gradients out."
            )
        raise ValueError(
            f"{counts[first]} weights of {first} are not 0 though they are pruned, "
            f"{sum(counts.values())} in all. {cause}"
        )
    return total


def set_masks(opt_state: Any, masks: PyTree, prunable: trees.Rules = ()) -> Any:
    """Puts other masks into an optimizer state: pruning by hand, between two steps.

    Do not use ``optax.tree.set`` for this, because the state also holds what the last update kept.
    The next ``update`` sets the weights and moments under the new False masks to 0. If the
    parameters are used before, apply the masks at once with ``apply_masks``. A dynamic method
    changes the masks again at its next event.

    Args:
      opt_state: state of a transformation that contains one ``sparsify``.
      masks: bool tree, matched with the params by path.
      prunable: the path rules that the method was given.

    Returns:
      The optimizer state with the new masks; ``opt_state`` itself does not change.

    Raises:
      ValueError: as ``get_masks``; or the masks are of another tree, or switch off weights of a
        leaf that is not prunable.

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
    floats = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, jnp.float32), masks)
    check_dense(masks, trees.describe(floats, prunable))

    def replace(state: Any) -> Any:
        if not _is_sparse(state):
            return state
        keep = jax.tree.map(jnp.copy, masks)
        return state._replace(method=state.method._replace(masks=masks), keep=keep)

    return jax.tree.map(replace, opt_state, is_leaf=_is_sparse)


def _is_sparse(state: Any) -> bool:
    return isinstance(state, SparseState)


def _sparse_states(opt_state: Any) -> list[SparseState]:
    return [x for x in jax.tree.leaves(opt_state, is_leaf=_is_sparse) if _is_sparse(x)]


def where(masks: PyTree, tree: PyTree) -> PyTree:
    """The tree with zeros where masks are False; leaves that are not floats do not change."""
    return jax.tree.map(lambda m, x: moments.select(m, x) if is_trained(x) else x, masks, tree)


def is_trained(x: Any) -> bool:
    """Whether a leaf holds floats; others are left to the inner optimizer."""
    return bool(jnp.issubdtype(x.dtype, jnp.inexact))


def _masked(params: PyTree, masks: PyTree) -> PyTree:
    """The masked parameters, from which the inner optimizer starts; abstract ones unchanged."""
    if any(isinstance(p, jax.ShapeDtypeStruct) for p in jax.tree.leaves(params)):
        return params
    return apply_masks(params, masks)


def to_zero(keep: jax.Array, update: jax.Array, param: jax.Array) -> jax.Array:
    """The update where a weight is kept; elsewhere the update that sets it to 0."""
    if not is_trained(param):
        return update
    dtype = jnp.promote_types(update.dtype, param.dtype)
    return moments.select(keep, update.astype(dtype), -param.astype(dtype))


def do_if(
    predicate: Any, f: Callable[..., tuple[Any, PyTree]], operands: tuple[Any, PyTree], step: Any
) -> tuple[Any, PyTree]:
    """``f(*operands)`` if the predicate holds; else the operands, without a copy.

    A conditional copies operands that it only passes on; a loop of no iterations does not. But XLA
    moves constant work out of a loop, where every step would pay for it; a conditional inside the
    loop prevents that. Outside of jit it would be compiled anew at each step; there only the first
    step traces ``f`` for nothing, so that errors come early.
    """
    if not isinstance(predicate, jax.core.Tracer) and not predicate and step > 1:
        return operands

    def once(carry: Any) -> Any:
        pending, operands = carry
        changed = jax.lax.cond(pending, lambda x: f(*x), lambda x: x, operands)
        return jnp.zeros_like(pending), changed

    start = (jnp.asarray(predicate), operands)
    return jax.lax.while_loop(lambda carry: carry[0], once, start)[1]


_PAIRS = {
    "LookaheadParams": "lookahead keeps fast and slow weights, which would be pruned each for "
    "itself: use optax.lookahead(sparsify(...), ...), and evaluate apply_masks(params.slow, "
    "get_masks(opt_state))",
    "SplitRealAndImaginaryArrays": "real and imaginary parts would be pruned each for itself: use "
    "sparsify(optax.contrib.split_real_and_imaginary(...), method)",
}


def check_params(params: PyTree) -> None:
    """Refuses parameters that an optimizer has turned into pairs."""

    def pair(x: Any) -> bool:
        return type(x).__name__ in _PAIRS

    for x in jax.tree.leaves(params, is_leaf=pair):
        if pair(x):
            raise ValueError(f"sparsify got {type(x).__name__}: {_PAIRS[type(x).__name__]}.")


def check_frozen(
    inner: optax.GradientTransformation, state: Any, method: Method, method_state: Any, params: Any
) -> None:
    """Refuses a method that prunes what the optimizer never updates."""
    if not (never := moments.frozen(inner, state, params)):
        return
    step = jnp.zeros([], jnp.int32)

    def masks_after(method_state: Any, params: PyTree) -> PyTree:
        seen = Event(params, params, method_state[0], step, None, state)
        return method.update(method_state, seen)[0][0]

    jaxpr = jaxprs.opened(jax.make_jaxpr(masks_after)(method_state, params))
    changed = [
        path
        for path, before, after in zip(
            trees.paths(method_state[0]), jaxpr.invars, jaxpr.outvars, strict=False
        )
        if path in never and before is not after
    ]
    if changed:
        rules = ", ".join(f"('^{path}$', False)" for path in changed)
        raise ValueError(
            f"The method {method.name} would prune {', '.join(changed)}, which the optimizer never "
            "updates: what is pruned could not come back. Keep frozen layers dense by rules, "
            f"prunable=[{rules}, ...]."
        )


def _check_update(grads: PyTree, state: Any, params: PyTree | None, method: Method) -> None:
    """Refuses arguments that do not belong together."""
    if params is None:
        raise ValueError("sparsify needs the parameters: call tx.update(grads, opt_state, params).")
    if not _is_sparse(state):
        raise ValueError(
            f"sparsify expects its own state, got a {type(state).__name__}. A file that is read "
            "without an example gives dicts; granet_jax.check_restored(restored, example) tells."
        )
    if not state.written_by or state.grew is None:
        raise ValueError(
            "The state is of an earlier version. Bring it up to date: "
            "granet_jax.check_restored(state, jax.eval_shape(tx.init, params))."
        )
    if state.written_by.keys() != {method.name}:
        raise ValueError(
            f"The state was written by the method {', '.join(state.written_by)}, this one is "
            f"{method.name}. Start anew, with the old masks: granet_jax.set_masks("
            "tx.init(params), granet_jax.get_masks(old_state))."
        )
    wanted = trees.by_path(params)
    dtypes = {str(x.dtype) for x in jax.tree.leaves((state.method[0], state.keep))}
    if dtypes - {"bool"}:
        raise ValueError(
            f"Masks in the state are {', '.join(sorted(dtypes))} instead of bool: something around "
            "sparsify does arithmetic on its state, as SAM does. Put it inside: "
            "sparsify(optax.contrib.sam(...), method)."
        )
    for what, tree in (("mask", state.method[0]), ("gradient", grads)):
        found = trees.by_path(tree)
        if odd := found.keys() ^ wanted.keys():
            raise ValueError(
                f"Each parameter needs a {what}; only one of the two has "
                f"{', '.join(sorted('/'.join(words) for words in odd))}."
            )
        for words, p in wanted.items():
            if jnp.shape(found[words]) != jnp.shape(p):
                raise ValueError(
                    f"The {what} of {'/'.join(words)} has shape {jnp.shape(found[words])}, the "
                    f"parameter {jnp.shape(p)}. What works on gradients of other shapes, as "
                    "differentially_private_aggregate does, stands before sparsify: "
                    "optax.chain(..., sparsify(...))."
                )
        kinds: list[Any] = [jax.tree.structure(x) for x in (tree, grads)]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"The {what}s lie in a {type(tree).__name__}, the gradients in a "
                f"{type(grads).__name__}, or they differ inside. What a file gives back is put "
                "right by granet_jax.check_restored(state, jax.eval_shape(tx.init, params))."
            )
