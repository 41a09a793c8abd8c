"""FLOPs of sparse inference and training, counted from the trace of any apply function.

:func:`count` walks the jaxpr of a function and attributes the multiply-adds (MACs) of each
convolution and matrix product to the parameter that it reads; nothing is computed. The rest is
arithmetic on these costs and on densities (:func:`granet_jax.metrics.densities`), safe under
``jit``, so that a run can add up what its real masks cost step by step.

The conventions are those of Evci et al. 2020, "Rigging the Lottery", appendix H, and of most
papers since: a MAC is 2 FLOPs; only products with prunable parameters shrink, in proportion to the
parameter's density; padding counts as work; a backward pass costs two forward passes.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from granet_jax import report, trees
from granet_jax.types import PyTree

# Which leaves of params a value is made of, and how many entries came from each (their ratio
# matters). Empty = a constant or a mask; None = data, which is all that depends on a batch.
_Origin: TypeAlias = dict[int, int] | None


class LeafCost(NamedTuple):
    """What one call of the function does with one leaf of ``params``."""

    path: str  # e.g. "conv1/kernel"
    shape: tuple[int, ...]
    macs: int  # multiply-adds of the products that read it, 0 for biases and the like
    outputs: int  # entries of the results of those products


class Costs(NamedTuple):
    """What one call of a function costs."""

    leaves: tuple[LeafCost, ...]  # all leaves of params, in leaf order
    other: int  # MACs of products that read no parameter (attention scores), or two


class _Product(NamedTuple):
    origin: dict[int, int]
    macs: int
    outputs: int

    def times(self, n: int) -> "_Product":
        return _Product(self.origin, n * self.macs, n * self.outputs)


def count(apply_fn: Callable[..., Any], params: PyTree, *args: Any) -> Costs:
    """Counts the multiply-adds of ``apply_fn(params, *args)`` by parameter, without computing it.

    A parameter is followed through whatever makes a kernel of it inside the function: reshapes,
    casts, slices of a stack of layers, masks, thresholds, normalisation by its own entries. Values
    that depend on ``args`` are data and no longer the parameter. A product of data with a parameter
    counts for that parameter, as often as it is done: in each iteration of a ``scan``, at each use
    of a shared parameter. Of a ``cond``, the costliest branch counts. Where several parameters
    enter elementwise, the largest is meant; concatenated ones share the cost by size.

    A convolution has ``positions * kernel size`` MACs, where the positions are those of the output,
    or of the input where that is dilated (transposed convolutions). Only ``conv_general_dilated``
    and ``dot_general`` are counted: neither lookups, norms and activations, nor ``ragged_dot``.

    Args:
      apply_fn: the forward pass. What is not an array (``train=False``) it has to close over.
      params: tree of arrays or ``ShapeDtypeStruct``s.
      *args: the same, of any structure: a batch of one image gives costs for each image; batch
        statistics, typed keys, masks. All but bool arrays, keys and single floats is data: masks
        that are not in ``params`` have to be bool (they may be cast inside).

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
    paths = list(trees.paths(params))
    jaxpr = jax.make_jaxpr(apply_fn)(params, *args).jaxpr
    avals: list[Any] = [var.aval for var in jaxpr.invars]
    shapes = [aval.shape for aval in avals[: len(paths)]]
    origins: list[_Origin] = [{i: math.prod(shape)} for i, shape in enumerate(shapes)]
    _, products = _walk(jaxpr, origins + [_from_outside(aval) for aval in avals[len(paths) :]])
    macs: Counter[int] = Counter()
    outputs: Counter[int] = Counter()
    for product in products:
        macs.update(_split(product.macs, product.origin))
        outputs.update(_split(product.outputs, product.origin))
    leaves = [
        LeafCost(path, shape, macs[i], outputs[i])
        for i, (path, shape) in enumerate(zip(paths, shapes, strict=True))
    ]
    return Costs(tuple(leaves), sum(p.macs for p in products if not p.origin))


