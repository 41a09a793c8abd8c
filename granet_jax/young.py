"""What newly grown weights need from an optimizer: transformations for use inside ``sparsify``."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from granet_jax import trees
from granet_jax.transform import is_trained
from granet_jax.types import PyTree

OLD = 2**16 - 1  # the age of weights that are live from the start, and the highest age


class YoungState(NamedTuple):
    """State of :func:`correct_young`."""

    young_step: jax.Array  # int32, updates done
    age: PyTree  # uint16, steps in which a weight has been live since it grew; OLD = from the start


def correct_young(
    b1: float = 0.9, b2: float = 0.999, ramp: int = 100
) -> optax.GradientTransformationExtraArgs:
    """Gives regrown weights the updates of an optimizer that starts when they grow.

    Adam divides its moments by ``1 - b^t``, where t counts all steps. A weight that grew late has
    moments of 0 but a large t, so its first step is ``(1 - b1) / sqrt(1 - b2)`` = 3.2 times the
    learning rate, instead of once. Here its update is multiplied by ::

        min(a / ramp, 1) * (1 - b1^t) / (1 - b1^a) * sqrt((1 - b2^a) / (1 - b2^t))

    where a is the number of steps since it grew. Apart from the ramp, this is what Adam restarted
    for this weight alone would do (up to epsilon). Weights that are live from the start do not
    change.

    Chain it after the part that divides by moments, and before weight decay, inside
    :func:`granet_jax.sparsify` (or ``compact.sparsify``), which passes it ``keep``::

        sparsify(
            optax.chain(
                optax.scale_by_adam(), correct_young(), optax.scale_by_learning_rate(1e-3)
            ),
            method,
        )

    Chained after a whole ``optax.adamw`` it also scales the decay of young weights.

    Source: SMET (arXiv 2606.00888), where moments are corrected by a weight's own age. As a factor
    of the finished update it works with any optimizer that has these two decays.

    Args:
      b1: the optimizer's decay of the first moment; 0 = it has no first moment (RMSprop).
      b2: the optimizer's decay of the second moment; 0 = it has no second moment. With both 0 only
        the ramp is left (Lion).
      ramp: steps in which the updates of a regrown weight rise to full size; 1 = no ramp.

    Returns:
      A transformation with two bytes of state for each weight.

    Raises:
      ValueError: a decay outside [0, 1), or ``ramp`` outside [1, 65535); in ``update``, if there is
        no ``keep``, because it stands outside ``sparsify``.

    Differs from the paper's code in that: the ramp does not affect the moments; the first step of a
    weight has age 1, not 2; dense parameters have no ramp.

    Example: a weight that grew at step 999 gets its first update at step 1000.
      >>> import jax.numpy as jnp
      >>> tx = correct_young(ramp=1)
      >>> params = {"kernel": jnp.zeros(2)}
      >>> state = tx.init(params)
      >>> state = state._replace(young_step=jnp.int32(998))
      >>> keep = {"kernel": jnp.array([True, False])}
      >>> _, state = tx.update(params, state, params, keep=keep)
      >>> keep = {"kernel": jnp.array([True, True])}
      >>> updates, _ = tx.update({"kernel": jnp.ones(2)}, state, params, keep=keep)
      >>> [round(float(x), 4) for x in updates["kernel"]]  # 1 / 2.515
      [1.0, 0.3977]
    """
    if not (0.0 <= b1 < 1.0 and 0.0 <= b2 < 1.0):
        raise ValueError(f"b1 and b2 must be in [0, 1), as those of the optimizer; got {b1}, {b2}.")
    if not 1 <= ramp < OLD:
        raise ValueError(f"ramp is a number of steps, from 1 (no ramp) to {OLD - 1}; got {ramp}.")

    def init(params: PyTree) -> YoungState:
        age = jax.tree.map(lambda p: jnp.full_like(p, OLD, dtype=jnp.uint16), params)
        return YoungState(jnp.zeros([], jnp.int32), age)

    def update(
        updates: PyTree, state: YoungState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, YoungState]:
        if "keep" not in extra_args:
            raise ValueError(
                "correct_young is told by granet_jax.sparsify which weights are kept: put it "
                "inside, sparsify(optax.chain(..., correct_young()), method)."
            )
        t = optax.safe_increment(state.young_step)
        keep = trees.by_path(extra_args["keep"])  # of all, and not of this optimizer's alone
        age = jax.tree_util.tree_map_with_path(
            lambda path, age: _older(age, keep[trees.names(path)]), state.age
        )

        def scaled(u: jax.Array, age: jax.Array) -> jax.Array:
            return (u * _factor(age, t, b1, b2, ramp)).astype(u.dtype) if is_trained(u) else u

        return jax.tree.map(scaled, updates, age), YoungState(t, age)

    return optax.GradientTransformationExtraArgs(init, update)


def _older(age: jax.Array, keep: jax.Array) -> jax.Array:
    return jnp.where(keep, age + (age < OLD), 0).astype(jnp.uint16)


def _factor(age: jax.Array, t: jax.Array, b1: float, b2: float, ramp: int) -> jax.Array:
    a = jnp.clip(age.astype(jnp.int32), 1, t).astype(jnp.float32)

    def gone(decay: float, steps: jax.Array) -> jax.Array:
        """``1 - decay^steps``, exact where it is small."""
        return -jnp.expm1(steps * jnp.log(decay)) if decay else jnp.ones_like(steps)

    now = t.astype(jnp.float32)
    factor = gone(b1, now) / gone(b1, a) * jnp.sqrt(gone(b2, a) / gone(b2, now))
    factor *= jnp.minimum(a / ramp, 1.0)
    return jnp.where(age.astype(jnp.int32) >= jnp.minimum(t, OLD), 1.0, factor)


def scale_by_density(
    exponent: float = 1.0, prunable: trees.Rules = ()
) -> optax.GradientTransformationExtraArgs:
    """Divides the updates of each prunable layer by ``density^exponent``.

    A sparse layer sums over fewer inputs, so a step changes its outputs less. SμPar therefore
    divides Adam's learning rate of hidden matrices by ``width * density``; this is the factor for
    the density, and the learning rate has to account for the width. The density is the share of
    weights kept in this step, for each layer of a stack by itself.

    Source: Dey et al. 2024, "Sparse maximal update parameterization" (arXiv 2405.15743), with
    exponent 1. Others take the square root, ``exponent=0.5``.

    Args:
      exponent: of the density; 0 = no change.
      prunable: path rules, see :func:`granet_jax.trees.describe`.

    Returns:
      A transformation without state; chain it inside :func:`granet_jax.sparsify`, which passes it
      ``keep``.

    Raises:
      ValueError: in ``update``, without parameters, or without ``keep``, because it stands outside
        ``sparsify``.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = scale_by_density()
      >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
      >>> keep = {"kernel": jnp.array([[True, False]] * 2), "bias": jnp.array([True] * 2)}
      >>> updates, _ = tx.update(params, tx.init(params), params, keep=keep)
      >>> updates["kernel"].tolist(), updates["bias"].tolist()
      ([[2.0, 2.0], [2.0, 2.0]], [1.0, 1.0])
    """

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        if params is None or "keep" not in extra_args:
            raise ValueError(
                "scale_by_density is told by granet_jax.sparsify which weights are kept: put it "
                "inside, sparsify(optax.chain(..., scale_by_density()), method)."
            )
        leaves = trees.describe(params, prunable)
        keep = trees.split(extra_args["keep"], leaves)
        scaled = [
            (u * _power(k, exponent).astype(u.dtype))
            for u, k in zip(trees.split(updates, leaves), keep, strict=True)
        ]
        return trees.join(scaled, updates, leaves), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _power(keep: jax.Array, exponent: float) -> jax.Array:
    """``density^-exponent`` of each layer, shaped to multiply its stack; 1 for empty layers."""
    axes = tuple(range(1, keep.ndim))
    density = jnp.mean(keep, axis=axes, keepdims=True, dtype=jnp.float32)
    return jnp.where(density > 0, density, 1.0) ** -exponent
