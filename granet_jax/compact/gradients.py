"""Gradients for all weights, live or not, computed with live weights."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from granet_jax import trees
from granet_jax.compact import packing
from granet_jax.compact.layouts import Layouts
from granet_jax.compact.rules import RULES
from granet_jax.compact.trace import on_slots
from granet_jax.compact.walk import begin
from granet_jax.types import PyTree


def value_and_dense_grad(
    fn: Callable[..., Any], has_aux: bool = False, *, native: bool | None = None
) -> Callable[..., Any]:
    """As ``jax.value_and_grad(fn)`` at the dense parameters, but computed from slots.

    Growth by gradients needs these gradients. The forward pass and the gradients of activations use
    live weights only. Only the gradients of kernels are dense products: a third of the work.

    Args:
      fn: ``fn(params, *args)`` returns a scalar, or ``(scalar, aux)``.
      has_aux: whether it returns ``aux``.
      native: as for :func:`granet_jax.compact.sparse`.

    Returns:
      ``(values, layouts, *args) -> (what fn returns, gradients)``; the gradients are a tree of the
      dense parameters' shapes.

    Example:
      >>> import jax.numpy as jnp
      >>> from granet_jax import compact
      >>> params = {"w": jnp.array([[1.0, 0.0], [0.0, 2.0]])}
      >>> values, layouts = compact.pack(params, {"w": params["w"] != 0})
      >>> loss = lambda params, x: jnp.sum(x @ params["w"])
      >>> value, grads = value_and_dense_grad(loss)(values, layouts, jnp.array([[3.0, 4.0]]))
      >>> float(value), grads["w"].tolist()
      (11.0, [[3.0, 3.0], [4.0, 4.0]])
    """

    def of_slots(values: PyTree, layouts: Layouts, *args: Any, **kwargs: Any) -> Any:
        found = trees.paths(values)
        floats = {k: x for k, x in found.items() if jnp.issubdtype(x.dtype, jnp.inexact)}
        zeros = {
            path: jnp.zeros((*layout.stack, layout.layer_size), found[path].dtype)
            for path, layout in layouts.items()
        }
        dense = {path: x for path, x in floats.items() if path not in layouts}

        def of_dense(zeros: dict[str, Any], dense: dict[str, Any]) -> Any:
            tree = packing.map_by_path(lambda path, x: dense.get(path, x), values)
            return on_slots(begin(RULES, native, zeros), fn, tree, layouts, args, kwargs)

        value, grads = jax.value_and_grad(of_dense, (0, 1), has_aux=has_aux)(zeros, dense)

        def grad(path: str, x: jax.Array) -> jax.Array:
            if path in layouts:
                whole: jax.Array = grads[0][path].reshape(layouts[path].shape)
                return whole
            return grads[1][path] if path in floats else jnp.zeros_like(x)

        return value, packing.map_by_path(grad, values)

    return of_slots
