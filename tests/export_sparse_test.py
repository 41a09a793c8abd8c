"""Exported models that run sparse: products come out the same, in whatever way they are done."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import granet_jax as gj
from granet_jax import export
from granet_jax.compact import native
from granet_jax.export import products, sparse
from granet_jax.export.graph import flatten

KEY = jax.random.key(0)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


class Net(nn.Module):
    """All kinds of layers: strides, dilation, padding, groups, normalisation, a product of both."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), strides=(2, 1), name="strided")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        x = nn.Conv(8, (3, 2), kernel_dilation=(2, 1), padding=((1, 2), (0, 3)), name="dilated")(x)
        x = x + nn.Conv(8, (3, 3), feature_group_count=4, name="grouped")(x)
        x = nn.Conv(16, (1, 1), use_bias=False, name="pointwise")(nn.gelu(x))
        x = nn.MultiHeadDotProductAttention(2, qkv_features=8)(x.reshape(len(x), -1, 16))
        return nn.Dense(10)(x.mean(1))


@functools.cache
def conv_net(sparsity=0.8):
    draw = np.random.default_rng(0)  # compiles nothing
    x = jnp.asarray(draw.normal(size=(2, 8, 9, 3)), jnp.float32)
    variables = jax.tree.map(
        lambda v: jnp.asarray(draw.uniform(0.1, 0.3, v.shape), v.dtype),
        jax.eval_shape(Net().init, jax.random.key(1), x),
    )
    params = variables["params"]
    masks = jax.tree.map(lambda p: draw.random(p.shape) > sparsity * (p.ndim > 1), params)
    rest = {name: x for name, x in variables.items() if name != "params"}

    @jax.jit
    def apply_fn(params, x):
        return Net().apply({"params": params, **rest}, x)

    return apply_fn, params, masks, x


def forced(monkeypatch, way):
    """Takes one way wherever it can be taken, however long it takes."""
    if way == "native" and not native.available():
        pytest.skip("the kernels are not built")

    def fastest(product, step, ways):
        ready, choice = measured(product, step, ways)
        forced_way = sparse._WAYS[way](product)
        return (ready, choice) if forced_way is None else (forced_way, choice._replace(taken=way))

    measured = sparse._fastest
    monkeypatch.setattr(sparse, "_ROUNDS", 1)
    monkeypatch.setattr(sparse, "_SMALLEST_TILE", 1)
    monkeypatch.setattr(sparse, "_fastest", fastest)
    monkeypatch.setattr(sparse, "_is_faster", lambda a, b, example: True)


@pytest.mark.parametrize("way", ["native", "bcsr", "gather"])
def test_each_way_gives_the_outputs_of_the_dense_model(way, monkeypatch):
    forced(monkeypatch, way)
    apply_fn, params, masks, x = conv_net()
    sparse_apply = export.compile(apply_fn, params, masks, x, ways=[way])
    taken = [choice.taken for choice in sparse_apply.choices]
    assert taken == [way] * 8  # three convolutions, four products of attention, the last layer
    wanted = apply_fn(gj.apply_masks(params, masks), x)
    chex.assert_trees_all_close(sparse_apply(x), wanted, **CLOSE)
    chex.assert_trees_all_close(jax.jit(sparse_apply)(x), wanted, **CLOSE)


@pytest.mark.parametrize("way", ["native", "bcsr", "bcsr4", "gather"])
@pytest.mark.parametrize(
    "spec", ["bi,io->bo", "io,bi->bo", "oi,bi->ob", "bci,iho->bcho", "i,io->o"]
)
def test_products_in_any_layout(spec, way, monkeypatch):
    forced(monkeypatch, way)
    sizes = {"b": 3, "i": 7, "o": 5, "c": 2, "h": 4}
    weight_first = spec.split("->")[0].split(",")[0] in ("io", "oi")
    operands = [
        jax.random.normal(jax.random.fold_in(KEY, i), [sizes[axis] for axis in term])
        for i, term in enumerate(spec.split("->")[0].split(","))
    ]
    kernel, x = operands if weight_first else operands[::-1]
    masks = {"kernel": jax.random.bernoulli(KEY, 0.3, kernel.shape)}

    def apply_fn(params, x):
        pair = (params["kernel"], x) if weight_first else (x, params["kernel"])
        return jnp.einsum(spec, *pair)

    sparse_apply = export.compile(apply_fn, {"kernel": kernel}, masks, x, ways=[way])
    assert [choice.taken for choice in sparse_apply.choices] == [way]
    dense = apply_fn(gj.apply_masks({"kernel": kernel}, masks), x)
    chex.assert_trees_all_close(sparse_apply(x), dense, **CLOSE)


