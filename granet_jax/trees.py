"""Paths of leaves, which leaves are prunable, and leaves seen as stacks of layers.

Which leaves are prunable is *static*: it follows from paths, shapes and rules alone. So it is known
while tracing and does not have to be stored beside the masks.
"""

import collections
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from granet_jax.types import LayerShape, PyTree, Shapes


class Structure(NamedTuple):
    """Decision of a rule: how the weights of a layer are kept or pruned together.

    Made by :mod:`granet_jax.structures`. The default decides whether the leaf is prunable; leaves
    with a ``tie`` always are.
    """

    grid: Callable[["Leaf"], tuple[int, ...]]  # shape of a layer's units
    gather: Callable[[jax.Array, "Leaf"], jax.Array]  # (layers, *layer_shape) -> (layers, *grid)
    spread: Callable[[jax.Array, "Leaf"], jax.Array]  # back, each unit's value to its weights
    grouped: bool = False  # the last axis of the grid is a group; all groups keep the same number
    fixed: bool = False  # empty groups get their share of a layer's count, too
    ablation: Callable[["Leaf"], float] = lambda leaf: 0.0  # least share of salient weights
    tie: str | None = None  # leaves with the same tie are ranked as one layer
    block: tuple[int, ...] = ()  # sides of the units along the last axes, where these are blocks


class Stacked(NamedTuple):
    """Decision of a rule: the first ``axes`` axes stack layers; otherwise the default decides.

    For models whose layers are stacked by ``jax.lax.scan``: a ``(24, 512, 512)`` kernel then
    counts as 24 layers of ``(512, 512)`` in scores, counts and selection.

    Example:
      >>> import jax.numpy as jnp
      >>> (leaf,) = describe({"kernel": jnp.ones((24, 8, 8))}, [("kernel", Stacked(1))])
      >>> leaf.num_layers, leaf.layer_shape
      (24, (8, 8))
    """

    axes: int = 1
    structure: Structure | None = None  # of each layer
    prunable: bool = False  # True = prunable even if the default says no


Rules: TypeAlias = Sequence[tuple[str, bool | Stacked | Structure]]


class Leaf(NamedTuple):
    """What is known about one leaf of ``params`` without looking at its values."""

    path: str  # e.g. "conv1/kernel"
    shape: tuple[int, ...]
    prunable: bool
    stack_axes: int  # how many leading axes stack layers; 0 for most
    structure: Structure | None = None  # of a prunable leaf, if a rule gives one
    why: str = ""  # the reason for ``prunable``, e.g. "named scale"

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


@functools.lru_cache(maxsize=2**16)
def _word(key: Any) -> str:
    return jax.tree_util.keystr((key,), simple=True)


def names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """A key path as strings; the trailing ``.value`` of a Flax NNX variable is left out.

    Args:
      path: key path of a leaf, as ``jax.tree_util.tree_leaves_with_path`` gives it.

    Example:
      >>> import jax
      >>> ((path, _),) = jax.tree_util.tree_leaves_with_path({"layers": [{"kernel": 0}]})
      >>> names(path)
      ('layers', '0', 'kernel')
    """
    if path and getattr(path[-1], "name", None) == "value":
        path = path[:-1]
    return tuple(map(_word, path))


def by_path(tree: PyTree) -> dict[tuple[str, ...], Any]:
    """The leaves of a tree by their :func:`names`, in leaf order.

    Trees of one model in different containers (``nnx.State``, a pure dict, what a file gives back)
    agree on names, whatever the order of their leaves.

    Args:
      tree: any pytree.

    Returns:
      ``{names: leaf}``.

    Raises:
      ValueError: two leaves have the same names.

    Example:
      >>> by_path({"layers": [{"kernel": 7}]})
      {('layers', '0', 'kernel'): 7}
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    found = {names(path): leaf for path, leaf in leaves}
    if len(found) < len(leaves):
        paths = ["/".join(names(path)) for path, _ in leaves]
        twice = sorted({path for path in paths if paths.count(path) > 1})
        raise ValueError(f"Leaves need paths of their own; more than one is called {twice}.")
    return found


def paths(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by path, words joined by slashes, in leaf order.

    Where two paths would read alike, words that hold a slash are put in quotes.

    Args:
      tree: any pytree.

    Returns:
      ``{path: leaf}``.

    Raises:
      ValueError: as :func:`by_path`.

    Example:
      >>> list(paths({"a": {"b": 1}, "a/b": 2, "c/d": 3}))
      ['a/b', "'a/b'", 'c/d']
    """
    found = by_path(tree)
    joined = collections.Counter("/".join(words) for words in found)

    def path(words: tuple[str, ...]) -> str:
        plain = "/".join(words)
        if joined[plain] == 1:
            return plain
        return "/".join(repr(word) if "/" in word else word for word in words)

    return {path(words): leaf for words, leaf in found.items()}


