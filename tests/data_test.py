"""Data: arrays, folders, augmentation, and ImageNet as a stream of encoded images."""

import io
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments.data import augment, images, streams
from experiments.data.streams import Batch, Stream
from experiments.engine import batches
from experiments.engine.task import Memory
from experiments.tasks import images as tasks_of_images
from tests.images import jpeg_records, random_images

DATA_DIR = pathlib.Path(__file__).parents[2] / "shared" / "data" / "tfds"


def test_from_arrays_measures_train():
    train = random_images(20)
    dataset = images.from_arrays(train, random_images(5))
    scaled = train.images / 255
    np.testing.assert_allclose(dataset.mean, scaled.mean((0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(dataset.std, scaled.std((0, 1, 2)), atol=1e-6)
    assert dataset.num_classes == 3
    assert dataset.train.labels.dtype == np.int32


def test_validation_is_held_out_of_train_and_always_the_same():
    train = random_images(30)._replace(labels=np.arange(30))
    first, again = (images.from_arrays(train, random_images(5), validation=10) for _ in range(2))
    kept, held_out = first.train.labels, first.held_out["validation"].labels
    assert sorted([*kept, *held_out]) == list(range(30))
    assert len(held_out) == 10
    np.testing.assert_array_equal(held_out, again.held_out["validation"].labels)
    np.testing.assert_array_equal(first.train.images, train.images[kept])


@pytest.mark.parametrize(
    ("train", "test", "validation", "message"),
    [
        (Batch(np.ones((3, 4, 4, 1)), np.zeros(3, int)), None, 0, "must be uint8 .* got float64"),
        (Batch(np.ones((3, 4, 4), np.uint8), np.zeros(3, int)), None, 0, r"got uint8 \(3, 4, 4\)"),
        (random_images(3)._replace(labels=np.zeros(2, int)), None, 0, r"integers \(3,\)"),
        (random_images(3)._replace(labels=np.zeros(3)), None, 0, "got float64"),
        (random_images(3)._replace(labels=np.array([0, -1, 2])), None, 0, "count from 0, got -1"),
        (random_images(3), random_images(3, (9, 8, 3)), 0, "differ in shape"),
        (random_images(3), None, 3, "fewer than the 3"),
    ],
)
def test_wrong_arrays(train, test, validation, message):
    with pytest.raises(ValueError, match=message):
        images.from_arrays(train, random_images(2) if test is None else test, validation)


def test_from_folder(tmp_path):
    for split, classes in (("train", ["cat", "dog"]), ("test", ["dog"])):
        for name in classes:
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            value = 200 if name == "dog" else 10
            Image.fromarray(np.full((9, 7), value, np.uint8)).save(folder / "1.png")
    dataset = images.from_folder(tmp_path, size=4)
    assert dataset.train.images.shape == (2, 4, 4, 3)
    assert dataset.train.images[1].min() == dataset.held_out["test"].images.max() == 200
    np.testing.assert_array_equal(dataset.held_out["test"].labels, [1])
    with pytest.raises(ValueError, match="holds no folders"):
        images.from_folder(tmp_path / "train", size=4)
    (tmp_path / "train" / "cat").rename(tmp_path / "test" / "cat")
    with pytest.raises(ValueError, match=r"classes that train has not: \['cat'\]"):
        images.from_folder(tmp_path, size=4)


def test_batches_in_order_pad_the_last_one():
    split = random_images(5)
    (first, valid), (last, some) = batches.in_order(Memory(split), 4)
    np.testing.assert_array_equal(first.labels, split.labels[:4])
    assert valid.all()
    np.testing.assert_array_equal(some, [True, False, False, False])
    assert last.labels[0] == split.labels[4]
    assert last.images.shape == (4, 8, 8, 3)


@pytest.mark.parametrize("n", [9, 11, 12])
def test_batches_in_order_hold_every_image_once(n):
    split = random_images(n)._replace(labels=np.arange(n))
    pairs = list(batches.in_order(Memory(split), 4))
    assert [len(b.labels) for b, _ in pairs] == [4, 4, 4]
    assert [label for b, valid in pairs for label in b.labels[valid]] == list(range(n))


@pytest.mark.parametrize("n", [9, 11, 12])
def test_batches_of_a_stream_deal_every_image_to_one_process(monkeypatch, n):
    source = tasks_of_images._source(Stream(jpeg_records(n), np.arange(n)))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    seen = []
    for process in range(2):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        pairs = list(batches.in_order(source, 4))
        assert [len(b.labels) for b, _ in pairs] == [2, 2, 2]
        seen += [label for b, valid in pairs for label in b.labels[valid]]
    assert sorted(seen) == list(range(n))


@pytest.mark.parametrize(("name", "mode"), [("reflect", "reflect"), ("zero", "constant")])
def test_crops_are_crops_of_the_padded_image(name, mode):
    images = random_images(40).images
    out = np.asarray(augment.AUGMENTATIONS[name](jax.random.key(1), jnp.asarray(images)))
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)), mode=mode)
    found = []
    for image, source in zip(out, padded, strict=True):
        found += [
            (y, x, flip)
            for y in range(9)
            for x in range(9)
            for flip in (1, -1)
            if np.array_equal(image, source[y : y + 8, x : x + 8][:, ::flip])
        ][:1]
    assert len(found) == 40  # each is a crop
    assert len(set(found)) > 20  # and not always the same
    assert {flip for _, _, flip in found} == {1, -1}


