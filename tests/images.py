"""For tests: random images as arrays and as encoded records; trainers on images."""

import io

import numpy as np
from PIL import Image

from experiments.data.streams import Batch
from experiments.engine import run, training
from experiments.tasks import images


def make_trainer(config, dataset, model=None, mesh=None):
    return training.make_trainer(config, images.task(config, dataset, model), mesh)


def train(folder, config, dataset, model=None, **kwargs):
    return run.run(make_trainer(config, dataset, model), folder, **kwargs)


def random_images(n, shape=(8, 8, 3), classes=3, seed=0):
    rng = np.random.default_rng(seed)
    return Batch(rng.integers(0, 256, (n, *shape), np.uint8), np.arange(n) % classes)


def jpeg_records(n, size=(60, 80)):
    rng = np.random.default_rng(0)
    records = []
    for i in range(n):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(file, "JPEG")
        records.append({"image": file.getvalue(), "label": i})
    return records
