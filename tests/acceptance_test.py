"""Every method with every optimizer and wrapper: the promises of the transform, on real state.

In ``make test`` each method meets two optimizers in two wrappers; in ``make test-all`` all in all.
"""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import granet_jax as gj
from tests import tables

FULL = list(itertools.product(tables.METHODS, tables.INNERS, tables.WRAPPERS))
_inners, _wrappers = list(tables.INNERS), list(tables.WRAPPERS)
SOME = [
    (
        method,
        _inners[(i + k * len(_inners) // 2) % len(_inners)],
        _wrappers[(i + 2 * k) % len(_wrappers)],
    )
    for i, method in enumerate(tables.METHODS)
    for k in range(2)
]


def test_all_are_among_them():
    for rows, all_ in zip(
        zip(*SOME, strict=True), (tables.METHODS, _inners, _wrappers), strict=True
    ):
        assert set(rows) == set(all_)


@pytest.mark.parametrize("row", SOME, ids="-".join)
def test_some_of_the_product(row):
    check(*row)


@pytest.mark.full
@pytest.mark.parametrize("row", sorted(set(FULL) - set(SOME)), ids="-".join)
def test_full_product(row):
    check(*row)


def check(method, inner, wrapper, dtype=jnp.float32):
    make_method, num_live = tables.METHODS[method]
    wrap, updates_per_step = tables.WRAPPERS[wrapper]
    tx = wrap(gj.sparsify(tables.INNERS[inner](), make_method()))
    params = gj.testing.example_params(dtype)
    state = tx.init(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, jax.eval_shape(tx.init, params))
    params = gj.apply_masks(params, gj.get_masks(state))
    shapes = jax.tree.map(jax.typeof, (params, state))
    leaves = gj.trees.describe(params)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def train_step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for call in range(1, tables.STEPS * updates_per_step + 1):
        step = call // updates_per_step
        params, state = train_step(params, state, tables.random_grads(params, call))
        masks = gj.get_masks(state)
        live = 0
        for leaf, mask, param in zip(
            leaves, jax.tree.leaves(masks), jax.tree.leaves(params), strict=True
        ):
            mask, param = np.asarray(mask), np.asarray(param)
            assert not param[~mask].any(), f"{leaf.path} is not 0 off the mask at {step=}"
            assert leaf.prunable or mask.all(), f"{leaf.path} was pruned"
            live += mask.sum() if leaf.prunable else 0
        if num_live(step) is not None:
            assert live == num_live(step), f"{live} weights live at {step=}"
    chex.assert_tree_all_finite(params)
    assert jax.tree.map(jax.typeof, (params, state)) == shapes
    found = _count_masked_moments(state, masks, tables.EPSILON.get(inner, 0.0))
    assert found or inner in ("sgd", "schedule_free")


def _count_masked_moments(state, masks, epsilon):
    """Finds moments without the library's help: by field name, then parameter path, and shape."""
    masks = {jax.tree_util.keystr(p): m for p, m in jax.tree_util.tree_leaves_with_path(masks)}
    found = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        for i, key in enumerate(path):
            if getattr(key, "name", None) not in tables.MOMENTS:
                continue
            mask = masks.get(jax.tree_util.keystr(path[i + 1 :]))
            if mask is not None and mask.shape == leaf.shape:
                off = np.abs(np.asarray(leaf)[~np.asarray(mask)])
                assert np.all(off <= epsilon), jax.tree_util.keystr(path)
                found += 1
    return found


@pytest.mark.parametrize("method", tables.METHODS | tables.VARIANTS)
def test_conformance_kit(method):
    make_method, num_live = (tables.METHODS | tables.VARIANTS)[method]
    known = num_live if num_live(0) is not None else None
    gj.testing.check_method(make_method(), num_steps=tables.STEPS, num_live=known)


@pytest.mark.parametrize(
    ("broken", "promise"),
    [
        ("revives", "keep lies within both masks"),
        ("prunes_dense", "dense leaves stay dense"),
        ("drifts", "as many weights are live"),
        ("random", "eager and compiled updates agree"),
        ("float_masks", "a mask is bool"),
    ],
)
def test_conformance_kit_finds_broken_methods(broken, promise):
    good = tables.METHODS["rigl"][0]()

    def update(state, event):
        state, keep = good.update(state, event)
        if broken == "revives":
            keep = jax.tree.map(jnp.ones_like, keep)
        if broken == "prunes_dense":
            off = jax.tree.map(jnp.zeros_like, keep)
            keep = {**keep, "norm": off["norm"]}
            state = state._replace(masks={**state.masks, "norm": off["norm"]})
        if broken == "drifts":
            off = jnp.zeros_like(keep["head"]["kernel"])
            masks = {**state.masks, "head": {**keep["head"], "kernel": off}}
            keep = jax.tree.map(jnp.logical_and, keep, masks)
            state = state._replace(masks=masks)
        if broken == "random":
            draw = np.random.default_rng().random((12, 5)) < 0.5
            keep = {**keep, "head": {**keep["head"], "kernel": keep["head"]["kernel"] & draw}}
        return state, keep

    def init(params):
        state = good.init(params)
        if broken == "float_masks":
            state = state._replace(masks=jax.tree.map(lambda m: m.astype(float), state.masks))
        return state

    method = good._replace(init=init, update=update)
    with pytest.raises(AssertionError, match=promise):
        gj.testing.check_method(method, num_live=tables.METHODS["rigl"][1])


@pytest.mark.usefixtures("compiled_well")
@pytest.mark.parametrize(
    "inner",
    ["momentum", *(pytest.param(x, marks=pytest.mark.full) for x in ("adamw", "adafactor"))],
)
def test_200_steps_are_exactly_zero_off_the_mask(inner):
    method = gj.granet(
        initial_sparsity=0.5,
        final_sparsity=0.95,
        end_step=100,
        update_every=10,
        total_steps=200,
        key=tables.KEY,
    )
    tx = gj.sparsify(tables.INNERS[inner](), method)
    params = gj.testing.example_params()
    state = tx.init(params)

    def step(carry, t):
        params, state = carry
        updates, state = tx.update(tables.random_grads(params, t), state, params)
        params = optax.apply_updates(params, updates)
        masks = gj.get_masks(state)
        off = jax.tree.map(lambda p, m: jnp.max(jnp.where(m, 0.0, jnp.abs(p))), params, masks)
        return (params, state), (off, gj.metrics.sparsity(masks, params))

    (params, state), (off, sparsity) = jax.jit(
        lambda carry: jax.lax.scan(step, carry, jnp.arange(200))
    )((params, state))
    chex.assert_trees_all_equal(off, jax.tree.map(jnp.zeros_like, off))
    assert sparsity[0] == 0.5
    np.testing.assert_array_equal(np.asarray(sparsity[99:]), np.float32(1 - 27 / 540))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.full)])
