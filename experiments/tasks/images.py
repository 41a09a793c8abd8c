"""Classification of images: ``make(settings, mesh, data_dir)``, or ``task`` of data of your own."""

import dataclasses
import functools
import inspect
from collections.abc import Iterator
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from experiments import models
from experiments.data import augment, images, streams
from experiments.data.images import Dataset
from experiments.data.streams import Batch, Stream
from experiments.engine.settings import ByChoice, EpochSettings, flag
from experiments.engine.task import ACCURACY, Memory, Streamed, Task, Unit
from experiments.models import layers

AT_INIT_IMAGES = 10  # for each class, shown to methods that prune before training

_CIFAR = {"model": "resnet20", "epochs": 160, "batch_size": 128, "update_every": 1000}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(EpochSettings):
    """Of a classifier of images; made by hand, ``dataset`` and ``model`` may be any names."""

    task: str = "images"
    dataset: str = flag(
        "what to train on; digits ships with scikit-learn, others are read from --data_dir",
        "digits",
        choices=list(images.DATASETS),
    )
    model: str = flag("the network", choices=list(models.MODELS), free=True)
    init: str = flag(
        "initial weights: the model's own, or uniform within 1 / sqrt(fan-in) as PyTorch's",
        "own",
        choices=["own", "uniform"],
    )
    normalise: bool = flag("inputs of mean 0 and deviation 1, instead of within [0, 1]", True)
    sparsity: float = flag("fraction of zeros among prunable weights at the end, in [0, 1)", 0.98)
    epochs: int = flag("passes over the training data", low=1)
    batch_size: int = flag("images in a step, over all devices", low=1)
    update_every: int = flag("steps between mask updates (Delta T)", low=1)
    label_smoothing: float = flag("share of the label spread over all classes", 0.0, low=0, high=1)
    augment: str = flag(
        "pad by 4 pixels (reflect or zero), crop at random and mirror; or none",
        "none",
        choices=list(augment.AUGMENTATIONS),
    )
    validation: int = flag(
        "training images held out; with them the best epoch is chosen on these", 0, low=0
    )
    precision: str = flag(
        "of the arithmetic in the model; parameters, moments and rankings are f32 in both",
        "f32",
        choices=["f32", "bf16"],
    )

    by_choice: ClassVar[ByChoice] = {
        "dataset": {
            "digits": {
                "model": "lenet_300_100",
                "epochs": 60,
                "batch_size": 32,
                "update_every": 40,
            },
            "mnist": {
                "model": "lenet_300_100",
                "epochs": 20,
                "batch_size": 100,
                "update_every": 200,
            },
            "cifar10": {**_CIFAR, "augment": "reflect"},
            "cifar100": {**_CIFAR, "augment": "zero"},
            "imagenet2012": {
                "model": "resnet50",
                "epochs": 100,
                "batch_size": 128,
                "update_every": 4000,
                "chunk_steps": 500,
            },
        }
    }

    @property
    def title(self) -> str:
        """What is trained."""
        return f"{self.dataset}, {self.model}"


def make(config: Settings, mesh: Mesh, data_dir: str | None = None) -> Task:
    """The task that the settings name.

    Args:
      config: the settings.
      mesh: not looked at.
      data_dir: folder with TFDS data sets in array_record form; digits needs none.

    Raises:
      ValueError: as :func:`experiments.data.images.load` and :func:`task`.
    """
    return task(config, images.load(config.dataset, data_dir, config.validation))


def task(config: Settings, dataset: Dataset, model: nn.Module | None = None) -> Task:
    """Classification of any images.

    Args:
      config: the settings.
      dataset: what to train and test on.
      model: a Flax module from float images ``(batch, height, width, channels)`` to logits; None =
        the one that ``config.model`` names, in ``config.precision``. One of your own is told
        ``train`` if it takes such an argument, may keep batch statistics and use dropout, and
        sets its own precision.

    Raises:
      ValueError: there is no such model, or it does not fit the images.
    """
    net = _Net(config, dataset, model or _named(config, dataset))
    return Task(
        init=net.init,
        loss=net.loss,
        evaluate=net.evaluate,
        train=_source(dataset.train),
        held_out={name: _source(split) for name, split in dataset.held_out.items()},
        metrics=(ACCURACY,),
        epochs=config.epochs,
        facts=images.facts(dataset),
        forward=net.apply,
        example=net.image,
        scored_loss=net.scored_loss,
        num_scored=AT_INIT_IMAGES * dataset.num_classes,
        augment=functools.partial(_augmented, augment.AUGMENTATIONS[config.augment]),
        unit=Unit("images"),
    )


