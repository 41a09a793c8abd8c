"""FLOPs of sparse inference and training, counted from the trace of any apply function.

:func:`count` attributes the multiply-adds (MACs) of each convolution and matrix product in the
trace of a function (:mod:`granet_jax.products`) to the parameter that it reads. The rest is
arithmetic on these costs and on densities (:func:`granet_jax.metrics.densities`), safe under
``jit``, so that a run can add up what its real masks cost step by step.

The conventions are those of Evci et al. 2020, "Rigging the Lottery", appendix H, and of most
papers since: a MAC is 2 FLOPs; only products with prunable parameters shrink, in proportion to the
parameter's density; padding counts as work; a backward pass costs two forward passes.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from granet_jax import products, report
from granet_jax.types import PyTree


class LeafCost(NamedTuple):
    """What one call of the function does with one leaf of ``params``."""

    path: str  # e.g. "conv1/kernel"
    shape: tuple[int, ...]
    macs: int  # multiply-adds of the products that read it; 0 for biases and norms
    outputs: int  # entries of the results of those products


class Costs(NamedTuple):
    """What one call of a function costs."""

    leaves: tuple[LeafCost, ...]  # all leaves of params, in leaf order
    other: int  # MACs of products of data with data (attention scores), or of two parameters


def count(apply_fn: Callable[..., Any], params: PyTree, *args: Any) -> Costs:
    """Counts the multiply-adds of ``apply_fn(params, *args)`` by parameter, without computing it.

    A parameter is followed through the operations that make a kernel of it: reshapes, casts, slices
    of a stack of layers, masks, thresholds, normalisation by its own entries. A value that depends
    on ``args`` is data. A product of data with a parameter counts for that parameter, as often as
    it is done: in each iteration of a ``scan``, and at each use of a shared parameter. The
    costliest branch of a ``cond`` counts. If a kernel is made elementwise from several parameters,
    the product counts for the largest; concatenated parameters share the cost by size.

    A convolution has ``positions * kernel size`` MACs, with the positions of the output, or those
    of the input if it is dilated (transposed convolutions). Only ``conv_general_dilated`` and
    ``dot_general`` are counted; lookups, norms, activations and ``ragged_dot`` are not.

    Source: Evci et al. 2020, "Rigging the Lottery", appendix H, for what is counted.

    Args:
      apply_fn: the forward pass. It has to close over arguments that are not arrays
        (``train=False``).
      params: tree of arrays or ``ShapeDtypeStruct``.
      *args: arrays or ``ShapeDtypeStruct`` in any structure: inputs (one image gives the costs of
        one image), batch statistics, typed keys, masks. Everything but bool arrays, keys and single
        floats is data. So masks that are not in ``params`` have to be bool here; the function may
        cast them.

    Returns:
      The :class:`Costs`, ints.

    Raises:
      ValueError: a product is done in a ``while_loop``, whose trips cannot be known, or inside a
        primitive that hides its shapes (``shard_map``, Pallas kernels).

    Example: each weight of a 4x3 kernel meets each of 8 examples.
      >>> import jax, jax.numpy as jnp
      >>> params = {"kernel": jnp.zeros((4, 3)), "scale": jnp.ones(())}
      >>> batch = jax.ShapeDtypeStruct((8, 4), jnp.float32)
      >>> costs = count(lambda p, x: p["scale"] * (x @ p["kernel"]), params, batch)
      >>> [(leaf.path, leaf.macs, leaf.outputs) for leaf in costs.leaves]
      [('kernel', 96, 24), ('scale', 0, 0)]
    """
    shapes, found = products.uses(apply_fn, params, *args)
    if any(use.macs == math.inf for use in found):
        raise ValueError(
            "A while_loop does convolutions or matrix products, and how often is not known "
            "before it runs. Give it a fixed number of trips (fori_loop with Python ints, "
            "scan), or count the function that it repeats."
        )
    macs: Counter[int] = Counter()
    outputs: Counter[int] = Counter()
    for use in found:
        macs.update(products.shares(int(use.macs), use.entries))
        outputs.update(products.shares(int(use.outputs), use.entries))
    leaves = [
        LeafCost(path, shape, macs[i], outputs[i]) for i, (path, shape) in enumerate(shapes.items())
    ]
    return Costs(tuple(leaves), sum(int(use.macs) for use in found if not use.entries))


def forward(
    costs: Costs, densities: Mapping[str, Any] | None = None, *, per_output: int = 0
) -> Any:
    """FLOPs of one forward pass.

    ``sum_l (2 macs_l density_l + per_output outputs_l) + 2 other``.

    Args:
      costs: from :func:`count`.
      densities: kept fraction by path, as :func:`granet_jax.metrics.densities` returns; floats or
        arrays, which may be traced. Leaves that are not named are dense; None = all are dense.
      per_output: FLOPs added for each output of a product with a parameter, at any density.
        RigL's counter adds 2, for bias and ReLU, which gives 8.20e9 for a dense ResNet-50; 0 gives
        8.18e9.

    Returns:
      A float, or a float32 array if densities are arrays.

    Raises:
      ValueError: a density whose path is no leaf.

    Example:
      >>> costs = Costs((LeafCost("bias", (3,), 0, 0), LeafCost("kernel", (4, 3), 12, 3)), other=0)
      >>> forward(costs), forward(costs, {"kernel": 0.25}), forward(costs, per_output=2)
      (24.0, 6.0, 30.0)
    """
    densities = densities or {}
    if unknown := sorted(densities.keys() - {leaf.path for leaf in costs.leaves}):
        raise ValueError(
            f"Densities of {', '.join(unknown)}, but the costs are of "
            f"{', '.join(leaf.path for leaf in costs.leaves)}. Count the same tree of params."
        )
    fixed = 2 * costs.other + per_output * sum(leaf.outputs for leaf in costs.leaves)
    scaled = (2.0 * leaf.macs * densities.get(leaf.path, 1.0) for leaf in costs.leaves if leaf.macs)
    return sum(scaled, start=float(fixed))


def ratio(costs: Costs, densities: Mapping[str, Any], *, per_output: int = 0) -> Any:
    """FLOPs of a forward pass divided by those of the dense one: the papers' "test FLOPs", .24x.

    Args:
      costs: from :func:`count`.
      densities: as for :func:`forward`.
      per_output: as for :func:`forward`.

    Returns:
      A float, or a float32 array if densities are arrays.

    Raises:
      ValueError: as :func:`forward`; or nothing was counted.

    Example: three quarters of the MACs are in a layer that keeps a tenth of its weights.
      >>> costs = Costs((LeafCost("a", (6, 5), 30, 5), LeafCost("b", (5, 2), 10, 2)), other=0)
      >>> round(ratio(costs, {"a": 0.1}), 4)
      0.325
    """
    dense = forward(costs, per_output=per_output)
    if not dense:
        raise ValueError("No FLOPs were counted, so there is no ratio: see granet_jax.flops.count.")
    return forward(costs, densities, per_output=per_output) / dense


def training_ratio(forward_ratio: Any, dense_gradients: float = 0.0) -> Any:
    """FLOPs of training divided by those of dense training: ``f + q (1 - f) / 3``.

    Both train for the same number of steps. A step costs three forward passes: the forward pass
    itself, the gradients of the activations, and those of the weights. In sparse training each
    costs f times as much as in dense training. But a method that grows by gradients needs dense
    gradients of the weights in a share q of the steps:

    * 0 for static masks, SET, pruning without growth;
    * ``1 / (dT + 1)`` for RigL with updates every dT steps, whose paper has
      ``(3 dT f_S + 2 f_S + f_D) / (dT + 1)``; about as much for GraNet;
    * 1 for SNFS, and for any method that reads all gradients at each step.

    Source: Evci et al. 2020, appendix H. Sources disagree: the authors of GraNet and ITOP leave out
    the dense gradients (q = 0); a reproduction of RigL (arXiv 2103.15767) prints 3 E[f] for gradual
    pruning (q = 0), but its code adds dense gradients at each step (q = 1).

    Args:
      forward_ratio: f, the mean of :func:`ratio` over the steps; a float or an array. If the sparse
        run is x times longer than the dense run, multiply the result by x.
      dense_gradients: q, in [0, 1].

    Returns:
      A float, or an array if ``forward_ratio`` is one.

    Raises:
      ValueError: q outside [0, 1].

    Example: ResNet-50 at 90%, ERK: RigL and SNFS (the papers print .25x and .50x).
      >>> round(training_ratio(0.2439, 1 / 101), 4), round(training_ratio(0.2439, 1), 4)
      (0.2464, 0.4959)
    """
    if not 0 <= dense_gradients <= 1:
        raise ValueError(
            f"dense_gradients is a share of the steps, in [0, 1]; got {dense_gradients}. "
            "With an update every 100 steps it is 1 / 101."
        )
    return forward_ratio + dense_gradients * (1 - forward_ratio) / 3


def table(costs: Costs, densities: Mapping[str, Any] | None = None) -> str:
    """A table with a line for each leaf that has MACs or a density: its FLOPs and their share.

    If a prunable leaf has no MACs, no product reads it, or the trace could not follow it to one:
    its sparsity saves no FLOPs.

    Args:
      costs: from :func:`count`.
      densities: as for :func:`forward`, not traced.

    Returns:
      Lines of text, joined.

    Raises:
      ValueError: as :func:`forward`.

    Example:
      >>> leaves = (LeafCost("a", (6, 50), 300, 50), LeafCost("b", (50, 2), 100, 2))
      >>> print(table(Costs(leaves, other=20), {"a": 0.1}))
      parameter  shape    MACs  density  FLOPs    share
      a          (6, 50)   300   0.1000     60   20.0 %
      b          (50, 2)   100   1.0000    200   66.7 %
      other                 20   1.0000     40   13.3 %
      all                  420   0.3571    300  100.0 %
    """
    given = {path: float(density) for path, density in (densities or {}).items()}
    dense, total = forward(costs), forward(costs, given)
    lines = [
        (leaf.path, str(leaf.shape), leaf.macs, given.get(leaf.path, 1.0))
        for leaf in costs.leaves
        if leaf.macs or leaf.path in given
    ]
    lines += [("other", "", costs.other, 1.0)] if costs.other else []
    lines += [("all", "", int(dense / 2), total / max(dense, 1.0))]
    rows = [("parameter", "shape", "MACs", "density", "FLOPs", "share")]
    for path, shape, macs, density in lines:
        flops = 2 * macs * density
        share = f"{100 * flops / max(total, 1.0):.1f} %"
        rows.append((path, shape, f"{macs:,}", f"{density:.4f}", f"{flops:,.0f}", share))
    return report.aligned(rows)
