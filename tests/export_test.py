"""Exported models: files that come back bit for bit, products that come out the same."""

import collections
import functools
import math
import random

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import granet_jax as gj
from experiments.benchmarks import weights
from granet_jax import export
from granet_jax.compact import native
from granet_jax.export import products, sparse
from granet_jax.export.graph import flatten

KEY = jax.random.key(0)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


# --- Files ---


def odd_tree():
    """Dtypes, shapes and paths that a file has to bear, and masks for some of the leaves."""
    draw = functools.partial(np.random.default_rng(0).normal, size=(3, 5))
    params = {
        "half": jnp.asarray(draw(), jnp.bfloat16),
        "a/b": {"kernel": jnp.asarray(draw(), jnp.float32), "scalar": jnp.float32(-0.0)},
        "list": [jnp.asarray(draw(), jnp.float16), np.arange(7, dtype=np.int8)],
        "empty": jnp.zeros((0, 4)),
        "gone": jnp.ones((2, 9)),
        "special": jnp.array([[jnp.nan, -jnp.inf], [-0.0, 1e-42]]),
    }
    masks = gj.ones(params)
    masks["half"] = jnp.asarray(draw() > 0)
    masks["a/b"]["kernel"] = jnp.asarray(draw() > 1)
    masks["gone"] = jnp.zeros((2, 9), bool)
    masks["special"] = jnp.array([[True, True], [True, False]])
    return params, masks


def bits(tree):
    return [
        (words, x.dtype, x.shape, np.asarray(x).tobytes())
        for words, x in ((w, np.asarray(x)) for w, x in gj.trees.by_path(tree).items())
    ]


def test_a_file_comes_back_bit_for_bit(tmp_path):
    params, masks = odd_tree()
    size = export.save(tmp_path / "model.safetensors", params, masks)
    assert size == (tmp_path / "model.safetensors").stat().st_size
    saved = export.load(tmp_path / "model.safetensors")
    assert bits(saved.params) == bits(gj.apply_masks(params, masks))
    assert bits(saved.masks) == bits(masks)


SAVED = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "bfloat16", ">f4", ">i2", "int4", "uint4"),
    *("float8_e5m2", "float8_e5m2fnuz", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e4m3b11fnuz"),
    *("float8_e3m4", "float8_e4m3", "float8_e8m0fnu", "float4_e2m1fn", "float6_e2m3fn", "int2"),
)


def test_every_dtype_comes_back_or_is_refused(tmp_path):
    draw = np.random.default_rng(0)
    values = draw.integers(0, 2, (5, 4))
    params = {
        name: {str(i): x.astype(name) for i, x in enumerate((values, values[0, 0], values[:0]))}
        for name in SAVED
    }
    masks = jax.tree.map(lambda x: draw.random(x.shape) > 0.5, params)
    export.save(tmp_path / "model", params, masks)
    wanted = jax.tree.map(lambda x: x.astype(x.dtype.newbyteorder("=")), params)
    wanted = jax.tree.map(lambda x, m: np.where(m, x, np.zeros_like(x)), wanted, masks)
    assert bits(export.load(tmp_path / "model").params) == bits(wanted)
    for dtype, message in {
        "complex128": "a is complex128, which a file cannot hold: .* at most 8 bytes",
        "longdouble": "a is .*, which a file cannot hold",
        "V4": "a is no array of numbers",
        "U3": "a is no array of numbers",
        "datetime64[s]": "a is no array of numbers",
    }.items():
        with pytest.raises(ValueError, match=message):
            export.save(tmp_path / "other", {"a": np.zeros((2, 2), dtype)})
    with pytest.raises(ValueError, match="a is no array of numbers, but key<"):
        export.save(tmp_path / "other", {"a": jax.random.key(0)})
    assert not (tmp_path / "other").exists()


