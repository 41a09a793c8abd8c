"""docs/optimizers.md is what the optimizers of optax do; and what their states hold."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import granet_jax as gj
from tests import optimizer_table

NAMES = list(optimizer_table.names())
SOME = [
    "adagrad",
    "conditionally_mask",
    "dog",
    "dpsgd",
    "ema",
    "flatten",
    "lookahead",
    "rprop",
    "sam",
]


@pytest.fixture(autouse=True)
def _compile_quickly():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def on_page():
    lines = optimizer_table.PAGE.read_text().splitlines()
    rows = [re.split(r"(?<!\\) \| ", x.strip("| ")) for x in lines if x.startswith("| `")]
    return {row[0].strip("`"): row[1:] for row in rows}


def told(row):
    return [re.sub(r"refused.*", "refused", cell).strip() for cell in row]


def check(name):
    assert told(on_page()[name]) == told(optimizer_table.try_out(name)[1:])


def test_the_page_has_them_all():
    if optax.__version__ in optimizer_table.PAGE.read_text():
        assert on_page().keys() == set(NAMES)
    assert set(SOME) <= set(NAMES)


@pytest.mark.parametrize("name", SOME)
def test_some(name):
    check(name)


@pytest.mark.full
@pytest.mark.parametrize("name", sorted(set(NAMES) - set(SOME)))
def test_the_others(name):
    check(name)


def trained(inner, params, method, steps, grads=jnp.cos):
    """Parameters and state after some steps, in the README's order."""
    tx = gj.sparsify(inner, method)
    state = tx.init(params)
    params = gj.apply_masks(params, gj.get_masks(state))
    update = jax.jit(tx.update)
    for step in range(steps):
        updates, state = update(
            jax.tree.map(lambda p, t=step: grads(9 * p + t), params), state, params
        )
        params = optax.apply_updates(params, updates)
    return params, state


def half(shape):
    return jnp.arange(np.prod(shape)).reshape(shape) % 2 == 0


@pytest.mark.parametrize(
    "make", [optax.contrib.dog, optax.contrib.dowg, lambda _: optax.contrib.prodigy(), optax.adam]
)
def test_distances_are_those_of_the_live_weights_alone(make):
    params = {"kernel": jax.random.normal(jax.random.key(0), (8, 6))}
    masks = {"kernel": half((8, 6))}
    sparse, _ = trained(make(1.0), params, gj.static(masks=masks), 5)
    alone = {"kernel": params["kernel"][masks["kernel"]]}
    inner = make(1.0)
    state = inner.init(alone)
    for step in range(5):
        grads = {"kernel": jnp.cos(9 * alone["kernel"] + step)}
        updates, state = inner.update(grads, state, alone)
        alone = optax.apply_updates(alone, updates)
    np.testing.assert_allclose(sparse["kernel"][masks["kernel"]], alone["kernel"], rtol=1e-4)


def test_what_is_pruned_later_counts_for_no_distance():
    params = {"kernel": jax.random.normal(jax.random.key(0), (8, 6))}
    method = gj.gmp(final_sparsity=0.5, end_step=6, update_every=3)
    sizes = []
    for steps in (2, 3, 4, 8):
        weights, _ = trained(optax.contrib.dog(1.0), params, method, steps)
        sizes.append(float(jnp.abs(weights["kernel"]).max()))
    assert max(sizes) < 1.1 * float(jnp.abs(params["kernel"]).max())


@pytest.mark.parametrize(
    ("inner", "field", "initial"),
    [
        (optax.rprop(0.01), "step_sizes", 0.01),
        (optax.adagrad(0.1), "sum_of_squares", 0.1),
        (optax.yogi(0.1), "nu", 1e-6),
        (optax.contrib.cocob(), "scale", 1e-8),
        (optax.adam(0.1), "nu", 0.0),
    ],
)
def test_weights_that_grow_start_with_the_initial_state(inner, field, initial):
    params = {"kernel": jax.random.normal(jax.random.key(0), (8, 6))}
    method = optimizer_table.method()
    before, state = trained(inner, params, method, 2)
    masks = gj.get_masks(state)["kernel"]
    grown = masks & ~state.keep["kernel"]
    assert grown.any()
    np.testing.assert_array_equal(before["kernel"][grown], 0)
    held = optax.tree.get(state.inner, field)["kernel"]
    np.testing.assert_allclose(np.asarray(held)[np.asarray(grown)], initial, rtol=1e-6)
    after, _ = trained(inner, params, method, 4)  # rprop waits for a second gradient
    assert (after["kernel"][grown] != 0).all()


