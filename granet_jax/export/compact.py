"""Compaction: cuts out dead channels, neurons and filters and gives a smaller dense model."""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from granet_jax import jaxprs, report, structures, trees
from granet_jax.export import fold
from granet_jax.export.channels import is_depthwise, of_array, of_input, trace
from granet_jax.export.graph import Program, Step, check_inputs, flatten, kinds
from granet_jax.export.ids import Channels, Value
from granet_jax.masks import apply_masks
from granet_jax.types import PyTree


class Cut(NamedTuple):
    """How one axis of one leaf was cut; a line of :func:`cuts_table`."""

    path: str
    axis: int
    before: int
    after: int
    refused: dict[str, int]  # {reason: how many dead elements stayed for it}


@dataclasses.dataclass(frozen=True, eq=False)
class Compact:
    """A smaller dense model. Made by :func:`compact`."""

    params: PyTree  # the same tree with smaller leaves
    apply: Callable[..., Any]  # (params, *inputs) -> outputs, for inputs of the example's shapes
    cuts: tuple[Cut, ...]  # axes that were cut, or that keep dead elements


def compact(
    apply_fn: Callable[..., Any], params: PyTree, masks: PyTree | None, *example: Any
) -> Compact:
    """Cuts out dead channels, with their biases, norm entries and the weights that read them.

    An element of an axis (a channel, a neuron) is dead if for all inputs each product that reads it
    is 0: because the element itself is exactly 0, or because the weights that read it are 0. Which
    axes belong together (a kernel, the norm after it, the residual stream to which both write, the
    kernels that read the stream) follows from the trace of the model.

    A filter of zeros under a bias or a norm offset gives a constant for all inputs. It can be cut
    as well if the constant can be added to later biases: all its readers are products with kernels
    of two axes, or convolutions without padding and groups, and each is followed at once by a bias
    of its own. Otherwise it stays, and :func:`cuts_table` says why. :func:`channel_rules` avoids
    this: it ties biases and norms to the filter in training, but not the norms over concatenated
    channels (DenseNet), which have no filter of their own.

    Args:
      apply_fn: ``(params, *inputs) -> outputs``. Arrays that it closes over are cut, too.
      params: the trained parameters, and anything else in ``apply_fn``'s first argument (batch
        statistics). The model must not return any of these arrays.
      masks: bool tree, matched with the params by path. None = zeros count as pruned.
      *example: inputs of the shapes and dtypes to trace for; their values do not matter.

    Returns:
      A :class:`Compact`. Outputs are those of ``apply_fn``, except that sums are added up in
      another order. ``apply`` replays the trace and works for any model, on inputs of the example's
      shapes and dtypes; it raises a ValueError for others. If the model takes its widths from its
      parameters (Flax NNX, Equinox, bare functions) and does not divide by a width or the batch
      size, it also works with the new ``params`` itself, at any batch size. At least one element of
      each axis stays.

    Raises:
      ValueError: a parameter that is not masked holds NaN, or a mask has no parameter of its shape.

    Example: a hidden layer with two dead neurons, which are cut. A third has zero weights and a
    bias; it stays, because no later bias can take its constant.
      >>> import granet_jax as gj, jax.numpy as jnp
      >>> params = {"in": jnp.array([[1.0, 0.0, 0.0, 0.0]]),
      ...           "bias": jnp.array([0.0, 0.0, 0.0, 5.0]),
      ...           "out": jnp.ones((4, 2))}
      >>> def apply_fn(params, x):
      ...     return jnp.maximum(x @ params["in"] + params["bias"][None], 0) @ params["out"]
      >>> x = jnp.array([[3.0]])
      >>> small = gj.export.compact(apply_fn, params, None, x)
      >>> [x.shape for x in small.params.values()]
      [(2,), (1, 2), (2, 2)]
      >>> bool(jnp.array_equal(small.apply(small.params, x), apply_fn(params, x)))
      True
    """
    if masks is not None:
        params = apply_masks(params, masks)
    paths = ["/".join(words) for words in trees.by_path(params)]
    for path, x in zip(paths, jax.tree.leaves(params), strict=True):
        if jnp.issubdtype(jnp.result_type(x), jnp.inexact) and bool(jnp.isnan(x).any()):
            raise ValueError(f"{path} holds NaN, which no cut can respect; mend it first.")
    traced = _Traced.of(apply_fn, params, example)
    keep = _Keep.of(traced)
    added = _added_to_biases(jax.tree.leaves(params), traced, keep)
    whole = [
        jnp.asarray(x if i not in added else (np.asarray(x) + added[i]).astype(x.dtype))
        for i, x in enumerate(jax.tree.leaves(params))
    ]
    leaves = map(keep.cut, whole, traced.params)
    small = jax.tree.unflatten(jax.tree.structure(params), leaves)
    told = [
        value._replace(const=value.const if i not in added else [np.asarray(x)])
        for i, (x, value) in enumerate(zip(whole, traced.params, strict=True))
    ]
    cuts = tuple(cut for args in zip(paths, told, strict=True) for cut in keep.told(*args))
    consts = {slot: keep.cut(x, traced.values[slot]) for slot, x in traced.program.consts.items()}
    steps = [(step, _adapted(step, traced, keep)) for step in traced.program.steps]

    wanted = kinds(example)

    def apply(params: PyTree, *inputs: Any) -> Any:
        check_inputs(inputs, wanted, "traced")
        slots = dict(enumerate([*jax.tree.leaves(params), *jax.tree.leaves(inputs)])) | consts
        for step, function in steps:
            outs = function(*(slots[x] if isinstance(x, int) else x.value for x in step.inputs))
            slots |= dict(zip(step.outputs, outs, strict=True))
        outs = [slots[x] if isinstance(x, int) else x.value for x in traced.program.outputs]
        return jax.tree.unflatten(traced.out_tree, outs)

    return Compact(small, apply, cuts)