def test_no_augmentation_is_none():
    images = jnp.asarray(random_images(2).images)
    assert augment.AUGMENTATIONS["none"](jax.random.key(0), images) is images


def labels(iterator, n):
    return [next(iterator).labels.tolist() for _ in range(n)]


def test_stream_shuffles_each_pass_and_resumes():
    stream = Stream(jpeg_records(10), np.arange(1, 10))  # the first record belongs elsewhere
    iterator = streams.shuffled(stream, 4, seed=3)
    first_pass, second_pass = labels(iterator, 2), labels(iterator, 2)
    for first, second in (first_pass, second_pass):
        assert len({*first, *second}) == 8
        assert 0 not in first + second
    assert first_pass != second_pass
    resumed = streams.shuffled(stream, 4, seed=3)
    next(resumed)
    state = resumed.get_state()
    expected = next(resumed)
    again = streams.shuffled(stream, 4, seed=3)
    again.set_state(state)
    np.testing.assert_array_equal(next(again).images, expected.images)
    assert labels(streams.shuffled(stream, 4, seed=4), 2) != first_pass
    assert expected.images.shape == (4, 224, 224, 3)


def test_stream_is_dealt_out_to_processes(monkeypatch):
    stream = Stream(jpeg_records(10), np.arange(10))
    whole = labels(streams.shuffled(stream, 4, seed=0), 2)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    parts = []
    for process in range(2):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        parts.append(labels(streams.shuffled(stream, 4, seed=0), 2))
    together = [sorted(a + b) for a, b in zip(*parts, strict=True)]
    assert together == [sorted(batch) for batch in whole]


def test_stream_in_order_takes_the_middle():
    image = np.zeros((100, 200, 3), np.uint8)
    image[:, 50:150] = 255  # the middle square
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    stream = Stream([{"image": file.getvalue(), "label": 7}], np.arange(1))
    (batch,) = streams.in_order(stream, 2)
    np.testing.assert_array_equal(batch.labels, [7, -1])
    assert batch.images[0].min() == 255  # nothing from the sides


def test_random_boxes_lie_within_the_image():
    rng = np.random.default_rng(0)
    for size in [(500, 375), (40, 30), (1, 1), (2000, 3)]:
        for _ in range(50):
            left, top, right, bottom = streams._random_box(size, rng)
            assert 0 <= left < right <= size[0]
            assert 0 <= top < bottom <= size[1]


@pytest.mark.skipif(not (DATA_DIR / "cifar10").is_dir(), reason="the data are not on this disk")
@pytest.mark.parametrize(
    ("name", "shape", "mean", "std"),
    [
        ("mnist", (60_000, 28, 28, 1), [0.1307], [0.3081]),
        ("cifar10", (50_000, 32, 32, 3), [0.4913, 0.4821, 0.4465], [0.2452, 0.2428, 0.2606]),
    ],
)
def test_real_data_are_read_whole(name, shape, mean, std):
    dataset = images.load(name, str(DATA_DIR))
    assert dataset.train.images.shape == shape
    assert dataset.held_out["test"].labels.shape == (10_000,)
    assert dataset.num_classes == 10
    np.testing.assert_allclose(dataset.mean, mean, atol=1e-4)
    np.testing.assert_allclose(dataset.std, std, atol=1e-4)
