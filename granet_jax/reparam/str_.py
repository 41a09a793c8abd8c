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

    Each layer has one trainable number ``s``. Gradients are those of the formula: they reach only
    weights above the threshold, and ``s`` with ``-a'(s) * sum of sign(w) * upstream`` over those;
    at ``|w| = a(s)`` they are 0.

    ``s`` starts far below 0, where ``a(s)`` is about 0 and the network dense. **Weight decay** on
    ``s`` pulls it up towards 0, the more slowly the further it has come, until the gradients of
    the loss oppose it. So the sparsity follows from ``initial`` and the decay together. Two ways:

    * the paper's, one decay for weights and ``s`` alike: ``optax.add_decayed_weights(decay)``
      before the optimizer, without a mask, and ``coefficient=0`` in ``penalise``;
    * a decay of its own for ``s``, as ``coefficient`` in ``penalise``: the penalty is the sum of
      ``s^2 / 2``. Leave ``s`` out of the decay of the weights then, but keep that one: weights
      without decay outgrow a threshold that never passes ``a(0)``. With ``steer`` the coefficient
      follows from a sparsity asked for.

    Decay must be coupled, added to the gradients before momentum as both ways do; that of
    ``adamw`` is not. And a mask that keeps decay off biases by their rank keeps it off ``s``, too,
    which is a scalar.

    Source: Kusupati et al., "Soft Threshold Weight Reparameterization for Learnable Sparsity",
    ICML 2020, section 3.

    Args:
      initial: s at the start. At -10 the sigmoid is 5e-5, and the start all but dense. The paper's
        ResNet-50 starts at -3200, which its decay alone shrinks by e^-11.5 in 500,000 steps; a
        short training would stay dense.
      activation: a, from s to a threshold >= 0; sigmoid for convolutional networks, ``jnp.exp`` for
        recurrent ones. At -3200 the sigmoid and its derivative are exactly 0 in float32, and
        decay alone moves s.
      prunable: path rules, see :func:`granet_jax.trees.describe`. The paper prunes all layers.

    Returns:
      A reparameterisation; ``extra`` holds ``{path: float32 scalar}``, or ``(layers,)`` for
      stacks of layers; float64 where weights are.

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
    """The sign; of complex numbers ``w / |w|``, as JAX may hold that their sign has slope 0."""
    if not jnp.issubdtype(w.dtype, jnp.complexfloating):
        return jnp.sign(w)
    return w / jnp.where(w == 0, 1, jnp.abs(w)).astype(w.dtype)
