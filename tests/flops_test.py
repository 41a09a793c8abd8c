"""FLOPs: products found in traces and counted by hand, and the numbers that papers print."""

import dataclasses
import functools
import re
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import granet_jax as gj
from granet_jax import flops


def abstract(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def macs(costs):
    """MACs by path, without the leaves that have none."""
    found = {leaf.path: leaf.macs for leaf in costs.leaves if leaf.macs}
    return {**found, "other": costs.other} if costs.other else found


X = abstract(2, 4)
W = abstract(4, 3)  # X @ W has 2 * 4 * 3 = 24 multiply-adds
W44 = abstract(4, 4)  # and X @ W44 has 32
MASK = abstract(4, 3, dtype=bool)


@jax.custom_vjp
def custom_vjp_product(w, x):
    return x @ w


custom_vjp_product.defvjp(
    lambda w, x: (x @ w, (w, x)), lambda saved, g: (saved[1].T @ g, g @ saved[0].T)
)


@jax.custom_jvp
def custom_jvp_product(w, x):
    return x @ w


custom_jvp_product.defjvp(lambda primals, tangents: (x_at_w(*primals), x_at_w(*tangents)))


def x_at_w(w, x):
    return x @ w


def norm(x, scale):
    return scale.reshape(1, -1) * x * lax.rsqrt(jnp.mean(x * x) + 1e-6)


def recurrent(p, xs):
    """Starts from zeros, which are no data before the first step."""

    def cell(h, x):
        h = jnp.tanh(x @ p["x"] + norm(h, p["scale"]) @ p["h"])
        return h, h @ p["out"]

    return lax.scan(cell, jnp.zeros((1, 3)), xs)


def attention(p, x):
    q, k, v = (norm(x @ p[name], p["scale"]) + p["bias"].reshape(1, 4) for name in "qkv")
    return jax.nn.softmax(q @ k.T) @ v @ p["o"]


def spectral_norm(w, x):
    u = w @ jnp.ones((3, 1))
    return x @ (w / (u.T @ u)[0, 0])


def drop_connect(w, key, x):
    return x @ (w * jax.random.bernoulli(key, 0.5, w.shape) / 0.5)


WALKS = {
    "plain": (x_at_w, W, [X], {"": 24}),
    "vector": (lambda w, x: w @ x, W44, [abstract(4)], {"": 16}),
    "jit": (jax.jit(x_at_w), W, [X], {"": 24}),
    "nested jit": (jax.jit(lambda w, x: jax.jit(x_at_w)(w, x)), W, [X], {"": 24}),
    "remat": (jax.checkpoint(x_at_w), W, [X], {"": 24}),
    "custom_vjp": (custom_vjp_product, W, [X], {"": 24}),
    "custom_jvp": (custom_jvp_product, W, [X], {"": 24}),
    "custom_vjp in remat": (jax.checkpoint(custom_vjp_product), W, [X], {"": 24}),
    "bf16": (lambda w, x: x.astype("bfloat16") @ w.astype("bfloat16"), W, [X], {"": 24}),
    "transposed": (lambda w, x: x @ w.T, abstract(3, 4), [X], {"": 24}),
    "einsum": (lambda w, x: jnp.einsum("oi,bi->ob", w, x), abstract(3, 4), [X], {"": 24}),
    "heads": (
        lambda w, x: jnp.einsum("bi,iho->bho", x, w.reshape(4, 2, 3)),
        abstract(4, 6),
        [X],
        {"": 48},
    ),
    "reversed": (lambda w, x: x @ w[::-1], W, [X], {"": 24}),
    "padded": (lambda w, x: x @ jnp.pad(w, ((0, 0), (0, 2))), W, [X], {"": 40}),
    "part": (lambda w, x: x @ w[:, :2], W, [X], {"": 16}),
    "mask given": (lambda w, m, x: x @ (w * m), W, [MASK, X], {"": 24}),
    "mask cast": (lambda w, m, x: x @ (m.astype(w.dtype) * w), W, [MASK, X], {"": 24}),
    "mask selects": (lambda w, m, x: x @ jnp.where(m, w, 0), W, [MASK, X], {"": 24}),
    "mask closed over": (lambda w, x: x @ jnp.where(jnp.eye(4, 3) > 0, w, 0), W, [X], {"": 24}),
    "mask by value": (lambda w, x: x @ (w * (jnp.abs(w) > 0.1)), W, [X], {"": 24}),
    "library's masks": (lambda w, m, x: x @ gj.apply_masks(w, m), W, [MASK, X], {"": 24}),
    "soft threshold": (
        lambda p, x: x @ (jnp.sign(p["w"]) * jax.nn.relu(jnp.abs(p["w"]) - jax.nn.sigmoid(p["s"]))),
        {"s": abstract(), "w": W},
        [X],
        {"w": 24},
    ),
    "threshold by column": (
        lambda p, x: x @ jnp.where(jnp.abs(p["w"]) > p["t"].reshape(1, 3), p["w"], 0),
        {"t": abstract(3), "w": W},
        [X],
        {"w": 24},
    ),
    "scaled by its norm": (lambda w, x: x @ (w / jnp.linalg.norm(w)), W, [X], {"": 24}),
    "spectral norm": (spectral_norm, W, [X], {"": 24 + 12, "other": 4}),
    "drop connect": (drop_connect, W, [abstract(dtype=jax.random.key(0).dtype), X], {"": 24}),
    "scaled by a float": (lambda w, a, x: x @ (a * w), W, [abstract(), X], {"": 24}),
    "shared": (lambda w, x: x @ w @ w, W44, [X], {"": 64}),
    "tied": (lambda w, t: w[t] @ w.T, abstract(10, 4), [abstract(2, dtype=jnp.int32)], {"": 80}),
    "lookup": (
        lambda p, t: norm(p["e"][t], p["scale"]) @ p["w"],
        {"e": abstract(10, 4), "scale": abstract(4), "w": W},
        [abstract(1, dtype=jnp.int32)],
        {"w": 12},
    ),
    "norm before, batch of one": (
        lambda p, x: norm(x, p["scale"]) @ p["w"],
        {"scale": abstract(4), "w": W},
        [abstract(1, 4)],
        {"w": 12},
    ),
    "image closed over": (
        lambda p: norm(jnp.ones((1, 4)) * np.arange(4.0)[None], p["scale"]) @ p["w"],
        {"scale": abstract(4), "w": W},
        [],
        {"w": 12},
    ),
    "slices of a stack": (lambda w, x: x @ w[0] @ w[1], abstract(2, 4, 4), [X], {"": 64}),
    "scan over layers": (
        lambda w, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w),
        abstract(5, 4, 4),
        [X],
        {"": 5 * 32},
    ),
    "scan over layers of several leaves": (
        lambda p, x: lax.scan(
            jax.checkpoint(lambda h, p: (norm(h @ p["w"] @ p["v"], p["s"]), None)), x, p
        ),
        {"s": abstract(5, 4), "v": abstract(5, 3, 4), "w": abstract(5, 4, 3)},
        [X],
        {"v": 5 * 24, "w": 5 * 24},
    ),
    "scan in a scan": (
        lambda w, x: lax.scan(
            lambda h, w: (lax.scan(lambda h, _: (h @ w, None), h, None, length=3)[0], None), x, w
        ),
        abstract(5, 4, 4),
        [X],
        {"": 15 * 32},
    ),
    "fori_loop": (lambda w, x: lax.fori_loop(0, 7, lambda i, h: h @ w, x), W44, [X], {"": 7 * 32}),
    "fori_loop over a stack": (
        lambda w, x: lax.fori_loop(0, 5, lambda i, h: h @ w[i], x),
        abstract(5, 4, 4),
        [X],
        {"": 5 * 32},
    ),
    "recurrent": (
        recurrent,
        {"h": abstract(3, 3), "out": abstract(3, 5), "scale": abstract(3), "x": W},
        [abstract(6, 1, 4)],
        {"h": 6 * 9, "out": 6 * 15, "x": 6 * 12},
    ),
    "carried parameter": (
        lambda w, x: lax.scan(lambda c, _: ((c[0], c[1] @ c[0]), None), (w, x), None, length=3),
        W44,
        [X],
        {"": 96},
    ),
    "while without products": (
        lambda w, x: lax.while_loop(lambda v: v.sum() < 9, lambda v: 2 * v, x) @ w,
        W,
        [X],
        {"": 24},
    ),
    "vmap over examples": (
        lambda w, x: jax.vmap(lambda row: row @ w)(x),
        W,
        [X],
        {"": 24},
    ),
    "vmap over members": (jax.vmap(x_at_w, (0, None)), abstract(5, 4, 3), [X], {"": 5 * 24}),
    "cond": (
        lambda p, x: lax.cond(x[0, 0] > 0, lambda: x @ p["b"] @ p["a"], lambda: x @ p["a"]),
        {"a": W, "b": W44},
        [X],
        {"a": 24, "b": 32},
    ),
    "switch": (
        lambda p, x: lax.switch(
            x.sum().astype(int),
            [lambda: x @ p["a"], lambda: x @ p["b"] @ p["a"], lambda: x[:, :3]],
        ),
        {"a": W, "b": W44},
        [X],
        {"a": 24, "b": 32},
    ),
    "cond between parameters": (
        lambda w, x: x @ lax.cond(x[0, 0] > 0, lambda: w, lambda: jnp.zeros((4, 3))),
        W,
        [X],
        {"": 24},
    ),
    "barrier": (lambda w, x: jnp.matmul(*lax.optimization_barrier((x, w))), W, [X], {"": 24}),
    "device_put": (lambda w, x: jnp.matmul(*jax.device_put((x, w))), W, [X], {"": 24}),
    "fused outputs": (
        lambda p, x: x @ jnp.concatenate([p["a"], p["b"]], axis=1),
        {"a": W, "b": W44},
        [X],
        {"a": 24, "b": 32},
    ),
    "fused inputs": (
        lambda p, x: jnp.concatenate([x, x], axis=1) @ jnp.concatenate([p["a"], p["b"][:2, :3]]),
        {"a": abstract(6, 3), "b": W44},
        [X],
        {"a": 36, "b": 12},
    ),
    "attention": (
        attention,
        {name: W44 if name in "qkvo" else abstract(4) for name in ("bias", "scale", *"qkvo")},
        [X],
        {"k": 32, "o": 32, "q": 32, "v": 32, "other": 16 + 16},
    ),
    "two parameters": (lambda p: p[0] @ p[1], (W44, W), [], {"other": 48}),
    "low rank added": (
        lambda p, x: x @ (p["w"] + p["a"] @ p["b"]),
        {"a": abstract(4, 1), "b": abstract(1, 3), "w": W},
        [X],
        {"other": 12 + 24},
    ),
    "made from data": (lambda w, x: x @ (w * x.sum(axis=0)[:, None]), W, [X], {"other": 24}),
    "no product": (lambda w, x: x + w.sum(), W, [X], {}),
    "list": (lambda p, x: x @ p[0] @ p[1], [W44, W], [X], {"0": 32, "1": 24}),
}


