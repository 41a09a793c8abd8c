"""What the convolutional networks share: convolutions without bias, and batch norm."""

import functools
from typing import Any

import flax.linen as nn

HE = nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # He et al. 2015

conv = functools.partial(nn.Conv, use_bias=False, padding=1, kernel_init=HE)  # of 3x3
conv1x1 = functools.partial(conv, kernel_size=(1, 1), padding=0)


def norm(train: bool, dtype: Any, **kwargs: Any) -> nn.BatchNorm:
    """Batch norm that keeps a tenth of each batch's statistics, as PyTorch's does by default."""
    return nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, dtype=dtype, **kwargs)
