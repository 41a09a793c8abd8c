"""Reparameterisations against numpy, their optimizer against autodiff, the controller on toys."""

from typing import NamedTuple

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from sklearn.datasets import load_digits

import granet_jax as gj
from granet_jax.reparam.dst import long_tailed

METHODS = {"dst": gj.reparam.dst(), "str": gj.reparam.str_(initial=-3.0)}


def both(test):
    return pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)(test)


def lifted(method, p):
    """Thresholds that prune a part of normal weights: .5 (DST), or sigmoid(-2.5) = .08 (STR)."""
    return jax.tree.map(lambda e: e + 0.5, method.init(p))


def values_and_grads(method, w, extra, upstream):
    """Effective weights of one kernel, and the gradients of sum(upstream * effective)."""
    pair = ({"kernel": jnp.asarray(w)}, {"kernel": jnp.asarray(extra)})
    value, vjp = jax.vjp(lambda p, e: method.effective(p, e)["kernel"], *pair)
    dw, de = vjp(jnp.asarray(upstream))
    mask = method.masks(*pair)["kernel"]
    assert mask.dtype == bool
    return value, dw["kernel"], de["kernel"], mask


def test_long_tailed_estimator():
    x = jnp.array([0, 0.2, 0.4, 0.7, 1.0, 1.1])
    expected = [2, 1.2, 0.4, 0.4, 0.4, 0]
    np.testing.assert_allclose(long_tailed(x), expected, rtol=1e-6)
    np.testing.assert_allclose(long_tailed(-x), expected, rtol=1e-6)


def dst_by_numpy(w, t, g, output_axis):
    w, t, g = (np.asarray(x, np.float64) for x in (w, t, g))
    wide = [1] * w.ndim
    wide[output_axis] = -1
    q = np.abs(w) - t.reshape(wide)
    h = np.select([np.abs(q) <= 0.4, np.abs(q) <= 1], [2 - 4 * np.abs(q), 0.4], 0)
    m = q > 0
    inputs = tuple(i for i in range(w.ndim) if i != output_axis % w.ndim)
    return w * m, g * (m + w * h * np.sign(w)), -np.sum(g * w * h, axis=inputs), m


def str_by_numpy(w, s, g, activation, derivative):
    w, g = np.asarray(w, np.float64), np.asarray(g, np.float64)
    live = np.abs(w) > activation(s)
    return (
        np.where(live, np.sign(w) * (np.abs(w) - activation(s)), 0),
        g * live,
        -derivative(s) * np.sum(g * np.sign(w) * live),
        live,
    )