@pytest.mark.parametrize("name", WALKS)
def test_products_by_hand(name):
    function, params, args, expected = WALKS[name]
    assert macs(flops.count(function, params, *args)) == expected


def test_arrays_that_jax_keeps_inside_the_trace():
    if not hasattr(jax.config, "jax_use_simplified_jaxpr_constants"):
        pytest.skip("this JAX never does")
    function, params, _, expected = WALKS["image closed over"]
    jax.config.update("jax_use_simplified_jaxpr_constants", True)
    try:
        assert macs(flops.count(function, params)) == expected
    finally:
        jax.config.update("jax_use_simplified_jaxpr_constants", False)


def conv(dimension_numbers=("NHWC", "HWIO", "NHWC"), strides=(1, 1), padding="VALID", **kwargs):
    return functools.partial(
        lax.conv_general_dilated,
        window_strides=strides,
        padding=padding,
        dimension_numbers=dimension_numbers,
        **kwargs,
    )


CONVS = {
    "valid": (conv(), (2, 6, 5, 4), (3, 3, 4, 8), 2 * 4 * 3 * 9 * 4 * 8),
    "strided": (conv(strides=(2, 2)), (2, 7, 7, 4), (3, 3, 4, 8), 2 * 3 * 3 * 9 * 4 * 8),
    "NCHW": (conv(("NCHW", "OIHW", "NCHW")), (2, 4, 6, 5), (8, 4, 3, 3), 2 * 4 * 3 * 9 * 4 * 8),
    "grouped": (
        conv(feature_group_count=2),
        (2, 6, 6, 4),
        (3, 3, 2, 8),
        2 * 4 * 4 * 9 * 2 * 8,
    ),
    "depthwise": (conv(feature_group_count=4), (2, 6, 6, 4), (3, 3, 1, 4), 2 * 4 * 4 * 9 * 4),
    "depthwise, twice the channels": (
        conv(feature_group_count=4),
        (2, 6, 6, 4),
        (3, 3, 1, 8),
        2 * 4 * 4 * 9 * 8,
    ),
    "groups of the batch": (
        conv(batch_group_count=2),
        (4, 6, 6, 3),
        (3, 3, 3, 8),
        2 * 16 * 9 * 3 * 8,
    ),
    "dilated kernel": (conv(rhs_dilation=(2, 2)), (1, 8, 8, 2), (3, 3, 2, 4), 16 * 9 * 2 * 4),
    "one axis": (conv(("NWC", "WIO", "NWC"), (1,)), (2, 9, 4), (3, 4, 5), 2 * 7 * 3 * 4 * 5),
    "transposed, each pixel meets each weight": (
        conv(lhs_dilation=(2, 2), padding=((2, 2), (2, 2))),
        (2, 5, 5, 3),
        (3, 3, 3, 4),
        2 * 25 * 9 * 3 * 4,
    ),
    "transposed, in groups": (
        conv(lhs_dilation=(2, 2), padding=((2, 2), (2, 2)), feature_group_count=3),
        (2, 5, 5, 3),
        (3, 3, 1, 6),
        2 * 25 * 9 * 6,
    ),
    "transposed, in groups of the batch": (
        conv(lhs_dilation=(2, 2), padding=((2, 2), (2, 2)), batch_group_count=2),
        (4, 5, 5, 3),
        (3, 3, 3, 6),
        2 * 25 * 9 * 3 * 6,
    ),
}