def test_low_precision_parameters(dtype):
    gj.testing.check_method(
        tables.METHODS["granet"][0](),
        params=gj.testing.example_params(dtype),
        num_live=tables.METHODS["granet"][1],
    )


def test_updates_narrower_than_parameters_still_give_zeros():
    # bfloat16 cannot hold -p exactly, so the update is widened to the parameters' dtype.
    narrow = optax.stateless(lambda g, p: jax.tree.map(lambda x: x.astype(jnp.bfloat16), g))
    tx = gj.sparsify(narrow, gj.static(sparsity=0.5, key=tables.KEY))
    params = gj.testing.example_params()
    state = tx.init(params)
    updates, state = tx.update(tables.random_grads(params, 0), state, params)
    params = optax.apply_updates(params, updates)
    chex.assert_trees_all_equal(params, gj.apply_masks(params, gj.get_masks(state)))


def test_moments_of_parameters_named_like_fields():
    params = {"mu": {"w": jnp.ones((4, 4))}, "w": jnp.ones((4, 4)), "z": {"k": jnp.ones((4, 4))}}
    off = {"mu": {"w": jnp.zeros((4, 4), bool)}, "w": jnp.ones((4, 4), bool)}
    masks = {**off, "z": {"k": jnp.zeros((4, 4), bool)}}
    tx = gj.sparsify(optax.adam(0.1), gj.static(masks=masks))
    state = tx.init(params)
    for _ in range(2):
        _, state = tx.update(params, state, params)
    mu = optax.tree.get(state.inner[0], "mu", filtering=lambda path, _: len(path) == 1)
    np.testing.assert_allclose(mu["w"], 0.19, rtol=1e-6)
    assert not mu["mu"]["w"].any()
    assert not mu["z"]["k"].any()
    inner = optax.partition({"z": optax.sgd(0.1, momentum=0.9)}, {"a": "z"})
    tx = gj.sparsify(inner, gj.magnitude(sparsity=0.5, at=2))
    params = {"a": jnp.arange(16.0).reshape(4, 4)}
    state = tx.init(params)
    for _ in range(2):
        _, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    assert sum((x != 0).sum() for x in jax.tree.leaves(state.inner)) == 8


def test_given_masks_probe_with_an_empty_tree_and_match_by_path():
    masks = gj.ones(gj.testing.example_params())
    gj.testing.check_method(gj.static(masks=masks))
    with pytest.raises(ValueError, match="only one of the two has a, b, x, y"):
        gj.static(masks={"x": masks["norm"]["bias"], "y": masks["norm"]["bias"]}).init(
            {"a": jnp.ones((2, 4)), "b": jnp.ones((2, 4))}
        )
