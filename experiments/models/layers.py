"""What the convolutional networks share: convolutions without bias, and batch norm."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
from flax import traverse_util

import granet_jax as gj

HE = nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # He et al. 2015


def convolve(*args: Any, **kwargs: Any) -> jax.Array:
    """A convolution, on a single CPU with gradients of its kernel as fast as the rest."""
    one = jax.device_count() == 1  # XLA divides no kernel of ours
    function = gj.compact.conv_general_dilated if one else jax.lax.conv_general_dilated
    return function(*args, **kwargs)


conv = functools.partial(  # of 3x3
    nn.Conv, use_bias=False, padding=1, kernel_init=HE, conv_general_dilated=convolve
)
conv1x1 = functools.partial(conv, kernel_size=(1, 1), padding=0)


def norm(train: bool, dtype: Any, **kwargs: Any) -> nn.BatchNorm:
    """Batch norm that keeps a tenth of each batch's statistics, as PyTorch's does by default."""
    return nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, dtype=dtype, **kwargs)


def uniform_init(key: jax.Array, params: Any) -> Any:
    """Draws kernels and biases anew, uniform within 1 / sqrt(fan-in), as PyTorch's layers start."""
    flat = traverse_util.flatten_dict(params)
    for i, (path, leaf) in enumerate(flat.items()):
        kernel = flat.get((*path[:-1], "kernel"))
        if path[-1] in ("kernel", "bias") and kernel is not None:
            bound = 1 / math.sqrt(math.prod(kernel.shape[:-1]))
            draw_key = jax.random.fold_in(key, i)
            flat[path] = jax.random.uniform(draw_key, leaf.shape, leaf.dtype, -bound, bound)
    return traverse_util.unflatten_dict(flat)