def test_arrays_that_lie_in_other_orders(tmp_path):
    """safetensors writes memory as it lies, whatever its strides."""
    whole = np.arange(1, 13, dtype="f4").reshape(3, 4)
    params = {"a": whole.T, "b": whole[::-1], "c": whole[:, ::2], "d": whole.T.astype(">f4")}
    export.save(tmp_path / "file", params)
    assert bits(export.load(tmp_path / "file").params) == bits(
        {path: np.ascontiguousarray(x, "f4") for path, x in params.items()}
    )
    export.save_dense(tmp_path / "dense", params)
    saved = export.load_dense(tmp_path / "dense", {**params, "d": whole.T})
    for path, x in params.items():
        np.testing.assert_array_equal(saved.params[path], x)
    turned = export.load_dense(tmp_path / "dense", {"a": whole}, {"a": ("a", True)})
    export.save(tmp_path / "file", *turned)
    np.testing.assert_array_equal(export.load(tmp_path / "file").params["a"], whole)


def test_one_array_and_scalars(tmp_path):
    export.save(tmp_path / "file", jnp.arange(3.0))
    assert export.load(tmp_path / "file").params.tolist() == [0, 1, 2]
    params = {"kernel": jnp.ones((2, 2)), "scale": jnp.array(3.0), "wave": jnp.array([1j])}
    export.save_dense(tmp_path / "file", params | {"f8": jnp.ones((2, 2), jnp.float8_e4m3fn)})
    saved = export.load_dense(tmp_path / "file", params).params
    assert (saved["scale"].shape, saved["scale"].item()) == ((), 3.0)
    assert saved["wave"].tolist() == [1j]
    f8 = export.load_dense(tmp_path / "file", {"f8": jnp.ones((2, 2))}).params["f8"]
    assert f8.tolist() == [[1, 1], [1, 1]]
    with pytest.raises(ValueError, match="a name that files use"):
        export.save_dense(tmp_path / "file", {"__metadata__": jnp.ones(2)})
    assert export.load_dense(tmp_path / "file", params).params["scale"].item() == 3.0


def test_leaves_find_their_places_by_path(tmp_path):
    """Twelve equal layers: as strings, "10" comes before "2"."""
    params = [jnp.full(3, i, jnp.float32) for i in range(12)]
    export.save(tmp_path / "model", params)
    saved = export.load(tmp_path / "model", like=params)
    chex.assert_trees_all_equal(saved.params, params)
    chex.assert_trees_all_equal(saved.masks, gj.ones(params))
    with pytest.raises(ValueError, match=r"3 is float32\(3,\), expected float32\(4,\)"):
        export.load(tmp_path / "model", like=[*params[:3], jnp.ones(4), *params[4:]])
    with pytest.raises(ValueError, match=r"11 is .*, expected no such leaf"):
        export.load(tmp_path / "model", like=params[:11])


