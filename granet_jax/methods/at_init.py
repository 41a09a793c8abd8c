"""Pruning before training: SNIP, GraSP, SynFlow and magnitude. They return masks.

Train under them with ``gj.static(masks=masks)``, or start another method from them. The initial
weights do not change. Each function is a score and :func:`masks_from`, which ranks scores. The
random baseline is ``gj.random_masks(key, params, sparsity, gj.global_ranking)``.

By default all rank the whole network as one, as the papers do, so a layer may lose all its weights
(layer collapse): a warning names such layers, and so does :func:`collapsed`. Put batch norm into
inference mode, as the code of the SynFlow paper does. A residual branch that starts at zero (its
last scale is 0) has scores of 0 and is pruned first.

Example: SNIP on linear regression.
  >>> import granet_jax as gj, jax, jax.numpy as jnp, optax
  >>> params = {"kernel": jax.random.normal(jax.random.key(0), (8, 5)), "bias": jnp.zeros(5)}
  >>> loss = lambda params, batch: jnp.mean(
  ...     (batch[0] @ params["kernel"] + params["bias"][None] - batch[1]) ** 2
  ... )
  >>> batch = jax.random.normal(jax.random.key(1), (32, 8)), jnp.ones((32, 5))
  >>> masks = gj.at_init.snip(loss, params, [batch], sparsity=0.9)
  >>> tx = gj.sparsify(optax.sgd(0.1), gj.static(masks=masks))
  >>> params = gj.apply_masks(params, masks)
  >>> int((params["kernel"] != 0).sum())
  4
"""

import functools
import operator
import warnings
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from granet_jax import distributions, groups, structures, trees
from granet_jax import scores as score_functions
from granet_jax.masks import apply_masks, collapsed, ones, prune_to
from granet_jax.types import Distribution, Event, PyTree

LossFn: TypeAlias = Callable[[PyTree, Any], jax.Array]  # (params, batch) -> scalar
ApplyFn: TypeAlias = Callable[[PyTree, jax.Array], jax.Array]  # (params, inputs) -> outputs


def snip(
    loss_fn: LossFn,
    params: PyTree,
    batches: Iterable[Any],
    *,
    sparsity: Any,
    scope: Distribution = distributions.global_ranking,
    prunable: trees.Rules = (),
) -> PyTree:
    """Keeps the connections whose removal would change the loss most: :func:`snip_scores`.

    Source: Lee et al. 2019, "SNIP: Single-shot network pruning based on connection sensitivity".

    Args:
      loss_fn: pure function ``(params, batch) -> scalar``.
      params: tree of float arrays, as initialised.
      batches: pytrees of arrays, as the loss takes them. The paper takes one batch, the code of the
        SynFlow paper 10 images for each class.
      sparsity: fraction of zeros among prunable weights, in [0, 1).
      scope: what is ranked together: ``global_ranking``, or ``uniform`` or ``erk`` by layer.
      prunable: path rules, see :func:`granet_jax.trees.describe`.

    Returns:
      Masks, a bool tree of ``params``; leaves that are not prunable are all True. Counts are exact.

    Warns:
      UserWarning: a layer has lost all its weights.

    Raises:
      ValueError: no batch; scores that are not finite, or all 0; a sparsity outside [0, 1), or one
        that the structures cannot have.

    Differs from the paper's code in that the weights are not drawn again before training.

    Example: the gradient of this loss is (1, 2, 3, 4), so the scores are (4, 6, 6, 4).
      >>> import granet_jax as gj, jax.numpy as jnp
      >>> params = {"kernel": jnp.array([[4.0, 3.0], [-2.0, 1.0]])}
      >>> loss = lambda params, batch: jnp.vdot(params["kernel"], batch)
      >>> batch = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> gj.at_init.snip(loss, params, [batch], sparsity=0.5)["kernel"].tolist()
      [[False, True], [True, False]]
    """
    scores = snip_scores(loss_fn, params, batches)
    return masks_from(scores, params, sparsity=sparsity, scope=scope, prunable=prunable)


