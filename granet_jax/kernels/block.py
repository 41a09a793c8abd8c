"""A block-sparse matrix product for training and inference on accelerators.

Multiplying by a masked kernel in XLA saves no time. This product reads and multiplies only the
blocks of a kernel that are on, in the forward pass and in both gradients. So with
:func:`granet_jax.structures.block` training steps become cheaper, too. The list of live blocks is
data: when masks change, nothing is compiled again.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from granet_jax.kernels.backend import Backend
from granet_jax.kernels.gpu import ampere, hopper
from granet_jax.kernels.lists import lists
from granet_jax.kernels.tpu import tpu


def block_matmul(
    x: jax.Array,
    kernel: jax.Array,
    mask: jax.Array,
    block: Sequence[int],
    *,
    dense_gradient: bool | jax.Array = False,
    backend: Backend | None = None,
    interpret: bool = False,
) -> jax.Array:
    """``x @ where(mask, kernel, 0)`` for a mask made of blocks, without the empty ones.

    Args:
      x: ``(..., inputs)``, any float dtype.
      kernel: ``(inputs, outputs)``, of that dtype.
      mask: bool, shape of ``kernel``, constant within each block, as
        ``granet_jax.structures.block(block)`` makes it; a block counts as on if its first weight
        is on. Not differentiated.
      block: its shape ``(rows, columns)``. On a GPU powers of two, best 64 or 128 (from 16 on for
        Hopper, from 32 on for others); on a TPU multiples of 128. Blocks at the edges may be
        smaller.
      dense_gradient: also compute the gradient of weights that are off, which growth by gradients
        needs; a bool, or a traced one such as ``method.is_update_step(step)``. False = that
        gradient is 0.
      backend: ``kernels.hopper`` (``wgmma``), ``kernels.ampere`` (``mma``, on later GPUs too) or
        ``kernels.tpu``. None = that of the device. On CPUs, older GPUs and any GPU under JAX before
        0.11.2, and for other dtypes (float64; float32 on ``ampere``), XLA multiplies by the masked
        kernel, which saves nothing.
      interpret: run the kernel of ``backend`` (None = ``tpu``, with blocks of any shape) in JAX's
        interpreter: for tests on CPU. ``mma`` cannot be interpreted.

    Sums are kept in float32. Hopper multiplies float32 with 10 bits of mantissa (TF32), as XLA does
    by default. On several devices call it inside ``jax.shard_map``. It can be differentiated once,
    in reverse mode.

    Returns:
      ``(..., outputs)`` in the dtype of ``x``.

    Raises:
      ValueError: shapes or dtypes that do not fit together, or blocks that the device does not
        support.
      RuntimeError: a GPU backend was given, and JAX is older than 0.11.2.

    Source: Gray et al. 2017, "GPU Kernels for Block-Sparse Weights".

    Example: two of four blocks are on.
      >>> import jax.numpy as jnp
      >>> mask = jnp.kron(jnp.eye(2), jnp.ones((4, 4))).astype(bool)
      >>> y = block_matmul(jnp.ones((1, 8)), jnp.ones((8, 8)), mask, (4, 4), interpret=True)
      >>> y.tolist()
      [[4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0]]
    """
    if kernel.ndim != 2 or mask.shape != kernel.shape or x.shape[-1:] != kernel.shape[:1]:
        raise ValueError(
            "block_matmul takes x (..., inputs), a kernel (inputs, outputs) and its mask; got "
            f"{x.shape}, {kernel.shape} and {mask.shape}."
        )
    if x.dtype != kernel.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"block_matmul takes x and a kernel of one float dtype; got {x.dtype}, {kernel.dtype}."
        )
    block = check_block(block)
    if backend is None:
        backend = tpu if interpret else of_the_device()
    wanted = jnp.asarray(dense_gradient)
    rows = x.reshape(-1, x.shape[-1])
    if backend is None or x.dtype not in backend.dtypes or not x.size or not kernel.size:
        y = _masked(rows, kernel, mask, mask | wanted)
        return y.reshape(*x.shape[:-1], kernel.shape[1])
    if not backend.takes(block, interpret):
        raise ValueError(f"The sides of blocks on this device are {backend.sides}; got {block}.")
    live = mask[:: block[0], :: block[1]]
    rows = padded(rows, (backend.rows, block[0]))
    product = _product(backend, block, interpret)
    y = product(rows, padded(kernel, block), live, live | wanted)
    y = y[: math.prod(x.shape[:-1]), : kernel.shape[1]]
    return y.reshape(*x.shape[:-1], kernel.shape[1])


def check_block(block: Sequence[int]) -> tuple[int, int]:
    """The sides of a block, rows and columns, checked.

    Raises:
      ValueError: there are not two, or one is not an int >= 1.
    """
    sides = tuple(block)
    if len(sides) != 2 or any(side != int(side) or side < 1 for side in sides):
        raise ValueError(f"A block has two sides, whole numbers from 1 on; got {block}.")
    return int(sides[0]), int(sides[1])


def of_the_device() -> Backend | None:
    """The kernels of the default device.

    Returns:
      A :class:`Backend`; None for CPUs, NVIDIA GPUs before compute capability 8.0, AMD GPUs, and
      any GPU under JAX before 0.11.2.

    Example:
      >>> import jax
      >>> of_the_device() is None or jax.default_backend() in ("gpu", "tpu")
      True
    """
    platform = jax.default_backend()
    if platform == "tpu":
        return tpu
    capability = getattr(jax.devices()[0], "compute_capability", "") if platform == "gpu" else ""
    major = capability.partition(".")[0]
    if not major.isdigit() or int(major) < 8 or jax.__version_info__ < (0, 11, 2):
        return None
    return hopper if major == "9" else ampere


@functools.cache
def _product(
    backend: Backend, block: tuple[int, int], interpret: bool
) -> Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]:
    """The product of ``x``, a kernel and its live blocks, with gradients of its own.

    The fourth argument says for which blocks the gradient is computed.
    """

    @jax.custom_vjp
    def product(x: jax.Array, kernel: jax.Array, live: jax.Array, wanted: jax.Array) -> jax.Array:
        return backend.times(x, kernel, lists(live), block, False, interpret)

    def forward(
        x: jax.Array, kernel: jax.Array, live: jax.Array, wanted: jax.Array
    ) -> tuple[jax.Array, Any]:
        return product(x, kernel, live, wanted), (x, kernel, live, wanted)

    def backward(saved: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array, Any, Any]:
        x, kernel, live, wanted = saved
        dx = backend.times(dy, kernel, lists(live.T), block, True, interpret)
        d_kernel = backend.outer(x, dy, lists(wanted), block, 0, interpret)
        no_gradient = np.zeros(live.shape, jax.dtypes.float0)
        return dx, jnp.where(_spread(wanted, block), d_kernel, 0), no_gradient, no_gradient

    product.defvjp(forward, backward)
    return product


@jax.custom_vjp
def _masked(x: jax.Array, kernel: jax.Array, mask: jax.Array, wanted: jax.Array) -> jax.Array:
    """As :func:`_product`, by dense products with the masked kernel."""
    return x @ jnp.where(mask, kernel, 0)


def _masked_forward(*args: jax.Array) -> tuple[jax.Array, Any]:
    return _masked(*args), args


def _masked_backward(saved: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array, Any, Any]:
    x, kernel, mask, wanted = saved
    no_gradient = np.zeros(mask.shape, jax.dtypes.float0)
    dx = dy @ jnp.where(mask, kernel, 0).T
    return dx, jnp.where(wanted, x.T @ dy, 0), no_gradient, no_gradient


_masked.defvjp(_masked_forward, _masked_backward)


def _spread(live: jax.Array, block: tuple[int, int]) -> jax.Array:
    """A mask of weights, from a mask of blocks."""
    return jnp.repeat(jnp.repeat(live, block[0], axis=0), block[1], axis=1)


def padded(x: jax.Array, multiples: tuple[int, int]) -> jax.Array:
    """A matrix padded with zeros at the ends, to multiples of two lengths."""
    return jnp.pad(x, [(0, -n % multiple) for n, multiple in zip(x.shape, multiples, strict=True)])
