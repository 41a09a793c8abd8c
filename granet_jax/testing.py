"""The conformance kit: checks that a sparse-training method keeps the promises of all methods.

The methods of this library pass it. Run it on your own method in a test::

    def test_my_method():
        granet_jax.testing.check_method(my_method(...), num_live=lambda step: ...)
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from granet_jax import structures, trees
from granet_jax.transform import get_masks, sparsify
from granet_jax.types import Event, Method, PyTree


def example_params(dtype: Any = jnp.float32) -> PyTree:
    """A small tree of the kinds of leaves that methods meet, from convolution to embedding.

    Args:
      dtype: of the leaves.

    Returns:
      A tree of arrays.

    Example:
      >>> from granet_jax import trees
      >>> [leaf.path for leaf in trees.describe(example_params()) if leaf.prunable]
      ['conv/kernel', 'head/kernel', 'hidden/kernel']
    """
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        "embed": {"embedding": (11, 6)},
        "conv": {"kernel": (3, 3, 4, 8), "bias": (8,)},
        "norm": {"scale": (8,), "bias": (8,)},
        "hidden": {"kernel": (16, 12), "bias": (12,)},
        "head": {"kernel": (12, 5), "bias": (5,)},
    }
    abstract = {
        layer: {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in leaves.items()}
        for layer, leaves in shapes.items()
    }
    return _random_like(jax.random.key(0), abstract)


def check_method(
    method: Method,
    *,
    params: PyTree | None = None,
    num_steps: int = 24,
    num_live: Callable[[int], int] | None = None,
    prunable: trees.Rules = (),
) -> None:
    """Trains a small tree under ``method`` and checks the promises of methods.

    The promises: masks are total, bool and stable in shape, dtype and sharding; ``init`` accepts
    abstract parameters and a tree without leaves; leaves that are not prunable stay dense; masks
    change at events only; ``keep`` is a subset of the old and of the new masks; pruned weights and
    newly grown ones are exactly 0, with zero moments; eager and compiled updates agree bit for bit,
    and so do the method alone and inside ``sparsify``; one trace serves all steps; NaN in gradients
    and weights changes no total (unless outputs are ablated); units of structures are whole, and
    all live groups keep the same number; the total is ``num_live``.

    Args:
      method: the method to check.
      params: a tree of float arrays to train; None = :func:`example_params`.
      num_steps: updates to run; choose a schedule that ends within them.
      num_live: ``step -> weights kept in all prunable leaves`` after that step (0 = at the start);
        None = not checked.
      prunable: the path rules that the method was given.

    Raises:
      AssertionError: a promise is broken; the message names it, the step and the leaf.

    Example:
      >>> import granet_jax as gj, jax
      >>> method = gj.rigl(sparsity=0.5, update_every=4, total_steps=16, key=jax.random.key(0))
      >>> gj.testing.check_method(method)
    """
    params = example_params() if params is None else params
    leaves = trees.describe(params, prunable)
    can_ablate = any(x.structure is not None and x.structure.ablation(x) > 0 for x in leaves)
    _check_init(method, params)

    traces: list[None] = []
    # Powers of two, so that no rounding depends on how the compiler fuses the arithmetic.
    tx = sparsify(optax.sgd(0.125, momentum=0.5), method)

    @jax.jit
    def train_step(params: PyTree, state: Any, grads: PyTree) -> tuple[PyTree, Any]:
        traces.append(None)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    compiled_update = jax.jit(method.update)
    state = tx.init(params)
    avals = jax.tree.map(jax.typeof, state)
    method_state = method.init(params)
    _check_count(0, state, leaves, num_live)
    _check_structures(0, method_state[0], leaves)
    weights = params
    events = 0
    for step in range(1, num_steps + 1):
        grads = _random_like(jax.random.fold_in(jax.random.key(1), step), params)
        before = jax.tree.map(jnp.copy, method_state[0])
        keep = before
        if method.observe is not None:
            method_state = method.observe(method_state, grads)
        if bool(method.is_update_step(jnp.int32(step))):
            provisional = _provisional(weights, get_masks(state), _trace(state), grads)
            seen = Event(provisional, grads, before, jnp.int32(step), None, state.inner, {})
            args = (method_state, seen)
            if events == 0:
                same = jax.tree.map(
                    np.array_equal, *_without_keys(method.update(*args), compiled_update(*args))
                )
                _check(
                    all(jax.tree.leaves(same)), "eager and compiled updates agree", f"step {step}"
                )
            if events < 2 and not can_ablate:
                _check_nan(step, compiled_update, args, leaves)
            method_state, keep = compiled_update(*args)
            events += 1
        weights, state = train_step(weights, state, grads)
        masks = get_masks(state)
        trees_now = (before, masks, keep, method_state[0], weights, _trace(state))
        for leaf, *arrays in zip(leaves, *map(jax.tree.leaves, trees_now), strict=True):
            old, new, kept, same, weight, moment = map(np.asarray, arrays)
            where = f"step {step}, {leaf.path}"
            _check(np.array_equal(new, same), "the same scores give the same masks", where)
            _check(not np.any(kept & ~(old & new)), "keep lies within both masks", where)
            _check(leaf.prunable or np.all(kept & new), "dense leaves stay dense", where)
            _check(not np.any(weight[~kept]), "grown and pruned weights are 0", where)
            _check(not np.any(moment[~kept]), "their moments are 0", where)
        _check_count(step, state, leaves, num_live)
        _check_structures(step, get_masks(state), leaves)
        _check(jax.tree.map(jax.typeof, state) == avals, "shape, dtype, sharding stay", str(step))
    _check(len(traces) == 1, "one trace serves all steps", f"{len(traces)} traces")


def _check_init(method: Method, params: PyTree) -> None:
    masks = method.init(params)[0]
    structures: list[Any] = [jax.tree.structure(masks), jax.tree.structure(params)]
    _check(structures[0] == structures[1], "masks have the structure of params", str(structures[0]))
    for (path, mask), param in zip(
        trees.by_path(masks).items(), jax.tree.leaves(params), strict=True
    ):
        _check(
            mask.shape == param.shape and mask.dtype == bool,
            "a mask is bool and shaped as its parameter",
            f"{'/'.join(path)}: {mask.dtype}{mask.shape}",
        )
    abstract = jax.eval_shape(method.init, params)
    _check(
        jax.tree.map(lambda x: (x.shape, x.dtype), method.init(jax.eval_shape(lambda: params)))
        == jax.tree.map(lambda x: (x.shape, x.dtype), abstract),
        "init accepts abstract parameters",
        str(abstract),
    )
    method.init({})  # optax probes with a tree without leaves


def _check_count(
    step: int, state: Any, leaves: tuple[trees.Leaf, ...], num_live: Callable[[int], int] | None
) -> None:
    if num_live is not None:
        _check(
            _total(get_masks(state), leaves) == num_live(step),
            "as many weights are live as the schedule says",
            f"step {step}: {_total(get_masks(state), leaves)}, expected {num_live(step)}",
        )


def _check_structures(step: int, masks: PyTree, leaves: tuple[trees.Leaf, ...]) -> None:
    stacks = trees.split(masks, leaves)
    units = structures.live_units(stacks, leaves)
    prunable = [x for x in leaves if x.prunable]
    for leaf, stack, whole in zip(prunable, stacks, structures.spread(units, leaves), strict=True):
        where = f"step {step}, {leaf.path}"
        _check(np.array_equal(stack, whole), "a unit is kept or pruned as a whole", where)
    for leaf, unit in zip(structures.first_leaves(leaves), units, strict=True):
        if structures.is_grouped(leaf):
            num = np.asarray(unit).sum(-1).reshape(len(unit), -1)
            equal = (num == num.max(1, keepdims=True)) | (num == 0)
            _check(equal.all(), "live groups keep equally many", f"step {step}, {leaf.path}")


def _check_nan(step: int, update: Any, args: Any, leaves: tuple[trees.Leaf, ...]) -> None:
    method_state, seen = args
    expected = _num_units(update(*args)[0][0], leaves)
    broken_grads = jax.tree.map(lambda g: jnp.full_like(g, jnp.nan), seen.grads)
    some_nan = jax.tree.map(lambda w: w.at[::3].set(jnp.nan) if w.ndim else w, seen.params)
    for name, broken in (
        ("gradients", seen._replace(grads=broken_grads)),
        ("weights", seen._replace(params=some_nan)),
    ):
        got = _num_units(update(method_state, broken)[0][0], leaves)
        _check(got == expected, f"NaN {name} change no count", f"step {step}: {got}, {expected}")


def _without_keys(*trees_with_keys: PyTree) -> list[PyTree]:
    """Trees with typed keys replaced by their data, so that numpy can compare them."""
    return [
        jax.tree.map(
            lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x,
            tree,
        )
        for tree in trees_with_keys
    ]


@jax.jit
def _provisional(weights: PyTree, masks: PyTree, trace: PyTree, grads: PyTree) -> PyTree:
    """The weights that ``sparsify(sgd)`` shows the method, computed independently of it."""

    def step(w: jax.Array, m: jax.Array, t: jax.Array, g: jax.Array) -> jax.Array:
        return jnp.where(m, w - 0.125 * (0.5 * t + jnp.where(m, g, 0)), 0).astype(w.dtype)

    return jax.tree.map(step, weights, masks, trace, grads)


def _trace(state: Any) -> PyTree:
    return optax.tree.get(state.inner, "trace")


def _total(masks: PyTree, leaves: tuple[trees.Leaf, ...]) -> int:
    flat = jax.tree.leaves(masks)
    return sum(int(np.sum(m)) for m, x in zip(flat, leaves, strict=True) if x.prunable)


def _num_units(masks: PyTree, leaves: tuple[trees.Leaf, ...]) -> int:
    units = structures.live_units(trees.split(masks, leaves), leaves)
    return sum(int(np.sum(x)) for x in units)


def _random_like(key: jax.Array, tree: PyTree) -> PyTree:
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    draws = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, draws)


def _check(holds: Any, promise: str, where: str) -> None:
    if not holds:
        raise AssertionError(f"Broken promise: {promise} ({where}).")
