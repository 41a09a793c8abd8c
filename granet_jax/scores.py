"""Scores: how much each weight is worth keeping, or growing. All share one signature.

A score takes an :class:`granet_jax.types.Event` and returns a tree of real arrays of the params'
shapes, larger = better. Scores are float32; those of float64 and complex128 parameters are float64.
They are never narrower than float32, because low-precision scores tie by the thousand (growing by
bfloat16 gradients is known to ruin RigL and GraNet on transformers). ``|.|`` is the modulus of a
complex number.

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
    """``|w|``: the pruning score of GMP, SET, RigL and GraNet.

    Source: Han et al. 2015, "Learning both weights and connections for efficient neural networks",
    section 3.

    Args:
      event: its ``params`` are read.

    Returns:
      Scores >= 0.

    Example:
      >>> import jax.numpy as jnp
      >>> magnitude(Event({"w": jnp.array([-2.0, 1.0])}))["w"].tolist()
      [2.0, 1.0]
    """
    return jax.tree.map(size, event.params)


def gradient(event: Event) -> PyTree:
    """``|g|``: the growth score of RigL and GraNet.

    Source: Evci et al. 2020, "Rigging the Lottery", section 3.

    Args:
      event: its ``grads`` are read.

    Returns:
      Scores >= 0.

    Example:
      >>> import jax.numpy as jnp
      >>> gradient(Event({"w": jnp.zeros(2)}, {"w": jnp.array([0.5, -3.0])}))["w"].tolist()
      [0.5, 3.0]
    """
    return jax.tree.map(size, event.grads)


def saliency(event: Event) -> PyTree:
    """``|w * g|``: to first order, how much the loss changes if the weight is set to 0.

    For a complex weight it is the largest first-order change over all moves of length ``|w|``.

    Source: Molchanov et al. 2017, "Pruning convolutional neural networks for resource efficient
    inference"; SNIP (Lee et al. 2019) uses it at the start.

    Args:
      event: its ``params`` and ``grads`` are read.

    Returns:
      Scores >= 0.

    Example:
      >>> import jax.numpy as jnp
      >>> saliency(Event({"w": jnp.array([2.0, 1.0])}, {"w": jnp.array([0.5, -3.0])}))["w"].tolist()
      [1.0, 3.0]
    """
    return jax.tree.map(
        lambda p, g: jnp.multiply(*_alike(size(p), size(g))), event.params, event.grads
    )


def magnitude_and_gradient(coefficient: float = 0.01) -> ScoreFn:
    """``|w| + coefficient * |g|``: a drop score that spares small weights about to move.

    Source: Yuan et al. 2021 (MEST), section 3, where the coefficient is .01.

    Args:
      coefficient: weight of the gradient in the sum.

    Returns:
      A score, >= 0, that reads ``params`` and ``grads``.

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

    So a small weight scores high if it is the only one that a neuron has. The last axis of a layer
    is its outputs, all others are inputs. 1e-5 is added to the sums, so that the weights of empty
    neurons score 0.

    Source: Zhang et al. 2024 (RIA, there for one-shot pruning); the removal score of
    Cannistraci-Hebb training.

    Args:
      prunable: the path rules of the method, which say which axes stack layers. Leaves that are not
        prunable score ``|w|``.

    Returns:
      A score, >= 0, that reads ``params``.

    Raises:
      ValueError: when it scores, as :func:`granet_jax.trees.describe`.

    Example: the 1 in the last row is the only weight of its input, and a fifth of its output.
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
    """``|m|``, the first moment of the inner optimizer: Adam's ``mu`` or the ``trace`` of SGD.

    It ranks live weights, for dropping: under :func:`granet_jax.sparsify` the moments of masked
    weights are 0. To grow by momentum, use :func:`granet_jax.average_gradients`, which averages
    dense gradients.

    Source: Dettmers & Zettlemoyer 2019, "Sparse Networks from Scratch", section 3, who grow by the
    momentum of dense gradients.

    Args:
      event: its ``inner`` is read.

    Returns:
      Scores >= 0.

    Raises:
      ValueError: the optimizer has no such moment, or several.

    Example:
      >>> import jax.numpy as jnp
      >>> inner = optax.ScaleByAdamState(0, mu={"w": jnp.array([-0.5])}, nu={"w": jnp.ones(1)})
      >>> momentum(Event({"w": jnp.ones(1)}, inner=inner))["w"].tolist()
      [0.5]
    """
    return jax.tree.map(size, _moment(event, "mu", "trace"))


