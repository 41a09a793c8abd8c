"""Scores: how much each weight is worth keeping, or growing. All share one signature.

Each function takes an :class:`granet_jax.types.Event` and returns a tree of real arrays of the
params' shapes, larger = better. Scores are float32 where parameters
are narrower, because low-precision scores tie by the thousand (growing by bfloat16 gradients is
known to ruin RigL and GraNet on transformers); of float64 and complex128 they are float64. Of
complex numbers ``|.|`` is the modulus.

Example:
  >>> import jax.numpy as jnp
  >>> magnitude(Event({"w": jnp.array([[-2.0, 1.0]])}))["w"].tolist()
  [[2.0, 1.0]]
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from granet_jax import trees
from granet_jax.trees import Rules
from granet_jax.types import Event, PyTree, ScoreFn


def magnitude(event: Event) -> PyTree:
    """``|w|``: Han et al. 2015; the pruning score of GMP, SET, RigL and GraNet."""
    return jax.tree.map(size, event.params)


def gradient(event: Event) -> PyTree:
    """``|g|``: the growth score of RigL (Evci et al. 2020, section 3) and GraNet."""
    return jax.tree.map(size, event.grads)


def saliency(event: Event) -> PyTree:
    """``|w * g|``: the first-order change of the loss (Molchanov et al. 2017; SNIP's score).

    Of a complex weight it is the largest change by a move as far as to 0, in any direction.
    """
    return jax.tree.map(
        lambda p, g: jnp.multiply(*_alike(size(p), size(g))), event.params, event.grads
    )


def magnitude_and_gradient(coefficient: float = 0.01) -> ScoreFn:
    """``|w| + coefficient * |g|``: a drop score that spares small weights about to move.

    Source: Yuan et al. 2021 (MEST), section 3, where the coefficient is .01.

    Example:
      >>> import jax.numpy as jnp
      >>> score = magnitude_and_gradient(0.5)
      >>> score(Event({"w": jnp.array([-1.0, 0.0])}, {"w": jnp.array([2.0, 4.0])}))["w"].tolist()
      [2.0, 2.0]
    """

    def score(event: Event) -> PyTree:
        def of_leaf(p: jax.Array, g: jax.Array) -> jax.Array:
            p, g = _alike(size(p), size(g))
            return p + coefficient * g

        return jax.tree.map(of_leaf, event.params, event.grads)

    return score


def relative_importance(prunable: Rules = ()) -> ScoreFn:
    """``|w| / sum |w| of its output + |w| / sum |w| of its input``: how much both depend on it.

    Weights that are small in size may be all that a neuron has. The last axis of a layer is its
    outputs, all others are inputs. 1e-5 is added to sums, so that weights of empty neurons score 0.

    Source: Zhang et al. 2024 (RIA, there for one-shot pruning); the removal score of
    Cannistraci-Hebb training.

    Args:
      prunable: the path rules of the method, for stack axes are no inputs; other leaves score
        ``|w|``.

    Example: in the last row, 1 is all there is of its input, a fifth of its output.
      >>> import jax.numpy as jnp
      >>> w = jnp.array([[4.0, 2.0], [0.0, 6.0], [1.0, 0.0]])
      >>> scores = relative_importance()(Event({"w": w}))["w"]
      >>> [round(float(x), 2) for x in scores[2]]
      [1.2, 0.0]
    """

    def of_layers(w: jax.Array) -> jax.Array:
        a = size(w)
        by_output = jnp.sum(a, axis=tuple(range(1, a.ndim - 1)), keepdims=True) + 1e-5
        by_input = jnp.sum(a, axis=-1, keepdims=True) + 1e-5
        return a / by_output + a / by_input

    def score(event: Event) -> PyTree:
        leaves = trees.describe(event.params, prunable)
        scored = [of_layers(w) for w in trees.split(event.params, leaves)]
        return trees.join(scored, jax.tree.map(size, event.params), leaves)

    return score


def momentum(event: Event) -> PyTree:
    """``|m|``, the first moment of the optimizer inside: Adam's ``mu`` or the ``trace`` of SGD.

    The moments of masked weights are 0 under :func:`granet_jax.sparsify`, so it tells live weights
    apart; for growth, :func:`granet_jax.average_gradients` averages dense gradients.

    Raises:
      ValueError: the optimizer has no such moment, or several.

    Source: Dettmers & Zettlemoyer 2019, who grow by the momentum of dense gradients.
    """
    return jax.tree.map(size, _moment(event, "mu", "trace"))


def adam_fisher(event: Event) -> PyTree:
    """``w^2 nu``, where nu is Adam's second moment before this step: a diagonal Fisher information.

    It costs nothing, for the optimizer has it. Nu is not corrected for its bias, which changes no
    order. A weight that grew lately has a small nu and is the first to go.

    Raises:
      ValueError: the optimizer has no second moment, or several.
    """

    def of_leaf(p: jax.Array, nu: jax.Array) -> jax.Array:
        p, nu = _alike(size(p), size(nu))
        return p * p * nu

    return jax.tree.map(of_leaf, event.params, _moment(event, "nu"))


def movement(event: Event) -> PyTree:
    """``sum -w g`` over the steps so far: how much training has moved each weight away from 0.

    It may be negative, so that a large weight that shrinks goes before a small one that grows. It
    is kept by :func:`track_movement` in the optimizer's state; masked weights have 0 there, and
    begin anew when they regrow.

    Raises:
      ValueError: ``track_movement()`` is not in the optimizer, or more than once.

    Source: Sanh et al. 2020, "Movement pruning: adaptive sparsity by fine-tuning", section 4. There
    scores are trained parameters of a straight-through mask, whose gradient this sum is; a constant
    learning rate changes no order. Here it ranks live weights alone, so what is pruned does not
    come back.
    """
    return _moment(event, "movement")


class MovementState(NamedTuple):
    """State of :func:`track_movement`."""

    movement: PyTree  # float32 or wider, shapes of params


def track_movement() -> optax.GradientTransformation:
    """Adds up ``-w g`` in its state and leaves gradients as they are: first in the inner chain.

    Example:
      >>> import granet_jax as gj, jax.numpy as jnp, optax
      >>> tx = gj.sparsify(
      ...     optax.chain(gj.scores.track_movement(), optax.adam(1e-3)),
      ...     gj.gmp(final_sparsity=0.9, end_step=9, update_every=3, score=gj.scores.movement),
      ... )
      >>> track = gj.scores.track_movement()
      >>> params = {"kernel": jnp.array([[2.0, -1.0]])}
      >>> grads = {"kernel": jnp.array([[0.5, 0.5]])}
      >>> updates, state = track.update(grads, track.init(params), params)
      >>> state.movement["kernel"].tolist()
      [[-1.0, 0.5]]
    """

    def init(params: PyTree) -> MovementState:
        return MovementState(
            jax.tree.map(lambda p: jnp.zeros_like(p, jax.eval_shape(size, p).dtype), params)
        )

    def update(
        updates: PyTree, state: MovementState, params: PyTree | None = None
    ) -> tuple[PyTree, MovementState]:
        if params is None:
            raise ValueError(
                "track_movement needs the parameters: tx.update(grads, state, params)."
            )

        def moved(total: jax.Array, p: jax.Array, g: jax.Array) -> jax.Array:
            wide = jnp.promote_types(p.dtype, total.dtype)
            moved_by = jnp.conj(p.astype(wide)) * g.astype(wide)
            return total - jnp.real(moved_by).astype(total.dtype)

        return updates, MovementState(jax.tree.map(moved, state.movement, params, updates))

    return optax.GradientTransformation(init, update)


def cannistraci_hebb(prunable: Rules = ()) -> ScoreFn:
    """CH3-L3: how many short paths the masks have between the ends of a missing link.

    A path from output i to input v that lacks its link has three links: i shares inputs with
    another output k, and k has v. It counts ``1 / max(e, 1)``, where e is the number of inputs that
    i has and k has not: neurons that are wired alike count most. Paths through another input that
    shares outputs with v are counted likewise, and both are added. Weights and data do not matter.
    Links without such a path score below 0, drawn at random.

    Source: Muscoloni et al. 2022 for CH3-L3; its node-based form for training: Zhang et al. 2024
    and 2025 (CHT, CHTs), which grow the highest.

    Differs from the papers' code in that: where all is 0, as in very sparse layers, growth is
    random and not by index; kernels of convolutions are matrices with all axes but the last as
    inputs.

    Args:
      prunable: the path rules of the method, for stack axes are no inputs.

    Raises:
      ValueError: when it scores, without a key.

    Example: the first two inputs share an output, and the second lacks the other of the first.
      >>> import jax, jax.numpy as jnp
      >>> masks = {"w": jnp.array([[1, 1, 0], [0, 1, 0], [0, 0, 1]], bool)}
      >>> event = Event({"w": jnp.zeros((3, 3))}, masks=masks, key=jax.random.key(0))
      >>> scores = cannistraci_hebb()(event)["w"]
      >>> float(scores[1, 0]), bool(scores[2, 0] < 0)
      (2.0, True)
    """

    def paths(a: jax.Array) -> jax.Array:
        """Through other rows; ``a`` is a matrix of 0 and 1."""
        shared = jnp.matmul(a, a.T, precision="highest")
        outside = jnp.sum(a, axis=1)[:, None] - shared
        alike = jnp.where(shared > 0, 1 / jnp.maximum(outside, 1), 0.0)
        return jnp.matmul(alike, a, precision="highest")

    def of_layer(mask: jax.Array) -> jax.Array:
        a = mask.reshape(-1, mask.shape[-1]).astype(jnp.float32)
        return (paths(a) + paths(a.T).T).reshape(mask.shape)

    def score(event: Event) -> PyTree:
        leaves = trees.describe(event.params, prunable)
        found = [jax.vmap(of_layer)(mask) for mask in trees.split(event.masks, leaves)]
        draws = random(event)
        counts = trees.join(found, draws, leaves)
        return jax.tree.map(lambda n, draw: jnp.where(n > 0, n, draw - 1), counts, draws)

    return score


def sampled(score: ScoreFn, temperature: Any) -> ScoreFn:
    """Draws by a score instead of taking the best: ``T log(score) + Gumbel noise``.

    The k best of these are a sample of k weights without replacement, with chances proportional to
    ``score^T``: at T = 0 at random, at T = infinity the best. Weights of score 0 come last.

    Args:
      score: nonnegative.
      temperature: T, or a schedule ``step -> T``.

    Source: the top-k trick of Kool et al. 2019; soft removal and growth in Cannistraci-Hebb
    training and in SET's and RigL's sampling variants.

    Raises:
      ValueError: when it scores, without a key.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> event = Event({"w": jnp.array([8.0, 0.0, 1.0])}, key=jax.random.key(0))
      >>> sampled(magnitude, 2.0)(event)["w"].tolist()[1]
      -inf
    """

    def drawn(event: Event) -> PyTree:
        t = temperature(event.step) if callable(temperature) else temperature

        def of_leaf(value: jax.Array, draw: jax.Array) -> jax.Array:
            tiny = jnp.finfo(draw.dtype).tiny
            noise = -jnp.log(-jnp.log(jnp.maximum(draw, tiny)))
            logs = jnp.log(jnp.where(value > 0, value, 1.0))
            return jnp.where(value > 0, t * logs + noise, -jnp.inf)

        return jax.tree.map(of_leaf, score(event), random(event))

    return drawn


def _moment(event: Event, *names: str) -> PyTree:
    """The moments of the optimizer that go by one of these names, a tree of params."""
    found = [
        x for name in names for _, x in optax.tree_utils.tree_get_all_with_path(event.inner, name)
    ]
    if len(found) != 1:
        raise ValueError(
            f"This score needs one {' or '.join(names)} in the optimizer's state, found "
            f"{len(found)}. Take an optimizer such as optax.adam, and one only."
        )
    return found[0]


def random(event: Event) -> PyTree:
    """Uniform in [0, 1): the growth score of SET (Mocanu et al. 2018).

    Raises:
      ValueError: without a key.
    """
    if event.key is None:
        raise ValueError("Random scores need a key: give the method key=jax.random.key(seed).")
    leaves, treedef = jax.tree.flatten(event.params)
    draws = [
        jax.random.uniform(jax.random.fold_in(event.key, i), p.shape, jnp.float32)
        for i, p in enumerate(leaves)
    ]
    return jax.tree.unflatten(treedef, draws)


def size(x: jax.Array) -> jax.Array:
    """``|x|`` in float32, or in the precision of ``x`` where that is wider.

    Example:
      >>> import jax.numpy as jnp
      >>> size(jnp.array([3 + 4j])).tolist(), size(jnp.ones(2, jnp.bfloat16)).dtype.name
      ([5.0], 'float32')
    """
    magnitude = jnp.abs(x)
    return magnitude.astype(at_least_float32(magnitude.dtype))


def at_least_float32(dtype: Any) -> Any:
    """``dtype`` where it is float64 or complex, else float32: what sums and means are made in."""
    is_wide = dtype == jnp.float64 or jnp.issubdtype(dtype, jnp.complexfloating)
    return jnp.dtype(dtype if is_wide else jnp.float32)


def _alike(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two arrays of float32 or float64 in the wider of the two."""
    dtype = max(a.dtype, b.dtype, key=lambda x: x.itemsize)
    return a.astype(dtype), b.astype(dtype)
