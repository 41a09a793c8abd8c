"""Sparse momentum (SNFS): grows by averaged gradients, where they are largest."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from granet_jax import blocks, distributions, schedules, scores, selection, sortable, trees
from granet_jax.composition import compose, start_from
from granet_jax.masks import regenerate
from granet_jax.types import Distribution, Event, MaskState, Method, PyTree


def average_gradients(method: Method, decay: float = 0.9) -> Method:
    """The method, given a running mean of the dense gradients instead of one batch's gradients.

    At every step ``mean <- decay * mean + (1 - decay) * gradient``. The mean is float32, or has the
    parameters' dtype if that is float64 or complex. It costs at least four bytes for each weight,
    and a dense gradient at every step.

    Source: Dettmers & Zettlemoyer 2019, "Sparse Networks from Scratch", section 3.

    Args:
      method: one whose state is a :class:`granet_jax.types.MaskState`.
      decay: share of the mean that stays, in [0, 1).

    Returns:
      A method; its state holds the mean in ``average``.

    Raises:
      ValueError: ``decay`` outside [0, 1).

    Note:
      A NaN in a gradient stays in the mean; ``optax.apply_if_finite`` around ``sparsify`` keeps it
      out.

    Example: RigL that grows by averaged gradients.
      >>> import granet_jax as gj, jax
      >>> method = gj.rigl(sparsity=0.9, update_every=100, total_steps=1000, key=jax.random.key(0))
      >>> method = gj.average_gradients(method, decay=0.99)
    """
    if not 0.0 <= decay < 1.0:
        raise ValueError(f"decay must be in [0, 1), the share of the mean that stays; got {decay}.")

    def init(params: PyTree) -> MaskState:
        zeros = jax.tree.map(
            lambda p: jnp.zeros_like(p, dtype=scores.at_least_float32(p.dtype)), params
        )
        return method.init(params)._replace(average=zeros)

    def observe(state: MaskState, grads: PyTree) -> MaskState:
        if method.observe is not None:
            state = method.observe(state, grads)
        average = jax.tree.map(
            lambda m, g: decay * m + (1.0 - decay) * g.astype(m.dtype), state.average, grads
        )
        return state._replace(average=average)

    def update(state: MaskState, event: Event) -> tuple[MaskState, PyTree]:
        return method.update(state, event._replace(grads=state.average))

    name = f"average_gradients({method.name})"
    return method._replace(init=init, update=update, observe=observe, name=name)


def by_mean_score(
    num_dropped: jax.Array, growth: Sequence[jax.Array], live: Sequence[jax.Array]
) -> jax.Array:
    """Divides growth among layers in proportion to the mean growth score of their live weights.

    A layer gets at most as many weights as it has room for; the surplus is divided among the other
    layers in the same way. Shares are rounded down, and the rest goes to the largest fractions.

    Source: Dettmers & Zettlemoyer 2019, "Sparse Networks from Scratch", section 3.

    Args:
      num_dropped: int32 ``(layers,)``.
      growth: growth scores, stacks ``(layers_i, *layer_shape_i)``.
      live: bool stacks of the same shapes, before the drop.

    Returns:
      int32 ``(layers,)``, how many weights each layer grows; the sum is that of ``num_dropped``.

    Example: the second layer's mean is three times that of the first, but it has room for only two.
      >>> import jax.numpy as jnp
      >>> growth = [jnp.array([[1.0, 1.0, 1.0, 0.0, 0.0, 0.0]]), jnp.array([[3.0, 3.0, 3.0]])]
      >>> live = [jnp.array([[True] * 3 + [False] * 3]), jnp.array([[True, True, False]])]
      >>> by_mean_score(jnp.array([3, 1]), growth, live).tolist()
      [2, 2]
    """
    num_live, num_dropped = selection.count(live), jnp.asarray(num_dropped, jnp.int32)
    sizes = [math.prod(x.shape[1:]) for x in live for _ in range(len(x))]
    room = jnp.array(sizes, jnp.int32) - num_live + num_dropped
    total = _sum(num_dropped)
    sums = [
        jnp.sum(jnp.where(x & jnp.isfinite(s), s, 0.0), axis=tuple(range(1, x.ndim)))
        for s, x in zip(growth, live, strict=True)
    ]
    dtype = sortable.widest(sums)
    sums_of_all = jnp.concatenate([blocks.replicated(x).astype(dtype) for x in sums])
    mean = sums_of_all / jnp.maximum(num_live, 1).astype(dtype)
    weight = mean + 1e-6 * jnp.max(mean) + 1e-30  # so that every layer can take some surplus

    def deal(_: jax.Array, shares: jax.Array) -> jax.Array:
        open_weight = jnp.where(shares < most, weight, 0.0)
        rest = total.astype(dtype) - jnp.sum(shares)
        return jnp.minimum(
            most, shares + rest * open_weight / jnp.maximum(open_weight.sum(), 1e-30)
        )

    most = room.astype(dtype)
    shares = jax.lax.fori_loop(0, len(sizes), deal, jnp.zeros(len(sizes), dtype))
    shares *= 1 - 2.0**-20  # rounding must not have lifted their sum above the total
    num_grown = jnp.floor(shares).astype(jnp.int32)
    by_fraction = jnp.argsort(num_grown.astype(dtype) - shares)
    one_more = jnp.minimum(room - num_grown, 1)[by_fraction]
    num_grown = num_grown.at[by_fraction].add(_fill(total - _sum(num_grown), one_more))
    return num_grown + _fill(total - _sum(num_grown), room - num_grown)


def _fill(total: jax.Array, capacity: jax.Array) -> jax.Array:
    """Divides a total: each in turn takes all it can."""
    return jnp.clip(total - (jnp.cumsum(capacity, dtype=jnp.int32) - capacity), 0, capacity)


def _sum(counts: jax.Array) -> jax.Array:
    return jnp.sum(counts, dtype=jnp.int32)


def snfs(
    *,
    sparsity: Any,
    update_every: int,
    total_steps: int,
    decay: float = 0.9,
    begin_step: int = 0,
    initial_fraction: Any = 0.5,
    final_fraction: Any = 0.005,
    start: Distribution = distributions.erk,
    masks: PyTree | None = None,
    prunable: trees.Rules = (),
    key: jax.Array | None = None,
) -> Method:
    """Trains at a fixed sparsity; weights move to the layers where gradients are large.

    At each event every layer drops its ``ceil(f_t * live)`` smallest weights. The number dropped in
    all is divided among the layers in proportion to the mean ``|momentum|`` of their live weights.
    Each layer grows its share where its ``|momentum|`` is largest. Momentum is a running mean of
    dense gradients.

    Source: Dettmers & Zettlemoyer 2019, "Sparse Networks from Scratch: Faster Training without
    Losing Performance", section 3.

    Args:
      sparsity: fraction of zeros among all prunable weights, in [0, 1), constant.
      update_every: updates between events (an epoch in the paper).
      total_steps: updates in all; the cosine's length and the last event.
      decay: of the running mean.
      begin_step: no event before it.
      initial_fraction: f at step 0, in [0, 1].
      final_fraction: f at ``total_steps``, in [0, 1].
      start: how the sparsity is spread over layers at first.
      masks: start from these instead of random ones (bool, tree of params).
      prunable: path rules, see :func:`granet_jax.trees.describe`.
      key: typed key for the random start.

    Returns:
      A method for :func:`granet_jax.sparsify`.

    Raises:
      ValueError: a sparsity, fraction or decay out of range, a random start without key, or a
        schedule without events.

    Differs from the paper's code in that: the momentum is the method's own mean of raw gradients,
    not the optimizer's (for SGD the two differ by a constant factor; under Adam theirs is divided
    by the root of the second moment); a layer may fill up (theirs stops at 99 % of its free
    places); layers that grow and are more than 80 % dense drop as the others do; rounding loses no
    weights.

    Example:
      >>> import granet_jax as gj, jax, optax
      >>> tx = gj.sparsify(
      ...     optax.sgd(0.1, momentum=0.9),
      ...     gj.snfs(sparsity=0.9, update_every=100, total_steps=1000, key=jax.random.key(0)),
      ... )
    """
    method = compose(
        start_from(masks, sparsity, start, prunable, key),
        regenerate(
            schedules.cosine(initial_fraction, final_fraction, total_steps),
            grow=scores.gradient,
            redistribute=by_mean_score,
            prunable=prunable,
        ),
        is_update_step=schedules.every(update_every, begin_step, total_steps),
        key=key,
    )
    return average_gradients(method, decay)._replace(name="snfs")