def test_products_of_nothing_and_half_precision_with_wide_sums(monkeypatch):
    forced(monkeypatch, "gather")
    draw = np.random.default_rng(0)
    params = {
        "none": jnp.zeros((0, 3)),
        "half": jnp.asarray(draw.normal(size=(70, 5)), jnp.bfloat16),
    }

    def apply_fn(params, x, y):
        wide = jax.lax.dot(y, params["half"], preferred_element_type=jnp.float32)
        return x @ params["none"], wide

    inputs = jnp.ones((2, 0)), jnp.asarray(draw.normal(size=(4, 70)), jnp.bfloat16)
    params["half"] *= draw.random((70, 5)) > 0.5
    sparse_apply = export.compile(apply_fn, params, None, *inputs)
    assert [choice.taken for choice in sparse_apply.choices] == ["gather"]
    chex.assert_trees_all_close(sparse_apply(*inputs), apply_fn(params, *inputs), **CLOSE)


def test_small_inputs_are_not_cut_into_tiles():
    params = {"kernel": jnp.eye(8)}
    sparse_apply = export.compile(lambda p, x: x @ p["kernel"], params, None, jnp.ones((4, 8)))
    (choice,) = sparse_apply.choices
    assert list(choice.milliseconds) == [
        "dense",
        *(["native"] if native.available() else []),
        "bcsr",
        "gather",
    ]


def test_what_does_not_depend_on_inputs_is_computed_once():
    params = {"kernel": jnp.ones((4, 4)), "scale": jnp.arange(4.0)}

    def apply_fn(params, x):
        kernel = params["kernel"] * jnp.exp(params["scale"])[None]
        return {"y": x @ kernel, "known": kernel.sum(), "x": x}

    x = jnp.ones((2, 4))
    sparse_apply = export.compile(apply_fn, params, None, x)
    names = [
        eqn.primitive.name for eqn in jax.make_jaxpr(sparse_apply)(x).eqns[0].params["jaxpr"].eqns
    ]
    assert "exp" not in names
    chex.assert_trees_all_close(sparse_apply(x), apply_fn(params, x))


def test_a_model_that_is_not_faster_as_a_whole_is_the_dense_one(monkeypatch):
    forced(monkeypatch, "gather")
    monkeypatch.setattr(sparse, "_is_faster", lambda a, b, example: False)
    apply_fn, params, masks, x = conv_net()
    sparse_apply = export.compile(apply_fn, params, masks, x, ways=["gather"])
    assert {choice.taken for choice in sparse_apply.choices} == {"dense"}
    wanted = apply_fn(gj.apply_masks(params, masks), x)
    chex.assert_trees_all_close(sparse_apply(x), wanted, **CLOSE)


def test_dense_layers_and_loops_stay_as_they_are():
    params = {"kernel": jax.random.normal(KEY, (3, 4, 4))}

    def apply_fn(params, x):
        x = x @ params["kernel"][0]
        return jax.lax.scan(lambda x, kernel: (x @ kernel, None), x, params["kernel"])[0]

    x = jnp.ones((2, 4))
    sparse_apply = export.compile(apply_fn, params, gj.ones(params), x)
    assert [choice.taken for choice in sparse_apply.choices] == ["dense"]
    chex.assert_trees_all_close(sparse_apply(x), apply_fn(params, x), **CLOSE)