def snip_scores(loss_fn: LossFn, params: PyTree, batches: Iterable[Any]) -> PyTree:
    """``|theta * g|``, where g is the gradient of the loss summed over batches.

    This is ``|dL/dm|`` at masks m of ones; for a complex weight, the largest value over masks of
    modulus 1. The papers divide by the sum of all scores, which changes no ranking.

    Source: Lee et al. 2019, as :func:`snip`.

    Args:
      loss_fn: as in :func:`snip`.
      params: as in :func:`snip`.
      batches: as in :func:`snip`.

    Returns:
      Tree of ``params``, scores >= 0, float32 or (for float64 parameters) float64.

    Raises:
      ValueError: no batch.

    Example:
      >>> import granet_jax as gj, jax.numpy as jnp
      >>> loss = lambda params, batch: 0.5 * batch * jnp.sum(params["w"] ** 2)
      >>> gj.at_init.snip_scores(loss, {"w": jnp.array([1.0, -2.0])}, [1.0, 2.0])["w"].tolist()
      [3.0, 12.0]
    """
    grads = _sum(jax.jit(jax.grad(loss_fn)), params, batches)
    return score_functions.saliency(Event(params, grads))


def grasp(
    loss_fn: LossFn,
    params: PyTree,
    batches: Iterable[Any],
    *,
    sparsity: Any,
    scope: Distribution = distributions.global_ranking,
    prunable: trees.Rules = (),
) -> PyTree:
    """Keeps the connections that matter most for the norm of the gradient: :func:`grasp_scores`.

    Source: Wang et al. 2020, "Picking winning tickets before training by preserving gradient flow".

    Args:
      loss_fn: as in :func:`snip`, but twice differentiable; in the paper the cross-entropy of
        ``logits / 200``.
      params: as in :func:`snip`.
      batches: as in :func:`snip`.
      sparsity: as in :func:`snip`.
      scope: as in :func:`snip`.
      prunable: as in :func:`snip`.

    Returns:
      Masks, as :func:`snip`.

    Raises:
      ValueError: as :func:`snip`.

    Differs from the paper's code in that: linear layers are not drawn again before scoring; batches
    are not split in halves; g includes the gradients of biases and norms; counts are exact.

    Example: on ``(a w0^2 + w1^2) / 2`` the scores are ``(a^2 w0^2, w1^2)``.
      >>> import granet_jax as gj, jax.numpy as jnp
      >>> loss = lambda params, a: jnp.sum(jnp.array([[a, 1.0]]) * params["kernel"] ** 2) / 2
      >>> params = {"kernel": jnp.array([[1.0, 2.0]])}
      >>> gj.at_init.grasp(loss, params, [3.0], sparsity=0.5)["kernel"].tolist()
      [[True, False]]
    """
    scores = grasp_scores(loss_fn, params, batches)
    return masks_from(scores, params, sparsity=sparsity, scope=scope, prunable=prunable)


def grasp_scores(loss_fn: LossFn, params: PyTree, batches: Iterable[Any]) -> PyTree:
    """``theta * (H g)``: gradient g and Hessian H of the loss, each summed over batches. Signed.

    To first order, removing a weight lowers ``|g|^2`` by twice its score. (The paper's score has
    the other sign, and the largest are pruned.) A complex weight counts as its real and its
    imaginary part: its score is ``Re(theta * conj(H g))``, where g and H are the gradient and the
    Hessian with respect to these real numbers.

    Source: Wang et al. 2020, as :func:`grasp`.

    Args:
      loss_fn: as in :func:`grasp`.
      params: as in :func:`grasp`.
      batches: as in :func:`grasp`.

    Returns:
      Tree of ``params``, signed scores, float32 or (for float64 parameters) float64.

    Raises:
      ValueError: no batch.

    Example:
      >>> import granet_jax as gj, jax.numpy as jnp
      >>> loss = lambda params, batch: batch * jnp.sum(params["w"] ** 3) / 3
      >>> gj.at_init.grasp_scores(loss, {"w": jnp.array([2.0, -1.0])}, [1.0])["w"].tolist()
      [32.0, 2.0]
    """
    batches = tuple(batches)
    grad = jax.grad(loss_fn)

    @jax.jit
    def hessian_times(vector: PyTree, params: PyTree, batch: Any) -> PyTree:
        # H is symmetric; and functions with a custom_vjp have no jvp.
        return jax.vjp(lambda p: grad(p, batch), params)[1](vector)[0]

    # JAX's gradient of a complex weight x + iy is dL/dx - i dL/dy: the conjugate of its direction.
    g = _sum(jax.jit(grad), params, batches)
    g = jax.tree.map(lambda x, p: jnp.conj(x).astype(p.dtype), g, params)
    product = _sum(functools.partial(hessian_times, g), params, batches)
    return jax.tree.map(lambda p, h: (p.astype(h.dtype) * h).real, params, product)


