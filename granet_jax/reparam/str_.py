"""STR: a trainable soft threshold for each layer."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from granet_jax import trees
from granet_jax.reparam.base import Reparameterisation, from_thresholds


def str_(
    *,
    initial: float = -10.0,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.sigmoid,
    prunable: trees.Rules = (),
) -> Reparameterisation:
    """Soft threshold reparameterisation: the network uses ``sign(w) * relu(|w| - a(s))``.

    Each layer has one trainable number ``s``. Gradients are those of the formula. A weight gets a
    gradient only if it is above the threshold. The gradient of ``s`` is ``-a'(s)`` times the sum of
    ``sign(w) * upstream`` over those weights. At ``|w| = a(s)`` gradients are 0.

    ``s`` starts far below 0, where ``a(s)`` is about 0 and the network is dense. **Weight decay**
    pulls ``s`` up towards 0, more slowly the nearer it comes, until the gradients of the loss
    balance it. So ``initial`` and the decay together determine the sparsity. There are two ways:

    * the paper's way, the same decay for weights and ``s``: ``optax.add_decayed_weights(decay)``
      before the optimizer, without a mask, and ``coefficient=0`` in ``penalise``;
    * a separate decay for ``s``, as ``coefficient`` in ``penalise``: the penalty is the sum of
      ``s^2 / 2``. Then exclude ``s`` from the decay of the weights, but keep decaying the weights:
      without decay they outgrow the threshold, which never exceeds ``a(0)``. ``steer`` finds the
      coefficient for a sparsity.

    The decay has to be added to the gradients before momentum, as both ways do; ``adamw`` does not.
    A mask that excludes biases from decay by their rank also excludes ``s``, which is a scalar.

    Source: Kusupati et al., "Soft Threshold Weight Reparameterization for Learnable Sparsity",
    ICML 2020, section 3.

    Args:
      initial: s at the start. At -10 the sigmoid is 5e-5, so the network is almost dense. The
        paper's ResNet-50 starts at -3200, and its decay alone shrinks s by e^-11.5 in 500,000
        steps; a short training would stay dense.
      activation: a, from s to a threshold >= 0; sigmoid for convolutional networks, ``jnp.exp`` for
        recurrent ones. At -3200 the sigmoid and its derivative are exactly 0 in float32, so only
        the decay moves s.
      prunable: path rules, see :func:`granet_jax.trees.describe`. The paper prunes all layers.

    Returns:
      A reparameterisation; ``extra`` is ``{path: float32 scalar}``, ``(layers,)`` for stacks of
      layers; float64 for float64 weights. Its functions raise a ValueError for a structure.

    Example: a threshold of .5.
      >>> import jax.numpy as jnp
      >>> method = str_(initial=0.0)
      >>> params = {"kernel": jnp.array([[1.0, 0.25], [-3.0, -0.5]])}
      >>> extra = method.init(params)
      >>> method.effective(params, extra)["kernel"].tolist()
      [[0.5, 0.0], [-2.5, -0.0]]
      >>> method.masks(params, extra)["kernel"].tolist()
      [[True, False], [True, False]]
    """
    return from_thresholds(
        initial=lambda x: jnp.full(x.shape[: x.stack_axes], initial, jnp.float32),
        threshold=lambda s, x: activation(s).reshape(-1, *[1] * len(x.layer_shape)),
        gate=lambda w, over: _direction(w) * jax.nn.relu(over).astype(w.dtype),
        penalty=lambda s: 0.5 * s**2,
        prunable=prunable,
    )


def _direction(w: jax.Array) -> jax.Array:
    """The sign; for complex numbers ``w / |w|``, as JAX may give their sign a gradient of 0."""
    if not jnp.issubdtype(w.dtype, jnp.complexfloating):
        return jnp.sign(w)
    return w / jnp.where(w == 0, 1, jnp.abs(w)).astype(w.dtype)