def cuts_table(cuts: tuple[Cut, ...]) -> str:
    """A table with a line for each axis that was cut or keeps dead elements, and why.

    Args:
      cuts: the field of :class:`Compact`.

    Returns:
      Lines of text, joined.

    Example:
      >>> print(cuts_table((Cut("fc/kernel", 1, 300, 120, {"a product reads it": 3}),)))
      parameter  axis  before  after         dead, but kept
      fc/kernel  1        300    120  3: a product reads it
    """
    rows = [("parameter", "axis", "before", "after", "dead, but kept")]
    for cut in cuts:
        why = "; ".join(f"{num}: {reason}" for reason, num in cut.refused.items())
        rows.append((cut.path, str(cut.axis), str(cut.before), str(cut.after), why))
    return report.aligned(rows)


def channel_rules(
    apply_fn: Callable[..., Any], params: PyTree, *example: Any, vectors: bool = True
) -> list[tuple[str, bool | trees.Structure | trees.Stacked]]:
    """Path rules that prune channels in such a way that :func:`compact` can cut them out.

    Kernels whose outputs are added (in a residual stream) are tied, and so are the biases and norms
    after them. Leaves whose channels cannot be cut (the last layer) stay dense. A norm over
    concatenated channels (DenseNet) is ranked alone: where one of its channels lives on and the
    kernel's does not, less can be cut.

    Args:
      apply_fn: ``(params, *inputs) -> outputs``.
      params: the tree that the optimizer trains; the function may close over the rest (batch
        statistics).
      *example: inputs; their values do not matter.
      vectors: False = do not tie biases and norms. This is for methods that regrow, because a
        channel whose norm and bias are 0 has no gradient. After training call
        ``granet_jax.structures.complete(masks, params, rules)`` with the rules of
        ``vectors=True``, and train a few more steps.

    Returns:
      Rules for ``prunable=``.

    Example:
      >>> import granet_jax as gj, jax.numpy as jnp
      >>> params = {"bias": jnp.ones(4), "in": jnp.ones((3, 4)), "out": jnp.ones((4, 2))}
      >>> def apply_fn(params, x):
      ...     return jnp.maximum(x @ params["in"] + params["bias"][None], 0) @ params["out"]
      >>> rules = gj.export.channel_rules(apply_fn, params, jnp.ones((1, 3)))
      >>> [(leaf.path, leaf.prunable) for leaf in gj.trees.describe(params, rules)]
      [('bias', True), ('in', True), ('out', False)]
    """
    traced = _Traced.of(apply_fn, params, example)
    fixed, read = traced.channels.fixed(), traced.read_by_products()
    rules: list[tuple[str, bool | trees.Structure | trees.Stacked]] = []
    names: dict[tuple[int, ...], str] = {}
    for (words, leaf), value in zip(trees.by_path(params).items(), traced.params, strict=True):
        path = "/".join(words)
        pattern = f"^{re.escape(path)}$"
        written = [i for i, ids in enumerate(value.ids) if not read.intersection(ids.tolist())]
        roots = {i: tuple(traced.channels.roots(value.ids[i]).tolist()) for i in written}
        free = [i for i in written if not fixed.keys() & set(roots[i])]
        is_pruned = jnp.issubdtype(leaf.dtype, jnp.inexact) and (vectors or leaf.ndim > 1)
        if len(free) == 1 and is_pruned:
            tie = names.setdefault(roots[free[0]], path)
            rules.append((pattern, structures.channel(axis=free[0], tie=tie)))
        else:
            rules.append((pattern, False))
    return rules


