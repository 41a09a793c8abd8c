"""Compaction: smaller models with the same outputs, and what is refused."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import granet_jax as gj
from granet_jax import export, structures

KEY = jax.random.key(0)


class Residual(nn.Module):
    """A stem, two blocks on one stream, one of them depthwise, pooling, a flattened head."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(self.norm("norm")(nn.Conv(8, (3, 3), use_bias=False, name="stem")(x)))
        y = nn.relu(self.norm("norm1")(nn.Conv(6, (3, 3), strides=2, name="conv1")(x)))
        y = self.norm("norm2")(nn.Conv(8, (1, 1), name="conv2")(y))
        x = nn.max_pool(x, (2, 2), (2, 2)) + y
        y = nn.Conv(8, (3, 3), feature_group_count=8, name="depthwise")(x)
        x = jnp.concatenate([nn.gelu(y) + x, x], axis=-1)
        x = nn.avg_pool(x, (2, 2), (2, 2)).reshape(len(x), -1)
        return nn.Dense(3, name="head")(nn.tanh(nn.Dense(7, name="hidden")(x)))

    def norm(self, name):
        return nn.BatchNorm(use_running_average=True, name=name)


@functools.cache
def residual():
    draw = np.random.default_rng(0)  # compiles nothing
    x = jnp.asarray(draw.normal(size=(2, 8, 8, 3)), jnp.float32)
    drawn = jax.tree.map(
        lambda a: jnp.asarray(draw.uniform(-1 if a.ndim > 1 else 0.1, 1.1, a.shape), a.dtype),
        jax.eval_shape(Residual().init, jax.random.key(1), x),
    )

    def apply_fn(params, x):
        return Residual().apply({"params": params, "batch_stats": drawn["batch_stats"]}, x)

    return jax.jit(apply_fn), drawn["params"], x


