"""Networks of the papers, in Flax: ``MODELS[name](num_classes=10, dtype=jnp.float32)``.

Inputs are float images ``(batch, height, width, channels)``, outputs logits ``(batch, classes)``.
``dtype`` is that of the arithmetic; parameters and logits are float32. ``train=True`` makes batch
norm use and collect the statistics of the batch.
"""

import functools
from collections.abc import Callable

import flax.linen as nn

from experiments.models.lenet import LeNet5, LeNet300100, Perceptron
from experiments.models.lstm import lstm_a, lstm_b
from experiments.models.resnet import resnet20, resnet50, resnet50_cifar, wrn_22_2
from experiments.models.vgg import vgg16, vgg19
from experiments.models.vit import ViT

MODELS: dict[str, Callable[..., nn.Module]] = {
    "lenet_300_100": LeNet300100,
    "lenet5": LeNet5,
    "mlp_3072": functools.partial(Perceptron, width=3072),
    "lstm_a": lstm_a,
    "lstm_b": lstm_b,
    "vgg16": vgg16,
    "vgg19": vgg19,
    "resnet20": resnet20,
    "resnet50_cifar": resnet50_cifar,
    "resnet50": resnet50,
    "wrn_22_2": wrn_22_2,
    "vit_small": ViT,
}
