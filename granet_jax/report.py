"""A table of what is prunable and how much of it is kept."""

from collections.abc import Sequence

import jax
import numpy as np

from granet_jax import trees
from granet_jax.types import PyTree


def table(params: PyTree, masks: PyTree | None = None, prunable: trees.Rules = ()) -> str:
    """One line for each leaf of ``params``: path, shape, prunable or dense, kept, sparsity.

    Print it before a long run, to see what the path rules chose. The last line sums up the
    prunable weights; a layer that has lost all of them is named below.

    Args:
      params: tree of arrays or ``ShapeDtypeStruct``s.
      masks: bool tree of the same structure; None = dense.
      prunable: the path rules that the method was given.

    Raises:
      ValueError: as :func:`granet_jax.trees.describe`.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"fc": {"kernel": jnp.ones((4, 5)), "bias": jnp.ones(5)}}
      >>> print(table(params))
      parameter  shape   weights  kept  sparsity
      fc/bias    (5,)          5         (dense)
      fc/kernel  (4, 5)       20    20    0.0000
      prunable                20    20    0.0000
    """
    leaves = trees.describe(params, prunable)
    flat_masks = [None] * len(leaves) if masks is None else jax.tree.leaves(masks)
    rows = [("parameter", "shape", "weights", "kept", "sparsity")]
    total = live = 0
    empty = []
    for leaf, mask in zip(leaves, flat_masks, strict=True):
        if not leaf.prunable:
            rows.append((leaf.path, str(leaf.shape), f"{leaf.size:,}", "", "(dense)"))
            continue
        kept = leaf.size if mask is None else int(np.sum(np.asarray(mask)))
        rows.append((leaf.path, str(leaf.shape), *_numbers(leaf.size, kept)))
        total, live = total + leaf.size, live + kept
        empty += [leaf.path] if kept == 0 else []
    rows.append(("prunable", "", *_numbers(total, live)))
    lines = [aligned(rows)]
    if empty:
        lines.append(f"Layer collapse: no weight is left in {', '.join(empty)}.")
    return "\n".join(lines)


def aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows of cells as lines of text, the first two columns flush left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _numbers(total: int, live: int) -> tuple[str, str, str]:
    return f"{total:,}", f"{live:,}", f"{1 - live / max(total, 1):.4f}"