def test_half_of_the_channels_cut_leaves_the_outputs():
    apply_fn, params, x = residual()
    rules = export.channel_rules(apply_fn, params, x)
    masks = gj.random_masks(KEY, params, 0.5, gj.uniform, rules)
    small = export.compact(apply_fn, params, masks, x)
    shapes = {"/".join(path): a.shape for path, a in gj.trees.by_path(small.params).items()}
    assert shapes["stem/kernel"] == (3, 3, 3, 4)
    assert shapes["norm/scale"] == shapes["norm2/bias"] == shapes["depthwise/bias"] == (4,)
    assert shapes["conv1/kernel"] == (3, 3, 4, 3)
    assert shapes["conv2/kernel"] == (1, 1, 3, 4)
    assert shapes["depthwise/kernel"] == (3, 3, 1, 4)
    assert shapes["hidden/kernel"] == (2 * 2 * 8, 3)  # of 8 + 6 + 7, 10 stay
    assert shapes["head/kernel"] == (3, 3)
    wanted = apply_fn(gj.apply_masks(params, masks), x)
    chex.assert_trees_all_close(small.apply(small.params, x), wanted, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(jax.jit(small.apply)(small.params, x), wanted, rtol=1e-5, atol=1e-5)
    assert not any(cut.refused for cut in small.cuts)


def test_costs_are_those_of_the_smaller_model():
    apply_fn, params, x = residual()
    rules = export.channel_rules(apply_fn, params, x)
    masks = gj.random_masks(KEY, params, 0.5, gj.uniform, rules)
    small = export.compact(apply_fn, params, masks, x)
    macs = {leaf.path: leaf.macs for leaf in gj.flops.count(small.apply, small.params, x).leaves}
    assert macs["stem/kernel"] == 2 * 8 * 8 * (3 * 3 * 3 * 4)
    assert macs["conv1/kernel"] == 2 * 4 * 4 * (3 * 3 * 4 * 3)
    assert macs["depthwise/kernel"] == 2 * 4 * 4 * (3 * 3 * 4)
    assert macs["head/kernel"] == 2 * 3 * 3


def test_a_dense_model_stays_as_it_is():
    apply_fn, params, x = residual()
    small = export.compact(apply_fn, params, None, x)
    assert small.cuts == ()
    chex.assert_trees_all_equal(small.params, params)
    chex.assert_trees_all_close(small.apply(params, x), apply_fn(params, x), rtol=1e-5, atol=1e-5)


def test_filters_under_a_norm_that_is_not_pruned():
    """They go where what reads them has a bias and no edges; others stay and are told."""
    apply_fn, params, x = residual()
    rules = [("(stem|conv1)/kernel", structures.channel()), ("", False)]
    masks = gj.random_masks(KEY, params, 0.5, gj.uniform, rules)
    small = export.compact(apply_fn, params, masks, x)
    told = {(cut.path, cut.axis): (cut.before, cut.after, cut.refused) for cut in small.cuts}
    assert told["conv1/kernel", 3] == told["norm1/bias", 0] == (6, 3, {})
    assert told["stem/kernel", 3] == (8, 8, {"a product reads it": 4})
    assert "4: a product reads it" in export.cuts_table(small.cuts)
    assert small.params["conv2"]["bias"].shape == params["conv2"]["bias"].shape
    assert not np.array_equal(small.params["conv2"]["bias"], params["conv2"]["bias"])
    wanted = apply_fn(gj.apply_masks(params, masks), x)
    chex.assert_trees_all_close(small.apply(small.params, x), wanted, rtol=1e-5, atol=1e-5)


def readers():
    """What reads six neurons, three of which are numbers; how many of them stay."""
    return {
        "bias": (lambda h, p: h @ p["out"] + p["b"], 3),
        "weights first": (lambda h, p: (p["out"].T @ h.T + p["b"][:, None]).T, 3),
        "turned weights": (lambda h, p: jnp.dot(h, p["out"].T.T) + p["b"][None], 3),
        "half precision": (
            lambda h, p: (
                h.astype(jnp.bfloat16) @ p["out"].astype(jnp.bfloat16) + p["b"].astype(jnp.bfloat16)
            ).astype(jnp.float32),
            3,
        ),
        "window": (lambda h, p: (_windows(h, p["window"], "VALID") + p["b"])[:, 0], 3),
        "window with edges": (lambda h, p: (_windows(h, p["window"], "SAME") + p["b"])[:, 0], 6),
        "no bias": (lambda h, p: h @ p["out"], 6),
        "bias of two products": (lambda h, p: jnp.tanh(h @ p["out"] + p["b"]) + p["b"], 6),
        "output read twice": (lambda h, p: (y := h @ p["out"]) * (y + p["b"]), 6),
        "bias along the batch": (lambda h, p: h @ p["out"] + p["batch"][:, None], 6),
        "bias of two axes": (lambda h, p: h @ p["out"] + p["plane"], 6),
        "one more reader": (lambda h, p: h @ p["out"] + p["b"] + (h @ p["other"]), 6),
        "one more reader with a bias": (
            lambda h, p: h @ p["out"] + p["b"] + (h @ p["other"] + p["b2"]),
            3,
        ),
        "tied weights": (lambda h, p: (h @ p["out"] + p["b"]) @ p["out"].T @ p["out"], 6),
    }


def _windows(h, kernel, padding):
    """Two places, both the same, seen by a window of two."""
    numbers = ("NHC", "HIO", "NHC")
    return jax.lax.conv_general_dilated(
        jnp.stack([h, h], 1), kernel, (1,), padding, dimension_numbers=numbers
    )


@pytest.mark.parametrize("case", readers())
def test_numbers_go_into_the_bias_of_what_reads_them(case):
    read, stays = readers()[case]
    keys = jax.random.split(KEY, 8)
    shapes = {
        "out": (6, 2),
        "other": (6, 2),
        "window": (2, 6, 2),
        "plane": (4, 2),
        "batch": (4,),
        "b": (2,),
        "b2": (2,),
        "bias": (6,),
    }
    params = {
        name: jax.random.normal(key, shape)
        for (name, shape), key in zip(shapes.items(), keys, strict=True)
    }
    params["in"] = jax.random.normal(KEY, (3, 6)) * jnp.array([[1.0, 0, 1, 0, 0, 1]])

    def apply_fn(params, x):
        return read(jax.nn.softplus(x @ params["in"] + params["bias"][None]), params)

    x = jax.random.normal(keys[0], (4, 3))
    with jax.numpy_rank_promotion("allow"):
        small = export.compact(apply_fn, params, None, x)
        assert small.params["in"].shape == (3, stays)
        wanted = apply_fn(params, x)
        rough = 3e-2 if case == "half precision" else 1e-5
        got = small.apply(small.params, x)
        chex.assert_trees_all_close(got, wanted, rtol=rough, atol=rough)


def test_what_nothing_reads_is_cut_whatever_it_holds():
    """Consumers without weights are as good as producers of zeros."""
    keys = jax.random.split(KEY, 3)
    params = {
        "in": jax.random.normal(keys[0], (3, 5)),
        "bias": jnp.ones(5),
        "out": jax.random.normal(keys[1], (5, 2)).at[jnp.array([1, 4])].set(0),
    }

    def apply_fn(params, x):
        return jnp.exp(x @ params["in"] + params["bias"][None]) @ params["out"]

    x = jax.random.normal(keys[2], (4, 3))
    small = export.compact(apply_fn, params, None, x)
    assert [a.shape for a in small.params.values()] == [(3,), (3, 3), (3, 2)]
    chex.assert_trees_all_close(small.apply(small.params, x), apply_fn(params, x), rtol=1e-5)


def cases():
    """Models of which half of the hidden channels are 0; how many of 6 stay."""
    norm = {"epsilon": 1e-6}

    def layer_norm(h):
        h = h - h.mean(1, keepdims=True)
        return h / jnp.sqrt((h * h).mean(1, keepdims=True) + norm["epsilon"])

    def shuffled(h, shape, order):
        h = h.reshape(shape).transpose(order)
        return h.reshape(4, -1)

    def ones(n):
        return jnp.ones((2, n))

    return {
        "relu": (jax.nn.relu, 3),
        "silu": (jax.nn.silu, 3),
        "sigmoid is not 0 at 0": (jax.nn.sigmoid, 6),
        "rms norm": (lambda h: h / jnp.sqrt((h * h).mean(1, keepdims=True) + 1e-6), 3),
        "layer norm subtracts the mean": (layer_norm, 6),
        "softmax": (lambda h: jax.nn.softmax(h, axis=1), 6),
        "sorted": (lambda h: jnp.sort(h, axis=1), 6),
        "turned": (lambda h: h[:, ::-1], 3),
        "two slices": (lambda h: jnp.concatenate([h[:, 4:], h[:, :4]], 1), 3),
        "every second": (lambda h: jnp.concatenate([h[:, ::2], h[:, 1::2]], 1), 6),
        "split": (lambda h: jnp.concatenate(jnp.split(h, [2], axis=1)[::-1], 1), 3),
        "heads": (lambda h: h.reshape(-1, 2, 3).swapaxes(1, 2).reshape(-1, 6), 6),
        "pixel shuffle": (lambda h: shuffled(h, (4, 1, 2, 3), (0, 2, 1, 3)).reshape(-1, 6), 6),
        "groups shuffled": (lambda h: shuffled(h, (4, 3, 2), (0, 2, 1)), 6),
        "channels into places": (lambda h: h.reshape(8, 3).sum(1).reshape(4, 2) @ ones(6), 6),
        "places into channels": (
            lambda h: (
                shuffled(h[:, None] * jnp.ones((1, 4, 1)), (4, 2, 2, 6), (0, 2, 1, 3))
                .reshape(4, 4, 6)
                .mean(1)
            ),
            6,
        ),
        "places": (lambda h: (h[:, None] * jnp.ones((1, 4, 1))).mean(1), 3),
        "padded": (lambda h: jnp.pad(h, ((0, 0), (1, 0)))[:, 1:], 6),
        "clipped": (lambda h: jnp.clip(h, -1.0, 1.0), 3),
        "clipped above 0": (lambda h: jnp.clip(h, 0.5, 1.0), 6),
        "where": (lambda h: jnp.where(h > 0, h, 0.1 * h), 3),
        "scanned": (
            lambda h: jax.lax.scan(lambda c, _: (c * 0.5, None), h, None, length=2)[0],
            6,
        ),
        "remat": (jax.checkpoint(lambda h: jnp.tanh(h) ** 3), 3),
        "a sum is added": (lambda h: h + h.sum(1, keepdims=True), 6),
        "scaled by a sum": (lambda h: h * h.sum(1, keepdims=True), 3),
        "numbers": (lambda h: h * (jnp.float32(2) ** 3) + 0.0, 3),
    }


@pytest.mark.parametrize("case", cases())
def test_operations_between_two_products(case):
    between, stays = cases()[case]
    keys = jax.random.split(KEY, 3)
    params = {
        "in": jax.random.normal(keys[0], (3, 6)) * jnp.array([[1.0, 0, 1, 0, 0, 1]]),
        "out": jax.random.normal(keys[1], (6, 2)),
    }

    def apply_fn(params, x):
        return between(x @ params["in"]) @ params["out"]

    x = jax.random.normal(keys[2], (4, 3))
    small = export.compact(apply_fn, params, None, x)
    assert small.params["in"].shape == (3, stays)
    assert small.params["out"].shape == (stays, 2)
    wanted = apply_fn(params, x)
    chex.assert_trees_all_close(small.apply(small.params, x), wanted, rtol=1e-5, atol=1e-6)


def odd_models():
    """Between ``h``, half of it 0, and the outputs; what the parameters are."""
    narrow, whole = {"b": jnp.ones(2, jnp.bfloat16)}, {"b": jnp.array([1, 2])}
    halves = (2, 1), (2, 1), "SAME"
    spread, holes = {"window_dilation": (6, 1)}, {"base_dilation": (2, 1)}

    def pool(h, window, **how):
        return jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, window, (1, 1), **how)

    return {
        "a number added": (lambda h, p: jnp.exp(h) @ p["out"] + 1.0, {}),
        "itself added": (lambda h, p: (y := jnp.exp(h) @ p["out"]) + y, {}),
        "one bias for all": (lambda h, p: jnp.exp(h) @ p["out"] + p["b"], {"b": jnp.ones(1)}),
        "narrow bias": (lambda h, p: jnp.exp(h) @ p["out"] + p["b"], narrow),
        "whole bias": (lambda h, p: jnp.exp(h) @ p["out"] + p["b"], whole),
        "rounded bias": (
            lambda h, p: jnp.exp(h) @ p["out"] + p["b"].astype(jnp.int32).astype(jnp.float32),
            {"b": jnp.array([0.6, -1.7])},
        ),
        "0 / 0": (lambda h, p: jnp.nan_to_num(h / h, nan=1.0) @ p["out"] + p["b"], {}),
        "complex": (lambda h, p: jnp.abs(jnp.exp(1j * h) * (1 + 2j)) @ p["out"] + p["b"], {}),
        "one dead channel": (lambda h, p: h[:, 1] * h.sum(1), {}),
        "one dead channel, split": (lambda h, p: jnp.split(h, [1, 2], 1)[1] * (h @ p["out"]), {}),
        "custom reduction": (
            lambda h, p: jax.lax.reduce_window(h, 0.0, jax.lax.max, *halves) @ p["out"],
            {},
        ),
        "random keys": (
            lambda h, p: jnp.where(jax.random.bernoulli(KEY, 0.5, h.shape), h, 0) @ p["out"],
            {},
        ),
        "windows of padding": (
            lambda h, p: jnp.tanh(nn.max_pool(h[None], (2,), (2,), ((2, 2),)))[0] @ p["out"],
            {},
        ),
        "windows of padding, spread": (
            lambda h, p: jnp.tanh(pool(h, (2, 1), padding=((1, 1), (0, 0)), **spread)) @ p["out"],
            {},
        ),
        "windows of holes": (
            lambda h, p: jnp.tanh(pool(h, (1, 1), padding="VALID", **holes)) @ p["out"],
            {},
        ),
        "no outputs": (
            lambda h, p: jnp.exp(h) @ p["out"] + p["b"],
            {"out": jnp.zeros((6, 0)), "b": jnp.zeros(0)},
        ),
        "a straight path": (lambda h, p: (h + jax.lax.stop_gradient(h)) @ p["out"], {}),
    }


