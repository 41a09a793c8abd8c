"""How weights are held in training: dense under masks, live ones alone, or with thresholds."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import granet_jax as gj
from experiments.engine import methods

_SHRINK_AT = 0.7  # slots are repacked where at most this share is needed: steps compile anew


class Family(NamedTuple):
    """How a method's weights are held; ``held`` is what the optimizer trains."""

    start: Callable[[Any, optax.GradientTransformation], tuple[Any, Any]]
    """(initial weights, optimizer) -> held, optimizer state"""
    through: Callable[[Callable[..., Any]], Callable[..., Any]]
    """f(weights, *args) -> the same of (held, optimizer state, *args)"""
    gradients: Callable[..., Any]
    """(f, event, held, optimizer state, *args), where f gives a number and more ->
    (what f gives, gradients of held, what update is told besides)"""
    weights: Callable[[Any, Any], Any]  # (held, optimizer state) -> dense weights
    masks: Callable[[Any, Any], Any]  # (held, optimizer state) -> masks
    explored: Callable[[Any], Any]  # optimizer state -> union of all masks; None = not tracked
    is_update_step: Callable[[Any], Any]  # step -> whether FLOPs are measured anew after it
    two_programs: bool  # whether steps with and without an event are compiled apart


def masked(method: gj.Method) -> Family:
    """Dense weights, masks in the optimizer's state."""

    def start(params: Any, tx: optax.GradientTransformation) -> tuple[Any, Any]:
        opt_state = tx.init(params)
        return gj.apply_masks(params, gj.get_masks(opt_state)), opt_state

    return _dense(
        start,
        lambda params: params,
        lambda _, opt_state: gj.get_masks(opt_state),
        lambda opt_state: gj.get_method_state(opt_state).explored,
        method.is_update_step,
    )


_MEASURE_EVERY = 10  # steps; counting the masks at each one would cost


def thresholds(method: gj.reparam.Reparameterisation) -> Family:
    """Pairs of dense weights and extra parameters; masks change at every step."""

    def start(params: Any, tx: optax.GradientTransformation) -> tuple[Any, Any]:
        pair = (params, method.init(params))
        return pair, tx.init(pair)

    return _dense(
        start,
        lambda pair: method.effective(*pair),
        lambda pair, _: method.masks(*pair),
        lambda opt_state: None,
        gj.every(_MEASURE_EVERY),
    )


def _dense(
    start: Callable[..., Any],
    weights: Callable[[Any], Any],
    masks: Callable[[Any, Any], Any],
    explored: Callable[[Any], Any],
    is_update_step: Callable[[Any], Any],
) -> Family:
    def through(f: Callable[..., Any]) -> Callable[..., Any]:
        return lambda held, _, *args: f(weights(held), *args)

    def gradients(f: Callable[..., Any], _: Any, *args: Any) -> Any:
        return *jax.value_and_grad(through(f), has_aux=True)(*args), {}

    return Family(
        start,
        through,
        gradients,
        lambda held, _: weights(held),
        masks,
        explored,
        is_update_step,
        False,
    )


def live(method: gj.Method) -> Family:
    """Slots of live weights; layouts in the optimizer's state."""

    def start(params: Any, tx: optax.GradientTransformation) -> tuple[Any, Any]:
        opt_state = tx.init(params)
        return gj.compact.to_slots(params, gj.compact.get_layouts(opt_state)), opt_state

    def through(f: Callable[..., Any]) -> Callable[..., Any]:
        sparse = gj.compact.sparse(f)
        return lambda held, state, *args: sparse(held, gj.compact.get_layouts(state), *args)

    def gradients(
        f: Callable[..., Any], event: bool | None, held: Any, state: Any, *args: Any
    ) -> Any:
        layouts = gj.compact.get_layouts(state)

        def dense() -> Any:
            return gj.compact.value_and_dense_grad(f, has_aux=True)(held, layouts, *args)

        if event:
            value, grads = dense()
            return value, gj.compact.to_slots(grads, layouts), _told(lambda: grads, event)
        value, grads = jax.value_and_grad(through(f), has_aux=True)(held, state, *args)
        return value, grads, _told(lambda: dense()[1], event)

    return Family(
        start,
        through,
        gradients,
        lambda held, state: gj.compact.unpack(held, gj.compact.get_layouts(state)),
        lambda held, state: gj.compact.masks(held, gj.compact.get_layouts(state)),
        lambda state: gj.compact.get_state(state).method.explored,
        method.is_update_step,
        True,
    )