@pytest.mark.parametrize(
    ("shape", "output_axis"),
    [((7, 5), -1), ((5, 7), 0), ((3, 3, 4, 6), -1), ((6, 4, 3, 3), 0), ((2, 6, 3), 1)],
)
def test_dst_is_the_papers_formula(shape, output_axis):
    keys = jax.random.split(jax.random.key(0), 3)
    w, g = jax.random.normal(keys[0], shape), jax.random.normal(keys[1], shape)
    t = jax.random.uniform(keys[2], shape[output_axis : output_axis + 1 or None], minval=-0.5)
    method = gj.reparam.dst(output_axis=output_axis)
    assert method.init({"kernel": w})["kernel"].shape == t.shape
    got = values_and_grads(method, w, t, g)
    for a, b in zip(got, dst_by_numpy(w, t, g, output_axis), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_dst_at_its_knees():
    """Q = |w| - t is 0, .4, 1, beyond 1 and below -1; and w = 0 under three thresholds."""
    w = jnp.array([[0.5, -0.5, 0.5, -1.5, 0.25, 0.0, 0.0, 0.0]])
    t = jnp.array([0.5, 0.1, -0.5, 0.25, 1.5, 0.0, -0.25, 0.25])
    value, dw, dt, mask = values_and_grads(METHODS["dst"], w, t, jnp.ones_like(w))
    # |w| = t is masked, and takes part in learning with H(0) = 2. A weight of 0 has no sign, and
    # counts as kept only below a negative threshold.
    np.testing.assert_array_equal(mask, [[False, True, True, True, False, False, True, False]])
    np.testing.assert_array_equal(value, [[0, -0.5, 0.5, -1.5, 0, 0, 0, 0]])
    np.testing.assert_allclose(dw, [[0.5 * 2, 1 + 0.5 * 0.4, 1.2, 1, 0, 0, 1, 0]], rtol=1e-6)
    np.testing.assert_allclose(dt, [-0.5 * 2, 0.5 * 0.4, -0.2, 0, 0, 0, 0, 0], rtol=1e-6)


def sigmoid(s):
    return 1 / (1 + np.exp(-s))


@pytest.mark.parametrize("s", [-4.0, -1.0, 0.5])
@pytest.mark.parametrize(
    ("activation", "by_numpy", "derivative"),
    [
        (jax.nn.sigmoid, sigmoid, lambda s: sigmoid(s) * (1 - sigmoid(s))),
        (jnp.exp, np.exp, np.exp),
    ],
    ids=["sigmoid", "exp"],
)
def test_str_is_the_papers_formula(s, activation, by_numpy, derivative):
    w, g = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    method = gj.reparam.str_(initial=s, activation=activation)
    got = values_and_grads(method, w, np.float32(s), g)
    for a, b in zip(got, str_by_numpy(w, s, g, by_numpy, derivative), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_str_at_its_knees():
    w = jnp.array([[0.5, -0.5, 0.75, -2.0, 0.0]])  # a(0) = .5
    value, dw, ds, mask = values_and_grads(METHODS["str"], w, np.float32(0), jnp.ones_like(w))
    np.testing.assert_array_equal(value, [[0, 0, 0.25, -1.5, 0]])
    np.testing.assert_array_equal(mask, [[False, False, True, True, False]])
    np.testing.assert_array_equal(dw, [[0, 0, 1, 1, 0]])
    assert ds == -0.25 * (1 - 1)
    # At -3200 the sigmoid and its derivative underflow: dense, and s does not learn.
    value, dw, ds, mask = values_and_grads(METHODS["str"], w, np.float32(-3200), jnp.ones_like(w))
    np.testing.assert_array_equal(value, w)
    np.testing.assert_array_equal(mask, w != 0)
    np.testing.assert_array_equal(dw, mask)
    assert ds == 0


def test_penalties():
    extra = {"a": jnp.array([0.0, 1.0]), "b": jnp.array([[-1.0], [2.0]])}
    expected = 1 + np.exp(-1.0) + np.exp(1.0) + np.exp(-2.0)
    np.testing.assert_allclose(METHODS["dst"].penalty(extra), expected, rtol=1e-6)
    assert METHODS["str"].penalty(extra) == (1 + 1 + 4) / 2
    chex.assert_trees_all_equal(jax.grad(METHODS["str"].penalty)(extra), extra)  # weight decay
    assert METHODS["dst"].penalty({}).dtype == jnp.float32


@pytest.mark.parametrize(("live", "is_reset"), [(3, True), (4, False)])
def test_dst_resets_a_layer_of_which_one_percent_is_left(live, is_reset):
    weights = {"a": jnp.zeros((30, 10)).at[:live, 0].set(1.0), "b": jnp.ones((4, 4))}
    extra = {"a": jnp.full(10, 0.5), "b": jnp.full(4, 0.5)}
    new = METHODS["dst"].reset(weights, extra)
    np.testing.assert_array_equal(new["a"], 0.0 if is_reset else 0.5)
    np.testing.assert_array_equal(new["b"], 0.5)
    chex.assert_trees_all_equal(METHODS["str"].reset(weights, extra), extra)


def test_stacked_layers_have_thresholds_of_their_own():
    rules = [("blocks", gj.Stacked(1)), ("deep", gj.Stacked(2))]
    p = {
        "blocks": jax.random.normal(jax.random.key(0), (3, 20, 5)),
        "deep": jax.random.normal(jax.random.key(1), (2, 3, 20, 5)),
    }
    for axis, outputs in ((-1, 5), (0, 20)):
        method = gj.reparam.dst(output_axis=axis, prunable=rules)
        extra = method.init(p)
        assert {k: v.shape for k, v in extra.items()} == {
            "blocks": (3, outputs),
            "deep": (2, 3, outputs),
        }
        extra["blocks"] = extra["blocks"].at[1].set(0.7).at[2].set(9.0)
        single = gj.reparam.dst(output_axis=axis)
        stacked, one = [
            jax.jit(lambda p, e, m=m: (m.effective(p, e), m.reset(p, e))) for m in (method, single)
        ]
        effective, reset = stacked(p, extra)
        for i in range(3):
            alone, alone_reset = one({"w": p["blocks"][i]}, {"w": extra["blocks"][i]})
            np.testing.assert_array_equal(effective["blocks"][i], alone["w"])
            np.testing.assert_array_equal(reset["blocks"][i], alone_reset["w"])
        assert [float(t[0]) for t in reset["blocks"]] == [0, np.float32(0.7), 0]
    method = gj.reparam.str_(prunable=rules)
    assert {k: v.shape for k, v in method.init(p).items()} == {"blocks": (3,), "deep": (2, 3)}
    extra = {"blocks": jnp.array([-9.0, 0.0, 9.0]), "deep": jnp.zeros((2, 3))}
    mask = method.masks(p, extra)["blocks"]
    thresholds = jax.nn.sigmoid(extra["blocks"])[:, None, None]
    np.testing.assert_array_equal(mask, jnp.abs(p["blocks"]) > thresholds)


@both
def test_masks_are_total_and_dense_leaves_pass_through(method):
    p = gj.testing.example_params()
    extra = lifted(method, p)
    effective, masks = jax.jit(lambda *pair: (method.effective(*pair), method.masks(*pair)))(
        p, extra
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(effective, p)
    chex.assert_trees_all_equal_structs(masks, p)
    for leaf, m, e, w in zip(
        gj.trees.describe(p), *map(jax.tree.leaves, (masks, effective, p)), strict=True
    ):
        assert m.dtype == bool
        assert m.shape == w.shape
        assert not np.any(np.asarray(e)[~np.asarray(m)])
        assert leaf.prunable != bool(m.all())
        if not leaf.prunable:
            np.testing.assert_array_equal(e, w)
    chex.assert_trees_all_equal(method.init(jax.eval_shape(lambda: p)), method.init(p))
    assert method.init({}) == {}


@both
def test_export_gives_plain_params_for_static_training(method):
    p = small_params()
    p["conv"]["kernel"] = p["conv"]["kernel"].at[0].set(jnp.nan)
    extra = lifted(method, p)
    sparse, masks = gj.reparam.export(method, p, extra)
    assert not masks["conv"]["kernel"][0].any()
    for path in (("conv", "kernel"), ("fc", "kernel"), ("fc", "bias")):
        value, mask, dense = (
            np.asarray(tree[path[0]][path[1]])
            for tree in (sparse, masks, method.effective(p, extra))
        )
        np.testing.assert_array_equal(value.view(np.int32)[~mask], 0)  # +0
        np.testing.assert_array_equal(value[mask], dense[mask])
    tx = gj.sparsify(optax.sgd(0.1), gj.static(masks=masks))
    state = tx.init(sparse)
    updates, state = tx.update(p, state, sparse)
    trained = optax.apply_updates(sparse, updates)
    assert (trained["fc"]["kernel"] != 0).sum() == masks["fc"]["kernel"].sum() < 72


class Linear(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs)])

    def __call__(self, x):
        return self.layers[1](nnx.relu(self.layers[0](x)))


def linen():
    model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(4)])
    return model.init(jax.random.key(0), X)["params"], lambda p: model.apply({"params": p}, X)


