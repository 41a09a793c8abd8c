"""Data sets for classification: ``load(name, data_dir)``, ``from_arrays`` and ``from_folder``.

Small sets are arrays in memory; ImageNet is a stream of encoded images (:mod:`.streams`).
"""

import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from experiments.data import streams
from experiments.data.streams import Batch, Stream

DEFAULT_DATA_DIR = "~/tensorflow_datasets"  # that of TFDS


class Dataset(NamedTuple):
    """Images and labels, split."""

    train: Batch | Stream  # a Batch holds the whole split: uint8 (n, h, w, c), int32 (n,)
    held_out: Mapping[str, Batch | Stream]  # "test", and "validation" where asked for
    num_classes: int
    mean: np.ndarray  # float32 (channels,), of train / 255
    std: np.ndarray  # float32 (channels,)


def load(name: str, data_dir: str | None = None, validation: int = 0) -> Dataset:
    """Reads a data set.

    Args:
      name: one of ``DATASETS``.
      data_dir: folder with TFDS data sets in array_record form; digits needs none.
      validation: number of training images held out as a split of their own, always the same ones.

    Raises:
      ValueError: the data is not there (the message says how to get it), or too small.
    """
    return DATASETS[name](data_dir or DEFAULT_DATA_DIR, validation)


def from_arrays(train: Batch, test: Batch, validation: int = 0) -> Dataset:
    """Makes a data set of arrays.

    Args:
      train: images uint8 ``(n, height, width, channels)`` and integer labels ``(n,)`` from 0 on.
      test: the same for testing.
      validation: number of training images to hold out.

    Raises:
      ValueError: arrays of other shapes or dtypes, or too few images.
    """
    for name, (images, labels) in (("train", train), ("test", test)):
        images, labels = np.asarray(images), np.asarray(labels)
        if images.ndim != 4 or images.dtype != np.uint8 or images.size == 0:
            raise ValueError(
                f"{name} images must be uint8 (n, height, width, channels) with n > 0, "
                f"got {images.dtype} {images.shape}."
            )
        if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(
                f"{name} labels must be integers ({len(images)},), one for each image, "
                f"got {labels.dtype} {labels.shape}."
            )
        if labels.min() < 0:
            raise ValueError(f"{name} labels must count from 0, got {labels.min()}.")
    if train.images.shape[1:] != test.images.shape[1:]:
        raise ValueError(
            f"train and test images differ in shape: {train.images.shape[1:]} and "
            f"{test.images.shape[1:]}. Resize one of them."
        )
    train, test = (Batch(images, labels.astype(np.int32)) for images, labels in (train, test))
    num_classes = int(max(train.labels.max(), test.labels.max())) + 1
    kept, held_out = _hold_out(len(train.labels), validation)
    splits = {"test": test}
    if validation:
        splits["validation"] = Batch(train.images[held_out], train.labels[held_out])
        train = Batch(train.images[kept], train.labels[kept])
    mean = train.images.mean((0, 1, 2), dtype=np.float64) / 255
    parts = np.array_split(train.images, math.ceil(train.images.nbytes / 2**24))
    squares = sum(np.square(x, dtype=np.float32).sum((0, 1, 2), dtype=np.float64) for x in parts)
    std = np.sqrt(squares / (train.images[..., 0].size * 255**2) - mean**2)
    std = np.maximum(std, 1 / 255)  # a channel may be constant
    return Dataset(train, splits, num_classes, mean.astype(np.float32), std.astype(np.float32))


def from_folder(path: str | pathlib.Path, size: int, validation: int = 0) -> Dataset:
    """Reads ``path/train/CLASS/*`` and ``path/test/CLASS/*``, any images that Pillow can read.

    Args:
      path: the folder; classes are the sorted names of the folders in ``train``.
      size: images are resized to ``(size, size, 3)``.
      validation: number of training images to hold out.

    Raises:
      ValueError: a folder is missing or empty, or holds a class that train has not.
    """
    path = pathlib.Path(path).expanduser()
    classes = sorted(p.name for p in path.glob("train/*") if p.is_dir())
    if not classes:
        raise ValueError(f"{path}/train holds no folders; make one for each class: train/cat/1.png")
    splits = []
    for split in ("train", "test"):
        files = sorted(p for p in path.glob(f"{split}/*/*") if p.is_file())
        if not files:
            raise ValueError(f"{path}/{split} holds no images; expected {split}/CLASS/IMAGE.")
        if unknown := sorted({p.parent.name for p in files} - set(classes)):
            raise ValueError(f"{path}/{split} holds classes that train has not: {unknown}.")
        images = [np.asarray(Image.open(p).convert("RGB").resize((size, size))) for p in files]
        labels = [classes.index(p.parent.name) for p in files]
        splits.append(Batch(np.stack(images), np.array(labels, np.int32)))
    return from_arrays(splits[0], splits[1], validation)


