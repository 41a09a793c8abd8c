"""How one sparsity is spread over the layers of a network.

A distribution takes ``(shapes, sparsity)``: the shapes of the layers, and the fraction of zeros
over all of them together. It returns how many weights to keep: a tuple with one int for each layer,
or one int for the whole tree; see :class:`granet_jax.types.Distribution`. The counts add up to
exactly ``round(N * (1 - sparsity))`` for N weights (halves round to even, as in Python).

If the sparsity is *traced* (``vmap``, ``optax.inject_hyperparams``), counts are computed in float32
and may be off by a few weights in 10^8; in float64 if the sparsity is float64. ``uniform`` then
rounds each layer by itself. ``erk`` and ``by_path`` decide in Python and refuse a traced sparsity.
"""

import math
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from granet_jax.scores import at_least_float32
from granet_jax.types import Counts, Distribution, Shapes


def check_sparsity(name: str, sparsity: Any) -> None:
    """Raises an error unless ``0 <= sparsity < 1``; a traced value is not checked."""
    if isinstance(sparsity, str):
        raise TypeError(f"{name} must be a number; got {sparsity!r}.")
    if not isinstance(sparsity, jax.core.Tracer) and not 0.0 <= float(sparsity) < 1.0:
        raise ValueError(
            f"{name} must be in [0, 1), the fraction of zeros; got {float(sparsity)}. "
            "Nine weights out of ten removed is 0.9."
        )


def uniform(shapes: Shapes, sparsity: Any) -> Counts:
    """The same sparsity in each layer.

    Each layer's count is rounded down. The weights left over go to the layers with the largest
    fractions, so that the total is exact.

    Source: Evci et al. 2020, "Rigging the Lottery", section 3, whose uniform runs also keep the
    first convolution dense: use a rule for that.

    Args:
      shapes: one shape for each layer.
      sparsity: fraction of zeros in [0, 1); may be traced.

    Returns:
      One int for each layer; an int32 array if the sparsity is traced.

    Raises:
      ValueError: sparsity outside [0, 1), or so high that a layer would lose all its weights; the
        message names the maximum.

    Example:
      >>> uniform([(4, 5), (5, 2)], 0.9)
      (2, 1)
    """
    sizes = [math.prod(shape) for shape in shapes]
    if isinstance(sparsity, jax.core.Tracer):
        return _rounded(sizes, sparsity)
    return _feasible("uniform", _uniform_counts, shapes, sparsity)


def erk(shapes: Shapes, sparsity: Any) -> Counts:
    """Erdos-Renyi-Kernel: density proportional to (sum of dimensions) / (product of dimensions).

    A layer whose density would exceed 1 is kept dense, and the densities of the others are computed
    again, until no density exceeds 1. The order of a kernel's axes does not matter: ``(kh, kw, in,
    out)`` and ``(out, in, kh, kw)`` give the same. An attention kernel ``(in, heads, dim)`` counts
    with its three dimensions, although it is used as a matrix.

    Source: Mocanu et al. 2018 (ER) and Evci et al. 2020, "Rigging the Lottery", section 3 (ERK).
    Differs from the reference code in that the counts are exact: each layer is rounded down and
    the weights left over go to the largest fractions.

    Args:
      shapes: one shape for each layer.
      sparsity: fraction of zeros in [0, 1), a number.

    Returns:
      One int for each layer.

    Raises:
      ValueError: sparsity outside [0, 1) or traced, or so high that a layer would lose all its
        weights; the message names the maximum.

    Example: the small layer stays dense.
      >>> erk([(100, 100), (4, 2)], 0.9)
      (993, 8)
    """
    if isinstance(sparsity, jax.core.Tracer):
        raise ValueError(
            "erk needs a number for the sparsity, got a traced value: it decides in Python which "
            "layers stay dense. Compute it outside jit/vmap, or use uniform or global_ranking."
        )
    return _feasible("erk", _erk_counts, shapes, sparsity)


