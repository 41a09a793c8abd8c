"""SparseGPT: prunes a layer input by input, and corrects the weights that are left."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from granet_jax.one_shot.methods import Keep, OneShot
from granet_jax.one_shot.statistics import gram


def sparsegpt(*, block: int = 128, damping: float = 0.01) -> OneShot:
    """Removes the weights that change the output least, and corrects the weights of later inputs.

    Let ``H = X^T X`` (damped), and U the upper factor of its inverse, ``U^T U = H^-1``. Inputs are
    processed in order. If the weight ``w_j`` of input j is removed, ``w_j / U_jj`` times row
    ``U_j`` is subtracted from the weights of the inputs after it. Which weights to remove is
    decided for a block of inputs at once, by ``w^2 / U_jj^2``; for N:M at the first input of each
    group, on the weights as corrected so far. Inputs that are always 0 lose their weights first.

    Source: Frantar & Alistarh 2023, "SparseGPT: massive language models can be accurately pruned in
    one-shot", algorithm 1.

    Args:
      block: how many inputs are decided together; a multiple of M for N:M.
      damping: share of the mean of H's diagonal that is added to the diagonal.

    Returns:
      A method for :func:`granet_jax.one_shot.prune`.

    Raises:
      ValueError: a block below 1 or negative damping; with the layer, a block that M does not
        divide.

    Differs from the paper's code in that: each block keeps its share of the layer's count, so that
    the count is exact (theirs prunes one weight more in each block); U comes from one factorisation
    of H in reversed order, without computing an inverse.

    Example: two inputs that are always equal; the kept weight takes the sum of both.
      >>> import jax.numpy as jnp
      >>> values = jnp.array([[100.0, 100.0], [100.0, 100.0]])
      >>> w, mask = sparsegpt(damping=1e-4).prune(jnp.array([[1.0], [2.0]]), values, Keep(1))
      >>> [round(float(x), 2) for x in w[:, 0]]
      [0.0, 3.0]
    """
    if block < 1 or damping < 0:
        raise ValueError(f"block is at least 1, damping at least 0; got {block=}, {damping=}.")
    return OneShot(functools.partial(_prune, block, damping), gram)


def _prune(
    block: int, damping: float, w: jax.Array, values: jax.Array, keep: Keep
) -> tuple[jax.Array, jax.Array]:
    num_inputs, num_outputs = w.shape
    if 0 < keep.group < num_inputs and block % keep.group:
        raise ValueError(f"SparseGPT's block of {block} has to be a multiple of M, {keep.group}.")
    seen = jnp.diagonal(values) > 0
    w = jnp.where(seen[:, None], w, 0.0)
    u = inverse_factor(values, damping)
    masks, kept = [], 0
    # Integers for each output, if all keep the same number.
    step = num_outputs if keep.group == num_inputs else 1
    total = step * max((keep.num_keep + step // 2) // step, 1)
    for start in range(0, num_inputs, block):
        end = min(start + block, num_inputs)
        share = step * round(end * total / (step * num_inputs)) - kept
        kept += share
        inside = Keep(share, min(keep.group, end - start))
        rows, errors, mask = _block(w[start:end], u[start:end, start:end], inside)
        after = jnp.where(jnp.arange(num_inputs) >= end, u[start:end], 0.0)
        w = w.at[start:end].set(rows) - jnp.matmul(after.T, errors, precision="highest")
        masks.append(mask)
    mask = jnp.concatenate(masks)
    return jnp.where(mask, w, 0.0), mask


def inverse_factor(values: jax.Array, damping: float) -> jax.Array:
    """The upper U with ``U^T U = H^-1``, where H comes from the Gram matrix; NaN if singular.

    ``H = 2 values``, with 1 on the diagonal for inputs that are always 0, plus damping. In reversed
    order H is ``L L^T``, so H is ``R R^T``, where the upper R is L reversed; U is the inverse of R.
    """
    diagonal = jnp.diagonal(2 * values)
    diagonal = jnp.where(diagonal > 0, diagonal, 1.0)
    h = jnp.where(jnp.eye(len(values), dtype=bool), diagonal[None], 2 * values)
    eye = jnp.eye(len(values), dtype=values.dtype)
    h += damping * jnp.mean(diagonal) * eye
    r = jnp.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    return jax.scipy.linalg.solve_triangular(r, eye)


def _block(w: jax.Array, u: jax.Array, keep: Keep) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A corrected block, the corrections for the inputs after it, and its mask."""
    diagonal = jnp.diagonal(u)
    by_group = keep.group < len(w) and keep.group > 0
    all_at_once = jnp.zeros(w.shape, bool)
    if not by_group and keep.num_keep:  # a group would keep at least one
        all_at_once = keep.best((w / diagonal[:, None]) ** 2)
    each = keep._replace(num_keep=round(keep.num_keep * keep.group / len(w)))

    def column(j: Any, state: Any) -> Any:
        w, errors, mask = state
        if by_group:

            def decide(mask: jax.Array) -> jax.Array:
                def rows(x: jax.Array) -> jax.Array:
                    return jax.lax.dynamic_slice_in_dim(x, j, keep.group)

                best = each.best((rows(w) / rows(diagonal)[:, None]) ** 2)
                return jax.lax.dynamic_update_slice_in_dim(mask, best, j, 0)

            mask = jax.lax.cond(j % keep.group == 0, decide, lambda mask: mask, mask)
        kept = jnp.where(mask[j], w[j], 0.0)
        error = (w[j] - kept) / diagonal[j]
        after = jnp.where(jnp.arange(len(w)) > j, u[j], 0.0)
        w = (w - after[:, None] * error[None]).at[j].set(kept)
        return w, errors.at[j].set(error), mask

    return jax.lax.fori_loop(0, len(w), column, (w, jnp.zeros_like(w), all_at_once))