def size(split: Batch | Stream) -> int:
    """The number of images."""
    return len(split.indices if isinstance(split, Stream) else split.labels)


def image_shape(split: Batch | Stream) -> tuple[int, ...]:
    """``(height, width, channels)`` of what the model sees."""
    if isinstance(split, Stream):
        return (streams.SIZE, streams.SIZE, 3)
    return split.images.shape[1:]


def facts(dataset: Dataset) -> dict[str, Any]:
    """What tells one data set from another, as JSON."""
    return {
        "train_images": size(dataset.train),
        **{f"{name}_images": size(split) for name, split in dataset.held_out.items()},
        "image_shape": list(image_shape(dataset.train)),
        "num_classes": dataset.num_classes,
        "mean": [round(float(x), 6) for x in dataset.mean],
    }


def sample(split: Batch | Stream, num: int, seed: int) -> Batch:
    """Draws images of a split at random, all different, as arrays.

    Raises:
      ValueError: the split is a stream, or holds fewer images.
    """
    if isinstance(split, Stream) or num > size(split):
        raise ValueError(
            f"{num} images are to be drawn at once: from data in memory, with as many training "
            "images at least."
        )
    chosen = np.random.default_rng(seed).permutation(size(split))[:num]
    return Batch(np.asarray(split.images)[chosen], np.asarray(split.labels)[chosen])


def _hold_out(num: int, validation: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted indices of what stays and of what is held out; the same for every seed."""
    if not 0 <= validation < num:
        raise ValueError(
            f"--validation={validation}: hold out 0 or more, but fewer than the {num} "
            "training images."
        )
    order = np.random.default_rng(0).permutation(num)
    return np.sort(order[validation:]), np.sort(order[:validation])


def _digits(data_dir: str, validation: int) -> Dataset:
    """The 1,797 8x8 digits of scikit-learn; a fixed fifth of each class is held out for testing."""
    del data_dir
    from sklearn import datasets, model_selection

    images, labels = datasets.load_digits(return_X_y=True)
    images = np.round(images * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    parts = model_selection.train_test_split(
        images, labels, test_size=0.2, stratify=labels, random_state=0
    )
    return from_arrays(Batch(parts[0], parts[2]), Batch(parts[1], parts[3]), validation)


def _tfds_arrays(name: str) -> Callable[[str, int], Dataset]:
    def read(split: str, data_dir: str) -> Batch:
        records = _tfds(name, split, data_dir)
        images, labels = [], []
        for start in range(0, len(records), 2048):
            some = records.__getitems__(list(range(start, min(start + 2048, len(records)))))
            images.append(np.stack([r["image"] for r in some]))
            labels.append(np.array([r["label"] for r in some], np.int32))
        return Batch(np.concatenate(images), np.concatenate(labels))

    return lambda data_dir, validation: from_arrays(
        read("train", data_dir), read("test", data_dir), validation
    )


def _imagenet(data_dir: str, validation: int) -> Dataset:
    """Encoded images; the 50,000 that TFDS calls validation are the test."""
    train, test = (
        _tfds("imagenet2012", split, data_dir, encoded=True) for split in ("train", "validation")
    )
    kept, held_out = _hold_out(len(train), validation)
    splits = {"test": Stream(test, np.arange(len(test)))}
    if validation:
        splits["validation"] = Stream(train, held_out)
    return Dataset(
        Stream(train, kept),
        splits,
        num_classes=1000,
        mean=np.array([0.485, 0.456, 0.406], np.float32),
        std=np.array([0.229, 0.224, 0.225], np.float32),
    )


def _tfds(name: str, split: str, data_dir: str, encoded: bool = False) -> Any:
    """One split through ``tfds.data_source``, which needs no TensorFlow."""
    path = pathlib.Path(data_dir).expanduser()
    if not any(path.glob(f"{name}/*/dataset_info.json")):
        raise ValueError(
            f"{path} holds no {name}. Pass --data_dir=FOLDER, where TFDS has prepared it, or "
            "prepare it once: pip install 'granet_jax[prepare]', then python -c \"import "
            f"tensorflow_datasets as tfds; tfds.builder('{name}', data_dir='{data_dir}', "
            "file_format='array_record').download_and_prepare()\". "
            "To try without data: --dataset=digits."
        )
    import tensorflow_datasets as tfds

    decoders = {"image": tfds.decode.SkipDecoding()} if encoded else None
    try:
        return tfds.data_source(name, split=split, data_dir=path, download=False, decoders=decoders)
    except (AssertionError, NotImplementedError, OSError, ValueError) as error:
        raise ValueError(
            f"{path}/{name} cannot be read: {error} Prepare it with file_format='array_record'."
        ) from error


DATASETS: dict[str, Callable[[str, int], Dataset]] = {
    "digits": _digits,
    "mnist": _tfds_arrays("mnist"),
    "cifar10": _tfds_arrays("cifar10"),
    "cifar100": _tfds_arrays("cifar100"),
    "imagenet2012": _imagenet,
}