def nnx_state():
    graph, state = nnx.split(Linear(nnx.Rngs(0)))
    return state, lambda p: nnx.merge(graph, p)(X)


def equinox():
    model = eqx.nn.MLP(6, 4, 8, 1, key=jax.random.key(0))
    p, static = eqx.partition(model, eqx.is_inexact_array)
    return p, lambda p: jax.vmap(eqx.combine(p, static))(X)


def bare():
    p = (0.3 * jnp.eye(6, 8), 0.3 * jnp.eye(8, 4))
    return p, lambda p: jax.nn.relu(X @ p[0]) @ p[1]


X = jax.random.normal(jax.random.key(1), (32, 6))
Y = X[:, :4] * 2.0


@both
@pytest.mark.parametrize("make", [linen, nnx_state, equinox, bare])
def test_any_tree_trains(make, method):
    p, apply = make()
    if make is equinox and method is METHODS["dst"]:
        method = gj.reparam.dst(output_axis=0)
    pair = (p, method.init(p))
    assert len(pair[1]) == 2
    tx = gj.reparam.penalise(optax.adam(1e-2), method, 1e-3)

    @jax.jit
    def step(pair, state):
        value, grads = jax.value_and_grad(loss)(pair)
        updates, state = tx.update(grads, state, pair)
        return optax.apply_updates(pair, updates), state, value

    def loss(pair):
        return jnp.mean((apply(method.effective(*pair)) - Y) ** 2)

    state = tx.init(pair)
    first = loss(pair)
    for _ in range(30):
        pair, state, last = step(pair, state)
    assert last < first
    assert jax.tree.structure(pair[0]) == jax.tree.structure(p)
    assert 0 < state.sparsity < 1


