"""The loops that users have: Flax NNX, Flax Linen, Equinox, bare trees; scan, vmap, sharding."""

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import granet_jax as gj

as_users_compile = pytest.mark.usefixtures("compiled_well")

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (32, 8))
Y = jnp.argmax(X[:, :4], axis=1)
STEPS = 12


def method(key=KEY):
    return gj.granet(
        initial_sparsity=0.5,
        final_sparsity=0.75,
        end_step=8,
        update_every=2,
        total_steps=STEPS,
        key=key,
    )


def transform(key=KEY):
    return gj.sparsify(optax.adam(1e-2), method(key))


def cross_entropy(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, Y).mean()


def assert_trained_sparse(params, masks, first_loss, last_loss):
    """Sparsity .75 of the 192 weights of an 8-16-4 network, zeros where the mask is off."""
    chex.assert_trees_all_equal(params, gj.apply_masks(params, masks))
    assert round(192 * float(gj.metrics.sparsity(masks, params))) == 144
    assert last_loss < first_loss


@as_users_compile
def test_flax_nnx():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 4, rngs=rngs)])
            self.norm = nnx.BatchNorm(16, rngs=rngs)

        def __call__(self, x):
            return self.layers[1](nnx.relu(self.norm(self.layers[0](x))))

    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, transform(), wrt=nnx.Param)
    masks = gj.get_masks(optimizer.opt_state)
    params = nnx.state(model, nnx.Param)
    nnx.update(model, gj.apply_masks(params, masks))
    pure = gj.apply_masks(nnx.to_pure_dict(params), masks)  # mixed forms find each other
    chex.assert_trees_all_equal(pure, nnx.to_pure_dict(nnx.state(model, nnx.Param)))

    @nnx.jit
    def train_step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: cross_entropy(m(X)))(model)
        optimizer.update(model, grads)
        return loss

    losses = [train_step(model, optimizer) for _ in range(STEPS)]
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    masks = nnx.to_pure_dict(gj.get_masks(optimizer.opt_state))
    assert_trained_sparse(params, masks, losses[0], losses[-1])


@as_users_compile
def test_flax_linen_train_state():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4)(nn.relu(nn.LayerNorm()(nn.Dense(16)(x))))

    model = Model()
    state = TrainState.create(
        apply_fn=model.apply, params=model.init(KEY, X)["params"], tx=transform()
    )
    masked = gj.apply_masks(state.params, gj.get_masks(state.opt_state))
    state = state.replace(params=masked)

    @jax.jit
    def train_step(state):
        loss, grads = jax.value_and_grad(lambda p: cross_entropy(state.apply_fn({"params": p}, X)))(
            state.params
        )
        return state.apply_gradients(grads=grads), loss

    losses = []
    for _ in range(STEPS):
        state, loss = train_step(state)
        losses.append(loss)
    assert_trained_sparse(state.params, gj.get_masks(state.opt_state), losses[0], losses[-1])


@as_users_compile
def test_equinox():
    model = eqx.nn.MLP(8, 4, 16, 1, key=KEY)
    tx = transform()
    params, static = eqx.partition(model, eqx.is_inexact_array)
    state = tx.init(params)
    params = gj.apply_masks(params, gj.get_masks(state))

    @eqx.filter_jit
    def train_step(params, state):
        loss, grads = eqx.filter_value_and_grad(
            lambda p: cross_entropy(jax.vmap(eqx.combine(p, static))(X))
        )(params)
        updates, state = tx.update(grads, state, params)
        return eqx.apply_updates(params, updates), state, loss

    losses = []
    for _ in range(STEPS):
        params, state, loss = train_step(params, state)
        losses.append(loss)
    assert_trained_sparse(params, gj.get_masks(state), losses[0], losses[-1])


def bare_params(key=KEY):
    a, b = jax.random.split(key)
    return {
        "w1": jax.random.normal(a, (8, 16)) / 3,
        "b1": jnp.zeros(16),
        "w2": jax.random.normal(b, (16, 4)) / 4,
        "b2": jnp.zeros(4),
    }


def loss_fn(p):
    return cross_entropy(jax.nn.relu(X @ p["w1"] + p["b1"][None]) @ p["w2"] + p["b2"][None])


def step_fn(carry, _=None):
    params, state = carry
    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, state = transform().update(grads, state, params)
    return (optax.apply_updates(params, updates), state), loss


def start(key=KEY):
    params = bare_params(key)
    state = transform(key).init(params)
    return gj.apply_masks(params, gj.get_masks(state)), state


@as_users_compile
def test_bare_tree_with_donated_buffers():
    carry, losses = start(), []
    step = jax.jit(step_fn, donate_argnums=0)
    for _ in range(STEPS):
        carry, loss = step(carry)
        losses.append(loss)
    assert_trained_sparse(carry[0], gj.get_masks(carry[1]), losses[0], losses[-1])


@as_users_compile
def test_scan_equals_a_loop():
    scanned, _ = jax.jit(lambda c: jax.lax.scan(step_fn, c, None, STEPS))(start())
    carry = start()
    for _ in range(STEPS):
        carry, _ = jax.jit(step_fn)(carry)
    chex.assert_trees_all_equal(gj.get_masks(scanned[1]), gj.get_masks(carry[1]))
    chex.assert_trees_all_close(scanned[0], carry[0], rtol=1e-5, atol=1e-6)