def synflow(
    apply_fn: ApplyFn,
    params: PyTree,
    example: Any,
    *,
    sparsity: Any,
    rounds: int = 100,
    scope: Distribution = distributions.global_ranking,
    prunable: trees.Rules = (),
) -> PyTree:
    """Prunes in rounds by the flow through each connection, without data: :func:`synflow_scores`.

    Round i of n scores the network as pruned so far and prunes it to density ``rho^(i/n)``, where
    rho is the final density. Pruned weights stay pruned.

    Source: Tanaka et al. 2020, "Pruning neural networks without any data by iteratively conserving
    synaptic flow", algorithm 1.

    Args:
      apply_fn: pure function ``(params, inputs) -> outputs``.
      params: tree of float arrays, as initialised.
      example: an array or ``ShapeDtypeStruct`` with the shape and dtype of the inputs, such as one
        image.
      sparsity: fraction of zeros among prunable weights, in [0, 1).
      rounds: how many, >= 1; 100 in the paper. With one round, layers collapse as in other methods.
      scope: as in :func:`snip`, in each round.
      prunable: as in :func:`snip`.

    Returns:
      Masks, as :func:`snip`.

    Raises:
      ValueError: as :func:`snip`; or ``rounds < 1``, or the example is no array.

    Note:
      Each layer multiplies the flow. float32 is enough for VGG-19; in deeper networks the flow may
      overflow, which is an error. If all biases are 0, as at the start, scaling inputs and outputs
      changes no ranking: ``lambda params, x: 1e-30 * net(params, 1e-30 * x)``.

    Differs from the paper's code in that: counts are exact; shortcut convolutions are prunable
    unless a rule says otherwise; the statistics of batch norm are those that ``apply_fn`` uses (at
    their start of 0 and 1 they need no absolute value).

    Example: a score is the sum over paths through the connection; the path 1 * 4 is pruned first.
      >>> import granet_jax as gj, jax.numpy as jnp
      >>> params = [jnp.array([[-1.0, 2.0]]), jnp.array([[4.0], [-3.0]])]
      >>> net = lambda params, x: x @ params[0] @ params[1]
      >>> masks = gj.at_init.synflow(net, params, jnp.zeros((1, 1)), sparsity=0.5, rounds=2)
      >>> [mask.tolist() for mask in masks]
      [[[False, True]], [[False], [True]]]
    """
    if operator.index(rounds) < 1:
        raise ValueError(f"SynFlow takes at least one round, 100 in the paper; got {rounds=}.")
    if not (hasattr(example, "shape") and hasattr(example, "dtype")):
        raise ValueError(f"The example is one array of inputs; got {type(example).__name__}.")
    leaves = trees.describe(params, prunable)
    shapes = structures.shapes(leaves)
    groups.check_counts(leaves, scope(shapes, sparsity), sparsity)
    last = jnp.asarray(scope(shapes, sparsity), jnp.int32)
    masks = ones(params)
    for i in range(1, rounds + 1):
        scores = synflow_scores(apply_fn, apply_masks(params, masks), example)
        num_keep = scope(shapes, 1 - (1 - sparsity) ** (i / rounds)) if i < rounds else last
        # Counts of layers are rounded; none may fall below the final count.
        num_keep = jnp.maximum(jnp.asarray(num_keep, jnp.int32), last)
        masks, largest = _select(scores, params, masks, num_keep, _hashable(prunable))
        if i > 1 and _known(largest) and not np.any(largest):
            warnings.warn(
                f"SynFlow: after round {i - 1} of {rounds} no path leads from inputs to outputs; "
                "which weights go from then on is arbitrary. Take more rounds or a lower sparsity.",
                stacklevel=2,
            )
        else:
            _check(largest, leaves)
    warn_of_collapse(masks, params, prunable)
    return masks