def shampoo_like():
    """Statistics of rows and columns, stored by the parameter's path."""

    def init(params):
        rows = jax.tree.map(lambda p: jnp.eye(p.shape[0]), params)
        return {"rows": rows, "columns": jax.tree.map(lambda p: jnp.eye(p.shape[-1]), params)}

    def update(grads, state, params=None):
        rows = jax.tree.map(lambda s, g: s + g @ g.T, state["rows"], grads)
        columns = jax.tree.map(lambda s, g: s + g.T @ g, state["columns"], grads)
        updates = jax.tree.map(
            lambda g, r, c: -0.1 * jnp.linalg.inv(r) @ g @ jnp.linalg.inv(c), grads, rows, columns
        )
        return updates, {"rows": rows, "columns": columns}

    return optax.GradientTransformation(init, update)


@pytest.mark.parametrize("shape", [(8, 8), (8, 6), (6, 8)])
def test_square_statistics_are_no_moments(shape):
    params = {"kernel": jax.random.normal(jax.random.key(0), shape)}
    masks = {"kernel": half(shape)}
    params, state = trained(shampoo_like(), params, gj.static(masks=masks), 3)
    chex.assert_tree_all_finite(params)
    assert (state.inner["rows"]["kernel"] != 0).all()
    assert gj.check_sparse(params, state) == 0


def test_moments_one_step_beyond_the_path_of_their_parameter():
    def init(params):
        return jax.tree.map(lambda p: (jnp.zeros_like(p), jnp.ones_like(p)), params)

    def update(grads, state, params=None):
        state = jax.tree.map(lambda g, s: (s[0] + g, s[1] + 1), grads, state)
        return jax.tree.map(lambda g: -0.1 * g, grads), state

    inner = optax.GradientTransformation(init, update)
    masks = {"kernel": half((4, 4))}
    _, state = trained(inner, {"kernel": jnp.ones((4, 4))}, gj.static(masks=masks), 3)
    off = ~np.asarray(masks["kernel"])
    assert not np.asarray(state.inner["kernel"][0])[off].any()
    np.testing.assert_array_equal(np.asarray(state.inner["kernel"][1])[off], 2)  # its first step


def test_complex_weights_in_halves_have_one_mask():
    params = {
        "kernel": jnp.exp(1j * jnp.arange(16.0)).reshape(4, 4) * jnp.arange(16.0).reshape(4, 4)
    }
    method = gj.gmp(final_sparsity=0.5, end_step=4, update_every=2)
    inner = optax.contrib.split_real_and_imaginary(optax.adam(0.01))
    params, state = trained(inner, params, method, 6, grads=lambda x: x / 9)
    mask = gj.get_masks(state)["kernel"]
    assert mask.sum() == 8
    np.testing.assert_array_equal(params["kernel"] != 0, mask)
    for part in jax.tree.leaves(optax.tree.get(state.inner, "mu")):
        assert not np.asarray(part)[~np.asarray(mask)].any()
    outside = optax.contrib.split_real_and_imaginary(gj.sparsify(optax.adam(0.01), method))
    with pytest.raises(ValueError, match=r"use sparsify\(optax.contrib.split_real_and_imaginary"):
        outside.init(params)


FREEZES = {
    "partition": lambda: optax.partition(
        {"f": optax.set_to_zero(), "t": optax.adam(0.1)}, {"a": "f", "b": "t"}
    ),
    "masked": lambda: optax.chain(
        optax.sgd(0.1), optax.masked(optax.set_to_zero(), {"a": True, "b": False})
    ),
    "freeze": lambda: optax.chain(optax.adam(0.1), optax.freeze({"a": True, "b": False})),
}


@pytest.mark.parametrize("name", [x for x in FREEZES if x != "freeze" or hasattr(optax, x)])
def test_frozen_layers_are_refused_unless_a_rule_keeps_them(name):
    inner = FREEZES[name]()
    params = {"a": jnp.ones((8, 6)), "b": jnp.ones((6, 5))}
    kwargs = {"sparsity": 0.5, "update_every": 2, "total_steps": 8, "key": jax.random.key(0)}
    for make in (gj.rigl, gj.set_, gj.snfs):
        with pytest.raises(ValueError, match=r"would prune a, which the optimizer never updates"):
            gj.sparsify(inner, make(**kwargs)).init(params)
    with pytest.raises(ValueError, match=r"prunable=\[\('\^a\$', False\)"):
        gj.sparsify(inner, gj.gmp(final_sparsity=0.5, end_step=4, update_every=2)).init(params)
    method = gj.rigl(**kwargs, prunable=[("^a$", False)])
    trained_params, _ = trained(inner, params, method, 5)
    np.testing.assert_array_equal(trained_params["a"], 1)