@pytest.mark.parametrize("name", CONVS)
def test_convolutions(name):
    function, image, kernel, expected = CONVS[name]
    costs = flops.count(lambda w, x: function(x, w), abstract(*kernel), abstract(*image))
    assert macs(costs) == {"": expected}
    # Without padding in play, ones convolved with ones add up to the number of multiply-adds.
    out = function(jnp.ones(image), jnp.ones(kernel))
    assert out.sum() == expected
    assert costs.leaves[0].outputs == out.size


def test_padding_counts_as_work():
    same = conv(padding="SAME")
    costs = flops.count(lambda w, x: same(x, w), abstract(3, 3, 2, 4), abstract(1, 5, 5, 2))
    assert macs(costs) == {"": 25 * 9 * 2 * 4}


def test_convolutions_of_an_ensemble_and_under_bf16():
    def apply(w, x):
        return conv()(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16))

    members = jax.vmap(apply, (0, None))
    costs = flops.count(members, abstract(5, 3, 3, 2, 4), abstract(1, 6, 6, 2))
    assert macs(costs) == {"": 5 * 16 * 9 * 2 * 4}


def test_all_leaves_are_listed_with_their_outputs():
    params = {"b": abstract(3), "w": W}
    costs = flops.count(lambda p, x: x @ p["w"] + p["b"].reshape(1, 3), params, X)
    assert costs == flops.Costs(
        (flops.LeafCost("b", (3,), 0, 0), flops.LeafCost("w", (4, 3), 24, 6)), 0
    )
    stack = flops.count(WALKS["scan over layers"][0], abstract(5, 4, 4), X)
    assert stack.leaves == (flops.LeafCost("", (5, 4, 4), 160, 40),)


