"""Structures: weights that are kept or pruned together, or the same number in each group.

Hardware can use sparsity only in certain shapes. A structure is the decision of a path rule, so
every method works with it, for all layers or some::

    gj.granet(..., scope=gj.uniform, prunable=[("head", False), ("", gj.structures.n_of_m(4))])

There are two kinds:

* *Units*, weights that are kept or pruned together: :func:`block`, :func:`channel`. A unit's score
  is the mean of its weights' scores; where all are random, it is drawn for the unit. Counts and
  sparsity are of units: distributions see the shape of the grid of units, and a global ranking
  treats all units alike, whatever their size.
* *Groups*, each of which keeps the same number of weights: :func:`n_of_m`, :func:`fan_in`. A
  layer's count is divided by its live groups and rounded (halves up), but a group keeps at least
  one; 2:4 keeps half of the weights in groups of 4. Pruning keeps the best of each group.
  Regeneration drops the lowest of the layer, and each group grows as many as it lost.

Means are sums of floats. On sharded arrays their last bits, and so ties and near-ties, may depend
on the number of devices. Meshes with Explicit axes work with ``n_of_m`` and ``channel``; ``block``
and ``fan_in`` reshape sharded axes, which JAX can do on Auto axes only.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from granet_jax import blocks, sortable
from granet_jax.scores import at_least_float32
from granet_jax.trees import Leaf, Rules, Structure, describe, join, split
from granet_jax.types import LayerShape, PyTree, Shapes


def n_of_m(m: int, *, axis: int = -2) -> Structure:
    """N:M sparsity: of each ``m`` consecutive weights along ``axis``, the same number N is kept.

    N follows from the sparsity: ``m * (1 - sparsity)``. So 2:4 is a sparsity of 0.5 with ``m=4``,
    1:4 is 0.75. Give all layers the same sparsity: ``scope=uniform`` (``start=uniform`` for sparse
    starts). With ``erk``, and during gradual pruning, N is rounded for each layer, at least 1.
    Groups of given masks may hold more; from the first event on none exceeds its share.

    Args:
      m: length of a group, >= 1. It has to divide the axis.
      axis: of the layer, along which groups lie: the one that a product sums over. -2 for kernels
        ``(..., in, out)``, as in Flax; -1 for ``(out, in)``.

    Returns:
      A :class:`granet_jax.trees.Structure`, as a path rule takes it.

    Raises:
      ValueError: ``m < 1``; for a leaf, if ``m`` does not divide the axis; from a method, if N is
        no whole number, such as for a sparsity of .6 with ``m=4``.

    Example:
      >>> import granet_jax as gj, jax, jax.numpy as jnp
      >>> method = gj.static(sparsity=0.5, start=gj.uniform, key=jax.random.key(0),
      ...                    prunable=[("", gj.structures.n_of_m(4))])
      >>> masks = method.init({"kernel": jnp.ones((8, 3))}).masks
      >>> masks["kernel"].reshape(2, 4, 3).sum(1).tolist()
      [[2, 2, 2], [2, 2, 2]]
    """
    _check_positive(m=m)

    def grid(leaf: Leaf) -> tuple[int, ...]:
        length = leaf.layer_shape[_axis(axis, leaf)]
        if length % m:
            raise ValueError(
                f"n_of_m({m}) needs an axis that {m} divides; axis {axis} of {leaf.path} "
                f"{leaf.layer_shape} has {length}. Keep it dense with a rule before: "
                f"prunable=[({leaf.path!r}, False), ...]."
            )
        i = _axis(axis, leaf)
        rest = leaf.layer_shape[:i] + (length // m,) + leaf.layer_shape[i + 1 :]
        return (*rest, m)

    def gather(x: jax.Array, leaf: Leaf) -> jax.Array:
        i = 1 + _axis(axis, leaf)
        return jnp.moveaxis(x.reshape(*x.shape[:i], -1, m, *x.shape[i + 1 :]), i + 1, -1)

    def spread(x: jax.Array, leaf: Leaf) -> jax.Array:
        i = 1 + _axis(axis, leaf)
        return jnp.moveaxis(x, -1, i + 1).reshape(len(x), *leaf.layer_shape)

    return Structure(grid, gather, spread, grouped=True, fixed=True)


def fan_in(*, axis: int = -1, ablation: float = 0.0, spare: str | None = None) -> Structure:
    """Constant fan-in: each output keeps the same number of incoming weights.

    With ``ablation``, as in SRigL, regeneration also prunes whole outputs. Salient weights are
    those that would be live after dropping and growing by the layer's ranking. An output with fewer
    salient weights than ``ablation`` times the fan-in is ablated, unless the others have too few
    inputs for all live weights. Each of the remaining outputs then has ``live // outputs``
    weights, so the layer may lose a few weights to rounding.

    Args:
      axis: of the outputs; the fan-in is all other axes. -1 for kernels ``(..., in, out)``.
      ablation: gamma in the paper: 0.3, and 0.95 for vision transformers; 0 = no ablation.
      spare: regular expression of paths whose outputs are never ablated (the last layer).

    Returns:
      A :class:`granet_jax.trees.Structure`.

    Raises:
      ValueError: ``ablation`` outside [0, 1].

    Source: Lasby et al. 2023, "Dynamic Sparse Training with Structured Sparsity" (SRigL),
    section 3. Differs from it in that weights just dropped may come back, as everywhere here.

    Example:
      >>> import granet_jax as gj, jax, jax.numpy as jnp
      >>> method = gj.static(sparsity=0.5, key=jax.random.key(0),
      ...                    prunable=[("", gj.structures.fan_in())])
      >>> method.init({"kernel": jnp.ones((8, 3))}).masks["kernel"].sum(0).tolist()
      [4, 4, 4]
    """
    if not 0.0 <= ablation <= 1.0:
        raise ValueError(f"ablation must be in [0, 1], a fraction of the fan-in; got {ablation}.")

    def grid(leaf: Leaf) -> tuple[int, ...]:
        outputs = leaf.layer_shape[_axis(axis, leaf)]
        return (outputs, math.prod(leaf.layer_shape) // outputs)

    def gather(x: jax.Array, leaf: Leaf) -> jax.Array:
        return jnp.moveaxis(x, 1 + _axis(axis, leaf), 1).reshape(len(x), *grid(leaf))

    def spread(x: jax.Array, leaf: Leaf) -> jax.Array:
        i = _axis(axis, leaf)
        shape = leaf.layer_shape
        x = x.reshape(len(x), shape[i], *shape[:i], *shape[i + 1 :])
        return jnp.moveaxis(x, 1, 1 + i)

    def least(leaf: Leaf) -> float:
        return 0.0 if spare is not None and re.search(spare, leaf.path) else ablation

    return Structure(grid, gather, spread, grouped=True, ablation=least)


def block(shape: Sequence[int]) -> Structure:
    """Blocks of weights that are kept or pruned together.

    Args:
      shape: of a block, over the last axes of the layer. With ``(4, 4)``, a block of a kernel
        ``(kh, kw, in, out)`` has one position, 4 inputs and 4 outputs. If a side does not divide
        its axis, the last blocks are padded with weights of score 0.

    Returns:
      A :class:`granet_jax.trees.Structure`.

    Raises:
      ValueError: a length below 1, or a block with more axes than the layer.

    Source: Gray et al. 2017, "GPU Kernels for Block-Sparse Weights"; MEST (Yuan et al. 2021).

    Example:
      >>> import granet_jax as gj, jax, jax.numpy as jnp
      >>> method = gj.static(sparsity=0.5, key=jax.random.key(0),
      ...                    prunable=[("", gj.structures.block((2, 2)))])
      >>> method.init({"kernel": jnp.ones((2, 4))}).masks["kernel"].astype(int).tolist()
      [[1, 1, 0, 0], [1, 1, 0, 0]]
    """
    sides = tuple(shape)
    _check_positive(**{f"side_{i}": side for i, side in enumerate(sides)})

    def all_sides(leaf: Leaf) -> tuple[int, ...]:
        missing = len(leaf.layer_shape) - len(sides)
        if missing < 0:
            raise ValueError(
                f"block({sides}) has more axes than {leaf.path} {leaf.layer_shape}; give it a "
                "block of its own with a rule before."
            )
        return (1,) * missing + sides

    def grid(leaf: Leaf) -> tuple[int, ...]:
        pairs = zip(leaf.layer_shape, all_sides(leaf), strict=True)
        return tuple(-(-length // side) for length, side in pairs)

    def gather(x: jax.Array, leaf: Leaf) -> jax.Array:
        sides, num = all_sides(leaf), grid(leaf)
        lacking = [n * s - d for n, s, d in zip(num, sides, leaf.layer_shape, strict=True)]
        padded = jnp.pad(x, [(0, 0)] + [(0, lack) for lack in lacking])
        split = padded.reshape(len(x), *(y for pair in zip(num, sides, strict=True) for y in pair))
        return _mean(split, tuple(range(2, split.ndim, 2)))

    def spread(x: jax.Array, leaf: Leaf) -> jax.Array:
        sides, num = all_sides(leaf), grid(leaf)
        x = x.reshape(len(x), *(y for n in num for y in (n, 1)))
        pairs = [y for pair in zip(num, sides, strict=True) for y in pair]
        whole = jnp.broadcast_to(x, (len(x), *pairs))
        whole = whole.reshape(len(x), *(n * s for n, s in zip(num, sides, strict=True)))
        return whole[(slice(None), *(slice(length) for length in leaf.layer_shape))]

    return Structure(grid, gather, spread, block=sides)


def channel(*, axis: int = -1, tie: str | None = None) -> Structure:
    """Channels, filters, neurons: all weights of one index along an axis.

    Leaves with the same ``tie`` count as one layer and lose the same channels: kernels that write
    into one residual stream, and the norm and the bias that follow a kernel. A channel's score is
    the mean over its weights in all tied kernels; vectors (norm scales, biases) do not count. A
    vector is pruned only if a rule ties it.

    A pruned channel is exactly 0 in the network only if everything that could make it nonzero is
    tied: kernels, biases, norm scales and offsets. Then :func:`granet_jax.export.compact` can cut
    it out; :func:`granet_jax.export.channel_rules` writes such rules for a given network. But a
    channel whose norm and bias are 0 has no gradient and cannot regrow: with methods that regrow,
    tie kernels alone (``vectors=False`` there) and :func:`complete` the masks at the end.

    Args:
      axis: of the channels; -1 for the outputs of kernels ``(..., in, out)``.
      tie: any name; None = the leaf is ranked alone.

    Returns:
      A :class:`granet_jax.trees.Structure`.

    Raises:
      ValueError: from a method, if tied leaves differ in the number of channels or of layers.

    Source: Li et al. 2017, "Pruning Filters for Efficient ConvNets", who rank filters by the mean
    of ``|w|``; GraNet's structured version ranks sums, which is the same within a layer.

    Example:
      >>> import granet_jax as gj, jax, jax.numpy as jnp
      >>> rules = [("", gj.structures.channel(tie="a"))]
      >>> method = gj.static(sparsity=0.5, start=gj.uniform, key=jax.random.key(0), prunable=rules)
      >>> masks = method.init({"kernel": jnp.ones((2, 4)), "bias": jnp.ones(4)}).masks
      >>> masks["bias"].astype(int).tolist()
      [1, 0, 1, 0]
      >>> masks["kernel"].astype(int).tolist()
      [[1, 0, 1, 0], [1, 0, 1, 0]]
    """

    def grid(leaf: Leaf) -> tuple[int, ...]:
        return (leaf.layer_shape[_axis(axis, leaf)],)

    def gather(x: jax.Array, leaf: Leaf) -> jax.Array:
        i = 1 + _axis(axis, leaf)
        others = tuple(j for j in range(1, x.ndim) if j != i)
        return _mean(x, others)

    def spread(x: jax.Array, leaf: Leaf) -> jax.Array:
        ones = [1] * len(leaf.layer_shape)
        ones[_axis(axis, leaf)] = -1
        return jnp.broadcast_to(x.reshape(len(x), *ones), (len(x), *leaf.layer_shape))

    return Structure(grid, gather, spread, tie=tie)


def complete(masks: PyTree, params: PyTree, prunable: Rules) -> PyTree:
    """Masks of whole units: a unit is on if one of its weights is; in tied leaves, of a kernel.

    So vectors that were not pruned in training follow the kernels to which rules tie them. Put the
    result into the optimizer with :func:`granet_jax.set_masks` and these rules, and train on: the
    outputs change, because the norm offset of a dead channel was not 0.

    Args:
      masks: bool tree of params.
      params: tree of arrays or ``ShapeDtypeStruct``.
      prunable: path rules with structures.

    Example:
      >>> import granet_jax as gj, jax.numpy as jnp
      >>> masks = {"kernel": jnp.array([[True, False]]), "bias": jnp.array([True, True])}
      >>> params = {"kernel": jnp.ones((1, 2)), "bias": jnp.ones(2)}
      >>> masks = complete(masks, params, [("", channel(tie="a"))])
      >>> masks["bias"].tolist()
      [True, False]
    """
    leaves = describe(params, prunable)
    return join(spread(live_units(split(masks, leaves), leaves), leaves), masks, leaves)


def layers(leaves: Sequence[Leaf]) -> list[list[int]]:
    """The prunable leaves that are ranked together, by their index among the prunable ones.

    Tied leaves form one list, any other leaf a list of its own; in the order of their first leaf.

    Raises:
      ValueError: tied leaves of different numbers of channels or stacked layers.
    """
    prunable = [x for x in leaves if x.prunable]
    together: dict[Any, list[int]] = {}
    for i, x in enumerate(prunable):
        tie = x.structure.tie if x.structure is not None else None
        together.setdefault(i if tie is None else tie, []).append(i)
    for tie, members in together.items():
        kinds = {(prunable[i].num_layers, _units(prunable[i])) for i in members}
        if len(kinds) > 1:
            told = ", ".join(f"{prunable[i].path} {prunable[i].shape}" for i in members)
            raise ValueError(
                f"The leaves tied as {tie!r} have different numbers of channels or of layers: "
                f"{told}. Give each its axis, channel(axis=..., tie={tie!r})."
            )
    return list(together.values())


def shapes(leaves: Sequence[Leaf]) -> Shapes:
    """The shapes that distributions see, in layer order: of each layer, or of its grid of units.

    Without structures the same as :func:`granet_jax.trees.layer_shapes`.
    """
    return [
        LayerShape(x.layer_shape if is_grouped(x) else _units(x), x.path)
        for x in first_leaves(leaves)
        for _ in range(x.num_layers)
    ]


def lay_out(leaves: Sequence[Leaf]) -> blocks.Layout:
    """The layout of the stacks of units that :func:`gather` makes."""
    return blocks.lay_out([(x.num_layers, *_units(x)) for x in first_leaves(leaves)])


def gather(stacks: Sequence[jax.Array], leaves: Sequence[Leaf]) -> list[jax.Array]:
    """Turns stacks of layers into stacks of units, ``(layers, *grid)``: the mean over each unit.

    The last axis of a grouped grid is a group. Stacks without a structure stay as they are.
    """
    prunable = [x for x in leaves if x.prunable]

    def of_layer(members: list[int]) -> jax.Array:
        if len(members) == 1 or all(len(prunable[i].layer_shape) < 2 for i in members):
            voters = members[:1]
        else:
            voters = [i for i in members if len(prunable[i].layer_shape) >= 2]
        each = [_gather(stacks[i], prunable[i]) for i in voters]
        if len(voters) == 1:
            return each[0]
        sizes = np.array([prunable[i].size for i in voters], np.float32)
        dtype = sortable.widest(each)
        shares = (sizes / sizes.sum()).astype(dtype)
        return sum(x.astype(dtype) * share for x, share in zip(each, shares, strict=True))

    return [of_layer(members) for members in layers(leaves)]


def drawn(stacks: Sequence[jax.Array], key: jax.Array, leaves: Sequence[Leaf]) -> list[jax.Array]:
    """Random stacks of units, each with a draw of its own instead of a mean of several.

    Args:
      stacks: of units, from draws for weights; those of groups stay as they are.
      key: from which the draws for weights were made.
      leaves: of the whole tree.
    """
    places = {leaf.path: i for i, leaf in enumerate(leaves)}
    return [
        x
        if leaf.structure is None or leaf.structure.grouped
        else jax.random.uniform(jax.random.fold_in(key, places[leaf.path]), x.shape, x.dtype)
        for x, leaf in zip(stacks, first_leaves(leaves), strict=True)
    ]


def live_units(stacks: Sequence[jax.Array], leaves: Sequence[Leaf]) -> list[jax.Array]:
    """Turns stacks of masks into bool stacks of units, True if a weight of the unit is on."""
    return [x > 0 if x.dtype != bool else x for x in gather(stacks, leaves)]


def spread(units: Sequence[jax.Array], leaves: Sequence[Leaf]) -> list[jax.Array]:
    """Undoes :func:`gather` for masks: a unit's mask goes to all its weights."""
    prunable = [x for x in leaves if x.prunable]
    by_leaf = {i: x for members, x in zip(layers(leaves), units, strict=True) for i in members}
    return [
        by_leaf[i] if x.structure is None else x.structure.spread(by_leaf[i], x)
        for i, x in enumerate(prunable)
    ]


