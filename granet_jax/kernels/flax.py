"""The block-sparse product in layers of Flax."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

import jax

from granet_jax import trees
from granet_jax.kernels.block import block_matmul
from granet_jax.types import PyTree


def dense_in_blocks(
    block: tuple[int, int],
    *,
    dense_gradient: bool | jax.Array = False,
    interpret: bool = False,
) -> contextlib.AbstractContextManager[None]:
    """A context in which Flax's ``nn.Dense`` multiplies by :func:`block_matmul`.

    It applies to ``nn.Dense`` layers whose kernel has a mask in the collection "masks" of the
    variables. ``nn.scan`` and ``nn.vmap`` have to treat this collection as they treat "params".
    Other layers do not change: subclasses, ``DenseGeneral``, attention, and layers with their own
    ``dot_general`` or ``precision``. They multiply by the whole kernel, which gives the same result
    as long as the kernel itself is masked, as it is in training. While parameters are initialised,
    nothing changes. The context has to be active when ``jit`` traces. Needs the package flax.

    Args:
      block: as for :func:`block_matmul`, for all layers.
      dense_gradient: as for :func:`block_matmul`.
      interpret: as for :func:`block_matmul`.

    Returns:
      A context manager.

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
        own = layer.dot_general, layer.dot_general_cls, layer.precision
        if not has_both or any(x is not None for x in own):
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


@contextlib.contextmanager
def linear_in_blocks(
    model: Any,
    masks: PyTree,
    block: tuple[int, int],
    *,
    dense_gradient: bool | jax.Array = False,
    interpret: bool = False,
) -> Iterator[None]:
    """A context in which the ``nnx.Linear`` layers of a model multiply by :func:`block_matmul`.

    It applies to layers whose kernel has a mask. Other layers do not change, as in
    :func:`dense_in_blocks`: subclasses, ``LinearGeneral``, attention, stacks of layers, and layers
    with their own ``dot_general``, ``precision`` or ``preferred_element_type``. Enter
    it inside the function that ``nnx.jit`` compiles, with model and masks as arguments; outside of
    it, each entry compiles the function again. Needs the package flax.

    Args:
      model: any ``nnx.Module``.
      masks: bool tree with the paths of ``nnx.state(model, nnx.Param)``, as ``gj.get_masks`` gives
        it. Layers without blocks may be left out. In the mask of a dense layer every block is on.
      block: as for :func:`block_matmul`, for all layers.
      dense_gradient: as for :func:`block_matmul`.
      interpret: as for :func:`block_matmul`.

    Returns:
      A context manager.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> model = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
      >>> masks = jax.tree.map(lambda p: jnp.zeros(p.shape, bool), nnx.state(model, nnx.Param))
      >>> with linear_in_blocks(model, masks, (4, 4), interpret=True):
      ...     model(jnp.ones((1, 8))).tolist()
      [[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]]
    """
    from flax import nnx

    by_path = dict(zip(trees.paths(masks), jax.tree.leaves(masks), strict=True))
    layers = []
    for path, layer in nnx.iter_modules(model):
        mask = by_path.get("/".join(map(str, (*path, "kernel"))))
        if type(layer) is nnx.Linear and mask is not None and mask.ndim == 2 and _is_plain(layer):
            layers.append((layer, mask))

    def multiply(mask: Any, x: jax.Array, kernel: jax.Array, *_: Any, **__: Any) -> jax.Array:
        return block_matmul(
            x, kernel, mask, block, dense_gradient=dense_gradient, interpret=interpret
        )

    for layer, mask in layers:
        layer.dot_general = functools.partial(multiply, mask)
    try:
        yield
    finally:
        for layer, _ in layers:
            layer.dot_general = jax.lax.dot_general


def _is_plain(layer: Any) -> bool:
    """Whether a layer's product has no options besides its operands."""
    told = layer.precision, getattr(layer, "preferred_element_type", None)
    return layer.dot_general is jax.lax.dot_general and told == (None, None)