def test_buffers_that_are_no_floats_are_left_alone():
    params = {"kernel": jnp.ones((4, 4)), "seen": jnp.zeros((4, 4), bool), "ids": jnp.arange(3)}
    labels = {"kernel": "t", "seen": "f", "ids": "f"}
    inner = optax.partition({"f": optax.set_to_zero(), "t": optax.adam(0.1)}, labels)
    method = gj.rigl(sparsity=0.5, update_every=2, total_steps=8, key=jax.random.key(0))
    tx = gj.sparsify(inner, method)
    state = tx.init(params)
    new = gj.apply_masks(params, gj.get_masks(state))
    for _ in range(3):
        updates, state = tx.update(params, state, new)
        updates = {**params, "kernel": updates["kernel"]}
        new = {**params, "kernel": optax.apply_updates(new, updates)["kernel"]}
    assert (new["kernel"] != 0).sum() <= 8
    chex.assert_trees_all_equal_dtypes(new, params)


def test_states_of_others_are_refused_by_name():
    params = {"kernel": jnp.ones((8, 6)), "bias": jnp.ones(6)}
    rigl = gj.rigl(sparsity=0.5, update_every=2, total_steps=8, key=jax.random.key(0))
    set_ = gj.set_(sparsity=0.5, update_every=2, total_steps=8, key=jax.random.key(0))
    old = gj.sparsify(optax.adam(0.1), rigl).init(params)
    with pytest.raises(ValueError, match="written by the method rigl, this one is set_"):
        gj.sparsify(optax.adam(0.1), set_).update(params, old, params)
    with pytest.raises(ValueError, match=r"another optimizer.* of ScaleByAdamState is unexpected"):
        gj.sparsify(optax.sgd(0.1), rigl).update(params, old, params)
    with pytest.raises(ValueError, match="another optimizer"):
        gj.sparsify(optax.sgd(0.1, momentum=0.9), rigl).update(params, old, params)
    other = {"kernel": jnp.ones((8, 6))}
    with pytest.raises(ValueError, match="needs a mask; only one of the two has bias"):
        gj.sparsify(optax.adam(0.1), rigl).update(other, old, other)
    with pytest.raises(ValueError, match="got a dict"):
        gj.sparsify(optax.adam(0.1), rigl).update(params, {"masks": {}}, params)
    no_key = gj.granet(final_sparsity=0.5, end_step=4, update_every=2, total_steps=8)
    key = gj.granet(
        final_sparsity=0.5, end_step=4, update_every=2, total_steps=8, key=jax.random.key(0)
    )
    with pytest.raises(ValueError, match="made without a key, the method with one"):
        gj.sparsify(optax.adam(0.1), key).update(
            params, gj.sparsify(optax.adam(0.1), no_key).init(params), params
        )
    moved_on = gj.set_masks(gj.sparsify(optax.adam(0.1), set_).init(params), gj.get_masks(old))
    gj.sparsify(optax.adam(0.1), set_).update(params, moved_on, params)


def test_check_sparse_finds_averages_and_later_transformations():
    method = gj.static(sparsity=0.5, key=jax.random.key(0))
    params = {"kernel": jnp.arange(1.0, 17.0).reshape(4, 4)}
    tx = optax.lookahead(gj.sparsify(optax.sgd(0.1), method), 2, 0.5)
    pair = optax.LookaheadParams.init_synced(params)
    state = tx.init(pair)
    with pytest.raises(
        ValueError, match="8 weights of fast/kernel are not 0 though they are pruned"
    ):
        gj.check_sparse(pair, state)
    sparse = gj.apply_masks(params, gj.get_masks(state))
    assert gj.check_sparse(pair._replace(fast=sparse, slow=sparse), state) == 0
    assert jax.jit(gj.check_sparse)(pair, state) == 16
    with pytest.raises(ValueError, match="params have no kernel of their shape"):
        gj.check_sparse({"bias": jnp.ones(4)}, state)
    with pytest.raises(ValueError, match="found 0"):
        gj.check_sparse(params, optax.adam(0.1).init(params))
