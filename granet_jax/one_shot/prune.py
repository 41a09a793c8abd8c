"""Pruning a model with one call, layer after layer or all layers from one pass."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from granet_jax import distributions, groups, scores, structures, trees
from granet_jax.masks import ones
from granet_jax.one_shot import statistics as calibration
from granet_jax.one_shot.methods import Keep, OneShot
from granet_jax.one_shot.statistics import Statistic
from granet_jax.types import Distribution, PyTree


class Pruned(NamedTuple):
    """The result of pruning."""

    params: PyTree  # of the dtypes before, exactly 0 where masked
    masks: PyTree  # bool, as methods and :func:`granet_jax.static` take them


def prune(
    method: OneShot,
    apply_fn: Callable[[PyTree, Any], Any],
    params: PyTree,
    batches: Iterable[Any],
    *,
    sparsity: float,
    scope: Distribution = distributions.uniform,
    prunable: trees.Rules = (),
    sequential: bool = True,
) -> Pruned:
    """Prunes a trained model once, with a few batches of data and no training.

    It works for any function of any tree: Flax, NNX, Equinox, Haiku or bare. The trace shows which
    product reads which weights. To train on, use ``gj.static(masks=pruned.masks)``, or start any
    dynamic method from these masks.

    Args:
      method: ``magnitude()``, ``wanda()``, ``ria()``, ``sparsegpt()`` or ``alps()`` of this
        package, or your own :class:`granet_jax.one_shot.OneShot`.
      apply_fn: ``(params, batch) -> anything``, the forward pass.
      params: tree of arrays of any float dtype; arithmetic is float32, or float64 for float64.
      batches: typical data, pytrees of arrays; a few thousand rows (tokens) are enough.
      sparsity: fraction of zeros among prunable weights, in [0, 1).
      scope: counts for each layer, ``uniform`` or ``erk`` or ``by_path``.
      prunable: path rules, see :func:`granet_jax.trees.describe`. One-shot methods support the
        structures ``n_of_m(4)`` along inputs and ``fan_in()``. Layers of a ``scan`` need a
        ``Stacked`` rule (:func:`granet_jax.prunable_from` writes it).
      sequential: each layer is calibrated with the outputs of the layers already pruned, which
        takes a pass over the batches for each layer; False = one pass through the dense model.

    Returns:
      New parameters and masks.

    Raises:
      ValueError: no batch; a sparsity that the layers or structures cannot have; a prunable leaf
        that no product reads, or whose inputs the trace does not show (the message gives its path
        and the reason); a layer that no row reached; weights or statistics that are not finite.

    Source: Frantar & Alistarh 2023, for the order of layers.

    Example:
      >>> import granet_jax as gj, jax, jax.numpy as jnp
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (8, 4))}
      >>> batches = [jax.random.normal(jax.random.key(1), (100, 8))]
      >>> pruned = gj.one_shot.prune(
      ...     gj.one_shot.sparsegpt(), lambda p, x: x @ p["kernel"], params, batches, sparsity=0.5
      ... )
      >>> int(pruned.masks["kernel"].sum())
      16
    """
    leaves, batches = trees.describe(params, prunable), list(batches)
    how: dict[str, Any] = {"sparsity": sparsity, "scope": scope, "prunable": prunable}
    if method.statistic is None and not (batches and _needs_axes(method, leaves)):
        return prune_from(method, params, {}, **how)
    if not sequential or method.statistic is None:
        statistic = method.statistic or calibration.squares  # only to find the inputs
        found = calibration.calibrate(apply_fn, params, batches, statistic, prunable=prunable)
        return prune_from(method, params, found, **how)
    if not batches:
        raise ValueError("prune needs a batch at least; got none.")
    seen = calibration.plan(apply_fn, params, batches[0], leaves)
    layers = _layers(method, {p: x.axes for p, x in seen.items()}, sparsity, scope, leaves)
    numbers = {path: x.number for path, x in seen.items()}
    add = calibration.of_layer(apply_fn, leaves, method.statistic, numbers)
    tree, work = jax.tree.structure(params), _begin(method, params)
    for path, i in calibration.order(apply_fn, params, batches[0], leaves, seen):
        sums = calibration.zeros_by_size(seen, method.statistic)
        for batch in batches:
            sums = add(jax.tree.unflatten(tree, work.params), batch, sums, (numbers[path], i))
        work = _prune_layer(work, leaves, layers[path, i], *sums[str(seen[path].size)])
    return work.pruned(tree)


def prune_from(
    method: OneShot,
    params: PyTree,
    statistics: Mapping[str, Statistic],
    *,
    sparsity: float,
    scope: Distribution = distributions.uniform,
    prunable: trees.Rules = (),
) -> Pruned:
    """Prunes by given statistics, so that one calibration serves many sparsities.

    Args:
      method: as in :func:`prune`.
      params: the calibrated parameters.
      statistics: from :func:`calibrate`, with the method's statistic and the same rules.
      sparsity: as in :func:`prune`.
      scope: as in :func:`prune`.
      prunable: as in :func:`prune`.

    Returns:
      New parameters and masks.

    Raises:
      ValueError: as :func:`prune`; or a prunable leaf without a statistic.

    Example:
      >>> import granet_jax as gj, jax.numpy as jnp
      >>> params = {"kernel": jnp.array([[1.0], [5.0], [2.0], [1.0]])}
      >>> batch = jnp.array([[2.0, 0.0, 1.0, 0.5]])
      >>> found = gj.one_shot.calibrate(lambda p, x: x @ p["kernel"], params, [batch])
      >>> for s in (0.25, 0.5):
      ...     masks = gj.one_shot.prune_from(gj.one_shot.wanda(), params, found, sparsity=s).masks
      ...     masks["kernel"].ravel().astype(int).tolist()
      [1, 0, 1, 1]
      [1, 0, 1, 0]
    """
    leaves = trees.describe(params, prunable)
    axes = {path: x.inputs for path, x in statistics.items()}
    if method.statistic is None:  # without a statistic the last axis is the outputs
        axes = {x.path: tuple(range(len(x.layer_shape) - 1)) for x in leaves if x.prunable} | axes
    layers = _layers(method, axes, sparsity, scope, leaves)
    work = _begin(method, params)
    for (path, i), layer in layers.items():
        known: tuple[Any, Any] = (None, 1.0)
        if method.statistic is not None:
            known = statistics[path].values[i], statistics[path].rows[i]
        work = _prune_layer(work, leaves, layer, *known)
    return work.pruned(jax.tree.structure(params))


def _needs_axes(method: OneShot, leaves: Sequence[trees.Leaf]) -> bool:
    """Whether it matters which axes of a layer are its inputs."""
    return method.by_output or any(x.structure is not None for x in leaves)


class _Layer(NamedTuple):
    """One layer, and how many of its weights to keep."""

    path: str
    place: int  # in the stack of its leaf
    inputs: tuple[int, ...]  # axes
    keep: Keep


def _layers(
    method: OneShot,
    axes: Mapping[str, tuple[int, ...]],
    sparsity: float,
    scope: Distribution,
    leaves: Sequence[trees.Leaf],
) -> dict[tuple[str, int], _Layer]:
    """The layers to prune, with their counts, checked."""
    distributions.check_sparsity("sparsity", sparsity)
    counts = scope(structures.shapes(leaves), sparsity)
    groups.check_counts(leaves, counts, sparsity)
    if np.ndim(counts) == 0:
        raise ValueError(
            "One-shot methods prune layer by layer, and global_ranking gives one count for all: "
            "pass scope=granet_jax.uniform or erk."
        )
    found, left = {}, iter(np.asarray(counts).tolist())
    for leaf in leaves:
        if not leaf.prunable:
            continue
        if leaf.path not in axes:
            raise ValueError(
                f"{leaf.path} has no statistic: calibrate with the rules that you prune with, "
                f"{list(axes)} have one. Or keep it dense by a rule, ({leaf.path!r}, False)."
            )
        size = math.prod(leaf.layer_shape[i] for i in axes[leaf.path])
        group = size if method.by_output else 0
        if leaf.structure is not None:
            group = _group(leaf, axes[leaf.path])
        for i in range(leaf.num_layers):
            keep = Keep(next(left), group)
            found[leaf.path, i] = _Layer(leaf.path, i, axes[leaf.path], keep)
    return found


def _group(leaf: trees.Leaf, inputs: tuple[int, ...]) -> int:
    """How many consecutive inputs a group of a structure has.

    Raises:
      ValueError: its groups are not consecutive inputs of one output.
    """
    structure = leaf.structure
    assert structure is not None
    if structure.grouped:
        size = math.prod(leaf.layer_shape[i] for i in inputs)
        places = np.arange(leaf.size // leaf.num_layers, dtype=np.int32)
        groups = np.asarray(
            structure.gather(jnp.asarray(places.reshape(1, *leaf.layer_shape)), leaf)
        )
        length = groups.shape[-1]
        matrix = np.asarray(_matrix(places.reshape(leaf.layer_shape), inputs)).T
        wanted = matrix.reshape(-1, length) if size % length == 0 else matrix
        found = groups.reshape(-1, length)
        if {tuple(x) for x in np.sort(wanted)[:, :2]} == {tuple(x) for x in np.sort(found)[:, :2]}:
            return length
    raise ValueError(
        f"The structure of {leaf.path} {leaf.layer_shape} has no groups of inputs: its products "
        f"sum over axes {inputs}. One-shot methods know n_of_m(m, axis=...) along these, and "
        "fan_in(axis=...) with the axis of the outputs."
    )


def _matrix(layer: Any, inputs: tuple[int, ...]) -> Any:
    """A layer as a matrix ``(inputs, outputs)``."""
    outputs = [i for i in range(layer.ndim) if i not in inputs]
    size = math.prod(layer.shape[i] for i in inputs)
    return layer.transpose(*inputs, *outputs).reshape(size, -1)


def _layer_of(matrix: Any, shape: tuple[int, ...], inputs: tuple[int, ...]) -> Any:
    """Undoes :func:`_matrix`."""
    order = [*inputs, *(i for i in range(len(shape)) if i not in inputs)]
    return matrix.reshape([shape[i] for i in order]).transpose(np.argsort(order))


class _Work(NamedTuple):
    """Parameters and masks so far, in leaf order, and the program that prunes one layer."""

    params: list[jax.Array]
    masks: list[jax.Array]
    program: Callable[..., Any]

    def pruned(self, tree: PyTree) -> Pruned:
        return Pruned(*(jax.tree.unflatten(tree, x) for x in (self.params, self.masks)))


def _begin(method: OneShot, params: PyTree) -> _Work:
    program = jax.jit(functools.partial(_one, method), static_argnums=(2, 3))
    arrays = [jnp.asarray(x) for x in jax.tree.leaves(params)]
    return _Work(arrays, jax.tree.leaves(ones(params)), program)


def _prune_layer(
    work: _Work, leaves: Sequence[trees.Leaf], layer: _Layer, values: Any, rows: Any
) -> _Work:
    """Prunes one layer.

    Raises:
      ValueError: no row reached it, or something is not finite.
    """
    i, leaf = next((i, x) for i, x in enumerate(leaves) if x.path == layer.path)
    name = layer.path if leaf.num_layers == 1 else f"{layer.path}[{layer.place}]"
    if float(rows) == 0:
        raise ValueError(
            f"No row reached {name} in these batches, so nothing is known of its inputs. Give more "
            "data, or keep it dense by a rule."
        )
    place = np.unravel_index(layer.place, leaf.shape[: leaf.stack_axes])
    mean = None if values is None else values / rows
    new, mask, is_finite = work.program(work.params[i][place], mean, layer.keep, layer.inputs)
    if not bool(is_finite):
        raise ValueError(
            f"{name} cannot be pruned: its weights or the statistic of its inputs are not finite, "
            "or their Gram matrix is singular. Look at the batches; raise damping."
        )
    params, masks = list(work.params), list(work.masks)
    params[i] = params[i].at[place].set(new)
    masks[i] = masks[i].at[place].set(mask)
    return work._replace(params=params, masks=masks)


def _one(
    method: OneShot,
    layer: jax.Array,
    values: Any,
    keep: Keep,
    inputs: tuple[int, ...],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The pruned layer, its mask, and whether everything is finite."""
    w = _matrix(layer, inputs).astype(scores.at_least_float32(layer.dtype))
    new, mask = method.prune(w, values, keep)
    new = new.astype(layer.dtype)
    given = [w, new] if values is None else [w, new, values]
    is_finite = jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in given]))
    new, mask = (_layer_of(x, layer.shape, inputs) for x in (new, mask))
    return new, mask, is_finite
