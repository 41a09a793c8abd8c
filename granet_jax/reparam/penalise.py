"""``penalise``: trains a reparameterisation with any optax optimizer; ``steer``: to a sparsity."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from granet_jax import metrics, schedules
from granet_jax.checkpoint import exportable
from granet_jax.distributions import check_sparsity
from granet_jax.reparam.base import Reparameterisation
from granet_jax.types import PyTree


class Controller(NamedTuple):
    """How the coefficient of the penalty changes in training.

    Attributes:
      initial: the coefficient before the first step.
      update: ``(coefficient, previous_sparsity, sparsity, step) -> coefficient`` of this step:
        float32 scalars, and an int32 step. ``sparsity`` is that of this step's forward pass,
        ``previous_sparsity`` that of the step before (0 at step 1).
      bounds: the smallest and the largest coefficient that it gives; None = there are none.
      sparsity: the target; None = there is none.

    Example: a coefficient that grows by 1 % in each step.
      >>> controller = Controller(1e-4, lambda coefficient, *_: 1.01 * coefficient)
      >>> controller.bounds is None
      True
    """

    initial: Any
    update: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
    bounds: tuple[Any, Any] | None = None
    sparsity: Any = None


@exportable
class PenaltyState(NamedTuple):
    """State of :func:`penalise`."""

    penalty_step: jax.Array  # int32 scalar, updates done
    coefficient: jax.Array  # float32 scalar, of the last update
    sparsity: jax.Array  # float32 scalar, of the forward pass before the last update
    inner: Any  # the wrapped optimizer's state


def penalise(
    inner: optax.GradientTransformation,
    method: Reparameterisation,
    coefficient: float | jax.Array | Controller,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that it trains a reparameterisation, with its penalty and its resets.

    The parameters are the pair ``(params, extra)``. The loss is that of the task alone, on
    ``method.effective(params, extra)``. One ``update``:

    1. Adds ``coefficient * grad penalty(extra)`` to the gradients of ``extra``. This is the same as
       adding ``coefficient * method.penalty(extra)`` to the loss.
    2. Runs ``inner`` on the pair.
    3. Returns updates with which plain ``optax.apply_updates`` gives ``extra`` after
       ``method.reset``. Values that are reset to 0 become exactly 0.

    The result is an optax transformation like any other. Its state holds the last ``coefficient``
    and ``sparsity`` (``optax.tree.get(opt_state, "sparsity")``). In a chain, nothing after it may
    change the updates. In ``inner``, gradient clipping includes the penalty, and weight decay
    applies to ``extra`` unless a mask excludes it.

    Args:
      inner: any optax transformation that ends in parameter updates.
      method: the reparameterisation, as ``dst()`` or ``str_()`` returns it.
      coefficient: a number >= 0; or a :class:`Controller`, such as :func:`steer` returns.

    Returns:
      A ``GradientTransformationExtraArgs`` whose state is :class:`PenaltyState`.

    Raises:
      TypeError: ``inner`` is no optax transformation, or ``method`` no reparameterisation.
      ValueError: a negative coefficient; parameters or gradients that are not a pair.

    Example:
      >>> import granet_jax as gj, jax, jax.numpy as jnp, optax
      >>> method = gj.reparam.dst()
      >>> tx = gj.reparam.penalise(optax.sgd(0.01, momentum=0.9), method, coefficient=5e-4)
      >>> params = {"kernel": jnp.array([[0.5, -0.3]]), "bias": jnp.zeros(2)}
      >>> pair = (params, method.init(params))
      >>> state = tx.init(pair)
      >>> def loss(pair):
      ...     params = method.effective(*pair)
      ...     return jnp.sum(params["kernel"] ** 2)
      >>> updates, state = tx.update(jax.grad(loss)(pair), state, pair)
      >>> pair = optax.apply_updates(pair, updates)
      >>> [round(float(t), 4) for t in pair[1]["kernel"]]
      [0.002, 0.0014]
    """
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            f"penalise wraps an optax transformation, got {type(inner).__name__}. "
            "Call it as penalise(optax.sgd(0.1), method, coefficient)."
        )
    if not isinstance(method, Reparameterisation):
        raise TypeError(
            f"penalise needs a Reparameterisation, got {type(method).__name__}. "
            "Call the method first: penalise(inner, granet_jax.reparam.dst(), coefficient)."
        )
    inner = optax.with_extra_args_support(inner)
    control = coefficient if isinstance(coefficient, Controller) else _constant(coefficient)

    def init(params: PyTree) -> PenaltyState:
        if jax.tree.leaves(params):  # optax probes with an empty tree
            _check_pair("parameters", params)
        return PenaltyState(
            jnp.zeros([], jnp.int32),
            jnp.asarray(control.initial, jnp.float32),
            jnp.zeros([], jnp.float32),
            inner.init(params),
        )

    def update(
        grads: PyTree, state: PenaltyState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, PenaltyState]:
        _check_pair("parameters", params)
        _check_pair("gradients", grads)
        assert params is not None
        weights, extra = params
        step = optax.safe_increment(state.penalty_step)
        sparsity = metrics.sparsity(method.masks(weights, extra), weights, method.prunable)
        coefficient = control.update(state.coefficient, state.sparsity, sparsity, step)
        coefficient = jnp.asarray(coefficient, jnp.float32)

        slopes = jax.grad(method.penalty)(extra)
        task_grads, extra_grads = grads
        extra_grads = jax.tree.map(
            lambda g, d: g + coefficient.astype(d.dtype) * d, extra_grads, slopes
        )
        updates, inner_state = inner.update(
            _like(grads, task_grads, extra_grads), state.inner, params, **extra_args
        )
        new_weights, new_extra = optax.apply_updates(params, updates)
        left = method.reset(new_weights, new_extra)
        if method.advance is not None:
            left = method.advance(extra)
        extra_updates = jax.tree.map(
            lambda u, old, new, reset: jnp.where(reset == new, u, reset - old),
            updates[1],
            extra,
            new_extra,
            left,
        )
        updates = _like(updates, updates[0], extra_updates)
        return updates, PenaltyState(step, coefficient, sparsity, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


GAIN = 10.0  # a density 10 % above its reference raises the coefficient by a factor of e
LARGEST_ERROR = 0.1  # larger relative errors count as this one, so a jump changes it by e at most
RANGE = 1e4  # the coefficient stays within this factor of the initial one


def steer(sparsity: float, end_step: int, initial: float = 1e-4) -> Controller:
    """Steers the coefficient of the penalty so that a requested sparsity is reached and held.

    The reference for the density (1 - sparsity) falls from 1 to the requested density at
    ``end_step``, by the same factor in each step, and is then constant. A proportional-integral
    controller acts on the logarithm of the coefficient, with ``e = log(density / reference)``
    clipped to +-.1::

        log c_t = log c_(t-1) + 10 * (e_t - e_(t-1)) + 10 * e_t / (end_step / 10)

    Errors and changes are relative, so it does not depend on the scale of weights, learning rate or
    penalty. The sparsity is reached on average, not exactly: it varies from step to step by tenths
    of a percentage point at a constant learning rate, and less if the learning rate decays.

    The coefficient is always positive: the penalty makes the network sparser, and the loss brings
    weights back. A sparsity cannot be reached if weight decay alone already exceeds it, or if it is
    above a limit of the method. (DST's limit is 99 % in any layer; the total may then be lower.) In
    these cases the coefficient goes to its bound and stays there: :func:`at_bound` shows it, and
    :func:`shortfall` reports it at the end of training.

    Args:
      sparsity: fraction of zeros among the prunable weights, in [0, 1); may be traced.
      end_step: the update at which it should be reached, >= 10; half of the training is a good
        choice, so that the network can settle in the other half.
      initial: the coefficient at the start, > 0. A value that is wrong by a factor of 100 does
        little harm; the coefficient stays within a factor of 10^4 of it.

    Returns:
      A controller for :func:`penalise`.

    Raises:
      ValueError: a sparsity outside [0, 1), an initial coefficient that is not positive, or
        ``end_step < 10``.

    Example:
      >>> import granet_jax as gj, optax
      >>> controller = steer(0.95, end_step=10_000)
      >>> tx = gj.reparam.penalise(optax.sgd(0.01, momentum=0.9), gj.reparam.dst(), controller)
      >>> float(controller.update(1e-3, 0.95, 0.95, 20_000))  # as requested: no change
      0.0010000000474974513
    """
    check_sparsity("sparsity", sparsity)
    schedules.check_steps(end_step=end_step)
    if end_step < 10:
        raise ValueError(f"steer needs end_step >= 10 updates to act in; got {end_step}.")
    if not initial > 0:
        raise ValueError(f"The initial coefficient must be > 0 to be scaled; got {initial}.")

    def error(sparsity_now: jax.Array, step: jax.Array) -> jax.Array:
        asked = jnp.log1p(-jnp.asarray(sparsity, jnp.float32))
        reference = asked * jnp.minimum(jnp.asarray(step, jnp.float32) / end_step, 1.0)
        density = jnp.maximum(1 - jnp.asarray(sparsity_now, jnp.float32), 1e-9)
        return jnp.clip(jnp.log(density) - reference, -LARGEST_ERROR, LARGEST_ERROR)

    def update(
        coefficient: jax.Array, previous_sparsity: jax.Array, sparsity: jax.Array, step: jax.Array
    ) -> jax.Array:
        now, before = error(sparsity, step), error(previous_sparsity, step - 1)
        factor = jnp.exp(GAIN * (now - before + now / (end_step / 10)))
        return jnp.clip(coefficient * factor, *bounds)

    bounds = initial / RANGE, initial * RANGE
    return Controller(initial, update, bounds, sparsity)


def at_bound(opt_state: Any, controller: Controller) -> jax.Array:
    """Whether the coefficient is at a bound, so that the controller cannot steer further.

    It is cheap under ``jit``; log it with the loss.

    Args:
      opt_state: state of a transformation that contains one ``penalise``.
      controller: the one that ``penalise`` was given.

    Returns:
      1 at the largest coefficient, -1 at the smallest, else 0; int32, of the shape of the
      coefficient (a scalar, or more under ``vmap``).

    Raises:
      ValueError: there is no ``penalise`` inside, or more than one.

    Example:
      >>> import granet_jax as gj, jax.numpy as jnp, optax
      >>> controller = gj.reparam.steer(0.8, end_step=1000)
      >>> tx = gj.reparam.penalise(optax.sgd(0.1), gj.reparam.str_(), controller)
      >>> params = {"kernel": jnp.ones((2, 2))}
      >>> state = tx.init((params, gj.reparam.str_().init(params)))
      >>> [int(at_bound(state._replace(coefficient=c), controller)) for c in (1e-8, 1e-4, 1.0)]
      [-1, 0, 1]
    """
    coefficient = _penalty_state(opt_state).coefficient
    if controller.bounds is None:
        return jnp.zeros(jnp.shape(coefficient), jnp.int32)
    low, high = (jnp.asarray(bound, jnp.float32) for bound in controller.bounds)
    return jnp.asarray(coefficient >= high, jnp.int32) - jnp.asarray(coefficient <= low, jnp.int32)


MISSED = 0.01  # a difference in sparsity above this is more than the noise of training


def shortfall(opt_state: Any, controller: Controller) -> str:
    """One line on a sparsity that was not reached and what to do; "" if all is well.

    It reports a sparsity that is missed by more than a percentage point, or a coefficient at its
    bound.

    Args:
      opt_state: of one run, after training; see :func:`at_bound`.
      controller: the one that ``penalise`` was given.

    Returns:
      A str.

    Raises:
      ValueError: as :func:`at_bound`.

    Example:
      >>> import granet_jax as gj, jax.numpy as jnp, optax
      >>> controller = gj.reparam.steer(0.8, end_step=1000)
      >>> tx = gj.reparam.penalise(optax.sgd(0.1), gj.reparam.str_(), controller)
      >>> params = {"kernel": jnp.ones((2, 2))}
      >>> state = tx.init((params, gj.reparam.str_().init(params)))
      >>> shortfall(state._replace(sparsity=0.56, coefficient=1.0), controller)[:46]
      'Sparsity 0.5600 was reached, 0.8 was asked for'
    """
    state, bound = _penalty_state(opt_state), int(at_bound(opt_state, controller))
    reached, asked = float(state.sparsity), controller.sparsity
    missed = asked is not None and abs(reached - float(asked)) > MISSED
    if not (bound or missed):
        return ""
    said = f"Sparsity {reached:.4f} was reached"
    said += "" if asked is None else f", {float(asked):g} was asked for"
    if bound:
        said += f"; the coefficient of the penalty is at its bound {float(state.coefficient):g}"
    too_sparse = reached > float(asked) if missed else bound < 0
    if too_sparse:
        return said + ". Let the weights decay less, train longer or more slowly, or ask for more."
    return said + (
        ". Let the weights decay more, by a decay in the gradients (AdamW's is not), train longer "
        "or more slowly, or ask for less."
    )


def _penalty_state(opt_state: Any) -> PenaltyState:
    def is_penalty(state: Any) -> bool:
        return isinstance(state, PenaltyState)

    found = [x for x in jax.tree.leaves(opt_state, is_leaf=is_penalty) if is_penalty(x)]
    if len(found) != 1:
        raise ValueError(
            f"Expected one penalise state in the optimizer state, found {len(found)} in a "
            f"{type(opt_state).__name__}. Pass the state that tx.init returned."
        )
    return found[0]


def _check_pair(what: str, tree: Any) -> None:
    if not isinstance(tree, tuple) or len(tree) != 2:
        raise ValueError(
            f"penalise needs {what} as a pair: pair = (params, method.init(params)), tx.init(pair) "
            "and tx.update(jax.grad(loss)(pair), opt_state, pair), where the loss is that of "
            f"method.effective(*pair); got {type(tree).__name__}."
        )


def _constant(coefficient: Any) -> Controller:
    if not isinstance(coefficient, jax.core.Tracer) and not coefficient >= 0:
        raise ValueError(f"The coefficient of a penalty must be >= 0; got {coefficient}.")
    return Controller(coefficient, lambda *_: coefficient)


def _like(pair: PyTree, first: PyTree, second: PyTree) -> PyTree:
    """A pair of the same kind, tuple or NamedTuple."""
    return jax.tree.unflatten(jax.tree.structure(pair), jax.tree.leaves((first, second)))
