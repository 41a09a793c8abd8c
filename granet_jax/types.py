"""The words of the library, each said once.

* **mask**: a bool array of its parameter's shape; ``True`` = kept. Masks are *total*: every leaf
  of ``params`` has one. The mask of a leaf that is never pruned is all ``True``. Only
  :func:`granet_jax.trees.describe` says which leaves are prunable; an all-``True`` mask does not.
* **sparsity**: the fraction of zeros among the *prunable* weights, the number that papers quote.
  Inside, the code works with ``num_keep``, an integer, so that counts are exact.
* **layer**: what a layerwise method treats as one unit: a prunable leaf, or one slice of a leaf
  whose leading axes are stacked layers.
* **score**: larger = more worth keeping, or growing. May be signed. The total order is
  ineligible < NaN < -inf < ... < -0 = +0 < ... < +inf. Scores are compared in float32, or in
  float64 if one of them is float64.
* **step**: the number of optimizer updates done; the first ``tx.update`` is step 1.
* **event**: a step at which masks may change.
* **prune** = switch off; **regrow** (regenerate) = switch on; **neuroregeneration** = prune and
  regrow the same number in one event.
* **keep**: the weights whose value and optimizer moments survive a step; a subset of the new masks.
  A weight that is in the new masks but not in ``keep`` starts at exactly 0 with zero moments.
* **live**, **on** = under a ``True`` mask; **masked**, **off** = under a ``False`` one.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax

PyTree: TypeAlias = Any
Counts: TypeAlias = Any  # an int (whole tree), ints in layer order, or such an int32 array
Shapes: TypeAlias = Sequence[tuple[int, ...]]  # one LayerShape for each layer, in layer order
NumKeep: TypeAlias = Callable[[Shapes, jax.Array], Counts]  # (shapes, step) -> Counts


class LayerShape(tuple[int, ...]):
    """The shape of a layer; ``path`` is that of its leaf, the same for all layers of a stack."""

    path: str

    def __new__(cls, shape: Sequence[int], path: str) -> "LayerShape":
        new = super().__new__(cls, shape)
        new.path = path
        return new


class Event(NamedTuple):
    """What methods, mask steps and scores may look at when masks are updated.

    Attributes:
      params: the weights after this step, with zeros where masked.
      grads: the raw gradients of this batch, of masked weights too.
      masks: bool tree of params at this point of the event: a score for growth sees the masks
        after the drop.
      step: int32 scalar, the step now being taken.
      key: a typed key, different for each step and mask step; None if the method has no key.
      inner: the state of the inner optimizer before this step.
      extra: further keyword arguments of ``tx.update`` (norms of activations, a loss).

    Example: what a score is given when it is tried by hand.
      >>> import jax.numpy as jnp
      >>> event = Event({"w": jnp.ones(2)}, grads={"w": jnp.zeros(2)}, step=1)
      >>> event.key is None
      True
    """

    params: PyTree
    grads: PyTree = None
    masks: PyTree = None
    step: Any = 0
    key: jax.Array | None = None
    inner: Any = None
    extra: dict[str, Any] = {}  # noqa: RUF012


class ScoreFn(Protocol):
    """Scores every weight: ``event -> tree`` of arrays of the params' shapes; larger = better."""

    def __call__(self, event: Event) -> PyTree: ...


class Distribution(Protocol):
    """Spreads a sparsity over layers: ``(shapes, sparsity) -> counts`` of weights to keep.

    One count for each layer makes a method layerwise; a single int is a budget for the whole tree.
    """

    def __call__(self, shapes: Shapes, sparsity: Any) -> Counts: ...


class Redistribution(Protocol):
    """Decides how many weights each layer grows: ``(num_dropped, growth, live) -> num_grown``.

    ``num_dropped`` is int32 ``(layers,)``; ``growth`` (scores) and ``live`` (before the drop)
    are stacks as :func:`granet_jax.trees.split` makes them. ``num_grown``, int32 ``(layers,)``,
    has the same sum as ``num_dropped``. No layer grows more weights than are off after the drop.
    """

    def __call__(
        self, num_dropped: jax.Array, growth: Sequence[jax.Array], live: Sequence[jax.Array]
    ) -> jax.Array: ...


class MaskStep(Protocol):
    """One pure change of masks: ``(masks, keep, event) -> (masks, keep)``."""

    def __call__(self, masks: PyTree, keep: PyTree, event: Event) -> tuple[PyTree, PyTree]: ...


class MaskState(NamedTuple):
    """State of the methods in this library; a method's own state may hold more after ``masks``."""

    masks: PyTree  # bool, shapes of params
    key: jax.Array | None  # uint32, the method's key data; each event folds its step into the key
    explored: PyTree = None  # bool, weights that have been on at least once; None = not tracked
    average: PyTree = None  # running mean of dense gradients, float32 or wider; None = not tracked


class Method(NamedTuple):
    """A sparse-training method: pure functions, safe under ``jit``, ``cond`` and ``vmap``.

    Attributes:
      init: ``params -> state``, whose first field is ``masks``. Accepts ``ShapeDtypeStruct`` leaves
        and a tree without leaves.
      update: ``(state, event) -> (state, keep)``, called at events only.
      is_update_step: ``step -> bool`` scalar: is this step an event?
      observe: ``(state, grads) -> state``, called at every step; None = nothing to observe.
      name: stored in the state, so that the state of another method is refused.

    Example: what the methods of this library return.
      >>> import granet_jax as gj
      >>> gj.static(sparsity=0.0).name
      'static'
    """

    init: Callable[[PyTree], Any]
    update: Callable[[Any, Event], tuple[Any, PyTree]]
    is_update_step: Callable[[jax.Array], Any]
    observe: Callable[[Any, PyTree], Any] | None = None
    name: str = "unnamed"


class SparseState(NamedTuple):
    """State of :func:`granet_jax.sparsify`: plain arrays, for any kind of file."""

    mask_step: jax.Array  # int32 scalar, updates done ("count" would collide with optax's own)
    method: Any  # the method's state; its first field is masks
    inner: Any  # the wrapped optimizer's state
    # bool, what the last update kept: the masks without the weights that an event has just grown.
    # It is stored because computing it again would cost each step a copy of the masks.
    keep: PyTree
    # {name of the method: None}, a part of the tree's structure; empty in states of old versions.
    written_by: dict[str, None] = {}  # noqa: RUF012
    # bool scalar, whether the last update was an event, whose grown weights ``keep`` lacks. It is
    # stored because another schedule may go on from this state. None in states of old versions.
    grew: jax.Array | None = None


def check_callable(**functions: Any) -> None:
    """Checks that what was given as a function is one.

    Args:
      **functions: by the name that the message gives.

    Raises:
      TypeError: one cannot be called.

    Example:
      >>> check_callable(score=abs)
    """
    for name, function in functions.items():
        if not callable(function):
            raise TypeError(
                f"{name} has to be a function, such as granet_jax.erk, granet_jax.scores.magnitude "
                f"or a schedule; got {function!r}."
            )