class Owner(NamedTuple):
    """The parameter that a leaf of an optimizer's state belongs to."""

    names: tuple[str, ...]  # the parameter's, as of :func:`by_path`
    same_shape: bool  # False for factored moments and the like


def owners(state: PyTree, params: PyTree) -> dict[tuple[Any, ...], Owner | None]:
    """For each leaf of a state, the parameter whose path is the end of the leaf's own path.

    A leaf of the parameter's shape may also lie one step below that path, as where a parameter has
    a pair of moments. If there is a parameter called "mu", a path may be split in more than one
    way: the split whose front part holds the most parameters is taken.

    Args:
      state: any tree of arrays or ``ShapeDtypeStruct``, such as the state of an optimizer.
      params: tree of arrays or ``ShapeDtypeStruct``.

    Returns:
      ``{key path: owner}``; None for leaves that belong to no parameter (step counters, keys).

    Example:
      >>> import jax.numpy as jnp, optax
      >>> params = {"kernel": jnp.ones((2, 3))}
      >>> found = owners(optax.sgd(0.1, momentum=0.9).init(params), params)
      >>> list(found.values())
      [Owner(names=('kernel',), same_shape=True)]
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
        if start is not None:
            return Owner(words[start:], leaf.shape == shapes[words[start:]])
        for i in range(len(words)):
            if shapes.get(words[i:-1]) == leaf.shape:
                return Owner(words[i:-1], True)
        return None

    return {path: owner(w, x) for w, (path, x) in zip(all_names, leaves, strict=True)}


def map_with_owner(f: Callable[[Any, Owner | None], Any], state: PyTree, params: PyTree) -> PyTree:
    """``f(leaf, owner)`` for each leaf of a state.

    Args:
      f: is given a leaf and its owner, or None; see :func:`owners`.
      state: any tree of arrays or ``ShapeDtypeStruct``.
      params: tree of arrays or ``ShapeDtypeStruct``.

    Returns:
      A tree of the structure of ``state``.

    Example: which leaves of Adam's state have the shape of a parameter.
      >>> import jax.numpy as jnp, optax
      >>> params = {"kernel": jnp.ones((2, 3))}
      >>> state = optax.adam(0.1).init(params)
      >>> marked = map_with_owner(lambda leaf, owner: owner is not None, state, params)
      >>> marked[0].count, marked[0].mu
      (False, {'kernel': True})
    """
    found = owners(state, params)
    return jax.tree_util.tree_map_with_path(lambda path, x: f(x, found[path]), state)


def describe(params: PyTree, rules: Rules = ()) -> tuple[Leaf, ...]:
    """Describes each leaf, in the tree's leaf order: whether it is prunable, and why.

    By default a leaf is prunable if it holds floats (real or complex), has rank >= 2 (not counting
    stack axes), and is a kernel by its name and shape. These stay dense, by their own name or by
    the class of the module that holds them: biases, scales and offsets; norms; embeddings and
    positions; class tokens and the like; layer scales; adapters (LoRA). The names are those of
    Flax, Haiku, Equinox, Penzai, Keras and Hugging Face. A vector in disguise stays dense as well:
    all its axes but the last are 1, or, with three axes or more, all but the first. (Leaves called
    ``kernel``, ``w``, ``weight`` or ``weights``, and matrices without a name, are kernels even so.)
    A leaf without elements is never prunable.

    Args:
      params: tree of arrays or ``ShapeDtypeStruct``.
      rules: ``(pattern, decision)`` pairs; the first pattern that ``re.search`` finds in a leaf's
        path decides. ``True`` = prunable if it holds floats; ``False`` = dense; ``Stacked(n)`` =
        the leading ``n`` axes stack layers, and the default decides on the rest; a structure =
        pruned in that structure, if the default (or a tie) makes the leaf prunable.

    Returns:
      One :class:`Leaf` for each leaf; ``()`` for a tree without leaves, with which optax probes
      optimizers.

    Raises:
      ValueError: a leaf is no array, has fewer axes than its rule stacks, or a structure that does
        not fit, or the path of another; a rule is no pair or matches no leaf; nothing is prunable.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"fc": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)},
      ...           "head": {"kernel": jnp.ones((3, 2))}}
      >>> for leaf in describe(params, [("head", False)]):
      ...     print(leaf.path, leaf.prunable, leaf.why)
      fc/bias False rank 1
      fc/kernel True rank 2
      head/kernel False rule 'head'
    """
    named = paths(params)
    if not named:
        return ()
    for rule in rules:
        try:
            pattern, _ = () if isinstance(rule, str) else rule
            matches = any(re.search(pattern, name) for name in named)
        except (TypeError, ValueError, re.error) as error:
            raise ValueError(
                "A rule is a pair of a regular expression and a decision, as in "
                f"prunable=[('^head/', False)]; got {rule!r}: {error}."
            ) from None
        if not matches:
            raise ValueError(
                f"The rule {pattern!r} matches no parameter; the paths are: {', '.join(named)}."
            )
    if odd := next((x for x in named.items() if not hasattr(x[1], "dtype")), None):
        raise ValueError(
            f"{odd[0]} is no array but {odd[1]!r:.60}. Give parameters alone: flax.nnx.state and "
            "equinox.filter find them."
        )
    holders = [_holder(params, path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    leaves = tuple(
        _decide(name, leaf, holder, rules)
        for (name, leaf), holder in zip(named.items(), holders, strict=True)
    )
    if not any(leaf.prunable for leaf in leaves):
        told = ", ".join(
            f"{x.path} {x.shape} {leaf.dtype} [{x.why}]"
            for x, leaf in zip(leaves, named.values(), strict=True)
        )
        raise ValueError(
            "No parameter is prunable: by default that takes floats of rank >= 2 that are no bias, "
            f"scale, norm or embedding; got {told}. "
            "Name what to prune with a rule, e.g. prunable=[('kernel', True)]."
        )
    return leaves


def _decide(name: str, leaf: Any, holder: str, rules: Rules) -> Leaf:
    pattern, decision = next((r for r in rules if re.search(r[0], name)), ("", Stacked(0)))
    shape = tuple(leaf.shape)
    is_float = jnp.issubdtype(leaf.dtype, jnp.inexact)
    dense = "no elements" if 0 in shape else None if is_float else "no floats"
    if isinstance(decision, bool):
        why = f"rule {pattern!r}"
        return Leaf(name, shape, decision and not dense, 0, why=(decision and dense) or why)
    if isinstance(decision, Structure):
        decision = Stacked(0, decision)
    if not isinstance(decision, Stacked):
        raise ValueError(
            f"The rule for {name} decides {decision!r}; expected True, False, Stacked(axes) or one "
            "of granet_jax.structures."
        )
    if not 0 <= decision.axes <= len(shape):
        raise ValueError(f"A rule stacks {decision.axes} axes of {name}, which has shape {shape}.")
    structure = decision.structure
    if not decision.prunable and (structure is None or structure.tie is None):
        dense = dense or _why_dense(name, shape[decision.axes :], holder)
    if dense:
        return Leaf(name, shape, False, decision.axes, why=dense)
    why = f"rule {pattern!r}" if pattern else f"rank {len(shape)}"
    described = Leaf(name, shape, True, decision.axes, structure, why)
    if structure is not None:
        structure.grid(described)  # raises where it does not fit
    return described


# Names of leaves that are no kernels: their own name; the name of the module that holds them.
_NAMED = {
    "bias": r"(^|_)bias(es)?(_|\d|$)",
    "scale": r"(^|_)(scale|offset|shift|gamma|beta|lambda|ls)\d*$|layer_?scale",
    "position": r"(^|_)(pos|pe|wpe|positions?|positional|pos_?(emb|enc)\w*)(_|\d|$)",
    "embedding": r"embed|(^|_)(embs?|wte|codebook)(_|\d|$)",
    "token": r"(^|_)(cls|class_?emb|probe|latents?|registers?)\d*$|tokens?\d*$",
    "adapter": r"(^|[^a-z])lora([^a-z]|[abem]?\d*$)|(^|[^a-z])adapters?([^a-z]|$)",
}
_HELD = {
    "norm": r"norm|^(ln|bn|gn)(\d*|_\w+)$",
    "scale": r"layer_?scale|^ls\d*$",
    "embedding": r"embed|^(embs?|wte|wpe|codebook|\w*_embs?)\d*$",
    "position": r"^(pos|positions?|pos_?(emb|enc)\w*|positional_?enc\w*)\d*$",
}
_ANYWHERE = (r"embed", _NAMED["adapter"])
_KERNELS = ("kernel", "w", "weight", "weights")  # of a layer with one input or output, too


def _why_dense(name: str, shape: tuple[int, ...], holder: str) -> str | None:
    """Why a leaf is no kernel, by name and shape; None = it is one."""
    if len(shape) < 2:
        return f"rank {len(shape)}"
    *front, own = [word for word in name.lower().split("/") if word != "data_array"] or [""]
    module = next((word for word in reversed(front) if not word.isdecimal()), "")
    for kind, pattern in _NAMED.items():
        if re.search(pattern, own):
            return f"named {own}" if kind in own else f"{kind}: named {own}"
    for kind, pattern in _HELD.items():
        for word in (module, holder):
            if re.search(pattern, word) and not (kind == "norm" and own in _KERNELS[:2]):
                return f"in {word}" if kind in word else f"{kind}: in {word}"
    for word in front:
        if any(re.search(pattern, word) for pattern in _ANYWHERE):
            return f"in {word}"
    is_row = max(shape[:-1]) == 1 or (len(shape) > 2 and max(shape[1:]) == 1)
    nameless = len(shape) == 2 and (own.isdecimal() or not own)
    return "a vector" if is_row and own not in _KERNELS and not nameless else None


def _holder(tree: PyTree, path: tuple[Any, ...]) -> str:
    """The class of the module that a leaf is an attribute of, in lower case; "" = of none."""
    held = ""
    for key in path:
        if isinstance(key, jax.tree_util.GetAttrKey):
            if key.name in ("value", "data_array"):
                return held
            held = type(tree).__name__.lower()
            tree = getattr(tree, key.name, None)
        else:
            held = "" if isinstance(key, jax.tree_util.DictKey) else held
            index = getattr(key, "key", getattr(key, "idx", None))
            try:
                tree = tree[index]
            except (TypeError, KeyError, IndexError):
                return ""
    return held


def layer_shapes(leaves: Sequence[Leaf]) -> Shapes:
    """One shape for each layer, in layer order: leaf order, then position in the stack.

    Args:
      leaves: from :func:`describe`.

    Returns:
      A list of :class:`granet_jax.types.LayerShape`; leaves that are not prunable are left out.

    Example:
      >>> import jax.numpy as jnp
      >>> layer_shapes(describe({"kernel": jnp.ones((2, 4, 3))}, [("", Stacked(1))]))
      [(4, 3), (4, 3)]
    """
    return [
        LayerShape(x.layer_shape, x.path) for x in leaves if x.prunable for _ in range(x.num_layers)
    ]


def num_prunable(leaves: Sequence[Leaf]) -> int:
    """How many weights are prunable.

    Args:
      leaves: from :func:`describe`.

    Example:
      >>> import jax.numpy as jnp
      >>> num_prunable(describe({"bias": jnp.ones(3), "kernel": jnp.ones((4, 3))}))
      12
    """
    return sum(x.size for x in leaves if x.prunable)


def pick(tree: PyTree, leaves: Sequence[Leaf]) -> list[jax.Array]:
    """The prunable leaves of a tree, found by path.

    Args:
      tree: masks, gradients, scores: any tree with the params' paths and shapes.
      leaves: from :func:`describe`.

    Returns:
      A list of arrays, in leaf order.

    Raises:
      ValueError: a prunable leaf is missing, or has another shape.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"bias": jnp.ones(3), "kernel": jnp.ones((4, 3))}
      >>> [x.shape for x in pick(params, describe(params))]
      [(4, 3)]
    """
    found = paths(tree)
    for x in leaves:
        if x.prunable and (x.path not in found or jnp.shape(found[x.path]) != x.shape):
            got = f"shape {jnp.shape(found[x.path])}" if x.path in found else "nothing"
            raise ValueError(
                f"A tree of other leaves than the params: expected shape {x.shape} at {x.path}, "
                f"got {got}. Masks, gradients and scores need a leaf for each parameter."
            )
    return [found[x.path] for x in leaves if x.prunable]


def split(tree: PyTree, leaves: Sequence[Leaf]) -> list[jax.Array]:
    """The prunable leaves of a tree, in leaf order, as stacks ``(num_layers, *layer_shape)``.

    Args:
      tree: as for :func:`pick`, which raises the errors.
      leaves: from :func:`describe`.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"bias": jnp.ones(3), "kernel": jnp.ones((4, 3))}
      >>> [x.shape for x in split(params, describe(params))]
      [(1, 4, 3)]
    """
    prunable = [x for x in leaves if x.prunable]
    pairs = zip(pick(tree, leaves), prunable, strict=True)
    return [a.reshape(x.num_layers, *x.layer_shape) for a, x in pairs]


def join(stacks: Sequence[jax.Array], tree: PyTree, leaves: Sequence[Leaf]) -> PyTree:
    """Undoes :func:`split`: ``tree`` with its prunable leaves replaced by ``stacks``.

    Args:
      stacks: arrays ``(num_layers, *layer_shape)``, one for each prunable leaf, in leaf order.
      tree: gives the structure and the other leaves.
      leaves: from :func:`describe`.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"bias": jnp.ones(3), "kernel": jnp.ones((4, 3))}
      >>> leaves = describe(params)
      >>> zeros = [jnp.zeros_like(x) for x in split(params, leaves)]
      >>> {name: int(x.sum()) for name, x in join(zeros, params, leaves).items()}
      {'bias': 3, 'kernel': 0}
    """
    prunable = [x for x in leaves if x.prunable]
    new = {x.path: stack.reshape(x.shape) for x, stack in zip(prunable, stacks, strict=True)}
    return jax.tree.unflatten(
        jax.tree.structure(tree), [new.get(path, leaf) for path, leaf in paths(tree).items()]
    )
