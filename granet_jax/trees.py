"""Paths of leaves, which leaves are prunable, and leaves seen as stacks of layers.

What is prunable is *static*: it follows from paths, shapes and rules alone, so that it is known
while tracing and never has to be stored beside the masks.
"""

import collections
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from granet_jax.types import PyTree, Shapes


class Structure(NamedTuple):
    """Decision of a rule: how the weights of a layer are kept or pruned together.

    Made by :mod:`granet_jax.structures`. Whether a leaf is prunable the default decides, but tied
    leaves always are.
    """

    grid: Callable[["Leaf"], tuple[int, ...]]  # shape of a layer's units
    gather: Callable[[jax.Array, "Leaf"], jax.Array]  # (layers, *layer_shape) -> (layers, *grid)
    spread: Callable[[jax.Array, "Leaf"], jax.Array]  # back, each unit's value to its weights
    grouped: bool = False  # the last axis of the grid is a group, which keeps as many as others
    ablation: Callable[["Leaf"], float] = lambda leaf: 0.0  # least share of salient weights
    tie: str | None = None  # leaves with the same tie are ranked as one layer


class Stacked(NamedTuple):
    """Decision of a rule: the first ``axes`` axes stack layers; otherwise the default decides.

    For models whose layers are stacked by ``jax.lax.scan``: a ``(24, 512, 512)`` kernel then
    counts as 24 layers of ``(512, 512)`` in scores, counts and selection.
    """

    axes: int = 1
    structure: Structure | None = None  # of each layer


Rules: TypeAlias = Sequence[tuple[str, bool | Stacked | Structure]]


class Leaf(NamedTuple):
    """What is known of one leaf of ``params`` without looking at its values."""

    path: str  # e.g. "conv1/kernel"
    shape: tuple[int, ...]
    prunable: bool
    stack_axes: int  # how many leading axes stack layers; 0 for most
    structure: Structure | None = None  # of a prunable leaf, if a rule gives one

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def num_layers(self) -> int:
        """Number of layers that the leaf stacks; 1 for most."""
        return math.prod(self.shape[: self.stack_axes])

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """Shape of each of its layers."""
        return self.shape[self.stack_axes :]


def names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """A key path as words; the trailing ``.value`` of a Flax NNX variable is left out."""
    if path and getattr(path[-1], "name", None) == "value":
        path = path[:-1]
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def by_path(tree: PyTree) -> dict[tuple[str, ...], Any]:
    """The leaves of a tree by their :func:`names`, in leaf order.

    Trees of one model in different clothes (``nnx.State``, pure dict) agree on names.

    Raises:
      ValueError: two leaves have the same names.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    found = {names(path): leaf for path, leaf in leaves}
    if len(found) < len(leaves):
        paths = ["/".join(names(path)) for path, _ in leaves]
        twice = sorted({path for path in paths if paths.count(path) > 1})
        raise ValueError(f"Leaves need paths of their own; more than one is called {twice}.")
    return found


class Owner(NamedTuple):
    """The parameter that a leaf of an optimizer's state belongs to."""

    names: tuple[str, ...]  # the parameter's, as of :func:`by_path`
    field: str  # what the state calls it, e.g. "mu"; "" where it says nothing
    same_shape: bool  # False for factored moments and the like


def owners(state: PyTree, params: PyTree) -> dict[tuple[Any, ...], Owner | None]:
    """For each leaf of a state, by its key path, the parameter whose path its own ends in.

    Leaves that belong to none (step counters, keys) have None. With a parameter called "mu", more
    than one split of a path may fit: the one whose front part holds the most parameters is taken.
    """
    shapes = {path: x.shape for path, x in by_path(params).items()}
    leaves = jax.tree_util.tree_leaves_with_path(state)
    all_names = [names(path) for path, _ in leaves]
    in_front = collections.Counter(
        words[:i] for words in all_names for i in range(len(words) + 1) if words[i:] in shapes
    )

    def owner(words: tuple[str, ...], leaf: Any) -> Owner | None:
        fits = [i for i in range(len(words) + 1) if words[i:] in shapes]
        start = max(fits, key=lambda i: in_front[words[:i]], default=None)
        if start is None:
            return None
        field = "".join(words[start - 1 : start])
        return Owner(words[start:], field, leaf.shape == shapes[words[start:]])

    return {path: owner(w, x) for w, (path, x) in zip(all_names, leaves, strict=True)}


def map_with_owner(f: Callable[[Any, Owner | None], Any], state: PyTree, params: PyTree) -> PyTree:
    """``f(leaf, owner)`` for each leaf of a state, see :func:`owners`."""
    found = owners(state, params)
    return jax.tree_util.tree_map_with_path(lambda path, x: f(x, found[path]), state)