def test_concrete_and_abstract_arrays_count_alike():
    make = functools.partial(jax.tree.map, lambda x: jnp.ones(x.shape, x.dtype))
    function, params, args, _ = WALKS["attention"]
    assert flops.count(function, params, *args) == flops.count(function, make(params), *make(args))


def test_parameters_in_other_clothes():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Params:
        fc1: dict
        fc2: tuple

    params = Params({"kernel": W44}, (W,))
    costs = flops.count(lambda p, x: x @ p.fc1["kernel"] @ p.fc2[0], params, X)
    assert macs(costs) == {"fc1/kernel": 32, "fc2/0": 24}


def test_twelve_layers_in_another_order():
    """As strings, "10" comes before "2"."""
    layers = [abstract(4, 4) for _ in range(11)] + [W]

    def apply_fn(p, x):
        for i in range(12):
            x = x @ p[i if isinstance(p, list) else str(i)]
        return x

    costs = flops.count(apply_fn, layers, X)
    restored = flops.count(apply_fn, {str(i): w for i, w in enumerate(layers)}, X)
    assert macs(costs) == macs(restored) == {**{str(i): 32 for i in range(11)}, "11": 24}
    kept = {"11": 0.5, "2": 0.25}
    assert flops.forward(costs, kept) == flops.forward(restored, kept)


def test_equinox():
    eqx = pytest.importorskip("equinox")
    model = eqx.filter_eval_shape(eqx.nn.MLP, 4, 3, 5, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, lambda x: isinstance(x, jax.ShapeDtypeStruct))
    costs = flops.count(lambda p, x: jax.vmap(eqx.combine(p, static))(x), params, X)
    assert macs(costs) == {"layers/0/weight": 40, "layers/1/weight": 30}


def test_flax_nnx_has_the_paths_of_masks():
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)
    costs = flops.count(lambda p, x: nnx.merge(graph, p)(x), params, X)
    assert macs(costs) == {"kernel": 24}
    kept = gj.metrics.densities(gj.ones(params), params)
    assert kept.keys() == {"kernel"}
    assert flops.ratio(costs, kept) == 1.0


def test_flax_lstm_concatenates_its_kernels():
    nn = pytest.importorskip("flax.linen")
    model = nn.RNN(nn.OptimizedLSTMCell(5))
    sequence = abstract(1, 7, 4)
    params = jax.eval_shape(model.init, jax.random.key(0), sequence)
    found = macs(flops.count(model.apply, params, sequence))
    assert found == {
        f"params/cell/{side}{gate}/kernel": 7 * 5 * (5 if side == "h" else 4)
        for side in "hi"
        for gate in "fgio"
    }


def test_products_that_cannot_be_counted():
    def endless(w, x):
        return lax.while_loop(lambda h: h.sum() < 9, lambda h: h @ w, x)

    def tested(w, x):
        return lax.while_loop(lambda h: (h @ w).sum() < 9, lambda h: 2 * h, x)

    for function in (endless, tested):
        with pytest.raises(ValueError, match=r"while_loop .* fixed number of trips"):
            flops.count(function, W44, X)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    spec = jax.sharding.PartitionSpec("data")
    shard_map = (
        getattr(jax, "shard_map", None)
        or pytest.importorskip("jax.experimental.shard_map").shard_map
    )
    sharded = shard_map(x_at_w, mesh=mesh, in_specs=(spec, spec), out_specs=spec)
    with pytest.raises(ValueError, match="inside shard_map"):
        flops.count(sharded, abstract(8, 3), abstract(2, 4))