@pytest.mark.parametrize("case", odd_models())
def test_odd_models_keep_their_outputs(case):
    read, changes = odd_models()[case]
    draw = np.random.default_rng(0)
    params = {
        "in": jnp.asarray(draw.normal(size=(3, 6)) * [1, 0, 1, 0, 0, 1], jnp.float32),
        "out": jnp.asarray(draw.normal(size=(6, 2)), jnp.float32),
        "b": jnp.zeros(2),
        **changes,
    }
    x = jnp.asarray(draw.normal(size=(5, 3)), jnp.float32)

    def apply_fn(params, x):
        return read(x @ params["in"], params)

    with jax.numpy_rank_promotion("allow"):
        small = export.compact(apply_fn, params, None, x)
        compiled = export.compile(apply_fn, params, None, x, ways=[])
        wanted = apply_fn(params, x)
        for got in (small.apply(small.params, x), compiled(x)):
            chex.assert_trees_all_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_reshapes_without_elements_and_of_mixed_channels_are_told():
    params = {"in": jnp.eye(4)[:, :2].repeat(2, 1) * jnp.array([[1.0, 0, 1, 0]]), "out": jnp.eye(2)}

    def apply_fn(params, x):
        return (x @ params["in"]).reshape(-1, 2) @ params["out"]

    for rows in (0, 3):
        x = jnp.ones((rows, 4))
        small = export.compact(apply_fn, params, None, x)
        chex.assert_trees_all_equal(small.params, params)
        chex.assert_trees_all_close(small.apply(params, x), apply_fn(params, x))
        assert "2: " in export.cuts_table(small.cuts)