def forward(
    costs: Costs, densities: Mapping[str, Any] | None = None, *, per_output: int = 0
) -> Any:
    """FLOPs of one forward pass.

    ``sum_l (2 macs_l density_l + per_output outputs_l) + 2 other``.

    Args:
      costs: from :func:`count`.
      densities: kept fraction by path, as :func:`granet_jax.metrics.densities` returns; floats or
        arrays, traced ones too. Leaves not named, and all under None, are dense.
      per_output: FLOPs added for each output of a product with a parameter, at any density.
        RigL's counter adds 2, for bias and ReLU, and so has 8.20e9 for a dense ResNet-50 where 0
        gives 8.18e9.

    Returns:
      A float, or a float32 array where densities are arrays.

    Raises:
      ValueError: a density is of no leaf.

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
    """FLOPs of a forward pass over those of the dense one: the papers' "test FLOPs", e.g. .24x.

    Args:
      costs: from :func:`count`.
      densities: as for :func:`forward`.
      per_output: as for :func:`forward`.

    Example: three quarters of the MACs are in a layer that keeps a tenth of its weights.
      >>> costs = Costs((LeafCost("a", (6, 5), 30, 5), LeafCost("b", (5, 2), 10, 2)), other=0)
      >>> round(ratio(costs, {"a": 0.1}), 4)
      0.325
    """
    return forward(costs, densities, per_output=per_output) / forward(costs, per_output=per_output)


def training_ratio(forward_ratio: Any, dense_gradients: float = 0.0) -> Any:
    """FLOPs of training over those of dense training for as many steps: ``f + q (1 - f) / 3``.

    A step costs three forward passes: one, one for the gradients of the activations, one for those
    of the weights. Sparse, each costs f of the dense one, but a method that grows by gradients
    needs a dense third on a share q of the steps:

    * 0 for static masks, SET, pruning without growth;
    * ``1 / (dT + 1)`` for RigL with updates every dT steps, whose paper has
      ``(3 dT f_S + 2 f_S + f_D) / (dT + 1)``; about as much for GraNet;
    * 1 for SNFS (and whatever else looks at all gradients at each step).

    Source: Evci et al. 2020, appendix H. The sources disagree: the authors of GraNet and ITOP
    neglect the dense gradients (q = 0); a reproduction of RigL (arXiv 2103.15767) prints 3 E[f] for
    gradual pruning (q = 0), but its code adds dense gradients at each step (q = 1).

    Args:
      forward_ratio: f, the mean over steps of :func:`ratio`; a float or an array. Train x times
        longer than the dense run and multiply the result by x.
      dense_gradients: q, in [0, 1].

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
    """One line for each leaf with a product or a density: MACs, density, FLOPs and their share.

    A prunable leaf without MACs is one that the trace lost on its way to a product, or that enters
    none: its density saves nothing.

    Args:
      costs: from :func:`count`.
      densities: as for :func:`forward`, not traced.

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


def _walk(jaxpr: Any, given: Sequence[_Origin]) -> tuple[list[_Origin], list[_Product]]:
    """Origins of a jaxpr's outputs, from those of its inputs, and the products on the way."""
    origins = dict(zip(jaxpr.invars, given, strict=True))
    origins |= {var: _from_outside(var.aval) for var in jaxpr.constvars}

    def origin(atom: Any) -> _Origin:
        if isinstance(atom, Literal):  # a number, or an array that was closed over
            aval: Any = atom.aval
            return _from_outside(aval) if aval.shape else {}
        return origins[atom]

    products = []
    for eqn in jaxpr.eqns:
        outs, done = _walk_eqn(eqn, [origin(atom) for atom in eqn.invars])
        # A single float (the norm of a kernel, a temperature) makes no data of what it scales.
        origins |= {
            var: {} if _is_float_scalar(var.aval) else out
            for var, out in zip(eqn.outvars, outs, strict=True)
        }
        products += done
    return [origin(atom) for atom in jaxpr.outvars], products


