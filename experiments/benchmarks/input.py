"""How many encoded photographs a second the input pipeline delivers, beside the decoder's limit.

Example:
  python -m experiments.benchmarks.input

Takes the two photographs that ship with scikit-learn, at ImageNet's usual 500 pixels.
"""

import io
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import app, flags
from PIL import Image
from rich.console import Console
from sklearn import datasets

from experiments import output, streams

flags.DEFINE_integer("images", 512, "how many are decoded in each measurement", lower_bound=64)
flags.DEFINE_integer("repeats", 3, "how often each is measured", lower_bound=1)


def photographs() -> list[dict[str, Any]]:
    """Records as TFDS gives them: JPEG of quality 95, 500 pixels wide, about 110 kB."""
    records = []
    for label, array in enumerate(datasets.load_sample_images().images):
        image, file = Image.fromarray(array), io.BytesIO()
        image.resize((500, 500 * image.height // image.width)).save(file, "JPEG", quality=95)
        records.append({"image": file.getvalue(), "label": label})
    return records


def images_per_second(records: list[dict[str, Any]], num: int, repeats: int) -> dict[str, float]:
    """Of one thread that only decodes, one thread that decodes and crops, and the pipeline."""
    batch_size = 32
    indices = np.arange(num) % len(records)
    stream = streams.Stream(records, indices)
    rng = np.random.default_rng(0)

    def decode() -> None:
        for index in indices:
            Image.open(io.BytesIO(records[index]["image"])).convert("RGB")

    def decode_and_crop() -> None:
        for index in indices:
            streams._train_image(records, index, rng)

    def pipeline() -> None:
        batches = streams.shuffled(stream, batch_size, seed=0)
        for _ in range(num // batch_size):
            next(batches)

    runs: dict[str, Callable[[], None]] = {
        "the decoder alone, whole images, one thread": decode,
        "decoded at the scale of the crop, cropped, one thread": decode_and_crop,
        "the pipeline, all threads": pipeline,
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return {name: num / float(np.median(values)) for name, values in seconds.items()}


def main(argv: list[str]) -> None:
    """Measures and prints a table."""
    if len(argv) > 1:
        sys.exit(f"error: {argv[1]!r} is no flag. See --help.")
    records = photographs()
    cores = len(os.sched_getaffinity(0))
    speeds = images_per_second(records, flags.FLAGS.images, flags.FLAGS.repeats)
    rows = [
        {
            "what": name,
            "images/s": f"{speed:,.0f}",
            "per core": f"{speed / (cores if 'all' in name else 1):,.0f}",
        }
        for name, speed in speeds.items()
    ]
    size = np.mean([len(record["image"]) for record in records]) / 1000
    output.print_table(Console(), f"JPEGs of {size:.0f} kB on {cores} cores", rows)


if __name__ == "__main__":
    app.run(main)
