"""The scaling law of sparse networks: fit it, predict with it, find the best sparsity for a budget.

This is for planning before training, in plain numpy and float64. ``live`` is the number of live
weights and ``data`` the amount of training (steps, examples, tokens), in units of your choice, such
as millions of weights and 1e5 steps. Use a law in the units in which it was fitted.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Law(NamedTuple):
    """``L = (a (1 - S)^b + c) N^-d + e D^-f + g``: loss at sparsity S, N live weights, data D.

    All coefficients are positive. ``g`` is the loss that no network can go below. ``(a + c) N^-d``
    is the loss that a dense network of N weights has because of its finite size; at N live weights
    and a sparsity near 1, ``c`` takes the place of ``a + c``.

    Source: Frantar et al. 2023 (arXiv 2309.08520), "Scaling laws for sparsely-connected foundation
    models", equation 1.

    Example: the published law of T5 on C4, in millions of weights and 1e5 steps.
      >>> t5 = Law(0.56779, 0.72161, 1.52265, 0.24513, 0.63362, 0.20271, 0.65074)
      >>> t5.g
      0.65074
    """

    a: float
    b: float
    c: float
    d: float
    e: float
    f: float
    g: float


def predict(law: Law, sparsity: Any, live: Any, data: Any) -> Any:
    """The loss that a law predicts.

    Args:
      law: fitted, or published.
      sparsity: S, fraction of zeros, in [0, 1).
      live: N, live weights, > 0.
      data: D, > 0.

    Returns:
      float64; arrays broadcast.

    Example: T5 on C4 by the published law; 85 million live weights, 500,000 steps.
      >>> t5 = Law(0.56779, 0.72161, 1.52265, 0.24513, 0.63362, 0.20271, 0.65074)
      >>> [round(float(predict(t5, s, 85, 5)), 3) for s in (0.0, 0.5, 0.75)]
      [1.812, 1.736, 1.691]
    """
    sparsity, live, data = (np.asarray(x, np.float64) for x in (sparsity, live, data))
    by_size = (law.a * (1 - sparsity) ** law.b + law.c) * live**-law.d
    return by_size + law.e * data**-law.f + law.g


class Fit(NamedTuple):
    """A law, and how well it fits."""

    law: Law
    huber: float  # mean Huber loss over the points
    num_found: int  # how many starts ended in this law (within a thousandth of its Huber loss)


def fit(
    sparsity: Any,
    live: Any,
    data: Any,
    losses: Any,
    *,
    of_logs: bool = True,
    delta: float = 1e-3,
    num_starts: int = 25,
    seed: int = 0,
) -> Fit:
    """The law with the smallest Huber loss over trained networks.

    It is the best result of several random starts, each minimised to convergence by a trust-region
    method (``scipy.optimize.least_squares``). Huber's loss of a residual r is ``r^2 / 2``, and
    linear from ``|r| = delta`` on.

    Source: Frantar et al. 2023: residuals of logs with delta .001 for T5, of losses with .01 for
    ViT.

    Args:
      sparsity: of each network, in [0, 1). For meaningful coefficients, sparsity, live and data
        need three different values each.
      live: of each network, > 0.
      data: of each network, > 0.
      losses: measured, > 0.
      of_logs: residuals are differences of log losses; False = of losses.
      delta: where Huber's loss becomes linear.
      num_starts: how many random starts.
      seed: of the starts.

    Returns:
      A :class:`Fit`.

    Raises:
      ValueError: lengths differ, fewer than 8 points, or values out of range.
      RuntimeError: no start converged.

    Differs from the paper's code in that each start is minimised until it no longer improves.
    (Theirs stops when gradients are below 1e-5. For T5 the loss itself is below that, so it stops
    near its start.)

    Example: exact points give the law back.
      >>> import itertools
      >>> law = Law(0.5, 0.7, 1.5, 0.25, 0.6, 0.2, 0.7)
      >>> points = itertools.product([0.0, 0.5, 0.75, 0.875], [1.0, 5.0, 20.0], [2.0, 5.0, 10.0])
      >>> s, n, d = np.array(list(points)).T
      >>> [round(x, 3) for x in fit(s, n, d, predict(law, s, n, d)).law]
      [0.5, 0.7, 1.5, 0.25, 0.6, 0.2, 0.7]
    """
    from scipy import optimize  # a dependency of jax

    points = _checked(sparsity, live, data, losses)
    measured = points[3]

    def residuals(x: np.ndarray) -> np.ndarray:
        told = predict(Law(*x), *points[:3])
        return np.log(told) - np.log(measured) if of_logs else told - measured

    draw, ended = np.random.default_rng(seed), []
    for _ in range(num_starts):
        with np.errstate(over="ignore", invalid="ignore"):
            try:
                found = optimize.least_squares(
                    residuals,
                    draw.uniform(0.05, 2.0, len(Law._fields)),
                    bounds=(1e-9, np.inf),
                    x_scale="jac",
                    loss="huber",
                    f_scale=delta,
                    **dict.fromkeys(("ftol", "xtol", "gtol"), 1e-14),
                    max_nfev=5000,
                )
            except ValueError:  # the start overflows
                continue
        ended.append((found.cost / len(measured), tuple(map(float, found.x))))
    if not ended:
        raise RuntimeError("No start came to an end: scale live and data to numbers near 1.")
    best, law = min(ended)
    return Fit(Law(*law), float(best), sum(cost <= 1.001 * best for cost, _ in ended))


def huber(
    law: Law, sparsity: Any, live: Any, data: Any, losses: Any, *, of_logs: bool, delta: float
) -> float:
    """The mean Huber loss of a law over trained networks, as :func:`fit` minimises it.

    Args:
      law: fitted, or published.
      sparsity: as for :func:`fit`.
      live: as for :func:`fit`.
      data: as for :func:`fit`.
      losses: as for :func:`fit`.
      of_logs: as for :func:`fit`.
      delta: as for :func:`fit`.

    Returns:
      A float.

    Raises:
      ValueError: as :func:`fit`.

    Example:
      >>> law = Law(1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
      >>> points = ([0.0] * 8, [1.0] * 8, [1.0] * 8, [4.0] * 7 + [5.0])
      >>> huber(law, *points, of_logs=False, delta=0.1)
      0.011875
    """
    *points, measured = _checked(sparsity, live, data, losses)
    told = predict(law, *points)
    off = np.abs(np.log(told) - np.log(measured) if of_logs else told - measured)
    return float(np.mean(np.where(off <= delta, off**2 / 2, delta * (off - delta / 2))))


def gradual_cost(sparsity: Any) -> Any:
    """The cost of a step of gradual pruning, relative to a dense network of as many weights.

    The dense network has as many weights as are live at the end. As in the paper, a quarter of
    training is dense, half is on the cubic, a quarter is sparse. So the cost is the mean density
    over training divided by the final density.

    Source: Frantar et al. 2023, "optimal sparsity".

    Args:
      sparsity: at the end, in [0, 1); a float or an array.

    Returns:
      float64 >= 1, of the shape of ``sparsity``.

    Example:
      >>> [round(float(gradual_cost(s)), 3) for s in (0.0, 0.5, 0.75)]
      [1.0, 1.375, 2.125]
    """
    sparsity = np.asarray(sparsity, np.float64)
    return (1 - 0.625 * sparsity) / (1 - sparsity)


def best_sparsity(
    law: Law, live: float, compute: float, cost: Callable[[Any], Any] = gradual_cost
) -> tuple[float, float]:
    """The sparsity with the lowest loss for a budget of live weights and of compute.

    At a higher sparsity, N live weights are pruned from a larger network. That is better for the
    same N, but each step costs ``cost(S)`` times as much, so the network sees less data.

    Args:
      law: fitted, or published.
      live: N, the live weights that the network has in the end.
      compute: N times the data on which a dense network of N weights could be trained.
      cost: of a step at a sparsity, relative to a dense network of N weights; takes arrays. A
        method that is sparse from the start costs 1 at any sparsity (``numpy.ones_like``); then
        sparsity is free, and the result is the highest one.

    Returns:
      ``(sparsity, loss)``; the sparsity is one of 0, .001 ... .990.

    Raises:
      ValueError: a budget that is not positive.

    Source: Frantar et al. 2023, "optimal sparsity".

    Example: the longer the training, the higher the sparsity that pays.
      >>> t5 = Law(0.56779, 0.72161, 1.52265, 0.24513, 0.63362, 0.20271, 0.65074)
      >>> [best_sparsity(t5, 85, 85 * steps)[0] for steps in (1, 5, 50)]
      [0.542, 0.648, 0.762]
    """
    if live <= 0 or compute <= 0:
        raise ValueError(f"A budget is positive; got {live=}, {compute=}.")
    sparsities = np.arange(991) / 1000
    losses = predict(law, sparsities, live, compute / live / cost(sparsities))
    best = int(np.argmin(losses))
    return float(sparsities[best]), float(losses[best])


def _checked(*columns: Any) -> list[np.ndarray]:
    """Sparsity, live, data and losses as float64 vectors of one length.

    Raises:
      ValueError: other shapes, fewer than 8 networks, or values out of range.
    """
    arrays = [np.asarray(x, np.float64) for x in columns]
    if len({x.shape for x in arrays}) != 1 or arrays[0].ndim != 1:
        shapes = [x.shape for x in arrays]
        raise ValueError(f"sparsity, live, data and losses: a vector each, as long; got {shapes}.")
    sparsity, *positive = arrays
    if len(sparsity) < len(Law._fields) + 1:
        raise ValueError(f"Seven coefficients need more than 7 networks; got {len(sparsity)}.")
    if not np.all((sparsity >= 0) & (sparsity < 1)):
        raise ValueError("A sparsity is a fraction of zeros, in [0, 1).")
    for name, x in zip(("live", "data", "losses"), positive, strict=True):
        if not np.all(np.isfinite(x) & (x > 0)):
            raise ValueError(f"{name} has to be positive and finite; the lowest is {np.min(x)}.")
    return arrays