OPTIMIZERS = {
    "momentum": optax.sgd(0.1, momentum=0.9),
    "nesterov_and_decay": optax.chain(
        optax.add_decayed_weights(1e-2), optax.sgd(0.1, momentum=0.9, nesterov=True)
    ),
    "adam": optax.adam(1e-2),
}


def small_params():
    keys = jax.random.split(jax.random.key(5), 2)
    conv, fc = (jax.random.normal(keys[0], (3, 3, 2, 4)), jax.random.normal(keys[1], (12, 6)))
    return {"conv": {"kernel": conv}, "fc": {"kernel": fc, "bias": jnp.zeros(6)}}


def small_loss(method, pair, step):
    """A loss of all parameters that differs from step to step."""
    weights = method.effective(*pair)
    errors = jax.tree.map(lambda w, p: (w - jnp.cos(step + 9 * p)) ** 2, weights, small_params())
    return 0.01 * optax.tree.sum(errors)


@both
@pytest.mark.parametrize("inner", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_penalise_equals_the_gradient_of_the_total_loss(method, inner):
    coefficient = 0.02
    tx = gj.reparam.penalise(inner, method, coefficient)

    def penalised(pair, t):
        return small_loss(method, pair, t)

    def total(pair, t):
        return small_loss(method, pair, t) + coefficient * method.penalty(pair[1])

    def train(tx, loss):
        def step(carry, t):
            pair, state = carry
            updates, state = tx.update(jax.grad(loss)(pair, t), state, pair)
            return (optax.apply_updates(pair, updates), state), pair

        pair = (small_params(), method.init(small_params()))
        return jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(8.0)))((pair, tx.init(pair)))

    (pair, state), pairs = train(tx, penalised)
    (expected, expected_state), _ = train(inner, total)
    chex.assert_trees_all_close(pair, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(state.inner, expected_state, rtol=1e-5, atol=1e-6)
    last = jax.tree.map(lambda x: x[-1], pairs)
    sparsity = gj.metrics.sparsity(method.masks(*last), last[0])
    assert state.sparsity == sparsity > 0
    assert state.penalty_step == 8
    assert state.coefficient == np.float32(coefficient)


def test_what_is_reset_becomes_exactly_zero():
    method = METHODS["dst"]
    p = {"a": jnp.full((10, 4), 0.3), "b": jnp.ones((10, 4))}
    pair = (p, {"a": jnp.array([0.31, 0.37, 0.43, 0.59]), "b": jnp.full(4, 0.31)})
    tx = gj.reparam.penalise(optax.sgd(0.1, momentum=0.9), method, 1.0)
    state = tx.init(pair)
    updates, state = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, pair), state, pair)
    new_params, extra = optax.apply_updates(pair, updates)
    chex.assert_trees_all_equal(new_params, p)
    np.testing.assert_array_equal(extra["a"], 0.0)
    np.testing.assert_allclose(extra["b"], 0.31 + 0.1 * np.exp(-0.31), rtol=1e-6)
    assert method.masks(new_params, extra)["a"].all()
    np.testing.assert_allclose(state.inner[0].trace[1]["b"], -np.exp(-0.31), rtol=1e-6)
    assert (state.inner[0].trace[1]["a"] < 0).all()  # moments live on