@jax.tree_util.register_pytree_node_class
class Holder:
    """A container of an array that does not compare itself."""

    def __init__(self, array):
        self.array = array

    def tree_flatten(self):
        return (self.array,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def test_inputs_of_other_shapes_and_unknown_ways_are_refused():
    params = {"kernel": jnp.ones((4, 4))}
    sparse_apply = export.compile(
        lambda params, x: x @ params["kernel"], params, None, jnp.ones((2, 4))
    )
    with pytest.raises(ValueError, match="compiled for inputs"):
        sparse_apply(jnp.ones((3, 4)))
    pair = {"a": jnp.ones((2, 4)), "b": jnp.zeros((2, 4))}
    of_pair = export.compile(lambda p, x: (x["a"] - x["b"]) @ p["kernel"], params, None, pair)
    of_holder = export.compile(lambda p, x: x.array @ p["kernel"], params, None, Holder(pair["a"]))
    chex.assert_trees_all_close(of_holder(Holder(pair["a"])), pair["a"] @ params["kernel"], **CLOSE)
    with pytest.raises(ValueError, match=r"compiled for inputs .*'a'.*; got .*'c'"):
        of_pair({"b": pair["a"], "c": pair["b"]})
    with pytest.raises(ValueError, match="Unknown ways"):
        export.compile(lambda params, x: x, params, None, jnp.ones(3), ways=["magic"])


@pytest.mark.parametrize("way", ["native", "bcsr"])
def test_serialized_models_give_the_same_outputs(way, monkeypatch):
    pytest.importorskip("flatbuffers")
    forced(monkeypatch, way)
    apply_fn, params, masks, x = conv_net()
    sparse_apply = export.compile(apply_fn, params, masks, x, ways=[way])
    data = export.serialize(sparse_apply, x)
    chex.assert_trees_all_close(export.deserialize(data)(x), sparse_apply(x), **CLOSE)


@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_by_the_kernel_for_live_weights(stride):
    if not native.available():
        pytest.skip("native.cc is not built here")
    draw = np.random.default_rng(0)
    kernel = draw.normal(size=(3, 3, 8, 16)) * (draw.random((3, 3, 8, 16)) < 0.1)
    x = jnp.asarray(draw.normal(size=(3, 10, 9, 8)), jnp.float32)
    params = {"w": jnp.asarray(kernel, jnp.float32)}

    def apply_fn(params, x):
        how = {"padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
        return jax.lax.conv_general_dilated(x, params["w"], (stride, stride), **how)

    program = flatten(jax.make_jaxpr(functools.partial(apply_fn, params))(x))
    (step,) = sparse._partially_evaluate(program).steps
    way = sparse._convolve(products.Product.of(step))
    (got,) = jax.jit(way.run)(way.arrays, x)
    wanted = apply_fn(params, x)
    chex.assert_trees_all_close(got, wanted, rtol=1e-5, atol=1e-5)
    sparse_apply = export.compile(apply_fn, params, None, x, ways=["convolve"])
    assert sparse_apply.choices[0].milliseconds.keys() == {"dense", "convolve"}
    chex.assert_trees_all_close(sparse_apply(x), wanted, rtol=1e-5, atol=1e-5)


def test_short_floats_are_gathered_in_float32():
    weights = np.zeros((4096, 8), np.float16)
    weights[:300] = np.where(np.arange(300) % 2, 300, -300)[:, None]
    x = jnp.full((1, 4096), 300, jnp.float16)
    program = flatten(jax.make_jaxpr(lambda x: x @ jnp.asarray(weights))(x))
    (step,) = sparse._partially_evaluate(program).steps
    ready = sparse._gather(products.Product.of(step))
    (y,) = ready.run(ready.arrays, x)
    assert y.dtype == jnp.float16
    assert not y.any()


def test_convolutions_without_outputs_stay_dense():
    params = {"kernel": jnp.ones((5, 5, 3, 16))}

    def apply_fn(params, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, params["kernel"], (1, 1), "VALID", dimension_numbers=numbers
        )

    x = jnp.ones((2, 3, 3, 3))
    assert export.compile(apply_fn, params, None, x)(x).shape == (2, 0, 0, 16)