def adam_fisher(event: Event) -> PyTree:
    """``w^2 nu``, where nu is Adam's second moment before this step: a diagonal Fisher information.

    The optimizer already keeps nu, so this costs no memory. The bias of nu is not corrected, which
    changes no ranking. A weight that grew recently has a small nu and is dropped first.

    Source: the diagonal Fisher information of Theis et al. 2018, "Faster gaze prediction with dense
    networks and Fisher pruning"; nu takes its place.

    Args:
      event: its ``params`` and ``inner`` are read.

    Returns:
      Scores >= 0.

    Raises:
      ValueError: the optimizer has no second moment, or several.

    Example:
      >>> import jax.numpy as jnp
      >>> inner = optax.ScaleByAdamState(0, mu={"w": jnp.zeros(1)}, nu={"w": jnp.array([0.5])})
      >>> adam_fisher(Event({"w": jnp.array([2.0])}, inner=inner))["w"].tolist()
      [2.0]
    """

    def of_leaf(p: jax.Array, nu: jax.Array) -> jax.Array:
        p, nu = _alike(size(p), size(nu))
        return p * p * nu

    return jax.tree.map(of_leaf, event.params, _moment(event, "nu"))


def movement(event: Event) -> PyTree:
    """``sum -w g`` over the steps so far: how much training has moved each weight away from 0.

    It may be negative: a large weight that shrinks is dropped before a small one that grows.
    :func:`track_movement` keeps the sum in the optimizer's state. For masked weights it is 0; a
    regrown weight starts again from 0.

    Source: Sanh et al. 2020, "Movement pruning: adaptive sparsity by fine-tuning", section 4. There
    the scores are trained parameters of a straight-through mask; this sum is what they are after
    training, divided by the learning rate if that is constant.

    Differs from the paper in that only live weights are ranked, so pruned weights do not come back.

    Args:
      event: its ``inner`` is read.

    Returns:
      Signed scores.

    Raises:
      ValueError: ``track_movement()`` is not in the optimizer, or more than once.

    Example:
      >>> import jax.numpy as jnp
      >>> inner = MovementState({"w": jnp.array([-1.0, 0.5])})
      >>> movement(Event({"w": jnp.ones(2)}, inner=inner))["w"].tolist()
      [-1.0, 0.5]
    """
    return _moment(event, "movement")


class MovementState(NamedTuple):
    """State of :func:`track_movement`."""

    movement: PyTree  # float32 or wider, shapes of params


