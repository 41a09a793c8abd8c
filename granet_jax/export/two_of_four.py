"""2:4 kernels in the layout of NVIDIA's sparse tensor cores."""

from typing import NamedTuple

import numpy as np


class TwoOfFour(NamedTuple):
    """A kernel that keeps two of each four inputs; made by :func:`to_two_of_four`."""

    values: np.ndarray  # (outputs, inputs / 2), the kept weights in order
    # uint16 (outputs, inputs / 16): four bits for each four inputs, the lowest bits first. The
    # lower two bits are the place of the first kept weight, the upper two that of the second.
    metadata: np.ndarray


def to_two_of_four(kernel: np.ndarray, mask: np.ndarray) -> TwoOfFour:
    """Packs a kernel trained under ``granet_jax.structures.n_of_m(4)`` at half its weights.

    The layout is that of operand A of PTX ``mma.sp``, and of row-major CUTLASS tensors before
    ``cutlass::reorder_meta``, which reorders the metadata for a tile shape.

    Args:
      kernel: ``(inputs, outputs)`` of any dtype; the number of inputs is a multiple of 16.
      mask: bool, at most two True in each four inputs; if there are fewer, zeros fill up.

    Returns:
      The packed kernel, numpy arrays.

    Raises:
      ValueError: other shapes, or more than two of four inputs kept.

    Source: NVIDIA, PTX ISA, "Sparse matrix storage".

    Example:
      >>> mask = np.array([True, False, False, True] * 4)[:, None]
      >>> packed = to_two_of_four(np.arange(16.0)[:, None], mask)
      >>> packed.values.tolist()
      [[0.0, 3.0, 4.0, 7.0, 8.0, 11.0, 12.0, 15.0]]
      >>> hex(packed.metadata[0, 0])
      '0xcccc'
    """
    kernel, mask = np.asarray(kernel), np.asarray(mask)
    if kernel.ndim != 2 or mask.shape != kernel.shape or len(kernel) % 16:
        raise ValueError(
            "A kernel (inputs, outputs) with a multiple of 16 inputs, and its mask, can be packed; "
            f"got {kernel.shape} and {mask.shape}."
        )
    groups = mask.T.reshape(kernel.shape[1], -1, 4)
    if (most := int(groups.sum(-1).max(initial=0))) > 2:
        raise ValueError(
            f"Of some four inputs {most} are kept; 2:4 allows two. Train with "
            "granet_jax.structures.n_of_m(4) at sparsity 0.5, scope=granet_jax.uniform."
        )
    # Kept inputs first, in order; the first two are taken, sorted by place.
    places = np.sort(np.argsort(~groups, axis=-1, kind="stable")[..., :2], axis=-1)
    weights = np.where(mask, kernel, 0).T.reshape(groups.shape)
    values = np.take_along_axis(weights, places, axis=-1)
    bits = (places[..., 0] | places[..., 1] << 2).reshape(kernel.shape[1], -1, 4)
    metadata = (bits << np.array([0, 4, 8, 12])).sum(-1).astype(np.uint16)
    return TwoOfFour(values.reshape(kernel.shape[1], -1), metadata)


def from_two_of_four(packed: TwoOfFour) -> np.ndarray:
    """Undoes :func:`to_two_of_four`.

    Args:
      packed: the packed kernel.

    Returns:
      The kernel ``(inputs, outputs)``, 0 where masked.

    Example:
      >>> mask = np.array([True, False, False, True] * 4)[:, None]
      >>> packed = to_two_of_four(np.ones((16, 1)), mask)
      >>> from_two_of_four(packed)[:4].ravel().tolist()
      [1.0, 0.0, 0.0, 1.0]
    """
    num_outputs, half = packed.values.shape
    bits = packed.metadata[..., None] >> np.array([0, 4, 8, 12], np.uint16)
    places = np.stack([bits & 3, bits >> 2 & 3], -1).reshape(num_outputs, -1, 2)
    kernel = np.zeros((num_outputs, half // 2, 4), packed.values.dtype)
    values = packed.values.reshape(num_outputs, -1, 2)
    np.put_along_axis(kernel, places.astype(np.int64), values, axis=-1)
    return kernel.reshape(num_outputs, -1).T