def synflow_scores(apply_fn: ApplyFn, params: PyTree, example: Any) -> PyTree:
    """``|theta * dR/dtheta|``: R sums the outputs of the network of ``|theta|`` on inputs of ones.

    In a network of ReLUs without biases the scores of each layer add up to R.

    Source: Tanaka et al. 2020, as :func:`synflow`.

    Args:
      apply_fn: as in :func:`synflow`; it is given weights of the parameters' dtypes.
      params: as in :func:`synflow`; for a pruned network, the masked parameters.
      example: as in :func:`synflow`.

    Returns:
      Tree of ``params``, scores >= 0, float32 or (for float64 parameters) float64.

    Example:
      >>> import granet_jax as gj, jax.numpy as jnp
      >>> params = [jnp.array([[-1.0, 2.0]]), jnp.array([[4.0], [-3.0]])]
      >>> net = lambda params, x: x @ params[0] @ params[1]
      >>> [x.ravel().tolist() for x in gj.at_init.synflow_scores(net, params, jnp.zeros((1, 1)))]
      [[4.0, 6.0], [4.0, 6.0]]
    """
    return _flow(params, apply_fn, tuple(example.shape), jnp.dtype(example.dtype))


def magnitude(
    params: PyTree,
    *,
    sparsity: Any,
    scope: Distribution = distributions.global_ranking,
    prunable: trees.Rules = (),
) -> PyTree:
    """Keeps the largest initial weights.

    A baseline. Layers differ in the scale of their initial weights, and those with the smallest
    scale collapse first.

    Source: the magnitude baseline of Tanaka et al. 2020.

    Args:
      params: as in :func:`snip`.
      sparsity: as in :func:`snip`.
      scope: as in :func:`snip`.
      prunable: as in :func:`snip`.

    Returns:
      Masks, as :func:`snip`.

    Raises:
      ValueError: weights that are not finite, or all 0; a sparsity outside [0, 1).

    Example:
      >>> import granet_jax as gj, jax.numpy as jnp
      >>> params = {"kernel": jnp.array([[1.0, -3.0], [2.0, 0.0]])}
      >>> gj.at_init.magnitude(params, sparsity=0.5)["kernel"].tolist()
      [[False, True], [True, False]]
    """
    scores = score_functions.magnitude(Event(params))
    return masks_from(scores, params, sparsity=sparsity, scope=scope, prunable=prunable)


def masks_from(
    scores: PyTree,
    params: PyTree,
    *,
    sparsity: Any,
    scope: Distribution = distributions.global_ranking,
    prunable: trees.Rules = (),
) -> PyTree:
    """Keeps the weights that score highest; one set of scores serves many sparsities.

    Args:
      scores: float tree of ``params``, larger = better; compared in float32, or in float64 if one
        is float64. Ties are settled by index.
      params: tree of arrays.
      sparsity: as in :func:`snip`.
      scope: as in :func:`snip`.
      prunable: as in :func:`snip`.

    Returns:
      Masks, as :func:`snip`.

    Raises:
      ValueError: as :func:`snip`.

    Example:
      >>> import granet_jax as gj, jax.numpy as jnp
      >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
      >>> scores = {"kernel": jnp.array([[3.0, 1.0], [2.0, 4.0]]), "bias": jnp.zeros(2)}
      >>> for sparsity in (0.25, 0.75):
      ...     gj.at_init.masks_from(scores, params, sparsity=sparsity)["kernel"].tolist()
      [[True, False], [True, True]]
      [[False, False], [False, True]]
    """
    leaves = trees.describe(params, prunable)
    counts = scope(structures.shapes(leaves), sparsity)
    groups.check_counts(leaves, counts, sparsity)
    num_keep = jnp.asarray(counts, jnp.int32)
    masks, largest = _select(scores, params, ones(params), num_keep, _hashable(prunable))
    _check(largest, leaves)
    warn_of_collapse(masks, params, prunable)
    return masks