COSTS = flops.Costs(
    (
        flops.LeafCost("bias", (3,), 0, 0),
        flops.LeafCost("dense", (5, 5), 50, 10),
        flops.LeafCost("kernel", (10, 10), 100, 20),
    ),
    other=25,
)


def test_forward_and_ratio_by_hand():
    kept = {"kernel": 0.25}
    assert flops.forward(COSTS) == 2 * (50 + 100 + 25)
    assert flops.forward(COSTS, kept) == 2 * (50 + 25 + 25)
    assert flops.forward(COSTS, kept, per_output=2) == 2 * (50 + 25 + 25) + 2 * 30
    assert flops.ratio(COSTS, kept) == 200 / 350
    assert flops.ratio(COSTS, kept, per_output=2) == 260 / 410
    assert flops.ratio(COSTS, {}) == 1.0
    with pytest.raises(ValueError, match=r"Densities of fc, .* bias, dense, kernel"):
        flops.forward(COSTS, {"fc": 0.5})


def test_ratio_of_real_masks_under_jit_and_vmap():
    params = {"a": jnp.ones((100, 100)), "b": jnp.ones((100, 10))}
    costs = flops.count(lambda p, x: x @ p["a"] @ p["b"], params, abstract(1, 100))
    rng = np.random.default_rng(0)
    masks = {name: jnp.asarray(rng.random(p.shape) < 0.2) for name, p in params.items()}

    def f(masks):
        return flops.ratio(costs, gj.metrics.densities(masks, params), per_output=2)

    live = sum(int(np.sum(m)) for m in masks.values())
    expected = (2 * live + 2 * 110) / (2 * 11_000 + 2 * 110)
    chex.assert_trees_all_close(jax.jit(f)(masks), np.float32(expected), rtol=1e-6)
    seeds = jax.tree.map(lambda m: jnp.stack([m, jnp.ones_like(m)]), masks)
    found = jax.vmap(f)(seeds)
    assert found.dtype == jnp.float32
    chex.assert_trees_all_close(found, np.float32([expected, 1]), rtol=1e-6)


def test_numbers_beyond_int32_under_jit():
    costs = flops.Costs((flops.LeafCost("w", (9, 9), 10**13, 10**10),), other=10**12)
    found = jax.jit(lambda d: flops.forward(costs, {"w": d}, per_output=2))(0.5)
    chex.assert_trees_all_close(found, np.float32(1e13 + 2e12 + 2e10), rtol=1e-6)


@pytest.mark.parametrize("delta_t", [1, 100, 4000])
def test_training_ratio_is_the_formula_of_rigl(delta_t):
    dense, sparse = 8.2, 1.7
    rigl = (3 * delta_t * sparse + 2 * sparse + dense) / (delta_t + 1)
    found = flops.training_ratio(sparse / dense, 1 / (delta_t + 1))
    assert found == pytest.approx(rigl / (3 * dense), rel=1e-12)
    snfs = flops.training_ratio(sparse / dense, 1)
    assert snfs == pytest.approx((2 * sparse + dense) / (3 * dense), rel=1e-12)
    assert flops.training_ratio(sparse / dense) == sparse / dense


def test_training_ratio_takes_a_share_not_a_period():
    with pytest.raises(ValueError, match="1 / 101"):
        flops.training_ratio(0.5, 100)


def test_table():
    text = flops.table(COSTS, {"kernel": jnp.float32(0.25), "bias": 1.0})
    assert [line.split() for line in text.splitlines()] == [
        ["parameter", "shape", "MACs", "density", "FLOPs", "share"],
        ["bias", "(3,)", "0", "1.0000", "0", "0.0", "%"],
        ["dense", "(5,", "5)", "50", "1.0000", "100", "50.0", "%"],
        ["kernel", "(10,", "10)", "100", "0.2500", "50", "25.0", "%"],
        ["other", "25", "1.0000", "50", "25.0", "%"],
        ["all", "175", "0.5714", "200", "100.0", "%"],
    ]
    assert "other" not in flops.table(COSTS._replace(other=0))


# What follows needs the networks of experiments.


@pytest.fixture(scope="module")
def papers():
    return pytest.importorskip("experiments.flops")


@pytest.fixture(scope="module")
def resnet50(papers):
    return papers.count(papers.NETWORKS["resnet50"])