def global_ranking(shapes: Shapes, sparsity: Any) -> Counts:
    """One budget for all layers together: the weights of the whole tree are ranked as one.

    A layer may lose all its weights (layer collapse); :func:`granet_jax.report.table` names such
    layers. On transformers a budget for each layer is often better.

    Args:
      shapes: one shape for each layer.
      sparsity: fraction of zeros in [0, 1); may be traced.

    Returns:
      One int; an int32 scalar if the sparsity is traced.

    Raises:
      ValueError: sparsity outside [0, 1), or so high that nothing would be left; or 2^31 weights
        or more, which int32 counts cannot hold.

    Example:
      >>> global_ranking([(4, 5), (5, 2)], 0.9)
      3
    """
    total = sum(math.prod(shape) for shape in shapes)
    if total >= 2**31:
        raise ValueError(
            f"One ranking over {total} weights does not fit int32 counts (at most 2^31 - 1); "
            "give each layer its own count with uniform or erk."
        )
    if isinstance(sparsity, jax.core.Tracer):
        return _rounded(total, sparsity)
    return _feasible("global_ranking", lambda shapes, num_keep: num_keep, shapes, sparsity)


def by_path(rules: Sequence[tuple[str, float]], otherwise: Distribution = erk) -> Distribution:
    """Gives the layers whose path matches a pattern a sparsity of their own.

    The other layers get the weights that are left, spread by ``otherwise``, so that the total is
    the sparsity that the method asks for. If the method asks for sparsity 0, as at a dense start of
    gradual pruning, all layers are dense.

    Args:
      rules: pairs of a pattern, searched for in the path, and a sparsity in [0, 1); the first that
        matches decides.
      otherwise: distribution of the other layers; it has to give one count for each layer.

    Returns:
      A distribution. It raises a ValueError if a pattern matches no layer, if a named layer would
      lose all its weights, if the other layers cannot make up for the total, if all layers are
      named and their total differs from the one asked for, or if the sparsity is traced.

    Raises:
      ValueError: a sparsity outside [0, 1).

    Example: attention at .5, so the perceptron has to be at .7 for .6 in all.
      >>> from granet_jax.types import LayerShape
      >>> layers = [LayerShape((10, 10), "attn/kernel"), LayerShape((10, 10), "mlp/kernel")]
      >>> by_path([("attn", 0.5)])(layers, 0.6)
      (50, 30)
    """
    for pattern, sparsity in rules:
        check_sparsity(f"The sparsity of {pattern!r}", sparsity)

    def distribution(shapes: Shapes, sparsity: Any) -> Counts:
        if isinstance(sparsity, jax.core.Tracer):
            raise ValueError("by_path needs a number for the sparsity, got a traced value.")
        check_sparsity("sparsity", sparsity)
        sizes = [math.prod(shape) for shape in shapes]
        if float(sparsity) == 0.0:
            return tuple(sizes)
        named = _named(rules, shapes)
        kept = {i: round(sizes[i] * (1.0 - own)) for i, own in named.items()}
        if empty := [i for i, count in kept.items() if count == 0 < sizes[i]]:
            path = getattr(shapes[empty[0]], "path", "")
            raise ValueError(
                f"by_path leaves none of the {sizes[empty[0]]} weights of {path} at a sparsity of "
                f"{named[empty[0]]}. Give it a lower one."
            )
        rest = [i for i in range(len(shapes)) if i not in named]
        asked, size = round(sum(sizes) * (1.0 - float(sparsity))), sum(sizes[i] for i in rest)
        left = asked - sum(kept.values())
        if not rest and abs(left) > len(shapes):
            raise ValueError(
                "by_path names every layer, and its sparsities make "
                f"{1 - sum(kept.values()) / sum(sizes):.6f} in all; {float(sparsity)} was asked "
                "for."
            )
        if rest and not 0 < left <= size:
            raise ValueError(
                f"by_path leaves {left} of {size} weights to {shapes[rest[0]].path} and the other "  # type: ignore[attr-defined]
                f"layers without a rule, so that all have sparsity {float(sparsity)}. Ask for "
                "another in all, or by path."
            )
        if rest:
            spread = otherwise([shapes[i] for i in rest], 1.0 - left / size)
            kept |= dict(zip(rest, _for_each(spread), strict=True))
        return tuple(kept[i] for i in range(len(shapes)))

    return distribution


