"""Newly grown weights under Adam, learning rates by density, initial weights by fan-in."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import granet_jax as gj
from granet_jax import compact
from granet_jax.young import OLD
from tests.compact_transform_test import compact_step

PARAMS = {"kernel": jnp.array([[0.5, 0.0], [0.25, 0.0]]), "bias": jnp.ones(2)}
MASKS = {"kernel": jnp.array([[True, False], [True, False]]), "bias": jnp.ones(2, bool)}
GRADS = {"kernel": jnp.array([[0.1, 0.3], [-0.2, -0.02]]), "bias": jnp.array([1.0, 2.0])}
LR = 1e-2


def grown_at(step):
    """All weights come on at one step, all at once."""

    def grow(masks, keep, event):
        return jax.tree.map(jnp.ones_like, masks), keep

    start = gj.start_from(MASKS, 0.0, gj.erk, (), None)
    return gj.compose(start, grow, is_update_step=lambda t: t == step)


def adam(*young):
    return optax.chain(optax.scale_by_adam(eps=0.0), *young, optax.scale_by_learning_rate(LR))


def first_updates(make, t):
    """The updates at step ``t`` of weights that grew at the event before, and the state."""
    tx = gj.sparsify(adam(*make), grown_at(t - 1))
    state = tx.init(PARAMS)
    # As after t - 2 steps of these gradients: moments of a long run, as its step count says.
    count = jnp.int32(t - 2)
    sums = [1 - 0.9 ** (t - 2), 1 - 0.999 ** (t - 2)]
    held = jax.tree.map(lambda m, g: jnp.where(m, g, 0.0), MASKS, GRADS)
    mu = jax.tree.map(lambda g: sums[0] * g, held)
    nu = jax.tree.map(lambda g: sums[1] * g**2, held)
    inner = [state.inner[0]._replace(count=count, mu=mu, nu=nu), *state.inner[1:]]
    if make:
        inner[1] = inner[1]._replace(young_step=count)
    state = state._replace(mask_step=count, inner=tuple(inner))
    params, update = PARAMS, jax.jit(lambda s, p: tx.update(GRADS, s, p))
    for _ in range(2):
        updates, state = update(state, params)
        params = optax.apply_updates(params, updates)
    return updates, state


@pytest.mark.parametrize(("t", "without"), [(100, 0.976), (1_000, 2.515), (10_000, 3.162)])
def test_the_first_step_of_a_grown_weight(t, without):
    """Closed form: .98, 2.52 and 3.16 learning rates without, one (or one over the ramp) with."""
    signs = np.array([-1.0, 1.0])
    plain, _ = first_updates([], t)
    np.testing.assert_allclose(plain["kernel"][:, 1], signs * without * LR, rtol=1e-3)
    corrected, state = first_updates([gj.correct_young(ramp=1)], t)
    np.testing.assert_allclose(corrected["kernel"][:, 1], signs * LR, rtol=1e-4)
    ramped, _ = first_updates([gj.correct_young(ramp=100)], t)
    np.testing.assert_allclose(ramped["kernel"][:, 1], signs * LR / 100, rtol=1e-4)
    for updates in (corrected, ramped):  # those that were there are left alone
        np.testing.assert_allclose(updates["kernel"][:, 0], plain["kernel"][:, 0], rtol=3e-7)
        np.testing.assert_allclose(updates["bias"], plain["bias"], rtol=3e-7)
    keep = jax.tree.map(jnp.ones_like, MASKS)
    passed, _ = gj.correct_young(ramp=100).update(GRADS, state.inner[1], PARAMS, keep=keep)
    np.testing.assert_array_equal(passed["kernel"][:, 0], GRADS["kernel"][:, 0])  # to the bit
    np.testing.assert_array_equal(passed["bias"], GRADS["bias"])
    age = optax.tree.get(state, "age")["kernel"]
    np.testing.assert_array_equal(age, [[OLD, 1], [OLD, 1]])


@pytest.mark.parametrize("t", [OLD - 1, OLD, OLD + 1, 300_000])
def test_old_weights_stay_old_in_long_runs(t):
    """Ages are counted to 65,535, steps further."""
    tx = gj.correct_young(b2=0.99999, ramp=OLD - 1)
    state = tx.init(PARAMS)._replace(young_step=jnp.int32(t - 1))
    updates, _ = tx.update(GRADS, state, PARAMS, keep=jax.tree.map(jnp.ones_like, MASKS))
    np.testing.assert_array_equal(updates["kernel"], GRADS["kernel"])
    with pytest.raises(ValueError, match=r"from 1 \(no ramp\) to 65534; got 65535"):
        gj.correct_young(ramp=OLD)


def test_it_is_adam_restarted_for_the_weight():
    """Twenty steps of changing gradients after step 500, against an Adam that begins there."""
    tx, fresh = gj.sparsify(adam(gj.correct_young(ramp=1)), grown_at(500)), adam()
    state, params = tx.init(PARAMS), PARAMS
    step = jax.jit(lambda g, s, p: tx.update(g, s, p))
    draw = jax.jit(lambda t: jax.random.normal(jax.random.fold_in(jax.random.key(0), t), (2, 2)))
    for t in range(1, 501):
        updates, state = step({"kernel": draw(t), "bias": jnp.ones(2)}, state, params)
        params = optax.apply_updates(params, updates)
    assert not params["kernel"][:, 1].any()
    restarted = fresh.init(params)
    for t in range(501, 521):
        grads = {"kernel": draw(t), "bias": jnp.ones(2)}
        wanted, restarted = fresh.update(grads, restarted, params)
        updates, state = step(grads, state, params)
        np.testing.assert_allclose(updates["kernel"][:, 1], wanted["kernel"][:, 1], rtol=1e-4)


def test_weights_pruned_and_regrown_are_young_again():
    young = gj.correct_young(ramp=4)
    state = young.init(PARAMS)
    ages = []
    for on in (1, 1, 0, 0, 1, 1, 0, 1):
        keep = {"kernel": jnp.full((2, 2), bool(on)), "bias": jnp.ones(2, bool)}
        updates, state = young.update(PARAMS, state, PARAMS, keep=keep)
        ages.append(int(state.age["kernel"][0, 0]))
        np.testing.assert_array_equal(updates["bias"], PARAMS["bias"])
    assert ages == [OLD, OLD, 0, 0, 1, 2, 0, 1]
    assert state.age["kernel"].dtype == jnp.uint16


def test_on_slots_as_on_dense_weights():
    method = gj.rigl(sparsity=0.5, update_every=3, total_steps=40, key=jax.random.key(0))
    params = {"kernel": jax.random.normal(jax.random.key(1), (6, 8))}
    inner = adam(gj.correct_young(ramp=5))
    dense, slots = gj.sparsify(inner, method), compact.sparsify(inner, method)
    state, other = dense.init(params), slots.init(params)
    values = compact.to_slots(params, compact.get_layouts(other))
    params = gj.apply_masks(params, gj.get_masks(state))
    update = jax.jit(dense.update)
    for t in range(1, 16):
        grads = {"kernel": jax.random.normal(jax.random.fold_in(jax.random.key(2), t), (6, 8))}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        values, other = compact_step(slots, grads, other, values)
        layouts = compact.get_layouts(other)
        np.testing.assert_array_equal(
            compact.masks(values, layouts)["kernel"], gj.get_masks(state)["kernel"]
        )
        np.testing.assert_allclose(
            compact.unpack(values, layouts)["kernel"], params["kernel"], atol=1e-6
        )
    with pytest.raises(ValueError, match="No parameter is prunable"):
        compact.sparsify(adam(gj.scale_by_density()), method).init(params)


def test_steps_by_density_of_each_layer():
    """Of a stack of two layers, one with half and one with a quarter of its weights."""
    keep = jnp.stack([jnp.arange(8) < 4, jnp.arange(8) < 2]).reshape(2, 2, 4)
    tree = {"stack": jnp.ones((2, 2, 4))}
    tx = gj.scale_by_density(0.5, [("stack", gj.Stacked(1))])
    updates, _ = tx.update(tree, tx.init(tree), tree, keep={"stack": keep})
    np.testing.assert_allclose(updates["stack"][:, 0, 0], [2**0.5, 2.0], rtol=1e-6)


def test_signals_keep_their_size_through_sparse_layers():
    keys = jax.random.split(jax.random.key(0), 5)
    draw = jax.nn.initializers.he_normal()
    params = {f"{i}": {"kernel": draw(keys[i], (400, 400))} for i in range(3)}
    masks = gj.random_masks(keys[3], params, 0.9, gj.uniform)
    x = jax.random.normal(keys[4], (64, 400))

    def spread(params):
        y = x
        for i in range(3):
            y = jax.nn.relu(y @ params[f"{i}"]["kernel"])
        return float(jnp.sqrt(jnp.mean(y**2)))

    dense = spread(params)
    assert spread(gj.apply_masks(params, masks)) < 0.05 * dense
    np.testing.assert_allclose(spread(gj.init.by_fan_in(params, masks)), dense, rtol=0.15)


def test_what_is_wrong_is_told():
    for wrong in ({"b1": 1.0}, {"b2": -0.1}, {"ramp": 0}):
        with pytest.raises(ValueError, match=r"must be in \[0, 1\)|from 1"):
            gj.correct_young(**wrong)
    for outside in (gj.correct_young(), gj.scale_by_density()):
        with pytest.raises(ValueError, match="put it inside"):
            outside.update(PARAMS, outside.init(PARAMS), PARAMS)


def test_it_knows_its_own_part_of_the_parameters():
    """Under ``partition`` it sees a part, and ``keep`` is of all."""
    params = {"head": {"kernel": jnp.ones((2, 2))}, "body": {"kernel": jnp.ones((4, 4))}}
    labels = {"head": "plain", "body": "young"}
    young = optax.chain(optax.scale_by_adam(), gj.correct_young(), optax.scale(-LR))
    inner = optax.partition({"plain": optax.sgd(LR), "young": young}, labels)
    method = gj.set_(sparsity=0.5, update_every=1, total_steps=9, key=jax.random.key(0))
    tx = gj.sparsify(inner, method)
    state = tx.init(params)
    for _ in range(3):
        _, state = tx.update(params, state, params)
    (age,) = (
        x for path, x in gj.trees.paths(state.inner).items() if path.endswith("age/body/kernel")
    )
    masks = gj.get_masks(state)["body"]["kernel"]
    assert set(age[masks].tolist()) >= {0, OLD}
    assert not age[~masks].any()