def test_nan_is_refused_unless_it_is_masked():
    params = {"in": jnp.eye(3).at[0, 1].set(jnp.nan), "out": jnp.ones((3, 2))}
    x = jnp.ones((2, 3))

    def apply_fn(params, x):
        return jnp.tanh(x @ params["in"]) @ params["out"]

    with pytest.raises(ValueError, match="in holds NaN"):
        export.compact(apply_fn, params, None, x)
    masks = {"in": jnp.eye(3, dtype=bool), "out": jnp.ones((3, 2), bool)}
    small = export.compact(apply_fn, params, masks, x)
    assert np.isfinite(small.apply(small.params, x)).all()


def test_one_channel_stays_where_all_are_dead():
    params = {"in": jnp.zeros((3, 4)), "out": jnp.ones((4, 2)), "unused": jnp.zeros((5, 5))}
    x = jnp.ones((2, 3))
    small = export.compact(lambda p, x: jnp.tanh(x @ p["in"]) @ p["out"], params, None, x)
    assert small.params["in"].shape == (3, 1)
    assert small.params["unused"].shape == (5, 5)
    np.testing.assert_array_equal(small.apply(small.params, x), jnp.zeros((2, 2)))


def test_trained_by_channel_then_cut():
    """GraNet by channel, from rules of the trace, to a model of half the width."""
    keys = jax.random.split(KEY, 3)
    params = {
        "in": jax.random.normal(keys[0], (8, 16)),
        "bias": jnp.zeros(16),
        "out": jax.random.normal(keys[1], (16, 4)),
    }
    x = jax.random.normal(keys[2], (32, 8))

    def apply_fn(params, x):
        return jax.nn.relu(x @ params["in"] + params["bias"][None]) @ params["out"]

    rules = export.channel_rules(apply_fn, params, x)
    method = gj.granet(
        final_sparsity=0.5, end_step=10, update_every=2, total_steps=20, prunable=rules
    )
    tx = gj.sparsify(optax.adam(1e-2), method)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: jnp.mean((apply_fn(p, x) - jnp.sin(x[:, :4])) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(20):
        params, state = step(params, state)
    small = export.compact(apply_fn, params, gj.get_masks(state), x)
    assert {name: a.shape for name, a in small.params.items()} == {
        "in": (8, 8),
        "bias": (8,),
        "out": (8, 4),
    }
    wanted = apply_fn(params, x)
    chex.assert_trees_all_close(small.apply(small.params, x), wanted, rtol=1e-5, atol=1e-6)
    # The parameters alone serve a function that takes its widths from them, with any batch.
    chex.assert_trees_all_close(apply_fn(small.params, x[:5]), wanted[:5], rtol=1e-5, atol=1e-6)


def test_compact_refuses_inputs_of_other_shapes():
    """It replays a trace, in which the length is a number."""
    params = {"in": jax.random.normal(KEY, (4, 8)).at[:, 3].set(0.0), "out": jnp.ones((8, 5))}

    def apply_fn(params, x):
        return (jnp.maximum(x @ params["in"], 0) @ params["out"])[:, -1]

    x = jax.random.normal(KEY, (2, 9, 4))
    small = export.compact(apply_fn, params, None, x[:, :6])
    chex.assert_trees_all_close(
        small.apply(small.params, x[:, :6]), apply_fn(params, x[:, :6]), rtol=1e-5, atol=1e-5
    )
    for inputs in ((x,), (x[:, :6], x[:, :6]), ()):
        with pytest.raises(ValueError, match=r"was traced for inputs .*float32\(2, 6, 4\).*; got"):
            jax.jit(small.apply)(small.params, *inputs)