def _sum(f: Callable[[PyTree, Any], PyTree], params: PyTree, batches: Iterable[Any]) -> PyTree:
    """``f(params, batch)`` summed over batches, in float32 or wider."""
    total = None
    for batch in batches:
        new = f(params, batch)
        new = jax.tree.map(lambda x: x.astype(score_functions.at_least_float32(x.dtype)), new)
        total = new if total is None else jax.tree.map(jnp.add, total, new)
    if total is None:
        raise ValueError("Scores need at least one batch; got none. (Is an iterator used up?)")
    return total


@functools.partial(jax.jit, static_argnames=("apply_fn", "shape", "dtype"))
def _flow(params: PyTree, apply_fn: ApplyFn, shape: tuple[int, ...], dtype: Any) -> PyTree:
    def total(sizes: PyTree) -> jax.Array:
        weights = jax.tree.map(lambda x, p: x.astype(p.dtype), sizes, params)
        return jnp.sum(apply_fn(weights, jnp.ones(shape, dtype))).real

    sizes = jax.tree.map(jnp.abs, params)
    return score_functions.saliency(Event(sizes, jax.grad(total)(sizes)))


def _hashable(prunable: trees.Rules) -> trees.Rules:
    """The same rules as tuples, for a file may have given lists."""
    return tuple((pattern, decision) for pattern, decision in prunable)


@functools.partial(jax.jit, static_argnames="prunable")
def _select(
    scores: PyTree, params: PyTree, masks: PyTree, num_keep: jax.Array, prunable: trees.Rules
) -> tuple[PyTree, list[jax.Array]]:
    """The masks of the best live weights, and the largest ``|score|`` of live weights by leaf."""
    leaves = trees.describe(params, prunable)  # not of the scores, which are floats everywhere
    pairs = zip(trees.pick(scores, leaves), trees.pick(masks, leaves), strict=True)
    largest = [jnp.max(jnp.where(mask, jnp.abs(x), 0.0)) for x, mask in pairs]
    prune = prune_to(lambda *_: num_keep, score=lambda *_: scores, prunable=prunable)
    kept, _ = prune(masks, masks, Event(params))
    return kept, largest


def _check(largest: list[jax.Array], leaves: tuple[trees.Leaf, ...]) -> None:
    """Refuses scores that give no ranking."""
    if not _known(largest):
        return
    paths = [leaf.path for leaf in leaves if leaf.prunable]
    if bad := [path for path, x in zip(paths, largest, strict=True) if not np.isfinite(x)]:
        raise ValueError(
            f"The scores of {', '.join(bad)} hold NaN or infinite values, which cannot be ranked. "
            "Look at the loss and the parameters. Where SynFlow overflows float32, scale inputs "
            "and outputs: lambda params, x: 1e-30 * net(params, 1e-30 * x)."
        )
    if not np.any(largest):
        raise ValueError(
            f"The scores of all prunable weights ({', '.join(paths)}) are 0: there is nothing to "
            "rank. Does a layer start at zeros, as some classifiers do?"
        )


def warn_of_collapse(
    masks: PyTree,
    params: PyTree,
    prunable: trees.Rules,
    before: PyTree | None = None,
    instead: str = "Lower the sparsity, or give each layer its own count with scope=granet_jax.erk",
) -> None:
    """Warns of layers that have just lost their last weight.

    Args:
      masks: bool tree of params; traced masks are not checked.
      params: tree of arrays or ``ShapeDtypeStruct``.
      prunable: path rules, see :func:`granet_jax.trees.describe`.
      before: masks before pruning; layers that were empty in these are not named. None = dense.
      instead: the advice at the end of the warning.

    Warns:
      UserWarning: there are such layers; the message names them.

    Example: half of the weights are left, so nothing is said.
      >>> import granet_jax as gj, jax.numpy as jnp
      >>> params = {"kernel": jnp.ones((1, 2))}
      >>> gj.at_init.warn_of_collapse({"kernel": jnp.array([[True, False]])}, params, ())
    """
    if not _known(masks):
        return
    were = [] if before is None else collapsed(before, params, prunable)
    if empty := [layer for layer in collapsed(masks, params, prunable) if layer not in were]:
        told = f"Layer collapse: no weight is left in {', '.join(empty)}. {instead}."
        warnings.warn(told, stacklevel=3)


def _known(tree: PyTree) -> bool:
    return not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree))
