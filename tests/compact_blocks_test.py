"""Training with live blocks alone: whole blocks are slots, and products are done by blocks."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import granet_jax as gj
from granet_jax import compact

BLOCK = (4, 8)
RULES = [("odd", False), ("", gj.structures.block(BLOCK))]
INTERPRETED = {"native": True}  # on a CPU; on a GPU or a TPU, blocks are multiplied as they are


def make_params(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"a": (16, 32), "b": (32, 16), "odd": (16, 6)}
    return {
        name: {"kernel": jax.random.normal(key, shape, dtype) / 4, "bias": jnp.zeros(shape[1])}
        for key, (name, shape) in zip(keys, shapes.items(), strict=False)
    }


def loss(params, x, y):
    for name in ("a", "b", "odd"):
        x = jax.nn.relu(x @ params[name]["kernel"]) + params[name]["bias"][None].astype(x.dtype)
    return jnp.mean((x.astype(jnp.float32) - y) ** 2)


X = jax.random.normal(jax.random.key(5), (10, 16))
Y = jax.random.normal(jax.random.key(6), (10, 6))


def test_slots_are_whole_blocks_row_by_row():
    mask = jnp.zeros((4, 4), bool).at[:2, 2:].set(True).at[2:, :2].set(True)
    params = {"w": jnp.arange(16.0).reshape(4, 4)}
    rules = [("", gj.structures.block((2, 2)))]
    values, layouts = compact.pack(params, {"w": mask}, rules, block=(2, 2))
    assert values["w"].tolist() == [2, 3, 6, 7, 8, 9, 12, 13]
    assert layouts["w"].index.tolist() == [1, 2]
    np.testing.assert_array_equal(compact.unpack(values, layouts)["w"], params["w"] * mask)
    np.testing.assert_array_equal(compact.masks(values, layouts)["w"], mask)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_and_gradients_equal_those_of_the_dense_leaf(dtype):
    params = make_params(dtype)
    masks = gj.random_masks(jax.random.key(1), params, 0.7, gj.erk, RULES)
    params, x = gj.apply_masks(params, masks), X.astype(dtype)
    values, layouts = compact.pack(params, masks, RULES, block=BLOCK)
    table = compact.table(loss, values, layouts, x, Y, **INTERPRETED)
    assert [line.split()[-1] for line in table.splitlines()[1:]] == ["blocks", "blocks"]

    dense, wanted = jax.value_and_grad(loss)(params, x, Y)
    got, grads = jax.jit(jax.value_and_grad(compact.sparse(loss, **INTERPRETED)))(
        values, layouts, x, Y
    )
    tolerance = {4: 1e-5, 2: 2e-2}[dtype.dtype.itemsize]
    np.testing.assert_allclose(got, dense, rtol=tolerance)
    wanted_slots = compact.to_slots(wanted, layouts)
    chex.assert_trees_all_close(grads, wanted_slots, rtol=tolerance, atol=tolerance)
    _, of_all = compact.value_and_dense_grad(loss, **INTERPRETED)(values, layouts, x, Y)
    chex.assert_trees_all_close(of_all, wanted, rtol=tolerance, atol=tolerance)


def test_a_scan_over_stacked_layers():
    params = {"w": jax.random.normal(jax.random.key(0), (3, 16, 16)) / 4}
    rules = [("", gj.trees.Stacked(1, gj.structures.block((8, 8))))]
    masks = gj.random_masks(jax.random.key(1), params, 0.5, gj.uniform, rules)
    params = gj.apply_masks(params, masks)
    values, layouts = compact.pack(params, masks, rules, block=(8, 8))
    chex.assert_shape(values["w"], (3, 2 * 64))

    def apply_fn(params, x):
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0] ** 2)

    got = jax.value_and_grad(compact.sparse(apply_fn, **INTERPRETED))(values, layouts, X)
    wanted, grads = jax.value_and_grad(apply_fn)(params, X)
    chex.assert_trees_all_close(got, (wanted, compact.to_slots(grads, layouts)), rtol=1e-4)


@pytest.mark.parametrize("native", [None, True])
def test_training_is_training_under_the_masks(native):
    """RigL in blocks: the same masks and weights as masked training, and blocks kept whole."""
    method = gj.rigl(
        sparsity=0.7, update_every=3, total_steps=30, key=jax.random.key(9), prunable=RULES
    )
    params = make_params()
    tx = compact.sparsify(optax.adam(1e-2), method, RULES, block=BLOCK)
    state = tx.init(params)
    values = compact.to_slots(params, compact.get_layouts(state))
    start = compact.masks(values, compact.get_layouts(state))
    dense_grad = compact.value_and_dense_grad(loss, native=native)

    @jax.jit
    def step(values, state):
        layouts = compact.get_layouts(state)
        grads = jax.grad(compact.sparse(loss, native=native))(values, layouts, X, Y)
        whole = functools.partial(dense_grad, values, layouts, X, Y)
        updates, state = tx.update(grads, state, values, dense_grads=lambda: whole()[1])
        return optax.apply_updates(values, updates), state

    masked = gj.sparsify(optax.adam(1e-2), method)
    masked_state = masked.init(params)
    dense = gj.apply_masks(params, gj.get_masks(masked_state))

    @jax.jit
    def masked_step(params, state):
        updates, state = masked.update(jax.grad(loss)(params, X, Y), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(9):
        values, state = step(values, state)
        dense, masked_state = masked_step(dense, masked_state)
    compact.check(state)
    layouts = compact.get_layouts(state)
    masks = compact.masks(values, layouts)
    assert not jnp.array_equal(masks["a"]["kernel"], start["a"]["kernel"])
    chex.assert_trees_all_equal(masks, gj.get_masks(masked_state))
    chex.assert_trees_all_close(compact.unpack(values, layouts), dense, atol=1e-5)


def test_fewer_slots_keep_whole_blocks():
    method = gj.magnitude(sparsity=0.75, at=1, prunable=RULES)
    params = make_params()
    tx = compact.sparsify(optax.sgd(0.1, momentum=0.9), method, RULES, block=BLOCK)
    state = tx.init(params)
    values = compact.to_slots(params, compact.get_layouts(state))
    updates, state = tx.update(jax.tree.map(jnp.zeros_like, values), state, values)
    values = optax.apply_updates(values, updates)
    before = compact.unpack(values, compact.get_layouts(state))
    values, state = compact.shrink((values, state), state, values)
    layout = compact.get_layouts(state)["a/kernel"]
    assert layout.capacity == compact.num_live(layout) < 16 * 32
    assert layout.capacity % 32 == 0
    chex.assert_trees_all_equal(compact.unpack(values, compact.get_layouts(state)), before)


def test_no_rows_no_live_blocks_and_a_batch():
    params = {"w": jax.random.normal(jax.random.key(0), (16, 16))}
    rules = [("", gj.structures.block((8, 8)))]
    masks = {"w": jnp.zeros((16, 16), bool).at[:8, 8:].set(True)}
    values, layouts = compact.pack(params, masks, rules, block=(8, 8))
    product = compact.sparse(lambda p, x: x @ p["w"], **INTERPRETED)
    chex.assert_shape(product(values, layouts, X[:0]), (0, 16))
    x = jax.random.normal(jax.random.key(1), (3, 10, 16))
    got = jax.vmap(product, (None, None, 0))(values, layouts, x)
    np.testing.assert_allclose(got, x @ jnp.where(masks["w"], params["w"], 0), atol=1e-5)
    none = {"w": jnp.zeros((16, 16), bool)}
    values, layouts = compact.pack(params, none, rules, block=(8, 8), capacity={"w": 0})
    np.testing.assert_array_equal(product(values, layouts, X), jnp.zeros((10, 16)))


@pytest.mark.parametrize("structure", [gj.structures.n_of_m(4), gj.structures.block((4, 4))])
def test_leaves_of_another_structure_are_kept_by_weights(structure):
    """Though a dense start looks like any structure; blocks beside them stay blocks."""
    rules = [("^a/", structure), *RULES]
    method = gj.magnitude(sparsity=0.5, at=1, scope=gj.uniform, prunable=rules)
    params = make_params()
    tx = compact.sparsify(optax.sgd(0.1), method, rules, block=BLOCK)
    state = tx.init(params)
    assert [x.block for x in compact.get_layouts(state).values()] == [(), BLOCK]
    values = compact.to_slots(params, compact.get_layouts(state))
    _, state = tx.update(jax.tree.map(jnp.zeros_like, values), state, values)
    compact.check(state)
    masked = gj.sparsify(optax.sgd(0.1), method)
    _, after = masked.update(jax.tree.map(jnp.zeros_like, params), masked.init(params), params)
    masks = compact.masks(values, compact.get_layouts(state))
    chex.assert_trees_all_equal(masks, gj.get_masks(after))


def test_a_precision_that_blocks_do_not_have_is_kept():
    params = make_params()
    masks = gj.random_masks(jax.random.key(1), params, 0.7, gj.erk, RULES)
    values, layouts = compact.pack(params, masks, RULES, block=BLOCK)

    def product(params, x):
        return jnp.dot(x, params["a"]["kernel"], precision="highest")

    table = compact.table(product, values, layouts, X, **INTERPRETED)
    assert table.splitlines()[1].split()[-2:] == ["dense", "precision"]


def test_masks_that_are_no_blocks_are_refused_and_other_leaves_kept_by_weights():
    params = make_params()
    masks = gj.random_masks(jax.random.key(1), params, 0.7, gj.erk, [("odd", False)])
    with pytest.raises(ValueError, match="Blocks of a/kernel are live in part"):
        compact.pack(params, masks, RULES, block=BLOCK)
    masks = gj.random_masks(jax.random.key(1), params, 0.7, gj.erk, RULES)
    _, layouts = compact.pack(params, masks, RULES, block=(5, 8))  # divides no layer
    assert all(layout.block == () for layout in layouts.values())
