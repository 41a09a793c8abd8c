"""Low-rank updates of sparse weights, ``W + scale m (a b)``, which keep pruned weights at 0."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from granet_jax import trees
from granet_jax.masks import apply_masks, check_masks
from granet_jax.types import PyTree


def init(
    key: jax.Array, params: PyTree, rank: int, prunable: trees.Rules = ()
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Factors for all prunable leaves: ``a`` normal with variance 1 / inputs, ``b`` zeros.

    Args:
      key: typed key.
      params: tree of arrays or ``ShapeDtypeStruct``; leaves ``(*stack, in, out)``.
      rank: of the update, >= 1.
      prunable: path rules, see :func:`granet_jax.trees.describe`; each stacked layer gets factors
        of its own.

    Returns:
      ``{path: (*stack, in, rank)}`` and ``{path: (*stack, rank, out)}``. Train them with any
      optimizer and keep ``params`` fixed.

    Raises:
      ValueError: a rank below 1, or a prunable layer that is not a matrix.

    Source: Hu et al. 2021, "LoRA: low-rank adaptation of large language models", section 4.1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> a, b = init(jax.random.key(0), {"kernel": jnp.ones((8, 4))}, rank=2)
      >>> a["kernel"].shape, b["kernel"].shape
      ((8, 2), (2, 4))
    """
    if rank < 1:
        raise ValueError(f"A low-rank update has a rank of at least 1; got {rank}.")
    a, b = {}, {}
    pairs = zip(trees.describe(params, prunable), jax.tree.leaves(params), strict=True)
    for i, (leaf, x) in enumerate(pairs):
        if not leaf.prunable:
            continue
        if len(leaf.layer_shape) != 2:
            raise ValueError(
                f"{leaf.path} {leaf.shape} is no matrix, or no stack of them by a rule; leave it "
                f"out: prunable=[({leaf.path!r}, False), ...]."
            )
        *stack, inputs, outputs = leaf.shape
        draw = jax.random.normal(jax.random.fold_in(key, i), (*stack, inputs, rank), x.dtype)
        a[leaf.path] = draw / inputs**0.5
        b[leaf.path] = jnp.zeros((*stack, rank, outputs), x.dtype)
    return a, b


def merge(
    params: PyTree,
    a: Mapping[str, jax.Array],
    b: Mapping[str, jax.Array],
    masks: PyTree,
    scale: float = 1.0,
) -> PyTree:
    """``W + scale m (a b)`` for the leaves that have factors; masked weights are 0.

    Use it in the loss to train ``a`` and ``b``. After training it gives the merged weights, which
    are as sparse as before.

    Source: Hu et al. 2021, section 4.1, with the product masked by ``m``.

    Args:
      params: tree of arrays.
      a: ``{path: (*stack, in, rank)}``.
      b: ``{path: (*stack, rank, out)}``.
      masks: bool tree of params.
      scale: of the update, alpha / rank in the paper.

    Returns:
      New parameters of the same dtypes. The product ``a b`` is float32 or wider.

    Raises:
      ValueError: factors without a parameter or without the other factor, or of a wrong shape;
        masks of another tree.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jnp.array([[1.0, 0.0]])}
      >>> masks = {"kernel": jnp.array([[True, False]])}
      >>> a, b = {"kernel": jnp.array([[2.0]])}, {"kernel": jnp.array([[3.0, 3.0]])}
      >>> merge(params, a, b, masks)["kernel"].tolist()
      [[7.0, 0.0]]
    """
    masks, found = check_masks(masks, params), trees.paths(params)
    if odd := sorted((a.keys() ^ b.keys()) | (a.keys() - found.keys())):
        raise ValueError(f"Factors without their other half, or of no parameter: {', '.join(odd)}.")

    def merged(path: str, w: Any) -> Any:
        if path not in a:
            return w
        left, right = a[path], b[path]
        shape = (*left.shape[:-1], *right.shape[-1:])
        is_stack = left.shape[:-2] == right.shape[:-2] and left.shape[-1:] == right.shape[-2:-1]
        if shape != w.shape or not is_stack:
            raise ValueError(
                f"The factors of {path}, {left.shape} and {right.shape}, make no {w.shape}."
            )
        update = jnp.matmul(left, right, preferred_element_type=jnp.promote_types(w.dtype, "f4"))
        return (w + scale * update).astype(w.dtype)

    new = [merged(path, w) for path, w in found.items()]
    return apply_masks(jax.tree.unflatten(jax.tree.structure(params), new), masks)