def describe(params: PyTree, rules: Rules = ()) -> tuple[Leaf, ...]:
    """Tells of each leaf, in the tree's leaf order, whether it is prunable.

    By default a leaf is prunable when it holds floats of rank >= 2 (without stack axes), its name
    is neither ``bias`` nor ``scale``, and no part of its path contains ``embed``. So kernels of
    dense and convolution layers are; biases, norm scales and embeddings are not. A leaf without
    elements never is.

    Args:
      params: tree of arrays or ``ShapeDtypeStruct``s.
      rules: ``(pattern, decision)`` pairs; the first pattern that ``re.search`` finds in a leaf's
        path decides. ``True`` = prunable, ``False`` = dense, ``Stacked(n)`` = the leading ``n``
        axes stack layers and the default decides on the rest, a structure = that, where the
        default (or its tie) makes the leaf prunable.

    Raises:
      ValueError: a rule matches no leaf, a leaf has fewer axes than its rule stacks, a structure
        does not fit a leaf, or nothing is prunable. (A tree without leaves passes: optax probes
        optimizers with one.)

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"fc": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)},
      ...           "head": {"kernel": jnp.ones((3, 2))}}
      >>> [(leaf.path, leaf.prunable) for leaf in describe(params, [("head", False)])]
      [('fc/bias', False), ('fc/kernel', True), ('head/kernel', False)]
    """
    named = [("/".join(words), leaf) for words, leaf in by_path(params).items()]
    if not named:
        return ()
    for pattern, _ in rules:
        if not any(re.search(pattern, name) for name, _ in named):
            paths = ", ".join(name for name, _ in named)
            raise ValueError(f"The rule {pattern!r} matches no parameter; the paths are: {paths}.")
    leaves = tuple(_decide(name, leaf, rules) for name, leaf in named)
    if not any(leaf.prunable for leaf in leaves):
        raise ValueError(
            "No parameter is prunable: by default that takes floats of rank >= 2 not named bias, "
            f"scale or *embed*; got {', '.join(f'{x.path} {x.shape}' for x in leaves)}. "
            "Name what to prune with a rule, e.g. prunable=[('kernel', True)]."
        )
    return leaves


def _decide(name: str, leaf: Any, rules: Rules) -> Leaf:
    decision = next((d for pattern, d in rules if re.search(pattern, name)), Stacked(0))
    shape = tuple(leaf.shape)
    if isinstance(decision, bool):
        return Leaf(name, shape, decision and 0 not in shape, 0)
    if isinstance(decision, Structure):
        decision = Stacked(0, decision)
    if not isinstance(decision, Stacked):
        raise ValueError(
            f"The rule for {name} decides {decision!r}; expected True, False, Stacked(axes) or one "
            "of granet_jax.structures."
        )
    if not 0 <= decision.axes <= len(shape):
        raise ValueError(f"A rule stacks {decision.axes} axes of {name}, which has shape {shape}.")
    parts = name.lower().split("/")
    structure = decision.structure
    is_kernel = (
        len(shape) - decision.axes >= 2
        and parts[-1] not in ("bias", "scale")
        and not any("embed" in part for part in parts)
    )
    is_tied = structure is not None and structure.tie is not None
    holds_floats = 0 not in shape and jnp.issubdtype(leaf.dtype, jnp.inexact)
    if not holds_floats or not (is_kernel or is_tied):
        return Leaf(name, shape, False, decision.axes)
    described = Leaf(name, shape, True, decision.axes, structure)
    if structure is not None:
        structure.grid(described)  # raises where it does not fit
    return described


def layer_shapes(leaves: Sequence[Leaf]) -> Shapes:
    """One shape for each layer, in layer order: leaf order, then position in the stack."""
    return [x.layer_shape for x in leaves if x.prunable for _ in range(x.num_layers)]


def num_prunable(leaves: Sequence[Leaf]) -> int:
    """How many weights are prunable."""
    return sum(x.size for x in leaves if x.prunable)


def pick(tree: PyTree, leaves: Sequence[Leaf]) -> list[jax.Array]:
    """The prunable leaves of a tree."""
    return [a for a, x in zip(jax.tree.leaves(tree), leaves, strict=True) if x.prunable]


def split(tree: PyTree, leaves: Sequence[Leaf]) -> list[jax.Array]:
    """The prunable leaves of a tree as stacks, arrays ``(num_layers, *layer_shape)``."""
    prunable = [x for x in leaves if x.prunable]
    pairs = zip(pick(tree, leaves), prunable, strict=True)
    return [a.reshape(x.num_layers, *x.layer_shape) for a, x in pairs]


def join(stacks: Sequence[jax.Array], tree: PyTree, leaves: Sequence[Leaf]) -> PyTree:
    """Undoes :func:`split`: ``tree`` with its prunable leaves replaced by ``stacks``."""
    arrays, treedef = jax.tree.flatten(tree)
    new = iter(stacks)
    joined = [
        next(new).reshape(x.shape) if x.prunable else a for a, x in zip(arrays, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, joined)
