"""A table of what is prunable and how much of it is kept."""

from collections.abc import Sequence

import numpy as np

from granet_jax import trees
from granet_jax.masks import collapsed
from granet_jax.types import PyTree


def table(params: PyTree, masks: PyTree | None = None, prunable: trees.Rules = ()) -> str:
    """A table with a line for each leaf: path, shape, weights, kept, sparsity, and why.

    Print it before a long run, to see what the path rules chose. The last line sums up the
    prunable weights. Below it are named the layers that have lost all their weights.

    Args:
      params: tree of arrays or ``ShapeDtypeStruct``.
      masks: bool tree, matched with the params by path; None = dense.
      prunable: the path rules that the method was given.

    Returns:
      Lines of text, joined.

    Raises:
      ValueError: as :func:`granet_jax.trees.describe`; or masks of another tree.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"fc": {"kernel": jnp.ones((4, 5)), "bias": jnp.ones(5)}}
      >>> print(table(params))
      parameter  shape   weights  kept  sparsity  why
      fc/bias    (5,)          5                  dense: rank 1
      fc/kernel  (4, 5)       20    20    0.0000  rank 2
      prunable                20    20    0.0000
    """
    leaves = trees.describe(params, prunable)
    rows = [("parameter", "shape", "weights", "kept", "sparsity", "why")]
    total = live = 0
    prunable_masks = iter(trees.pick(params if masks is None else masks, leaves))
    for leaf in leaves:
        if not leaf.prunable:
            why = f"dense: {leaf.why}"
            rows.append((leaf.path, str(leaf.shape), f"{leaf.size:,}", "", "", why))
            continue
        mask = next(prunable_masks)
        kept = leaf.size if masks is None else int(np.sum(np.asarray(mask)))
        rows.append((leaf.path, str(leaf.shape), *_numbers(leaf.size, kept), leaf.why))
        total, live = total + leaf.size, live + kept
    rows.append(("prunable", "", *_numbers(total, live), ""))
    lines = [aligned(rows, left=(0, 1, 5))]
    if empty := [] if masks is None else collapsed(masks, params, prunable):
        lines.append(f"Layer collapse: no weight is left in {', '.join(empty)}.")
    return "\n".join(lines)


def aligned(rows: Sequence[tuple[str, ...]], left: Sequence[int] = (0, 1)) -> str:
    """Rows of cells as aligned lines of text.

    Args:
      rows: of strings, all of one length.
      left: the columns that are flush left; the others are flush right.

    Returns:
      Lines of text, joined.

    Example:
      >>> print(aligned([("a", "xy", "1"), ("bc", "z", "20")]))
      a   xy   1
      bc  z   20
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _numbers(total: int, live: int) -> tuple[str, str, str]:
    return f"{total:,}", f"{live:,}", f"{1 - live / max(total, 1):.4f}"
