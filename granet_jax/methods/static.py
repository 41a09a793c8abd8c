"""Static sparse training: masks that never change."""

from typing import Any

import jax

from granet_jax import distributions, trees
from granet_jax.composition import compose, start_from
from granet_jax.types import Distribution, Method, PyTree


def static(
    *,
    sparsity: Any = 0.0,
    start: Distribution = distributions.erk,
    masks: PyTree | None = None,
    prunable: trees.Rules = (),
    key: jax.Array | None = None,
) -> Method:
    """Trains under fixed masks: random ones, or given ones.

    It is the baseline of sparse training, and the way to train under masks from elsewhere (pruning
    at initialisation, lottery tickets, a finished run).

    Args:
      sparsity: fraction of zeros among prunable weights, in [0, 1); 0 = dense, or whatever
        sparsity ``masks`` have.
      start: how the sparsity is spread over layers.
      masks: use these instead of random ones (bool, tree of params).
      prunable: path rules, see :func:`granet_jax.trees.describe`.
      key: typed key for random masks.

    Returns:
      A method for :func:`granet_jax.sparsify`.

    Raises:
      ValueError: a sparsity outside [0, 1), or random masks without a key; in ``init``, as
        :func:`granet_jax.start_from`.

    Example:
      >>> import granet_jax as gj, jax, optax
      >>> tx = gj.sparsify(optax.sgd(0.1), gj.static(sparsity=0.9, key=jax.random.key(0)))
    """
    return compose(
        start_from(masks, sparsity, start, prunable, key),
        is_update_step=lambda step: step < 0,
        name="static",
    )