def test_a_file_without_masks_is_dense(tmp_path):
    params, _ = odd_tree()
    export.save(tmp_path / "model", params)
    saved = export.load(tmp_path / "model")
    assert bits(saved.params) == bits(params)
    assert all(np.all(x) for x in jax.tree.leaves(saved.masks))


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    params, masks = odd_tree()
    export.save(tmp_path / "model", params, masks)
    before = (tmp_path / "model").read_bytes()
    monkeypatch.setattr("os.fsync", lambda descriptor: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export.save(tmp_path / "model", params)
    assert (tmp_path / "model").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_leaves_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Two leaves are called a/b"):
        export.save(tmp_path / "model", {"a": {"b": jnp.ones(2)}, "a/b": jnp.zeros(2)})
    assert not list(tmp_path.iterdir())


def test_masks_of_another_tree_are_refused(tmp_path):
    params, masks = odd_tree()
    masks["half"] = masks["half"][:1]
    with pytest.raises(ValueError, match="The mask of half has shape"):
        export.save(tmp_path / "model", params, masks)


def test_a_broken_file_never_loads_silently_wrong(tmp_path):
    """Bytes changed, removed, put in, swapped: an error, or what was written."""
    params, masks = odd_tree()
    path = tmp_path / "model"
    export.save(path, params, masks)
    whole = path.read_bytes()
    wanted = bits(gj.apply_masks(params, masks)), bits(masks)
    rng = random.Random(0)
    outcomes = collections.Counter()
    for _ in range(1000):
        path.write_bytes(mutated(whole, rng))
        try:
            saved = export.load(path)
        except ValueError as error:
            outcomes["refused" if "be read as a sparse model" in str(error) else str(error)] += 1
        else:
            assert (bits(saved.params), bits(saved.masks)) == wanted
            outcomes["the same"] += 1
    assert outcomes.keys() <= {"refused", "the same"}
    assert outcomes["refused"] > 900


def mutated(data, rng):
    data, place = bytearray(data), rng.randrange(len(data))
    length = rng.randrange(1, 40)
    kind = rng.randrange(5)
    if kind == 0:
        data[place] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[place:]
    elif kind == 2:
        del data[place : place + length]
    elif kind == 3:
        data[place:place] = rng.randbytes(length)
    else:
        data[place : place + length] = rng.randbytes(length)
    return bytes(data)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        export.load(tmp_path / "none")
    from safetensors.numpy import save_file

    save_file({"x": np.ones(3, np.float32)}, tmp_path / "other")
    with pytest.raises(ValueError, match=r"was not written by granet_jax\.export\.save"):
        export.load(tmp_path / "other")


@pytest.mark.parametrize(
    ("sparsity", "megabytes"), [(0.8, 23.683), (0.9, 13.499), (0.95, 8.399), (0.99, 4.354)]
)
def test_sizes_of_resnet_50_are_those_that_rigl_published(sparsity, megabytes, tmp_path):
    """ERK, at 99 % over all but the first layer, which is dense there; kernels and all biases."""
    shapes = weights.resnet50_shapes()
    layers = {f"{i:02}": np.zeros(shape, np.float32) for i, shape in enumerate(shapes)}
    counts = gj.erk(shapes, sparsity)
    if sparsity == 0.99:
        counts = (math.prod(shapes[0]), *gj.erk(shapes[1:], sparsity))
    masks = {
        name: (np.arange(x.size) < count).reshape(x.shape)
        for (name, x), count in zip(layers.items(), counts, strict=True)
    }
    biases = {"biases": np.ones(26_560 + 1_000, np.float32)}
    path = tmp_path / "model"
    size = export.save(path, layers | biases, masks | {"biases": np.ones(27_560, bool)})
    assert size / 1e6 == pytest.approx(megabytes, rel=0.005)


def test_two_of_four_packs_and_unpacks():
    kernel = np.asarray(jax.random.normal(KEY, (48, 5)), np.float16)
    rules = [("", gj.structures.n_of_m(4))]
    masks = gj.random_masks(KEY, {"kernel": kernel}, 0.5, gj.uniform, rules)
    masks = {"half": np.asarray(masks["kernel"]), "fewer": np.asarray(masks["kernel"]).copy()}
    masks["fewer"][:20] = False
    for mask in masks.values():
        packed = export.to_two_of_four(kernel, mask)
        assert packed.values.shape == (5, 24)
        assert packed.metadata.shape == (5, 3)
        np.testing.assert_array_equal(export.from_two_of_four(packed), np.where(mask, kernel, 0))
    with pytest.raises(ValueError, match="Of some four inputs 4 are kept"):
        export.to_two_of_four(kernel, np.ones_like(kernel, bool))
    with pytest.raises(ValueError, match="multiple of 16 inputs"):
        export.to_two_of_four(kernel[:4], masks["half"][:4])


# --- Sparse execution ---


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


def test_compact_refuses_inputs_of_other_shapes():
    """It replays a trace, in which the length is a number."""
    params = {"in": jax.random.normal(KEY, (4, 8)).at[:, 3].set(0.0), "out": jnp.ones((8, 5))}

    def apply_fn(params, x):
        return (jnp.maximum(x @ params["in"], 0) @ params["out"])[:, -1]

    x = jax.random.normal(KEY, (2, 9, 4))
    small = export.compact(apply_fn, params, None, x[:, :6])
    chex.assert_trees_all_close(
        small.apply(small.params, x[:, :6]), apply_fn(params, x[:, :6]), **CLOSE
    )
    for inputs in ((x,), (x[:, :6], x[:, :6]), ()):
        with pytest.raises(ValueError, match=r"was traced for inputs .*float32\(2, 6, 4\).*; got"):
            jax.jit(small.apply)(small.params, *inputs)


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
