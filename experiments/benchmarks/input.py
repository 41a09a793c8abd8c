"""How many encoded photographs a second the input pipeline delivers, beside the decoder's limit.

Takes the two photographs that ship with scikit-learn, at ImageNet's usual 500 pixels.
"""

import io
from typing import Any

import numpy as np
from PIL import Image
from sklearn import datasets

from experiments.benchmarks import timing
from experiments.benchmarks.tables import Table, cores
from experiments.data import streams

BATCH = 32


def photographs() -> list[dict[str, Any]]:
    """Records as TFDS gives them: JPEG of quality 95, 500 pixels wide."""
    records = []
    for label, array in enumerate(datasets.load_sample_images().images):
        image, file = Image.fromarray(array), io.BytesIO()
        image.resize((500, 500 * image.height // image.width)).save(file, "JPEG", quality=95)
        records.append({"image": file.getvalue(), "label": label})
    return records


def tables(quick: bool) -> list[Table]:
    """Rows on one thread that only decodes, one that decodes and crops, and the pipeline."""
    records = photographs()
    num = 2 * BATCH if quick else 512
    indices = np.arange(num) % len(records)
    rng = np.random.default_rng(0)

    def decode() -> None:
        for index in indices:
            Image.open(io.BytesIO(records[index]["image"])).convert("RGB")

    def decode_and_crop() -> None:
        for index in indices:
            streams._train_image(records, index, rng)

    def pipeline() -> None:
        batches = streams.shuffled(streams.Stream(records, indices), BATCH, seed=0)
        for _ in range(num // BATCH):
            next(batches)

    runs = {
        "the decoder alone, whole images, one thread": (decode, 1),
        "decoded at the scale of the crop, cropped, one thread": (decode_and_crop, 1),
        "the pipeline, all threads": (pipeline, cores()),
    }
    times = timing.in_turns({name: run for name, (run, _) in runs.items()}, 1 if quick else 3)
    rows = [
        {
            "what": name,
            "images/s": f"{num / m.median:,.0f}",
            "quartiles": timing.quartiles([num / t for t in m.seconds], "{:,.0f}".format),
            "per core": f"{num / m.median / runs[name][1]:,.0f}",
        }
        for name, m in times.items()
    ]
    size = np.mean([len(record["image"]) for record in records]) / 1000
    return [Table("Input pipeline", rows, f"JPEGs of {size:.0f} kB on {cores()} cores.")]
