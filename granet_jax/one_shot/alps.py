"""ALPS: a layer's best weights and their values together, by alternating directions."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from granet_jax.one_shot.methods import Keep, OneShot
from granet_jax.one_shot.statistics import gram

_STEPS = 10  # of conjugate gradients, at the end
_LEAST_RHO = 1e-12  # it falls for as long as the mask stays, and at 0 nothing holds it


def alps(*, damping: float = 0.01, rho: float = 0.1, iterations: int = 300) -> OneShot:
    """Minimises the squared output error over all weights with a given number of nonzeros.

    ADMM: B minimises the error near D; D keeps the largest weights of B; the dual V pulls the two
    together, with a strength rho that rises as the set of kept weights settles. Then conjugate
    gradients on the kept weights. It costs one eigendecomposition of the Gram matrix, and in each
    iteration a product of ``(inputs, inputs)`` by ``(inputs, outputs)``. At high sparsities it has
    a lower error than SparseGPT.

    Source: Meng et al. 2024, "ALPS: improved optimization for highly sparse one-shot pruning for
    large language models".

    Args:
      damping: share of the mean of the Gram matrix's diagonal that is added to the diagonal.
      rho: at the start.
      iterations: the largest number of them.

    Returns:
      A method for :func:`granet_jax.one_shot.prune`.

    Raises:
      ValueError: a number that is not positive.

    Differs from the paper's code in that it never restarts: if nothing changes before rho has
    risen, rho falls and iteration goes on; inputs that are always 0 lose their weights.

    Example: two inputs that are always equal; the kept weight takes the sum of both.
      >>> import jax.numpy as jnp
      >>> values = jnp.array([[100.0, 100.0], [100.0, 100.0]])
      >>> w, mask = alps(damping=1e-4).prune(jnp.array([[1.0], [2.0]]), values, Keep(1))
      >>> round(float(w.sum()), 2)
      3.0
    """
    if damping <= 0 or rho <= 0 or iterations < 1:
        raise ValueError(f"Numbers above 0; got {damping=}, {rho=}, {iterations=}.")
    return OneShot(functools.partial(_prune, damping, rho, iterations), gram)


def _prune(
    damping: float, rho: float, iterations: int, w: jax.Array, values: jax.Array, keep: Keep
) -> tuple[jax.Array, jax.Array]:
    diagonal = jnp.diagonal(values)
    w = jnp.where((diagonal > 0)[:, None], w, 0.0)
    g = values + damping * jnp.maximum(jnp.mean(diagonal), 1e-30) * jnp.eye(len(w), dtype=w.dtype)
    scale = jnp.sqrt(jnp.diagonal(g))
    g, b0 = g / scale[None] / scale[:, None], w * scale[:, None]
    roots, q = jnp.linalg.eigh(g)
    goal = _times(g, b0)

    def iterate(state: Any) -> Any:
        i, _, d, v, rho, old, has_grown, _ = state
        b = _times(q, _times(q.T, goal - v + rho * d) / (roots + rho)[:, None])
        mask = keep.best(jnp.abs(b + v / rho))
        d = jnp.where(mask, b + v / rho, 0.0)
        v += rho * (b - d)
        changed = jnp.sum(mask != old)
        checks = (i + 1) % 3 == 0
        share = changed / keep.num_keep
        up = jnp.where(share > 0.1, 1.3, jnp.where(share > 0.005, 1.2, 1.1))
        factor = jnp.where((changed > 0) & ((share > 0.005) | has_grown), up, 0.2)
        done = checks & (changed == 0) & has_grown
        rho = jnp.where(checks & ~done, jnp.maximum(rho * factor, _LEAST_RHO), rho)
        old = jnp.where(checks, mask, old)
        return i + 1, mask, d, v, rho, old, has_grown | (checks & (factor > 1)), done

    def goes_on(state: Any) -> Any:
        return (state[0] < iterations) & ~state[-1]

    mask = keep.best(jnp.abs(b0))
    d, v = jnp.where(mask, b0, 0.0), jnp.zeros_like(b0)
    start = jax.tree.map(jnp.asarray, (0, mask, d, v, jnp.float32(rho), mask, False, False))
    _, mask, d, *_ = jax.lax.while_loop(goes_on, iterate, start)
    return jnp.where(mask, _polished(g, goal, d, mask) / scale[:, None], 0.0), mask


def _polished(g: jax.Array, goal: jax.Array, d: jax.Array, mask: jax.Array) -> jax.Array:
    """Conjugate gradients on the kept weights, for each output by itself."""

    def step(_: Any, state: Any) -> Any:
        d, rest, way, size = state
        along = jnp.where(mask, _times(g, way), 0.0)
        length = size / jnp.maximum(jnp.sum(way * along, axis=0), 1e-30)
        d, rest = d + length[None] * way, rest - length[None] * along
        new = jnp.sum(rest**2, axis=0)
        return d, rest, rest + (new / jnp.maximum(size, 1e-30))[None] * way, new

    rest = jnp.where(mask, goal - _times(g, d), 0.0)
    start = d, rest, rest, jnp.sum(rest**2, axis=0)
    return jax.lax.fori_loop(0, _STEPS, step, start)[0]


def _times(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision="highest")
