"""A block-sparse matrix product as a Pallas kernel, for training and inference on accelerators.

Masks on CPU and in XLA's own products save no time. This product reads and multiplies only the
blocks of a kernel that are on, in the forward pass and in both gradients, so that with
:func:`granet_jax.structures.block` training steps get cheaper, too. Which blocks are on is data:
when the masks change, nothing is compiled again.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl


def block_matmul(
    x: jax.Array,
    kernel: jax.Array,
    mask: jax.Array,
    block: tuple[int, int],
    *,
    dense_gradient: bool | jax.Array = False,
    interpret: bool = False,
) -> jax.Array:
    """``x @ where(mask, kernel, 0)`` for a mask made of blocks, without the empty ones.

    Args:
      x: ``(..., inputs)``, any float dtype.
      kernel: ``(inputs, outputs)``, of that dtype.
      mask: bool, shape of ``kernel``, constant within each block, as
        ``granet_jax.structures.block(block)`` makes it; a block counts as on where its first weight
        is. Not differentiated.
      block: its shape ``(rows, columns)``. A GPU takes powers of two from 16 on, best 32 to 128;
        blocks at the edges may be smaller.
      dense_gradient: also compute the gradient of weights that are off, which growth by gradients
        needs: ``method.is_update_step(step)``, a traced bool, is true where it does. False = 0.
      interpret: run the kernel as ordinary operations, one program after the other: for tests on
        CPU. False = on a GPU, by Triton, of which JAX warns from 0.11 on; not on TPUs.

    Returns:
      ``(..., outputs)`` in the dtype of ``x``; sums are kept in float32.

    Raises:
      ValueError: shapes that do not fit together.

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
    if min(block) < 1:
        raise ValueError(f"A block has at least one row and one column; got {block}.")
    live = mask[:: block[0], :: block[1]]
    rows = x.reshape(-1, x.shape[-1])
    product = _product(tuple(block), interpret)
    y = product(rows, kernel, live, live | jnp.asarray(dense_gradient))
    return y.reshape(*x.shape[:-1], kernel.shape[1])


def dense_in_blocks(
    block: tuple[int, int],
    *,
    dense_gradient: bool | jax.Array = False,
    interpret: bool = False,
) -> contextlib.AbstractContextManager[None]:
    """A context in which Flax's ``nn.Dense`` multiplies by :func:`block_matmul`.

    Layers take part whose kernel has a mask in the collection "masks" of the variables, which
    ``nn.scan`` and ``nn.vmap`` have to hand out as they do "params". Others are left alone and
    multiply by the whole kernel, which is right as long as that is masked, as training keeps it:
    other layers (subclasses, ``DenseGeneral``, attention), those with a ``dot_general`` of their
    own, and all while parameters are made. The context has to be active when ``jit`` traces. Needs
    the package flax.

    Args:
      block: as for :func:`block_matmul`, for all layers.
      dense_gradient: as there.
      interpret: as there.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> model, x = nn.Dense(8), jnp.ones((1, 8))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> masks = {"kernel": jnp.zeros((8, 8), bool), "bias": jnp.ones(8, bool)}
      >>> with dense_in_blocks((4, 4), interpret=True):
      ...     model.apply({"params": params, "masks": masks}, x).tolist()
      [[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]]
    """
    import flax.linen as nn

    def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        layer = context.module
        if type(layer) is not nn.Dense or context.method_name != "__call__":
            return call(*args, **kwargs)
        has_both = all(layer.has_variable(kind, "kernel") for kind in ("params", "masks"))
        if not has_both or layer.dot_general is not None or layer.dot_general_cls is not None:
            return call(*args, **kwargs)
        names = ("kernel", "bias") if layer.use_bias else ("kernel",)
        weights = [nn.meta.unbox(layer.get_variable("params", name)) for name in names]
        operands: Any = (*args, *kwargs.values(), *weights)
        x, kernel, *bias = cast(Any, layer.promote_dtype(*operands, dtype=layer.dtype))
        mask = nn.meta.unbox(layer.get_variable("masks", "kernel"))
        y = block_matmul(x, kernel, mask, block, dense_gradient=dense_gradient, interpret=interpret)
        return y + bias[0].reshape((1,) * (y.ndim - 1) + (-1,)) if bias else y

    context: contextlib.AbstractContextManager[None] = nn.intercept_methods(intercept)
    return context


_ROWS = 64  # of x that one program multiplies


