"""DST: a trainable threshold for each output unit."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from granet_jax import selection, trees
from granet_jax.reparam.base import Reparameterisation, from_thresholds
from granet_jax.types import PyTree


def dst(*, output_axis: int = -1, prunable: trees.Rules = ()) -> Reparameterisation:
    """Dynamic sparse training: weights below a trained threshold are 0 in the forward pass.

    With one threshold ``t`` for each output unit of a layer and ``Q = |w| - t``, the network uses
    ``w * M`` where ``M = 1 if Q > 0 else 0``. Backward, the step has the long-tailed derivative
    ``H`` (:func:`long_tailed`)::

        dL/dw = dL/d(wM) * (M + |w| * H(Q))        dL/dt = -sum over inputs of dL/d(wM) * w * H(Q)

    so masked weights continue to learn and may come back. ``t`` starts at 0. The penalty is the sum
    of ``exp(-t)`` over all thresholds. If a layer keeps 1 % of its weights or less, its thresholds
    are reset to 0 and it starts dense again, so that no layer becomes empty. Sparsities of 99 % and
    more can therefore not be reached.

    A threshold may become negative. Then no weight of its unit is masked, and a weight of exactly 0
    counts as kept. A reset does not change the optimizer's moments of the thresholds.

    Source: Liu et al., "Dynamic Sparse Training: Find Efficient Sparse Network From Scratch With
    Trainable Masked Layers", ICLR 2020, section 3.

    Args:
      output_axis: the axis of the output units: -1 in Flax and Haiku, 0 in Equinox and PyTorch. In
        stacks of layers (``granet_jax.Stacked``), the axis is one of the layer's own. In a kernel
        with two output axes (attention heads), units along the other one share a threshold.
      prunable: path rules, see :func:`granet_jax.trees.describe`. The paper prunes all layers
        except the last one of its LSTM.

    Returns:
      A reparameterisation; ``extra`` is ``{path: float32 (out,)}``, ``(layers, out)`` for stacks of
      layers; float64 for float64 weights. Its functions raise a ValueError if a prunable leaf has
      no such axis, or a structure.

    Differs from the paper's code in that a layer is reset after the step that emptied it, not in
    the next forward pass. So an exported layer is never empty.

    Example: the threshold of the second unit masks one of its weights.
      >>> import jax.numpy as jnp
      >>> method = dst()
      >>> params = {"kernel": jnp.array([[1.0, 2.0], [-3.0, -4.0]])}
      >>> method.init(params)["kernel"].tolist()
      [0.0, 0.0]
      >>> method.effective(params, {"kernel": jnp.array([0.0, 2.5])})["kernel"].tolist()
      [[1.0, 0.0], [-3.0, -4.0]]
    """

    def outputs(leaf: trees.Leaf) -> list[int]:
        """The shape of a layer, with 1 for all axes but the outputs."""
        shape = [1] * len(leaf.layer_shape)
        if not -len(shape) <= output_axis < len(shape):
            raise ValueError(
                f"{output_axis=} is no axis of {leaf.path}, whose layers have shape "
                f"{leaf.layer_shape}. Leave it dense by a rule, e.g. ({leaf.path!r}, False)."
            )
        shape[output_axis] = leaf.layer_shape[output_axis]
        return shape

    method = from_thresholds(
        initial=lambda x: jnp.zeros((*x.shape[: x.stack_axes], math.prod(outputs(x)))),
        threshold=lambda t, x: t.reshape(x.num_layers, *outputs(x)),
        gate=lambda w, over: w * _step(over).astype(w.dtype),
        penalty=lambda t: jnp.exp(-t),
        prunable=prunable,
    )

    def reset(params: PyTree, extra: dict[str, jax.Array]) -> dict[str, jax.Array]:
        leaves = trees.describe(params, prunable)
        masks = trees.split(method.masks(params, extra), leaves)
        new = dict(extra)
        for leaf, mask in zip([x for x in leaves if x.prunable], masks, strict=True):
            is_empty = selection.count([mask]) <= mask[0].size // 100
            t = extra[leaf.path]
            new[leaf.path] = jnp.where(is_empty.reshape(*t.shape[:-1], 1), 0.0, t)
        return new

    return method._replace(reset=reset)


def long_tailed(x: jax.Array) -> jax.Array:
    """The surrogate derivative of the step: ``2 - 4|x|`` up to .4, then .4 up to 1, then 0.

    Example:
      >>> import jax.numpy as jnp
      >>> [round(float(h), 3) for h in long_tailed(jnp.array([0.0, -0.2, 0.4, 0.7, 1.1]))]
      [2.0, 1.2, 0.4, 0.4, 0.0]
    """
    size = jnp.abs(x)
    return jnp.where(size <= 0.4, 2.0 - 4.0 * size, jnp.where(size <= 1.0, 0.4, 0.0))


@jax.custom_jvp
def _step(x: jax.Array) -> jax.Array:
    return (x > 0).astype(x.dtype)


@_step.defjvp
def _step_jvp(primals: tuple[Any], tangents: tuple[Any]) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    return _step(x), long_tailed(x) * dx