@both
def test_eager_jit_scan_vmap_and_donation_agree(method):
    tx = gj.reparam.penalise(optax.adam(1e-2), method, gj.reparam.steer(0.5, 10))

    def start(scale):
        p = jax.tree.map(lambda x: scale * x, small_params())
        pair = (p, method.init(p))
        return pair, tx.init(pair)

    def step(carry, t):
        pair, state = carry
        grads = jax.grad(lambda pair: small_loss(method, pair, t))(pair)
        updates, state = tx.update(grads, state, pair)
        return (optax.apply_updates(pair, updates), state), state.sparsity

    carry = eager = start(1.0)
    types = jax.tree.map(jax.typeof, carry)
    assert jax.tree.map(jax.typeof, jax.eval_shape(start, 1.0)) == types
    eager, _ = step(eager, 0)
    jitted = jax.jit(chex.assert_max_traces(step, n=1), donate_argnums=0)
    carry, _ = jitted(carry, 0)
    chex.assert_trees_all_close(eager, carry, rtol=1e-4, atol=1e-5)
    carry, _ = jitted(carry, 1)
    assert jax.tree.map(jax.typeof, carry) == types

    many, sparsities = jax.vmap(lambda scale: jax.lax.scan(step, start(scale), jnp.arange(2)))(
        jnp.array([1.0, 2.0])
    )
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[0], many), carry, rtol=1e-4, atol=1e-5)
    assert sparsities.shape == (2, 2)


def test_wrappers_of_optax():
    method = METHODS["dst"]
    pair = (small_params(), method.init(small_params()))
    grads = jax.tree.map(jnp.ones_like, pair)
    plain = gj.reparam.penalise(optax.sgd(0.1), method, 0.5)
    expected, _ = plain.update(grads, plain.init(pair), pair)

    injected = optax.inject_hyperparams(
        lambda coefficient: gj.reparam.penalise(optax.sgd(0.1), method, coefficient)
    )(coefficient=0.5)
    steps = optax.MultiSteps(plain, 1)
    for tx in (injected, steps, optax.apply_if_finite(plain, 3), optax.chain(plain)):
        state = tx.init(pair)
        updates, state = jax.jit(tx.update)(grads, state, pair)
        chex.assert_trees_all_close(updates, expected, rtol=1e-5)
        assert optax.tree.get(state, "sparsity") == 0
    mapped = optax.tree.map_params(plain, lambda x: x + 1, plain.init(pair))
    assert mapped.coefficient == 0.5


class Pair(NamedTuple):
    params: object
    extra: object