def _walk_eqn(eqn: Any, given: list[_Origin]) -> tuple[list[_Origin], list[_Product]]:
    name, inner = eqn.primitive.name, _inner_jaxprs(eqn)
    if name in ("dot_general", "conv_general_dilated"):
        return [None], [_product(eqn, given)]
    if name == "scan":
        num_consts, num_carry = eqn.params["num_consts"], eqn.params["num_carry"]
        outs, products = _walk_loop(inner[0], given, num_consts, num_carry)
        return outs, [product.times(eqn.params["length"]) for product in products]
    if name == "while":
        num_test, num_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        carry = given[num_test + num_body :]
        outs, products = _walk_loop(
            eqn.params["body_jaxpr"].jaxpr, given[num_test:], num_body, len(carry)
        )
        test = eqn.params["cond_jaxpr"].jaxpr
        if products or _walk(test, [*given[:num_test], *carry])[1]:
            raise ValueError(
                "A while_loop does convolutions or matrix products, and how often is not known "
                "before it runs. Give it a fixed number of trips (fori_loop with Python ints, "
                "scan), or count the function that it repeats."
            )
        return outs, []
    if name == "cond":
        branches = [_walk(branch, given[1:]) for branch in inner]
        outs = [_combined(origins) for origins in zip(*(outs for outs, _ in branches), strict=True)]
        return outs, max((p for _, p in branches), key=lambda p: sum(x.macs for x in p))
    if len(inner) == 1 and _shapes(inner[0]) == _shapes(eqn):  # jit, remat, custom_vjp and the like
        return _walk(inner[0], given)
    if any(_walk(jaxpr, [{}] * len(jaxpr.invars))[1] for jaxpr in inner):
        raise ValueError(
            f"Convolutions or matrix products inside {name} cannot be counted. Count a function "
            "that does the same without it (for shard_map: on whole arrays)."
        )
    if name == "concatenate":
        return [_concatenated(given, [math.prod(var.aval.shape) for var in eqn.invars])], []
    ins, outs = _shapes(eqn)
    if ins == outs:  # among those of several values: optimization_barrier, device_put
        return given, []
    return [_combined(given)] * len(outs), []


def _walk_loop(
    body: Any, given: list[_Origin], num_consts: int, num_carry: int
) -> tuple[list[_Origin], list[_Product]]:
    """Walks the body until the origins of what it carries no longer change."""
    consts, xs = given[:num_consts], given[num_consts + num_carry :]
    carry = given[num_consts : num_consts + num_carry]
    while True:
        outs, products = _walk(body, [*consts, *carry, *xs])
        joined = [_combined(pair) for pair in zip(carry, outs[:num_carry], strict=True)]
        if joined == carry:
            return outs, products
        carry = joined


def _product(eqn: Any, given: list[_Origin]) -> _Product:
    (lhs, rhs), (out,) = _shapes(eqn)
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        macs = math.prod(out) * math.prod(lhs[axis] for axis in contracted)
    else:  # a position (image, row, column) meets each weight once, in its group of channels
        numbers = eqn.params["dimension_numbers"]
        if math.prod(eqn.params["lhs_dilation"]) > 1:
            size, channels = math.prod(lhs), lhs[numbers.lhs_spec[1]]
            channels *= eqn.params["batch_group_count"]
        else:
            size, channels = math.prod(out), out[numbers.out_spec[1]]
        macs = size * math.prod(rhs) // channels
    read = [origin for origin in given if origin]
    return _Product(read[0] if len(read) == 1 else {}, macs, math.prod(out))


def _from_outside(aval: Any) -> _Origin:
    """Data, unless it can only be a mask, a key or a factor."""
    is_key = jnp.issubdtype(aval.dtype, jax.dtypes.prng_key)
    return {} if is_key or aval.dtype == bool or _is_float_scalar(aval) else None


def _is_float_scalar(aval: Any) -> bool:
    return getattr(aval, "shape", None) == () and bool(jnp.issubdtype(aval.dtype, jnp.floating))


def _combined(origins: Sequence[_Origin]) -> _Origin:
    """Data, if any is; else the largest."""
    known = [origin for origin in origins if origin is not None]
    if len(known) < len(origins):
        return None
    return max(known, key=lambda origin: sum(origin.values()), default={})


def _concatenated(origins: Sequence[_Origin], sizes: Sequence[int]) -> _Origin:
    if None in origins:
        return None
    parts: Counter[int] = Counter()
    for origin, size in zip(origins, sizes, strict=True):
        parts.update(_split(size, origin or {}))
    return dict(parts)


def _split(total: int, origin: dict[int, int]) -> dict[int, int]:
    """Shares of a total in proportion to the entries from each leaf; they add up exactly."""
    bounds = [0, *accumulate(origin.values())]
    edges = [total * bound // max(bounds[-1], 1) for bound in bounds]
    return {i: end - start for i, (start, end) in zip(origin, pairwise(edges), strict=True)}


def _inner_jaxprs(eqn: Any) -> list[Any]:
    values = eqn.params.values()
    flat = [x for value in values for x in (value if isinstance(value, tuple) else (value,))]
    return [getattr(x, "jaxpr", x) for x in flat if hasattr(x, "eqns")]


def _shapes(x: Any) -> tuple[list[Any], list[Any]]:
    """Shapes of the inputs and outputs of an equation or a jaxpr."""
    ins, outs = ([getattr(v.aval, "shape", None) for v in vs] for vs in (x.invars, x.outvars))
    return ins, outs