def _named(rules: Sequence[tuple[str, float]], shapes: Shapes) -> dict[int, float]:
    """The sparsity of each layer that a rule matches, by the layer's index."""
    paths = [getattr(shape, "path", "") for shape in shapes]
    for pattern, _ in rules:
        if not any(re.search(pattern, path) for path in paths):
            raise ValueError(
                f"by_path: {pattern!r} matches no prunable layer. There are: "
                f"{', '.join(dict.fromkeys(paths))}."
            )
    found = {}
    for i, path in enumerate(paths):
        match = next((own for pattern, own in rules if re.search(pattern, path)), None)
        if match is not None:
            found[i] = match
    return found


def _for_each(counts: Counts) -> Sequence[int]:
    if isinstance(counts, int):
        raise ValueError(
            "by_path gives each layer its own count; global_ranking gives one for all. Take "
            "otherwise=granet_jax.erk or uniform."
        )
    return counts


def _rounded(sizes: Any, sparsity: jax.Array) -> jax.Array:
    dtype = at_least_float32(sparsity.dtype)
    return jnp.round(np.asarray(sizes, dtype) * (1.0 - sparsity.astype(dtype))).astype(jnp.int32)


def _uniform_counts(shapes: Shapes, num_keep: int) -> tuple[int, ...]:
    sizes = [math.prod(shape) for shape in shapes]
    return _apportion([Fraction(num_keep * size, sum(sizes)) for size in sizes], num_keep)


def _erk_counts(shapes: Shapes, num_keep: int) -> tuple[int, ...]:
    sizes = [math.prod(shape) for shape in shapes]
    # density = eps * dims / size, so the share of a layer is simply eps * dims.
    dims = [sum(shape) for shape in shapes]
    dense: set[int] = set()
    while len(dense) < len(shapes):
        sparse = [i for i in range(len(shapes)) if i not in dense]
        eps = Fraction(num_keep - sum(sizes[i] for i in dense), sum(dims[i] for i in sparse))
        highest = max(Fraction(dims[i], sizes[i]) for i in sparse)
        if eps * highest <= 1:
            break
        dense |= {i for i in sparse if Fraction(dims[i], sizes[i]) == highest}
    shares = [Fraction(sizes[i]) if i in dense else eps * dims[i] for i in range(len(shapes))]
    return _apportion(shares, num_keep)


def _apportion(shares: Sequence[Fraction], total: int) -> tuple[int, ...]:
    """Rounds shares down; what is left goes to the largest fractions, ties in layer order."""
    floors = [math.floor(share) for share in shares]
    fractions = [share - floor for share, floor in zip(shares, floors, strict=True)]
    by_fraction = sorted(range(len(shares)), key=lambda i: -fractions[i])
    for i in by_fraction[: total - sum(floors)]:
        floors[i] += 1
    return tuple(floors)


def _feasible(name: str, counts_of: Any, shapes: Shapes, sparsity: Any) -> Counts:
    """The counts for a sparsity; refuses those that leave a layer without weights."""
    check_sparsity("sparsity", sparsity)
    total = sum(math.prod(shape) for shape in shapes)
    if total == 0:
        return tuple(0 for _ in shapes)

    def is_feasible(num_keep: int) -> bool:
        counts = counts_of(shapes, num_keep)
        return min(counts) > 0 if isinstance(counts, tuple) else counts > 0

    num_keep = round(total * (1.0 - float(sparsity)))
    if is_feasible(num_keep):
        return counts_of(shapes, num_keep)
    too_few, enough = num_keep, total
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if is_feasible(middle) else (middle, enough)
    maximum = math.floor(1e6 * (1.0 - enough / total)) / 1e6
    raise ValueError(
        f"{name} cannot meet sparsity {float(sparsity)}: {num_keep} of {total} weights would leave "
        f"a layer without any. The maximum for these {len(shapes)} layers is {maximum}."
    )