def first_leaves(leaves: Sequence[Leaf]) -> list[Leaf]:
    """The leaf of each stack of units; the first one of tied leaves."""
    prunable = [x for x in leaves if x.prunable]
    return [prunable[members[0]] for members in layers(leaves)]


def is_grouped(leaf: Leaf) -> bool:
    """Whether the leaf's units form groups that each keep the same number."""
    return leaf.structure is not None and leaf.structure.grouped


def _units(leaf: Leaf) -> tuple[int, ...]:
    return leaf.layer_shape if leaf.structure is None else leaf.structure.grid(leaf)


def _gather(stack: jax.Array, leaf: Leaf) -> jax.Array:
    return stack if leaf.structure is None else leaf.structure.gather(stack, leaf)


def _mean(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return x.mean(axes, dtype=at_least_float32(x.dtype))


def _axis(axis: int, leaf: Leaf) -> int:
    """An axis of a layer, counted from its first."""
    rank = len(leaf.layer_shape)
    if not -rank <= axis < rank:
        raise ValueError(f"{leaf.path} {leaf.layer_shape} has no axis {axis}.")
    return axis % rank


def _check_positive(**lengths: int) -> None:
    for name, length in lengths.items():
        if not isinstance(length, int) or length < 1:
            raise ValueError(f"{name} must be an int >= 1; got {length!r}.")
