"""Files of exported models come back bit for bit."""

import collections
import functools
import math
import random

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import granet_jax as gj
from experiments.benchmarks import weights
from granet_jax import export

KEY = jax.random.key(0)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


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
