"""Straight-through training: masks of this step's weights, gradients to all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import granet_jax as gj
from tests import tables

RULES = [("", gj.structures.n_of_m(4))]


def params_of(*shape):
    return {"kernel": jax.random.normal(tables.KEY, shape), "bias": jnp.ones(shape[-1])}


@pytest.mark.parametrize("decay", [0.0, 2e-4])
def test_gradients_are_those_of_the_forward_pass_and_the_decay_bit_for_bit(decay):
    """g + decay (1 - m) w."""
    method = gj.reparam.sr_ste(sparsity=0.5, decay=decay, prunable=RULES)
    params = params_of(8, 6)
    extra, x = method.init(params), jax.random.normal(jax.random.key(1), (5, 8))

    def loss(params):
        return jnp.sum(jnp.sin(x @ params["kernel"] + params["bias"][None]))

    mask = method.masks(params, extra)["kernel"]
    groups = np.asarray(mask).reshape(2, 4, 6).sum(1)
    np.testing.assert_array_equal(groups, 2)
    inside = jax.jit(jax.grad(loss))(gj.apply_masks(params, method.masks(params, extra)))
    found = jax.jit(jax.grad(lambda p: loss(method.effective(p, extra))))(params)
    wanted = jax.jit(lambda g, w: g + decay * jnp.where(mask, 0.0, w))(
        inside["kernel"], params["kernel"]
    )
    np.testing.assert_array_equal(found["kernel"], wanted)
    np.testing.assert_array_equal(found["bias"], inside["bias"])


@pytest.mark.parametrize(
    "inner", [optax.sgd(0.1, momentum=0.9), optax.adamw(0.2, weight_decay=0.5)]
)
@pytest.mark.parametrize("scope", [gj.uniform, gj.global_ranking])
def test_masks_are_the_largest_weights_of_each_step(inner, scope):
    """Stored weights are dense, the step counts itself whatever the optimizer does to it."""
    method = gj.reparam.ste(sparsity=0.8, end_step=6, scope=scope)
    tx = gj.reparam.penalise(inner, method, 0.0)
    params = {"a": jax.random.normal(tables.KEY, (10, 5)), "b": 3 * jnp.ones((5, 10))}
    params["b"] += jax.random.normal(tables.KEY, (5, 10))
    pair = (params, method.init(params))
    state = tx.init(pair)
    step = jax.jit(lambda grads, state, pair: tx.update(grads, state, pair))
    came_back = False
    before = gj.ones(params)
    for t in range(1, 13):
        sparsity = 0.8 * (1 - (1 - min(t, 6) / 6) ** 3)
        masks = method.masks(*pair)
        sizes = {k: np.abs(np.asarray(w)) for k, w in pair[0].items()}
        if scope is gj.uniform:
            for k, size in sizes.items():
                num = round(50 - (50 - 10) * (1 - (1 - min(t, 6) / 6) ** 3))
                assert abs(int(masks[k].sum()) - num) <= 1, (t, k)
                assert size[np.asarray(masks[k])].min() >= size[~np.asarray(masks[k])].max(
                    initial=0
                )
        total = sum(int(m.sum()) for m in masks.values())
        assert abs(total - 100 * (1 - sparsity)) <= 2
        came_back |= any(bool((masks[k] & ~before[k]).any()) for k in masks)
        before = masks
        grads = jax.tree.map(
            lambda p, t=t: jax.random.normal(jax.random.fold_in(tables.KEY, t), p.shape), pair
        )
        grads = (grads[0], jax.tree.map(jnp.zeros_like, pair[1]))
        updates, state = step(grads, state, pair)
        pair = optax.apply_updates(pair, updates)
        assert float(pair[1]["step"]) == t
    assert total == 20
    assert came_back
    assert all(bool((w != 0).all()) for w in pair[0].values())
    np.testing.assert_allclose(float(state.sparsity), 0.8, atol=1e-6)
    exported, masks = gj.reparam.export(method, *pair)
    for k, w in exported.items():
        np.testing.assert_array_equal(w, np.where(masks[k], pair[0][k], 0.0))


def test_layers_of_a_stack_are_layers():
    rules = [("stack", gj.Stacked(1, gj.structures.n_of_m(4)))]
    method = gj.reparam.sr_ste(sparsity=0.5, prunable=rules)
    params = {"stack": jax.random.normal(tables.KEY, (3, 8, 4))}
    mask = np.asarray(method.masks(params, method.init(params))["stack"])
    np.testing.assert_array_equal(mask.reshape(3, 2, 4, 4).sum(2), 2)


def test_what_is_off_fades_in_stairs_and_is_trained_with_the_share_it_has():
    """w (m + a (1 - m)), a = 3/4, 1/2, 1/4, 0 from steps 2, 4, 6 and 8 on."""
    method = gj.reparam.mask_decay(sparsity=0.5, begin_step=2, end_step=8, num_stairs=4)
    params = {"kernel": jnp.array([[4.0, 1.0], [-2.0, 3.0]])}
    for step, leak in enumerate([1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25, 0, 0]):
        extra = {"step": jnp.float32(step)}  # updates done
        share = np.array([[1, leak], [leak, 1]])
        used = method.effective(params, extra)["kernel"]
        grads = jax.grad(lambda p: jnp.sum(method.effective(p, extra)["kernel"]))(params)  # noqa: B023
        np.testing.assert_array_equal(used, share * params["kernel"])
        np.testing.assert_array_equal(grads["kernel"], share)
        np.testing.assert_array_equal(method.masks(params, extra)["kernel"], share > 0)


def test_groups_lose_one_weight_at_a_time():
    method = gj.reparam.structure_decay(
        sparsity=0.75, m=4, begin_step=2, end_step=6, prunable=RULES
    )
    params = params_of(8, 6)
    for step, kept in enumerate([4, 3, 3, 2, 2, 1, 1]):  # updates done
        mask = np.asarray(method.masks(params, {"step": jnp.float32(step)})["kernel"])
        np.testing.assert_array_equal(mask.reshape(2, 4, 6).sum(1), kept)
        size = np.abs(np.asarray(params["kernel"])).reshape(2, 4, 6)
        ranks = np.argsort(np.argsort(-size, axis=1), axis=1)
        np.testing.assert_array_equal(mask.reshape(2, 4, 6), ranks < kept)
    with pytest.raises(ValueError, match=r"takes 2\.8: give it k/m"):
        gj.reparam.structure_decay(sparsity=0.7, m=4, end_step=6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sparsity": 98}, r"must be in \[0, 1\)"),
        ({"sparsity": 0.5, "end_step": 0}, "end_step"),
        ({"sparsity": 0.5, "decay": -1.0}, "decay must be >= 0"),
        ({"sparsity": 0.7, "prunable": RULES}, "sparsity"),
    ],
)
def test_what_cannot_be_is_told(given, message):
    with pytest.raises(ValueError, match=message):
        gj.reparam.ste(**given).init(params_of(8, 6))


def test_complex_weights_that_are_off_decay():
    """JAX's gradient of ``decay / 2 |w|^2`` is ``decay conj(w)``."""
    method = gj.reparam.ste(sparsity=0.5, end_step=1, decay=0.5)
    w = {"kernel": jnp.array([[3 + 1j, 0.5 + 0.25j], [-2.0, 0.25 - 1j]], jnp.complex64)}
    extra = method.advance(method.advance(method.init(w)))
    off = ~method.masks(w, extra)["kernel"]
    got = jax.grad(lambda w: 0.0 * jnp.abs(jnp.sum(method.effective(w, extra)["kernel"])))(w)
    expected = jax.grad(lambda w: 0.25 * jnp.sum(jnp.abs(jnp.where(off, w["kernel"], 0)) ** 2))(w)
    assert off.sum() == 2
    np.testing.assert_allclose(got["kernel"], expected["kernel"], rtol=1e-6)