def test_dense_resnet50(resnet50):
    _, costs = resnet50
    assert sum(leaf.macs for leaf in costs.leaves) == 4_089_184_256
    assert sum(leaf.outputs for leaf in costs.leaves) == 11_114_984
    assert costs.other == 0
    # Evci et al. print 8.2e9, and 3.2e18 for 100 epochs of training.
    dense = flops.forward(costs, per_output=2)
    assert dense == pytest.approx(8.2006e9, rel=1e-5)
    assert 3 * dense * 1_281_167 * 100 == pytest.approx(3.2e18, rel=0.02)


# sparsity: by ERK the inference, RigL's training (update every 100 steps) for the standard length
# and five times as long, and that of SNFS; then uniform with a dense first convolution.
RESNET50 = {
    0.5: (0.7150, 0.7160, 3.580, 0.810, 0.5157, 0.5173, 2.587),
    0.8: (0.4154, 0.4173, 2.087, 0.610, 0.2252, 0.2278, 1.139),
    0.9: (0.2439, 0.2464, 1.232, 0.496, 0.1283, 0.1312, 0.656),
    0.95: (0.1241, 0.1269, 0.635, 0.416, 0.0799, 0.0830, 0.415),
    0.965: (0.0877, 0.0907, 0.453, 0.392, 0.0654, 0.0685, 0.342),
    0.98: (0.0512, 0.0544, 0.272, 0.368, 0.0509, None, None),
    0.99: (0.0270, 0.0302, None, None, None, None, None),
}
PRINTED = {  # in the README of RigL and (the last: SNFS by ERK) in its paper
    0.8: ("0.42", "0.42", "2.09", "0.61", "0.23", None, "1.14"),
    0.9: ("0.24", "0.25", "1.23", "0.50", "0.13", None, "0.66"),
    0.95: ("0.12", None, "0.63", None, "0.08", None, "0.42"),
    0.965: ("0.09", None, "0.45", None, "0.07", None, "0.34"),
}
COLUMNS = (
    *("ERK inference", "ERK RigL", "ERK RigL 5x", "ERK SNFS"),
    *("uniform inference", "uniform RigL", "uniform RigL 5x"),
)


def ratios(papers, resnet50, sparsity):
    params, costs = resnet50
    rules = papers.NETWORKS["resnet50"].uniform_rules
    by_spread = {
        "ERK": papers.densities(params, gj.erk, sparsity),
        "uniform": papers.densities(params, gj.uniform, sparsity, rules),
    }
    return papers.ratios(costs, by_spread, per_output=2)


@pytest.mark.parametrize("sparsity", RESNET50)
def test_resnet50_costs_what_rigl_prints(papers, resnet50, sparsity):
    found = ratios(papers, resnet50, sparsity)
    for column, expected in zip(COLUMNS, RESNET50[sparsity], strict=True):
        if expected is not None:
            tolerance = 1e-3 if "5x" in column else 6e-4
            assert found[column] == pytest.approx(expected, abs=tolerance), column
    for column, printed in zip(COLUMNS, PRINTED.get(sparsity, [None] * 7), strict=True):
        if printed is not None:
            assert found[column] == pytest.approx(float(printed), abs=0.005 + 1e-3), column


def test_rigl_at_99_percent_with_a_dense_first_convolution(papers, resnet50):
    params, costs = resnet50
    kept = papers.densities(params, gj.erk, 0.99, [("stem", False)])
    inference = flops.ratio(costs, kept, per_output=2)
    assert inference == pytest.approx(0.0546, abs=5e-4)  # printed .05
    assert 5 * flops.training_ratio(inference, 1 / 101) == pytest.approx(0.29, abs=0.005)


@pytest.mark.parametrize(
    ("sparsity", "expected"),
    [(0.5, 0.7143), (0.8, 0.4138), (0.9, 0.2418), (0.95, 0.1217), (0.965, 0.0852)]
    + [(0.98, 0.0487), (0.99, 0.0243)],
)
def test_multiply_adds_of_resnet50_by_erk(papers, resnet50, sparsity, expected):
    params, costs = resnet50
    kept = papers.densities(params, gj.erk, sparsity)
    assert flops.ratio(costs, kept) == pytest.approx(expected, abs=1e-4)


def test_the_half_sparse_resnet50_of_granets_authors(papers, resnet50):
    params, costs = resnet50
    kept = papers.densities(params, gj.erk, 0.5)
    assert flops.forward(costs, kept) == pytest.approx(5_844_558_336, rel=1e-3)


@pytest.mark.parametrize(
    ("initial", "final", "expected"), [(0.5, 0.9, 0.288), (0.0, 0.9, 0.322), (0.5, 0.8, 0.441)]
)
def test_training_of_an_erk_shaped_granet(papers, resnet50, initial, final, expected):
    """The mean over the steps of 100 epochs, with events every 4000 steps and an end after 30."""
    params, costs = resnet50
    every, end, total = 4000, 300_270, 1_000_900

    @functools.cache
    def at(sparsity):
        return flops.ratio(costs, papers.densities(params, gj.erk, sparsity), per_output=2)

    events = range(0, total, every)
    remaining = [max(0.0, 1 - t / end) ** 3 for t in events]
    cost = [at(final + (initial - final) * left) for left in remaining]
    steps = [min(every, total - t) for t in events]
    assert np.average(cost, weights=steps) == pytest.approx(expected, abs=1e-3)