class _Traced(NamedTuple):
    program: Program
    channels: Channels
    values: dict[int, Value]  # by slot
    params: list[Value]  # of each leaf
    folds: dict[int, fold.Fold]  # by the slot of the product's output
    out_tree: Any

    @classmethod
    def of(cls, apply_fn: Callable[..., Any], params: PyTree, example: Any) -> "_Traced":
        closed, shapes = jaxprs.trace(apply_fn, params, *example)
        program, channels = flatten(closed), Channels()
        given = [of_array(channels, x) for x in jax.tree.leaves(params)]
        inputs = [of_input(channels, jnp.shape(x)) for x in jax.tree.leaves(example)]
        folds = fold.find(program, [jnp.shape(x) for x in jax.tree.leaves(params)])
        values = trace(channels, program, [*given, *inputs], folds)
        return cls(program, channels, values, given, folds, jax.tree.structure(shapes))

    def read_by_products(self) -> set[int]:
        """Ids of the axes of weights that products contract: those on the side of their inputs."""
        data = set(range(len(self.params), self.program.num_inputs))
        read: set[int] = set()
        for step in self.program.steps:
            if not data.intersection(step.slots()):
                continue
            data.update(step.outputs)
            for i, axes in enumerate(_contracted(step)):
                slot = step.inputs[i]
                if isinstance(slot, int) and slot not in data:
                    read.update(x for axis in axes for x in self.values[slot].ids[axis].tolist())
        return read


def _contracted(step: Step) -> tuple[tuple[int, ...], ...]:
    """The axes that a product sums over, of each operand."""
    if step.eqn.primitive.name == "dot_general":
        return step.eqn.params["dimension_numbers"][0]
    if step.eqn.primitive.name == "conv_general_dilated" and not is_depthwise(step):
        numbers = step.eqn.params["dimension_numbers"]
        return (numbers.lhs_spec[1],), (numbers.rhs_spec[1],)
    return ()


