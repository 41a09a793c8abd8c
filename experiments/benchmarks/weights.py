"""Weights in the shapes of ResNet-50."""

import jax
import numpy as np


def resnet50_shapes() -> list[tuple[int, ...]]:
    """Kernels of ResNet-50, (height, width, in, out), and its classifier: 54, 25.5 M weights."""
    shapes: list[tuple[int, ...]] = [(7, 7, 3, 64)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(1, 1, channels, width), (3, 3, width, width), (1, 1, width, 4 * width)]
            shapes += [(1, 1, channels, 4 * width)] if block == 0 else []
            channels = 4 * width
    return [*shapes, (2048, 1000)]


def shapes(quick: bool) -> list[tuple[int, ...]]:
    """Those of ResNet-50, or a few small ones."""
    return [(3, 3, 4, 8), (40, 30), (30, 5)] if quick else resnet50_shapes()


def random_tree(shapes: list[tuple[int, ...]], seed: int) -> dict[str, jax.Array]:
    """Normal values."""
    key = jax.random.key(seed)
    return {
        f"{i:02}/kernel": jax.random.normal(jax.random.fold_in(key, i), shape)
        for i, shape in enumerate(shapes)
    }


def described(shapes: list[tuple[int, ...]]) -> str:
    """How many there are."""
    total = sum(int(np.prod(shape)) for shape in shapes)
    return f"{len(shapes)} shapes, {total:,} weights"
