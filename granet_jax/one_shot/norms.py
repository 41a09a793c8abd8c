"""Recomputing the statistics of batch norm, which are wrong after pruning."""

from collections.abc import Callable, Iterable
from typing import Any

import jax

from granet_jax.types import PyTree


def recalibrate(
    update: Callable[[PyTree, Any], PyTree], statistics: PyTree, batches: Iterable[Any]
) -> PyTree:
    """Updates running statistics by passing batches through the network in training mode.

    Parameters do not change. Each batch moves the running statistics as in training. With the usual
    momentum of .9, the old statistics have a share of .9^100 = 3e-5 after 100 batches.

    Args:
      update: ``(statistics, batch) -> statistics``, one pass; compile it.
      statistics: tree of arrays, such as Flax's ``batch_stats``.
      batches: pytrees of arrays.

    Returns:
      The new statistics, a tree like ``statistics``.

    Raises:
      ValueError: there are no batches; ``update`` returns another tree, or other shapes.

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
    is_empty = True
    for batch in batches:
        new = update(statistics, batch)
        shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (new, statistics)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"update has to return statistics as it got; got {shapes[0]}.")
        statistics, is_empty = new, False
    if is_empty:
        raise ValueError("There are no batches. (A generator is empty after its first use.)")
    return statistics