LAYERS = """
stem                  9408 118.014 1.0000 0.8572 0.4200 0.2098 0.0839
stage1_1/conv1        4096  12.845 1.0000 1.0000 1.0000 0.7735 0.3094
stage1_1/conv2       36864 115.606 1.0000 0.3619 0.1773 0.0886 0.0354
stage1_1/conv3       16384  51.380 1.0000 1.0000 0.9588 0.4790 0.1916
stage1_1/shortcut    16384  51.380 1.0000 1.0000 0.9588 0.4790 0.1916
stage1_2/conv1       16384  51.380 1.0000 1.0000 0.9588 0.4790 0.1916
stage1_2/conv2       36864 115.606 1.0000 0.3619 0.1773 0.0886 0.0354
stage1_2/conv3       16384  51.380 1.0000 1.0000 0.9588 0.4790 0.1916
stage1_3/conv1       16384  51.380 1.0000 1.0000 0.9588 0.4790 0.1916
stage1_3/conv2       36864 115.606 1.0000 0.3619 0.1773 0.0886 0.0354
stage1_3/conv3       16384  51.380 1.0000 1.0000 0.9588 0.4790 0.1916
stage2_1/conv1       32768 102.760 1.0000 1.0000 0.5747 0.2871 0.1148
stage2_1/conv2      147456 115.606 0.5401 0.1769 0.0867 0.0433 0.0173
stage2_1/conv3       65536  51.380 1.0000 0.9753 0.4779 0.2388 0.0955
stage2_1/shortcut   131072 102.760 1.0000 0.5849 0.2866 0.1432 0.0573
stage2_2/conv1       65536  51.380 1.0000 0.9753 0.4779 0.2388 0.0955
stage2_2/conv2      147456 115.606 0.5401 0.1769 0.0867 0.0433 0.0173
stage2_2/conv3       65536  51.380 1.0000 0.9753 0.4779 0.2388 0.0955
stage2_3/conv1       65536  51.380 1.0000 0.9753 0.4779 0.2388 0.0955
stage2_3/conv2      147456 115.606 0.5401 0.1769 0.0867 0.0433 0.0173
stage2_3/conv3       65536  51.380 1.0000 0.9753 0.4779 0.2388 0.0955
stage2_4/conv1       65536  51.380 1.0000 0.9753 0.4779 0.2388 0.0955
stage2_4/conv2      147456 115.606 0.5401 0.1769 0.0867 0.0433 0.0173
stage2_4/conv3       65536  51.380 1.0000 0.9753 0.4779 0.2388 0.0955
stage3_1/conv1      131072 102.760 1.0000 0.5849 0.2866 0.1432 0.0573
stage3_1/conv2      589824 115.606 0.2669 0.0874 0.0428 0.0214 0.0086
stage3_1/conv3      262144  51.380 1.0000 0.4869 0.2386 0.1192 0.0477
stage3_1/shortcut   524288 102.760 0.8916 0.2921 0.1431 0.0715 0.0286
stage3_2/conv1      262144  51.380 1.0000 0.4869 0.2386 0.1192 0.0477
stage3_2/conv2      589824 115.606 0.2669 0.0874 0.0428 0.0214 0.0086
stage3_2/conv3      262144  51.380 1.0000 0.4869 0.2386 0.1192 0.0477
stage3_3/conv1      262144  51.380 1.0000 0.4869 0.2386 0.1192 0.0477
stage3_3/conv2      589824 115.606 0.2669 0.0874 0.0428 0.0214 0.0086
stage3_3/conv3      262144  51.380 1.0000 0.4869 0.2386 0.1192 0.0477
stage3_4/conv1      262144  51.380 1.0000 0.4869 0.2386 0.1192 0.0477
stage3_4/conv2      589824 115.606 0.2669 0.0874 0.0428 0.0214 0.0086
stage3_4/conv3      262144  51.380 1.0000 0.4869 0.2386 0.1192 0.0477
stage3_5/conv1      262144  51.380 1.0000 0.4869 0.2386 0.1192 0.0477
stage3_5/conv2      589824 115.606 0.2669 0.0874 0.0428 0.0214 0.0086
stage3_5/conv3      262144  51.380 1.0000 0.4869 0.2386 0.1192 0.0477
stage3_6/conv1      262144  51.380 1.0000 0.4869 0.2386 0.1192 0.0477
stage3_6/conv2      589824 115.606 0.2669 0.0874 0.0428 0.0214 0.0086
stage3_6/conv3      262144  51.380 1.0000 0.4869 0.2386 0.1192 0.0477
stage4_1/conv1      524288 102.760 0.8916 0.2921 0.1431 0.0715 0.0286
stage4_1/conv2     2359296 115.606 0.1327 0.0435 0.0213 0.0106 0.0043
stage4_1/conv3     1048576  51.380 0.7426 0.2433 0.1192 0.0595 0.0238
stage4_1/shortcut  2097152 102.760 0.4455 0.1459 0.0715 0.0357 0.0143
stage4_2/conv1     1048576  51.380 0.7426 0.2433 0.1192 0.0595 0.0238
stage4_2/conv2     2359296 115.606 0.1327 0.0435 0.0213 0.0106 0.0043
stage4_2/conv3     1048576  51.380 0.7426 0.2433 0.1192 0.0595 0.0238
stage4_3/conv1     1048576  51.380 0.7426 0.2433 0.1192 0.0595 0.0238
stage4_3/conv2     2359296 115.606 0.1327 0.0435 0.0213 0.0106 0.0043
stage4_3/conv3     1048576  51.380 0.7426 0.2433 0.1192 0.0595 0.0238
fc                 2048000   2.048 0.4524 0.1482 0.0726 0.0363 0.0145
"""