def test_a_named_pair_and_extra_arguments():
    method = METHODS["str"]
    pair = Pair(small_params(), method.init(small_params()))

    def update(updates, state, params, *, scale):
        return jax.tree.map(lambda u: scale * u, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = gj.reparam.penalise(inner, method, 1.0)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, pair), tx.init(pair), pair, scale=-1.0)
    new = optax.apply_updates(pair, updates)
    assert isinstance(new, Pair)
    chex.assert_trees_all_equal(new.extra, jax.tree.map(jnp.zeros_like, pair.extra))


@both
def test_bfloat16_weights_have_float32_thresholds(method):
    p = jax.tree.map(lambda x: x.astype(jnp.bfloat16), small_params())
    pair = (p, lifted(method, p))
    assert {e.dtype for e in pair[1].values()} == {np.dtype("float32")}
    tx = gj.reparam.penalise(optax.sgd(1e-5), method, 1.0)

    def loss(pair):
        effective = method.effective(*pair)
        chex.assert_trees_all_equal_dtypes(effective, p)
        return jnp.sum(effective["fc"]["kernel"].astype(jnp.float32))

    @jax.jit
    def step(pair):
        grads = jax.grad(loss)(pair)
        updates, _ = tx.update(grads, tx.init(pair), pair)
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), p)
        return grads, updates, method.masks(*pair), method.masks(wide, pair[1])

    grads, updates, masks, masks_of_wide = step(pair)
    chex.assert_trees_all_equal(masks, masks_of_wide)
    chex.assert_trees_all_equal_dtypes(grads, updates, pair)
    new = optax.apply_updates(pair, updates)[1]
    assert all((new[path] != pair[1][path]).any() for path in new)


@both
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_masks_are_sharded_as_their_params(method, axis_type):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type, axis_type))
    tx = gj.reparam.penalise(optax.sgd(0.1, momentum=0.9), method, gj.reparam.steer(0.5, 10))
    with jax.set_mesh(mesh):
        w = jax.random.normal(jax.random.key(0), (16, 8))
        p = {"kernel": jax.device_put(w, NamedSharding(mesh, PartitionSpec("x", "y")))}
        pair = (p, lifted(method, p))
        state = tx.init(pair)
        types = jax.tree.map(jax.typeof, (pair, state))

        @jax.jit
        def step(pair, state):
            grads = jax.grad(lambda pair: jnp.sum(method.effective(*pair)["kernel"] ** 2))(pair)
            updates, state = tx.update(grads, state, pair)
            return optax.apply_updates(pair, updates), state, method.masks(*pair)

        masks = method.masks(*pair)
        pair, state, traced_masks = step(pair, state)
    assert masks["kernel"].sharding == traced_masks["kernel"].sharding == p["kernel"].sharding
    assert jax.tree.map(jax.typeof, (pair, state)) == types
    assert state.sparsity == np.float32(1 - np.mean(masks["kernel"]))


def run_plant(controller, steps, speed, push=3e-4):
    """A threshold with momentum, pulled up by the coefficient and down by the task, on weights of
    a Laplace distribution: the density is exp(-threshold).
    """
    coefficient, previous = jnp.float32(controller.initial), jnp.float32(0)
    threshold = momentum = 0.0
    update = jax.jit(controller.update)
    sparsities, coefficients = [], []
    for step in range(1, steps + 1):
        sparsity = 1 - np.exp(-threshold)
        coefficient = update(coefficient, previous, jnp.float32(sparsity), jnp.int32(step))
        previous = jnp.float32(sparsity)
        momentum = 0.9 * momentum + 0.1 * speed * (float(coefficient) - push)
        threshold = max(threshold + momentum, 0.0)
        sparsities.append(sparsity)
        coefficients.append(float(coefficient))
    return np.array(sparsities), np.array(coefficients)