def test_vmap_over_seeds_keeps_the_conditional():
    """The step counter stays unbatched, so the conditional does not become a select."""
    keys = jax.random.split(jax.random.key(5), 3)
    one = jax.eval_shape(start)
    axes = jax.tree.map(lambda _: 0, one)
    axes = (axes[0], axes[1]._replace(mask_step=None, grew=None))
    carry = jax.vmap(start, out_axes=axes)(keys)
    step = jax.vmap(step_fn, in_axes=(axes,), out_axes=(axes, 0))
    assert " cond[" in str(jax.make_jaxpr(step)(carry))
    run = jax.jit(step)
    for _ in range(STEPS):
        carry, _ = run(carry)
    for i, key in enumerate(keys):
        alone = start(key)
        for _ in range(STEPS):
            alone, _ = jax.jit(step_fn)(alone)
        masks = jax.tree.map(lambda m, i=i: m[i], gj.get_masks(carry[1]))
        chex.assert_trees_all_equal(masks, gj.get_masks(alone[1]))


def test_vmap_over_sparsities():
    def train(sparsity):
        tx = gj.sparsify(
            optax.sgd(0.1), gj.gmp(final_sparsity=sparsity, end_step=4, update_every=2)
        )

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        params = bare_params()
        (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), None, 6)
        return gj.metrics.sparsity(gj.get_masks(state), params)

    got = jax.jit(jax.vmap(train))(jnp.array([0.25, 0.5, 0.75]))
    np.testing.assert_array_equal(got, [0.25, 0.5, 0.75])


def test_inject_hyperparams_schedules_the_sparsity():
    def make(learning_rate, sparsity):
        return gj.sparsify(
            optax.sgd(learning_rate), gj.gmp(final_sparsity=sparsity, end_step=1, update_every=1)
        )

    tx = optax.inject_hyperparams(make)(
        learning_rate=0.1, sparsity=optax.linear_schedule(0.0, 0.5, 8)
    )
    params = bare_params()
    state = tx.init(params)
    update = jax.jit(chex.assert_max_traces(tx.update, n=1))
    got = []
    for _ in range(9):
        updates, state = update(jax.grad(loss_fn)(params), state, params)
        params = optax.apply_updates(params, updates)
        got.append(float(gj.metrics.sparsity(gj.get_masks(state), params)))
    np.testing.assert_allclose(got, np.arange(9) / 16, atol=0.5 / 192)


SHARDED = {
    "gmp": lambda: gj.gmp(final_sparsity=0.75, end_step=4, update_every=2),
    "rigl": lambda: gj.rigl(sparsity=0.75, update_every=2, total_steps=8, key=KEY),
}


@pytest.mark.parametrize("name", SHARDED)
@pytest.mark.parametrize("axis_type", list(jax.sharding.AxisType)[:2])
def test_masks_follow_the_sharding_of_params(axis_type, name):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)
    shard = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", "model"))
    with jax.set_mesh(mesh):
        params = jax.tree.map(
            lambda p: jax.device_put(p, shard) if p.ndim == 2 else p, bare_params()
        )
        tx = gj.sparsify(optax.adam(1e-2), SHARDED[name]())
        state = tx.init(params)
        assert gj.get_masks(state)["w1"].sharding == shard
        grads = jax.tree.map(lambda p: jnp.sin(50 * p), params)
        update = jax.jit(tx.update)
        expected = tx.init(bare_params())
        for _ in range(4):
            _, state = update(grads, state, params)
            assert gj.get_masks(state)["w1"].sharding.is_equivalent_to(shard, 2)
    plain_grads = jax.tree.map(lambda p: jnp.sin(50 * p), bare_params())
    for _ in range(4):
        _, expected = jax.jit(tx.update)(plain_grads, expected, bare_params())
    chex.assert_trees_all_equal(
        jax.tree.map(np.asarray, gj.get_masks(state)),
        jax.tree.map(np.asarray, gj.get_masks(expected)),
    )


def test_observe_sees_every_gradient():
    base = method()
    average = base._replace(
        init=lambda p: (base.init(p).masks, jax.tree.map(jnp.zeros_like, p)),
        update=lambda s, event: (s, s[0]),
        observe=lambda s, g: (s[0], jax.tree.map(lambda a, b: 0.9 * a + b, s[1], g)),
    )
    tx = gj.sparsify(optax.sgd(0.1), average)
    params = bare_params()
    state = tx.init(params)
    for _ in range(3):
        _, state = tx.update(params, state, params)
    chex.assert_trees_all_close(state.method[1], jax.tree.map(lambda p: 2.71 * p, params))


def test_partition_gives_each_group_its_own_method():
    tx = optax.partition(
        {"sparse": transform(), "dense": optax.sgd(0.1)},
        {"w1": "sparse", "b1": "dense", "w2": "dense", "b2": "dense"},
    )
    params = bare_params()
    state = tx.init(params)
    masked = gj.apply_masks(params, gj.get_masks(state))
    assert (masked["w1"] == 0).sum() == 64
    chex.assert_trees_all_equal(masked["w2"], params["w2"])
    updates, state = tx.update(params, state, masked)
    assert (optax.apply_updates(masked, updates)["w1"] == 0).sum() == 64