@pytest.mark.parametrize(("column", "sparsity"), list(enumerate([0.5, 0.8, 0.9, 0.95, 0.98])))
def test_layers_of_resnet50_by_erk(papers, resnet50, column, sparsity):
    params, costs = resnet50
    kept = papers.densities(params, gj.erk, sparsity)
    by_path = {leaf.path: leaf for leaf in costs.leaves}
    rows = [line.split() for line in LAYERS.strip().splitlines()]
    assert {f"{name}/kernel" for name, *_ in rows} == kept.keys()
    for name, weights, million_macs, *densities in rows:
        leaf = by_path[f"{name}/kernel"]
        assert np.prod(leaf.shape) == int(weights)
        assert leaf.macs / 1e6 == pytest.approx(float(million_macs), abs=6e-4)
        assert kept[leaf.path] == pytest.approx(float(densities[column]), abs=1e-4), name


@pytest.mark.parametrize(
    ("name", "weights", "million_macs", "expected"),
    [  # at .8, .9, .95 and .98
        ("wrn_22_2", 1_076_912, 157.730, (0.3521, 0.1736, 0.0881, 0.0352)),  # printed .35, .17
        ("vgg19", 20_024_000, 398.136, (0.4052, 0.2225, 0.1131, 0.0475)),
        ("resnet20", 270_896, 40.813, (0.3581, 0.1773, 0.0867, 0.0348)),
        ("resnet50_cifar10", 23_467_712, 1297.830, (0.3942, 0.2306, 0.1156, 0.0452)),
        # printed .38, .22 and dense 2.59e9
        ("resnet50_cifar100", 23_652_032, 1298.014, (0.3851, 0.2247, 0.1136, 0.0454)),
        ("lenet5", 430_500, 2.293, (0.2913, 0.2040, 0.1262, 0.0484)),
        ("lenet_300_100", 266_200, 0.2662, (0.2, 0.1, 0.05, 0.02)),
    ],
)
def test_other_networks_by_erk(papers, name, weights, million_macs, expected):
    params, costs = papers.count(papers.NETWORKS[name])
    assert gj.trees.num_prunable(gj.trees.describe(params)) == weights
    assert sum(leaf.macs for leaf in costs.leaves) / 1e6 == pytest.approx(million_macs, abs=6e-4)
    for sparsity, ratio in zip((0.8, 0.9, 0.95, 0.98), expected, strict=True):
        kept = papers.densities(params, gj.erk, sparsity)
        # RigL's code rounds each layer up, which shows in networks as small as ResNet-20.
        assert flops.ratio(costs, kept) == pytest.approx(ratio, abs=2e-4)


def run(*args):
    command = [sys.executable, "-m", "experiments.flops", *args]
    return subprocess.run(command, capture_output=True, text=True)


def test_program(papers):
    done = run("--models=lenet_300_100,resnet50", "--sparsities=0.9", "--layers")
    assert done.returncode == 0, done.stderr
    for text in ("25,502,912 prunable weights", "8.201e+09 FLOPs", "0.2439", "0.1283", "1.2319"):
        assert text in done.stdout
    assert re.search(r"stage4_3/conv2/kernel +\(3, 3, 512, 512\) +115,605,504 +0.0213", done.stdout)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--models=alexnet", "error: --models=alexnet: name some of resnet50, vgg19"),
        ("--sparsities=", "error: --sparsities takes numbers"),
    ],
)
def test_program_ends_in_one_line(papers, flag, message):
    done = run(flag)
    assert done.returncode != 0
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


def test_no_ratio_where_nothing_was_counted():
    costs = flops.Costs((flops.LeafCost("a", (6, 5), 0, 0),), other=0)
    with pytest.raises(ValueError, match="No FLOPs were counted"):
        flops.ratio(costs, {"a": 0.1})
