"""Images too many for memory: decoded and cropped by Grain's threads while the device computes."""

import functools
import io
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from PIL import Image

SIZE = 224  # sides of the images that come out


class Batch(NamedTuple):
    """Images and labels."""

    images: Any  # uint8 (n, height, width, channels)
    labels: Any  # int32 (n,)


class Stream(NamedTuple):
    """Records with an encoded image and a label, some of which belong to the split."""

    records: Sequence[dict[str, Any]]  # random access: {"image": bytes, "label": int}
    indices: np.ndarray  # int (n,), into records


def shuffled(stream: Stream, batch_size: int, seed: int) -> grain.DatasetIterator:
    """Batches for training without end, newly shuffled and cropped in each pass.

    The images of a pass are dealt out to all processes, each of which decodes its own. The iterator
    has ``get_state`` and ``set_state``; a batch depends on its place in the order alone.

    Args:
      stream: the split.
      batch_size: images in a step, over all processes; an incomplete last batch is left out.
      seed: of order and crops.
    """
    share = batch_size // jax.process_count()
    whole = len(stream.indices) // batch_size * batch_size
    return iter(
        grain.MapDataset.source(stream.indices)
        .seed(seed)
        .shuffle()
        .random_map(functools.partial(_train_image, stream.records))[
            jax.process_index() : whole : jax.process_count()
        ]
        .batch(share, drop_remainder=True)
        .repeat()
        .to_iter_dataset(_READ_OPTIONS)
    )


def in_order(stream: Stream, batch_size: int) -> Iterator[Batch]:
    """Goes once through a split for testing, the last batch padded by labels of -1."""
    share = batch_size // jax.process_count()
    padding = -len(stream.indices) % batch_size
    indices = np.concatenate([stream.indices, np.full(padding, -1)])
    yield from (
        grain.MapDataset.source(indices)[jax.process_index() :: jax.process_count()]
        .map(functools.partial(_test_image, stream.records))
        .batch(share)
        .to_iter_dataset(_READ_OPTIONS)
    )


Box = tuple[float, float, float, float]

_READ_OPTIONS = grain.ReadOptions(num_threads=16, prefetch_buffer_size=4)  # batches


def _train_image(
    records: Sequence[dict[str, Any]], index: np.int64, rng: np.random.Generator
) -> Batch:
    """A random 8 % to 100 % of the image, resized, half of them mirrored (Szegedy et al. 2015)."""
    image, label = _open(records, index)
    box: Box = _random_box(image.size, rng)
    # JPEG decodes to a half, a quarter or an eighth at once where the crop stays large enough.
    scale = _draft(image, min(box[2] - box[0], box[3] - box[1]))
    left, top, right, bottom = (scale * side for side in box)
    box = (left, top, min(right, image.size[0]), min(bottom, image.size[1]))
    image = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box)
    pixels = np.asarray(image)
    return Batch(pixels[:, ::-1] if rng.random() < 0.5 else pixels, np.int32(label))


def _test_image(records: Sequence[dict[str, Any]], index: np.int64) -> Batch:
    """The middle of the image after resizing its shorter side to 256."""
    if index < 0:
        return Batch(np.zeros((SIZE, SIZE, 3), np.uint8), np.int32(-1))
    image, label = _open(records, index)
    side = min(image.size) * SIZE / 256
    left, top = ((length - side) / 2 for length in image.size)
    box = (left, top, left + side, top + side)
    image = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box)
    return Batch(np.asarray(image), np.int32(label))


def _open(records: Sequence[dict[str, Any]], index: np.int64) -> tuple[Image.Image, int]:
    record = records[int(index)]
    return Image.open(io.BytesIO(record["image"])), record["label"]


def _draft(image: Image.Image, shorter_side: float) -> float:
    """Asks the decoder for a smaller image; returns by how much it has shrunk."""
    before = image.size
    factor = SIZE / shorter_side
    image.draft("RGB", (max(1, int(before[0] * factor)), max(1, int(before[1] * factor))))
    return image.size[0] / before[0]


def _random_box(size: tuple[int, int], rng: np.random.Generator) -> Box:
    """``(left, top, right, bottom)`` of random area and aspect; the whole image if ten fail."""
    width, height = size
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1.0)
        aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
            return left, top, left + w, top + h
    return 0, 0, width, height