@pytest.mark.parametrize("speed", [3.0, 300.0])
@pytest.mark.parametrize("requested", [0.0, 0.8, 0.99])
def test_steer_meets_and_holds_on_a_toy_plant(requested, speed):
    sparsities, coefficients = run_plant(gj.reparam.steer(requested, 1000), 2000, speed)
    assert np.abs(sparsities[1500:] - requested).max() < 0.005
    assert np.all(coefficients > 0)


def test_steer_follows_its_reference_and_stays_within_bounds():
    controller = gj.reparam.steer(0.75, 1000, initial=1e-3)
    update = controller.update
    # On the reference, 1/2 at half time, nothing changes; 10 % above, e-fold and a little more.
    density = 0.25 ** (499 / 1000)
    same = update(1e-3, 1 - density, 0.5, 500)
    np.testing.assert_allclose(same, 1e-3, rtol=1e-4)
    more = update(1e-3, 1 - density, 1 - 0.5 * np.exp(0.1), 500)
    np.testing.assert_allclose(more, 1e-3 * np.exp(1.01), rtol=1e-4)
    # A steady error of 10 % for 100 steps: e-fold.
    steady = jnp.float32(1e-3)
    for step in range(2000, 2100):
        steady = update(steady, 1 - 0.25 * np.exp(0.1), 1 - 0.25 * np.exp(0.1), step)
    np.testing.assert_allclose(steady, 1e-3 * np.e, rtol=1e-3)
    # From on target to off by far: e-fold at once. No weight left is a number, too.
    np.testing.assert_allclose(update(1e-3, 0.75, 0.0, 2000), 1e-3 * np.exp(1.01), rtol=1e-4)
    np.testing.assert_allclose(update(1e-3, 0.75, 1.0, 2000), 1e-3 * np.exp(-1.01), rtol=1e-4)
    # The requested sparsity may be traced.
    many = jax.vmap(lambda s: gj.reparam.steer(s, 1000, 1e-3).update(1e-3, 0.75, 0.75, 2000))
    expected = [1e-3, 1e-3 * np.exp(0.01)]
    np.testing.assert_allclose(many(jnp.array([0.75, 0.8])), expected, rtol=1e-4)
    # The coefficient stays within 10^4 of the initial one.
    assert update(9.95, 0.0, 0.0, 2000) == 10.0
    np.testing.assert_allclose(update(1.005e-7, 1.0, 1.0, 2000), 1e-7, rtol=1e-6)


@both
def test_steer_meets_a_sparsity_in_training(method):
    """Digits, 800 steps: the requested sparsity is met in the second half, within half a point."""
    requested, steps = 0.9, 800
    images, labels = (jnp.asarray(x) for x in load_digits(return_X_y=True))
    keys = jax.random.split(jax.random.key(0), steps + 2)
    p = (jax.random.normal(keys[0], (64, 100)) / 6, jax.random.normal(keys[1], (100, 10)) / 10)
    inner = optax.chain(
        optax.add_decayed_weights(1e-3),
        optax.sgd(optax.cosine_decay_schedule(0.1, steps), momentum=0.9),
    )
    tx = gj.reparam.penalise(inner, method, gj.reparam.steer(requested, steps // 2))

    def loss(pair, batch):
        w1, w2 = method.effective(*pair)
        logits = jax.nn.relu(images[batch] / 16 @ w1) @ w2
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch]).mean()

    def step(carry, key):
        pair, state = carry
        batch = jax.random.randint(key, (64,), 0, len(labels))
        grads = jax.grad(loss)(pair, batch)
        updates, state = tx.update(grads, state, pair)
        return (optax.apply_updates(pair, updates), state), state.sparsity

    pair = (p, method.init(p))
    _, sparsities = jax.jit(lambda carry: jax.lax.scan(step, carry, keys[2:]))(
        (pair, tx.init(pair))
    )
    np.testing.assert_allclose(sparsities[-200:], requested, atol=0.005)
    assert sparsities[200] < 0.8