@functools.cache
def _product(
    block: tuple[int, int], interpret: bool
) -> Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]:
    """The product of ``x``, a kernel and its live blocks, with gradients of its own.

    The fourth argument says of which blocks the gradient is wanted.
    """

    @jax.custom_vjp
    def product(x: jax.Array, kernel: jax.Array, live: jax.Array, wanted: jax.Array) -> jax.Array:
        return _times(x, kernel, live, block, interpret)

    def forward(
        x: jax.Array, kernel: jax.Array, live: jax.Array, wanted: jax.Array
    ) -> tuple[jax.Array, Any]:
        return _times(x, kernel, live, block, interpret), (x, kernel, live, wanted)

    def backward(saved: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array, Any, Any]:
        x, kernel, live, wanted = saved
        dx = _times(dy, kernel.T, live.T, block[::-1], interpret)
        d_kernel = _outer(x, dy, wanted, block, interpret)
        no_gradient = np.zeros(live.shape, jax.dtypes.float0)
        return dx, d_kernel, no_gradient, no_gradient

    product.defvjp(forward, backward)
    return product


def _times(
    x: jax.Array, kernel: jax.Array, live: jax.Array, block: tuple[int, int], interpret: bool
) -> jax.Array:
    """Each program makes a tile of the output; its loop visits the live blocks of one column."""
    num_rows, num_outputs = len(x), kernel.shape[1]
    if not x.size or not kernel.size:
        return jnp.zeros((num_rows, num_outputs), x.dtype)
    rows, columns = block
    x, kernel = _padded(x, (_ROWS, rows)), _padded(kernel, block)
    # The numbers of the live blocks of each column, in order; then the others, never visited.
    order = jnp.argsort(~live, axis=0, stable=True).astype(jnp.int32).T
    num_live = jnp.sum(live, axis=0, dtype=jnp.int32)

    def program(order: Any, num_live: Any, x: Any, kernel: Any, out: Any) -> None:
        def add(i: jax.Array, total: jax.Array) -> jax.Array:
            place = pl.ds(order[0, i] * rows, rows)
            return total + jnp.dot(
                x[:, place], kernel[place, :], preferred_element_type=jnp.float32
            )

        zeros = jnp.zeros((_ROWS, columns), jnp.float32)
        out[...] = jax.lax.fori_loop(0, num_live[0], add, zeros).astype(out.dtype)

    tiles = len(x) // _ROWS, kernel.shape[1] // columns
    out = pl.pallas_call(
        program,
        grid=tiles,
        in_specs=[
            pl.BlockSpec((1, order.shape[1]), lambda i, j: (j, 0)),
            pl.BlockSpec((1,), lambda i, j: (j,)),
            pl.BlockSpec((_ROWS, x.shape[1]), lambda i, j: (i, 0)),
            pl.BlockSpec((kernel.shape[0], columns), lambda i, j: (0, j)),
        ],
        out_specs=pl.BlockSpec((_ROWS, columns), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((len(x), kernel.shape[1]), x.dtype),
        compiler_params=None if interpret else _for_gpus(),
        interpret=interpret,
    )(order, num_live, x, kernel)
    return out[:num_rows, :num_outputs]


def _outer(
    x: jax.Array, dy: jax.Array, live: jax.Array, block: tuple[int, int], interpret: bool
) -> jax.Array:
    """``x.T @ dy`` in the live blocks, 0 in the others; a program makes one block."""
    shape = x.shape[1], dy.shape[1]
    if not x.size or not dy.size:
        return jnp.zeros(shape, x.dtype)
    rows, columns = block
    x, dy = _padded(x, (_ROWS, rows)), _padded(dy, (_ROWS, columns))

    def program(live: Any, x: Any, dy: Any, out: Any) -> None:
        def add(i: jax.Array, total: jax.Array) -> jax.Array:
            place = pl.ds(i * _ROWS, _ROWS)
            a, b = x[place, :].T, dy[place, :]
            return total + jnp.dot(a, b, preferred_element_type=jnp.float32)

        trips = jnp.where(live[0, 0], len(x) // _ROWS, 0)
        zeros = jnp.zeros((rows, columns), jnp.float32)
        out[...] = jax.lax.fori_loop(0, trips, add, zeros).astype(out.dtype)

    out = pl.pallas_call(
        program,
        grid=live.shape,
        in_specs=[
            pl.BlockSpec((1, 1), lambda k, j: (k, j)),
            pl.BlockSpec((len(x), rows), lambda k, j: (0, k)),
            pl.BlockSpec((len(dy), columns), lambda k, j: (0, j)),
        ],
        out_specs=pl.BlockSpec(block, lambda k, j: (k, j)),
        out_shape=jax.ShapeDtypeStruct((x.shape[1], dy.shape[1]), x.dtype),
        compiler_params=None if interpret else _for_gpus(),
        interpret=interpret,
    )(live, x, dy)
    return out[: shape[0], : shape[1]]


def _for_gpus() -> Any:
    """Says that Triton compiles it; imported here, for not every platform has it."""
    from jax.experimental.pallas import triton

    return triton.CompilerParams()


def _padded(x: jax.Array, multiples: tuple[int, int]) -> jax.Array:
    """With zeros at the ends, to a multiple of each length."""
    return jnp.pad(x, [(0, -n % multiple) for n, multiple in zip(x.shape, multiples, strict=True)])