def _told(dense_grads: Callable[[], Any], event: bool | None) -> dict[str, Any]:
    return {"dense_grads": dense_grads, "event": event}


class Slots(NamedTuple):
    """What ``--compact`` asks of the optimizer."""

    prunable: gj.trees.Rules
    capacity: dict[str, int]  # slots of a layer of each leaf, at the start
    kernels: bool | None  # see gj.compact.pack; False on several devices, for XLA divides no kernel
    block: tuple[int, int] | None  # where whole blocks are kept

    def sparsify(
        self, inner: optax.GradientTransformation, method: gj.Method
    ) -> optax.GradientTransformation:
        """The optimizer on slots."""
        return gj.compact.sparsify(
            inner,
            method,
            self.prunable,
            capacity=self.capacity,
            kernels=self.kernels,
            block=self.block,
        )


def slots(
    config: Any, method: Any, params: Any, prunable: gj.trees.Rules, num_devices: int
) -> Slots | None:
    """What ``--compact`` asks for; None where it is not given, or nothing is sparse.

    Args:
      config: settings with ``method``, ``compact`` and ``block_kernel``.
      method: made of them.
      params: abstract, dense.
      prunable: path rules.
      num_devices: over which the work is divided.

    Raises:
      ValueError: the method or another flag does not go with it.
    """
    if not config.compact or config.method == "dense":
        return None
    if not isinstance(method, gj.Method):
        why = "trains dense weights, from which its masks follow"
    elif methods.METHODS[config.method].at_init is not None:
        why = "looks at data before it is known how many weights of a layer are live"
    elif methods.METHODS[config.method].grows_dense:
        why = "grows back to dense again and again"
    elif method.observe is not None:
        why = "needs dense gradients at every step"
    elif config.block_kernel:
        raise ValueError("--compact and --block_kernel are two ways to do the same products.")
    else:
        masks = method.init(params)[0]
        capacity = gj.compact.capacities(masks, gj.trees.describe(params, prunable))
        sides = methods.parse_block(config.structure) or ()
        has_kernels = num_devices == 1 and gj.kernels.of_the_device() is not None
        block = (sides[0], sides[1]) if has_kernels and len(sides) == 2 else None
        return Slots(prunable, capacity, None if num_devices == 1 else False, block)
    raise ValueError(f"--compact: {config.method} {why}. Leave the flag out.")


def events(family: Family, step: int, num_steps: int) -> list[bool]:
    """Which of the steps after ``step`` are events."""
    each = jax.vmap(family.is_update_step)(jnp.arange(step + 1, step + num_steps + 1))
    return [bool(x) for x in np.broadcast_to(np.asarray(each), num_steps)]


def shrunk(state: Any) -> Any:
    """A training state repacked to fewer slots, where much fewer are live.

    Args:
      state: concrete, with fields ``params`` and ``opt_state``.
    """
    layouts = gj.compact.get_layouts(state.opt_state)
    wanted = {path: gj.compact.num_live(x) for path, x in layouts.items()}
    slots = {path: math.prod(x.slots_shape) for path, x in layouts.items()}
    layers = {path: slots[path] // x.capacity for path, x in layouts.items()}
    needed = sum(layers[path] * wanted[path] for path in layouts)
    if needed > _SHRINK_AT * sum(slots.values()):
        return state
    return gj.compact.shrink(state, state.opt_state, state.params, wanted)


def with_capacity(state: Any, saved: Any) -> Any:
    """An abstract training state with as many slots as a saved one has.

    Args:
      state: abstract, with fields ``params`` and ``opt_state``.
      saved: what a checkpoint tells of the shapes of its arrays, a tree.
    """
    layouts = gj.compact.get_layouts(state.opt_state)
    found = gj.trees.paths(saved)
    own = {id(x.index): path for path, x in layouts.items()}
    places = {own[id(x)]: path for path, x in gj.trees.paths(state).items() if id(x) in own}
    capacity = {
        leaf: found[place].shape[-1] * layouts[leaf].unit
        for leaf, place in places.items()
        if place in found
    }
    if any(capacity.get(path, x.capacity) > x.capacity for path, x in layouts.items()):
        return state  # of other layers, which the reader tells
    smaller = jax.eval_shape(lambda x: gj.compact.shrink(x, x.opt_state, x.params, capacity), state)
    return jax.tree.map(
        lambda new, old: jax.ShapeDtypeStruct(new.shape, new.dtype, sharding=old.sharding),
        smaller,
        state,
    )
