"""Lottery tickets: the pruning step of iterative magnitude pruning. You write the loop.

One level trains under fixed masks (any optimizer in ``sparsify(..., static())``, with masks set by
:func:`granet_jax.set_masks`). Then :func:`prune` removes a fifth of the live weights. The rules of
retraining differ in where the next level starts, which is one line each:

* weight rewinding: ``apply_masks(params_k, masks)``, the weights after step k of the dense run,
  and the schedule from step k on;
* learning-rate rewinding: ``apply_masks(params, masks)``, the current weights, and the last part of
  the schedule again;
* fine-tuning: the current weights, and the last learning rate;
* reset, the original lottery ticket: ``apply_masks(params_0, masks)`` and the whole schedule;
* reinit, its control: ``apply_masks(init(new_key), masks)`` and the whole schedule.

In all of these the optimizer starts with fresh moments.

Source: Frankle & Carbin 2019, "The lottery ticket hypothesis" (reset, reinit); Frankle et al. 2020,
"Linear mode connectivity and the lottery ticket hypothesis" (weight rewinding); Renda et al. 2020,
"Comparing rewinding and fine-tuning in neural network pruning" (the comparison).

Example: three levels of the original lottery ticket.
  >>> import granet_jax as gj, jax, jax.numpy as jnp, optax
  >>> from granet_jax.methods import lottery
  >>> x, y = jax.random.normal(jax.random.key(0), (2, 50, 8))
  >>> loss = lambda params: jnp.mean((x @ params["kernel"] - y) ** 2)
  >>> tx = gj.sparsify(optax.sgd(optax.cosine_decay_schedule(0.1, 20)), gj.static(sparsity=0.0))
  >>> params_0 = {"kernel": jax.random.normal(jax.random.key(1), (8, 8))}
  >>> masks = gj.ones(params_0)
  >>> for level in range(4):
  ...     params = gj.apply_masks(params_0, masks)
  ...     state = gj.set_masks(tx.init(params), masks)
  ...     for _ in range(20):
  ...         updates, state = tx.update(jax.grad(loss)(params), state, params)
  ...         params = optax.apply_updates(params, updates)
  ...     print(int(masks["kernel"].sum()))
  ...     masks = lottery.prune(params, masks)
  64
  51
  40
  32
"""

from typing import Any

import jax
import jax.numpy as jnp

from granet_jax import groups, scores, selection, structures, trees
from granet_jax.masks import ceil_of_share, check_dense, check_masks, is_known, prune_to
from granet_jax.methods.at_init import warn_of_collapse
from granet_jax.types import Event, PyTree, ScoreFn


def prune(
    params: PyTree,
    masks: PyTree,
    *,
    fraction: Any = 0.2,
    by_layer: bool = False,
    score: ScoreFn = scores.magnitude,
    prunable: trees.Rules = (),
) -> PyTree:
    """Removes ``ceil(fraction * live)`` of the live prunable weights, those that score lowest.

    Groups (N:M, constant fan-in) need ``by_layer``; they lose more, for each keeps the same number.
    After j levels of 20 % about ``.8^j`` of the weights are left. A layer may lose its last weight;
    a warning names such layers.

    Source: Frankle & Carbin 2019, section 2, iterative pruning; one-shot is a single call with a
    large fraction.

    Args:
      params: tree of arrays, the weights after training.
      masks: bool tree of ``params``, under which they were trained.
      fraction: share of the live weights to remove, in [0, 1); may be traced.
      by_layer: remove the fraction in each layer, instead of ranking all layers together.
      score: the weights with the lowest score are removed. It can read parameters and masks only. A
        function that closes over the initial weights can score by how far weights have moved.
      prunable: path rules, see :func:`granet_jax.trees.describe`.

    Returns:
      New masks, a subset of ``masks``. Ties are settled by index. The count is computed in float32
      and may be off by one above 10^6 weights.

    Warns:
      UserWarning: a layer has lost its last weight.

    Raises:
      ValueError: a fraction outside [0, 1), or masks that are of another tree or switch off weights
        of a leaf that is not prunable; groups that have a single weight left each.

    Differs from open_lth in that counts are exact: open_lth removes one weight more, by a strict
    comparison with the threshold, and counts the weights of ignored layers as live.

    Example: of four live weights ceil(.3 * 4) = 2 are removed.
      >>> import jax.numpy as jnp
      >>> masks = {"kernel": jnp.array([[True, True, True], [True, False, False]])}
      >>> params = {"kernel": jnp.array([[3.0, -1.0, 2.0], [-0.5, 0.0, 0.0]])}
      >>> prune(params, masks, fraction=0.3)["kernel"].tolist()
      [[True, False, True], [False, False, False]]
    """
    if not isinstance(fraction, jax.core.Tracer) and not 0.0 <= float(fraction) < 1.0:
        raise ValueError(
            f"fraction must be in [0, 1), the share of live weights to remove; got {fraction}."
        )
    masks = check_masks(masks, params)
    # A layer that a rule keeps dense may be sparse already.
    check_dense(masks, trees.describe(params, [x for x in prunable if x[1] is not False]))
    leaves = trees.describe(params, prunable)
    units = structures.live_units(trees.split(masks, leaves), leaves)
    num_live = selection.count(units)
    if not by_layer:
        num_live = jnp.sum(num_live, dtype=jnp.int32)
    num_keep = num_live - ceil_of_share(fraction, num_live)
    if by_layer:
        num_keep = groups.rounded_down(num_keep, units, leaves)
    step = prune_to(lambda shapes, step: num_keep, score=score, prunable=prunable)
    fewer, _ = step(masks, masks, Event(params))
    instead = "Take a smaller fraction, or by_layer=True"
    warn_of_collapse(fewer, params, prunable, before=masks, instead=instead)
    _check_progress(fewer, masks, fraction, leaves)
    return fewer


def _check_progress(
    fewer: PyTree, masks: PyTree, fraction: Any, leaves: tuple[trees.Leaf, ...]
) -> None:
    """Refuses a level that cannot remove a weight, for each group keeps one."""
    if not any(map(structures.is_grouped, leaves)) or isinstance(fraction, jax.core.Tracer):
        return
    pairs = list(zip(trees.pick(fewer, leaves), trees.pick(masks, leaves), strict=True))
    if float(fraction) > 0 and all(is_known(x) and jnp.array_equal(x, y) for x, y in pairs):
        raise ValueError(
            "Nothing can be removed: each group (N:M, constant fan-in) keeps one weight at least, "
            "and has no more."
        )
