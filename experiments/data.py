"""Data sets as arrays in memory: ``load(name, data_dir)``."""

import pathlib
from typing import NamedTuple

import numpy as np


class Split(NamedTuple):
    """Images and labels."""

    images: np.ndarray  # uint8 (n, height, width, channels)
    labels: np.ndarray  # int32 (n,)


class Dataset(NamedTuple):
    """A data set for classification."""

    train: Split
    test: Split
    num_classes: int
    mean: np.ndarray  # float32 (channels,), of train / 255
    std: np.ndarray  # float32 (channels,)


def load(name: str, data_dir: str | None = None) -> Dataset:
    """Reads a data set.

    Args:
      name: one of ``DATASETS``.
      data_dir: folder with TFDS data sets; needed by all but digits.

    Raises:
      ValueError: the data is not there; the message says how to get it.
    """
    train, test = DATASETS[name](data_dir)
    scaled = train.images.astype(np.float32) / 255
    return Dataset(
        train,
        test,
        num_classes=int(train.labels.max()) + 1,
        mean=scaled.mean(axis=(0, 1, 2)),
        std=scaled.std(axis=(0, 1, 2)),
    )


def _digits(data_dir: str | None) -> tuple[Split, Split]:
    """The 1,797 8x8 digits of scikit-learn; a fixed fifth of each class is held out for testing."""
    del data_dir
    from sklearn import datasets, model_selection

    images, labels = datasets.load_digits(return_X_y=True)
    images = np.round(images * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    parts = model_selection.train_test_split(
        images, labels.astype(np.int32), test_size=0.2, stratify=labels, random_state=0
    )
    return Split(parts[0], parts[2]), Split(parts[1], parts[3])


def _mnist(data_dir: str | None) -> tuple[Split, Split]:
    return _tfds("mnist", "train", data_dir), _tfds("mnist", "test", data_dir)


def _tfds(name: str, split: str, data_dir: str | None) -> Split:
    """One split through ``tfds.data_source``, which needs no TensorFlow."""
    if data_dir is None:
        raise ValueError(
            f"{name} is read from disk: pass --data_dir=FOLDER, a TFDS folder that holds {name} "
            "in array_record form. To try without data: --dataset=digits."
        )
    if not (pathlib.Path(data_dir).expanduser() / name).is_dir():
        raise ValueError(
            f"{data_dir} holds no {name}. Prepare it once where TensorFlow is installed: "
            f"tfds.builder('{name}', data_dir='{data_dir}', file_format='array_record')"
            ".download_and_prepare()."
        )
    import tensorflow_datasets as tfds

    source = tfds.data_source(name, split=split, data_dir=pathlib.Path(data_dir).expanduser())
    images, labels = [], []
    for start in range(0, len(source), 2048):
        records = source.__getitems__(list(range(start, min(start + 2048, len(source)))))
        images.append(np.stack([r["image"] for r in records]))
        labels.append(np.array([r["label"] for r in records], np.int32))
    return Split(np.concatenate(images), np.concatenate(labels))


DATASETS = {"digits": _digits, "mnist": _mnist}