def _named(config: Settings, dataset: Dataset) -> nn.Module:
    if config.model not in models.MODELS:
        raise ValueError(
            f"model {config.model!r} is none of {', '.join(models.MODELS)}; "
            "pass a module of your own as model=."
        )
    dtype = jnp.bfloat16 if config.precision == "bf16" else jnp.float32
    return models.MODELS[config.model](num_classes=dataset.num_classes, dtype=dtype)


@dataclasses.dataclass(frozen=True)
class _Net:
    """A Flax module on images of a data set."""

    config: Settings
    dataset: Dataset
    model: nn.Module

    @property
    def image(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, *images.image_shape(self.dataset.train)), jnp.float32)

    def init(self, key: jax.Array) -> tuple[Any, dict[str, Any]]:
        variables = dict(self.model.init(key, jnp.zeros(self.image.shape), **self._told(False)))
        params = variables.pop("params")
        if self.config.init == "uniform":
            params = layers.uniform_init(jax.random.fold_in(key, 0), params)
        return params, variables

    def apply(
        self, params: Any, variables: Any, x: jax.Array, train: bool = False, **rest: Any
    ) -> Any:
        return self.model.apply({"params": params, **variables}, x, **self._told(train), **rest)

    def logits(self, params: Any, variables: Any, batch: Batch, *args: Any, **rest: Any) -> Any:
        x = batch.images.astype(jnp.float32) / 255
        if self.config.normalise:
            mean, std = (a.reshape(1, 1, 1, -1) for a in (self.dataset.mean, self.dataset.std))
            x = (x - mean) / std
        return self.apply(params, variables, x, *args, **rest)

    def loss(self, params: Any, variables: Any, batch: Batch, key: jax.Array) -> Any:
        collected = [name for name in variables if name != "masks"]
        logits, variables = self.logits(
            params, variables, batch, True, rngs={"dropout": key}, mutable=collected
        )
        labels = jax.nn.one_hot(batch.labels, self.dataset.num_classes)
        labels = optax.smooth_labels(labels, self.config.label_smoothing)
        losses = optax.softmax_cross_entropy(logits.astype(jnp.float32), labels)
        return jnp.mean(losses), variables

    def scored_loss(self, params: Any, variables: Any, batch: Batch, temperature: float) -> Any:
        logits = self.logits(params, variables, batch) / temperature
        labels = jax.nn.one_hot(batch.labels, self.dataset.num_classes)
        return jnp.mean(optax.softmax_cross_entropy(logits, labels))

    def evaluate(self, params: Any, variables: Any, batch: Batch) -> dict[str, jax.Array]:
        best = jnp.argmax(self.logits(params, variables, batch), axis=-1)
        return {"accuracy": 100.0 * (best == batch.labels)}

    def _told(self, train: bool) -> dict[str, Any]:
        takes_train = "train" in inspect.signature(type(self.model).__call__).parameters
        return {"train": train} if takes_train else {}


def _augmented(how: Any, key: jax.Array, batch: Batch) -> Batch:
    return Batch(how(key, batch.images), batch.labels)


def _source(split: Batch | Stream) -> Memory | Streamed:
    if not isinstance(split, Stream):
        return Memory(split)
    return Streamed(
        images.size(split), functools.partial(streams.shuffled, split), _in_order(split)
    )


def _in_order(split: Stream) -> Any:
    def batches(batch_size: int) -> Iterator[tuple[Batch, np.ndarray]]:
        for batch in streams.in_order(split, batch_size):
            yield batch, batch.labels >= 0

    return batches
