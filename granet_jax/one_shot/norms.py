"""Statistics of batch norm, which pruning leaves wrong, made anew."""

from collections.abc import Callable, Iterable
from typing import Any

import jax

from granet_jax.types import PyTree


def recalibrate(
    update: Callable[[PyTree, Any], PyTree], statistics: PyTree, batches: Iterable[Any]
) -> PyTree:
    """Passes batches through a network in training mode, and keeps the statistics that result.

    Parameters do not change. Each batch moves the running statistics as in training: with the usual
    momentum of .9, 100 batches leave a share of .9^100 = 3e-5 of the old ones.

    Args:
      update: ``(statistics, batch) -> statistics``, one pass; compile it.
      statistics: tree of arrays, as Flax's ``batch_stats``.
      batches: pytrees of arrays.

    Raises:
      ValueError: ``update`` returns another tree, or other shapes.

    Example: with Flax::

        @jax.jit
        def update(batch_stats, images):
            variables = {"params": params, "batch_stats": batch_stats}
            _, new = model.apply(variables, images, train=True, mutable=["batch_stats"])
            return new["batch_stats"]

        batch_stats = gj.one_shot.recalibrate(update, batch_stats, batches)

      >>> import jax.numpy as jnp
      >>> def update(mean, x):
      ...     return 0.5 * mean + 0.5 * jnp.mean(x)
      >>> float(recalibrate(update, jnp.zeros(()), [jnp.array([1.0, 3.0])] * 2))
      1.5
    """
    for batch in batches:
        new = update(statistics, batch)
        shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (new, statistics)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"update has to return statistics as it got; got {shapes[0]}.")
        statistics = new
    return statistics