def track_movement() -> optax.GradientTransformation:
    """Sums ``-w g`` in its state and does not change the gradients: put it first in the chain.

    Returns:
      A transformation whose state is :class:`MovementState`, at least 4 bytes for each weight.

    Raises:
      ValueError: in ``update``, without parameters.

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
    """CH3-L3: scores a missing link by the number of short paths between its ends.

    Take a missing link between output i and input v. A path of three links joins them if i shares
    an input with another output k, and k is linked to v. The path counts ``1 / max(e, 1)``, where e
    is the number of inputs that i has and k does not have: neurons that are wired alike count most.
    Paths through another input that shares an output with v count in the same way. The score is the
    sum of both. It depends on the masks alone, not on weights or data. A link without such a path
    gets a random score below 0.

    Source: Muscoloni et al. 2022 for CH3-L3. Zhang et al. 2024 and 2025 (CHT, CHTs) grow the links
    with the highest scores, in the node-based form that is used here.

    Differs from the papers' code in that: where all scores are 0, as in very sparse layers, growth
    is random instead of by index; the kernel of a convolution is a matrix with all axes but the
    last as inputs.

    Args:
      prunable: the path rules of the method, which say which axes stack layers.

    Returns:
      A score that reads ``masks`` and ``key``, above 0 with a path, in [-1, 0) without one.

    Raises:
      ValueError: when it scores without a key.

    Example: the first two inputs share an output; the second input lacks the first one's other
    output.
      >>> import jax, jax.numpy as jnp
      >>> masks = {"w": jnp.array([[1, 1, 0], [0, 1, 0], [0, 0, 1]], bool)}
      >>> event = Event({"w": jnp.zeros((3, 3))}, masks=masks, key=jax.random.key(0))
      >>> scores = cannistraci_hebb()(event)["w"]
      >>> float(scores[1, 0]), bool(scores[2, 0] < 0)
      (2.0, True)
    """

    def paths(a: jax.Array) -> jax.Array:
        """The sum over paths through other rows; ``a`` is a matrix of 0 and 1."""
        shared = jnp.matmul(a, a.T, precision="highest")
        outside = jnp.sum(a, axis=1)[:, None] - shared
        alike = jnp.where(shared > 0, 1 / jnp.maximum(outside, 1), 0.0)
        return jnp.matmul(alike, a, precision="highest")

    def of_layer(mask: jax.Array) -> jax.Array:
        a = mask.reshape(-1, *(mask.shape[-1:] or (1,))).astype(jnp.float32)
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

    The k highest of these are a sample of k weights without replacement, with chances proportional
    to ``score^T``. T = 0 draws uniformly; the larger T, the closer to taking the best. Weights of
    score 0 come last.

    Args:
      score: a nonnegative score.
      temperature: T, or a schedule ``step -> T``.

    Returns:
      A score that reads ``key`` and what ``score`` reads; -inf where ``score`` is 0.

    Source: the top-k trick of Kool et al. 2019; soft removal and growth in Cannistraci-Hebb
    training and in SET's and RigL's sampling variants.

    Raises:
      ValueError: when it scores without a key.

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


def _is_field(path: Any, _: Any) -> bool:
    """Whether a path ends in a field of a state, and not in a layer that is called like one."""
    return isinstance(path[-1], optax.tree_utils.NamedTupleKey)


def _moment(event: Event, *names: str) -> PyTree:
    """The optimizer's moments that have one of these names, a tree of params."""
    found = [
        x
        for name in names
        for _, x in optax.tree_utils.tree_get_all_with_path(event.inner, name, _is_field)
    ]
    if len(found) != 1:
        raise ValueError(
            f"This score needs one {' or '.join(names)} in the optimizer's state, found "
            f"{len(found)}. Take an optimizer such as optax.adam, and one only."
        )
    return found[0]


def random(event: Event) -> PyTree:
    """Uniform in [0, 1): the growth score of SET (Mocanu et al. 2018).

    Args:
      event: its ``key`` is read, and the shapes of its ``params``.

    Returns:
      float32 scores.

    Raises:
      ValueError: without a key.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> draws = random(Event({"w": jnp.ones(3)}, key=jax.random.key(0)))["w"]
      >>> draws.shape, draws.dtype.name
      ((3,), 'float32')
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
    """``|x|`` in float32, or in float64 if ``x`` is float64 or complex128.

    Args:
      x: array of any numeric dtype.

    Returns:
      An array of the same shape, >= 0 or NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> size(jnp.array([3 + 4j])).tolist(), size(jnp.ones(2, jnp.bfloat16)).dtype.name
      ([5.0], 'float32')
    """
    magnitude = jnp.abs(x)
    return magnitude.astype(at_least_float32(magnitude.dtype))


def at_least_float32(dtype: Any) -> Any:
    """``dtype`` if it is float64 or complex, else float32: the dtype of sums and means.

    Args:
      dtype: any dtype.

    Returns:
      A numpy dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> at_least_float32(jnp.bfloat16).name, at_least_float32(jnp.dtype("complex64")).name
      ('float32', 'complex64')
    """
    is_wide = dtype == jnp.float64 or jnp.issubdtype(dtype, jnp.complexfloating)
    return jnp.dtype(dtype if is_wide else jnp.float32)


def _alike(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two arrays of float32 or float64, both in the wider of the two dtypes."""
    dtype = max(a.dtype, b.dtype, key=lambda x: x.itemsize)
    return a.astype(dtype), b.astype(dtype)