class _Keep(NamedTuple):
    """Which elements stay, and why."""

    channels: Channels
    gone: set[int]  # roots
    reasons: dict[int, str]  # by root, why it stays

    @classmethod
    def of(cls, traced: _Traced) -> "_Keep":
        reasons = traced.channels.kept()
        read = {slot for step in traced.program.steps for slot in step.slots()}
        # Arrays that nothing reads are not cut, and at least one element of each axis stays.
        own = [(i, value) for i, value in enumerate(traced.params)]
        own += [(slot, traced.values[slot]) for slot in traced.program.consts]
        axes = [
            (slot in read, traced.channels.roots(ids).tolist())
            for slot, value in own
            for ids in value.ids
        ]
        gone = {root for _, roots in axes for root in roots} - reasons.keys()
        for is_read, roots in axes:
            if not is_read:
                gone.difference_update(roots)
            elif roots and gone.issuperset(roots):
                gone.discard(roots[0])
        return cls(traced.channels, gone, reasons)

    def mask(self, ids: np.ndarray) -> np.ndarray:
        """Bool: which elements of an axis stay."""
        return np.array([root not in self.gone for root in self.channels.roots(ids)], bool)

    def num(self, ids: np.ndarray) -> int:
        return int(self.mask(ids).sum())

    def cut(self, x: Any, value: Value) -> jax.Array:
        """An array without the elements that are cut."""
        masks = [self.mask(ids) for ids in value.ids]
        if all(mask.all() for mask in masks):
            return jnp.asarray(x)
        return jnp.asarray(np.asarray(x)[np.ix_(*masks)])

    def told(self, path: str, value: Value) -> list[Cut]:
        """The cuts of a leaf's axes; axes without dead elements are left out."""
        cuts = []
        for axis, (ids, zero) in enumerate(zip(value.ids, value.zero, strict=False)):
            dead = zero & self.mask(ids)
            roots = self.channels.roots(ids)[dead]
            refused = Counter(self.reasons.get(root, "the last one") for root in roots.tolist())
            if refused or self.num(ids) < len(ids):
                cuts.append(Cut(path, axis, len(ids), self.num(ids), dict(refused)))
        return cuts


def _added_to_biases(leaves: list[Any], traced: _Traced, keep: _Keep) -> dict[int, np.ndarray]:
    """What each bias has to take for the constants that are cut, by the index of its leaf."""
    evaluate = fold.evaluator(traced.program, leaves)
    each = {
        f.bias: f.into_bias(
            traced.values[f.slots[0]],
            ~keep.mask(traced.values[f.slots[0]].ids[f.axis]),
            evaluate(f.slots[1]),
        )
        for f in traced.folds.values()
    }
    return {bias: added for bias, added in each.items() if added.any()}


def _adapted(step: Step, traced: _Traced, keep: _Keep) -> Callable[..., list[Any]]:
    """The operation on inputs that have been cut."""
    name, params = step.eqn.primitive.name, dict(step.eqn.params)
    outs = [traced.values[slot] for slot in step.outputs]
    ins = [traced.values[x] for x in step.inputs if isinstance(x, int)]
    if all(keep.mask(ids).all() for value in (*outs, *ins) for ids in value.ids):
        return step.function
    if name == "broadcast_in_dim":
        params["shape"] = tuple(keep.num(ids) for ids in outs[0].ids)
    elif name == "reshape":
        params["new_sizes"] = tuple(keep.num(ids) for ids in outs[0].ids)
    elif name == "slice":
        for which in ("start_indices", "limit_indices"):
            pairs = zip(ins[0].ids, params[which], strict=True)
            params[which] = tuple(keep.num(ids[:end]) for ids, end in pairs)
    elif name == "split":
        ends = np.cumsum(params["sizes"])[:-1]
        params["sizes"] = tuple(keep.num(ids) for ids in np.split(ins[0].ids[params["axis"]], ends))
    elif name == "conv_general_dilated" and is_depthwise(step):
        numbers = params["dimension_numbers"]
        params["feature_group_count"] = keep.num(outs[0].ids[numbers.out_spec[1]])
    else:
        return step.function

    def function(*values: Any) -> list[Any]:
        results = step.eqn.primitive.bind(*values, **params)
        results = results if step.eqn.primitive.multiple_results else [results]
        return [results[i] for i in step.read]

    return function