def test_what_steering_cannot_reach_is_told():
    """STR on weights that do not decay: they outgrow a threshold that never passes 1/2."""
    method, controller = gj.reparam.str_(), gj.reparam.steer(0.8, 20)
    tx = optax.chain(gj.reparam.penalise(optax.adam(0.1), method, controller))
    params = {"kernel": jax.random.normal(jax.random.key(0), (8, 8))}
    pair = (params, method.init(params))

    def step(carry, _):
        pair, state = carry
        grads = jax.grad(lambda pair: jnp.sum((method.effective(*pair)["kernel"] - 5) ** 2))(pair)
        updates, state = tx.update(grads, state, pair)
        return (optax.apply_updates(pair, updates), state), gj.reparam.at_bound(state, controller)

    start = (pair, tx.init(pair))
    (_, state), bounds = jax.jit(lambda carry: jax.lax.scan(step, carry, length=150))(start)
    assert bounds[0] == 0
    assert bounds[-1] == 1
    chex.assert_type(bounds, jnp.int32)
    told = gj.reparam.shortfall(state, controller)
    assert "0.8 was asked for; the coefficient of the penalty is at its bound 1. " in told
    assert "decay more" in told
    assert "\n" not in told

    def of(sparsity, coefficient, controller=controller):
        changed = state[0]._replace(
            sparsity=jnp.float32(sparsity), coefficient=jnp.float32(coefficient)
        )
        return gj.reparam.shortfall([changed], controller)

    assert of(0.805, 0.1) == ""
    assert "decay less" in of(0.9, 1e-8)
    assert "decay less" in of(0.8, 1e-8)  # just met, with nothing left to give
    assert "Sparsity 0.7000 was reached, 0.8 was asked for. " in of(0.7, 0.1)  # DST's limit, say
    own = gj.reparam.Controller(1.0, lambda *_: 1.0)
    assert of(0.7, 1.0, own) == ""
    assert gj.reparam.at_bound(state, own) == 0
    with pytest.raises(ValueError, match=r"Expected one penalise state .* found 0 in a tuple"):
        gj.reparam.at_bound(optax.sgd(0.1).init(params), controller)


def test_errors():
    dst = METHODS["dst"]
    p = {"fc": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}}
    with pytest.raises(ValueError, match="'conv' matches no parameter"):
        gj.reparam.dst(prunable=[("conv", True)]).init(p)
    with pytest.raises(ValueError, match="output_axis=2 is no axis of fc/kernel"):
        gj.reparam.dst(output_axis=2).init(p)
    with pytest.raises(ValueError, match="No thresholds for fc/kernel"):
        dst.effective(p, {})
    with pytest.raises(TypeError, match="wraps an optax transformation, got Repar"):
        gj.reparam.penalise(dst, optax.sgd(0.1), 0.1)
    with pytest.raises(TypeError, match="Call the method first"):
        gj.reparam.penalise(optax.sgd(0.1), gj.reparam.dst, 0.1)
    for coefficient in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="must be >= 0"):
            gj.reparam.penalise(optax.sgd(0.1), dst, coefficient)
    tx = gj.reparam.penalise(optax.sgd(0.1), dst, 0.1)
    pair = (p, dst.init(p))
    for wrong in (None, p):
        with pytest.raises(ValueError, match="needs parameters as a pair"):
            tx.update(pair, tx.init(pair), wrong)
    for sparsity in (1.0, -0.1, 95):
        with pytest.raises(ValueError, match=r"in \[0, 1\)"):
            gj.reparam.steer(sparsity, 100)
    with pytest.raises(ValueError, match="end_step must be an int"):
        gj.reparam.steer(0.9, 100.5)
    with pytest.raises(ValueError, match="end_step >= 10"):
        gj.reparam.steer(0.9, 9)
    with pytest.raises(ValueError, match="must be > 0"):
        gj.reparam.steer(0.9, 100, initial=0.0)
