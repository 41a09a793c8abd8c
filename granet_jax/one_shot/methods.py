"""One-shot methods by scores: magnitude, Wanda, RIA. Each prunes one layer, seen as a matrix."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from granet_jax import groups, selection
from granet_jax.one_shot.statistics import StatisticFn, squares


class Keep(NamedTuple):
    """How many weights of a layer ``(inputs, outputs)`` are kept.

    Attributes:
      num_keep: of the whole layer.
      group: each output keeps the same number, at least one, of each ``group`` consecutive inputs;
        0 = the best of the whole layer.

    Example:
      >>> import jax.numpy as jnp
      >>> Keep(1).best(jnp.array([[1.0, 5.0], [2.0, 3.0]])).tolist()
      [[False, True], [False, False]]
    """

    num_keep: int
    group: int = 0

    def best(self, scores: jax.Array) -> jax.Array:
        """The mask of the highest scores, ``(inputs, outputs)``."""
        if not self.group:
            return selection.top_k([scores[None]], jnp.array([self.num_keep]))[0][0]
        rows = scores.T.reshape(1, scores.shape[1], -1, self.group)
        live = jnp.ones_like(rows, dtype=bool)
        best = groups.best_in_groups(rows, jnp.array([self.num_keep]), live, fixed=True)
        return best.reshape(scores.shape[1], -1).T


class OneShot(NamedTuple):
    """A method that prunes a layer once, by a statistic of its inputs.

    Attributes:
      prune: ``(w, values, keep) -> (w, mask)``. ``w`` is ``(inputs, outputs)``, float32 or wider;
        ``values`` is the mean of the statistic over rows; ``keep`` is a :class:`Keep` of static
        numbers. Masked weights have to be 0 in the result.
      statistic: a function of the rows of inputs; None = it needs no inputs.
      by_output: whether each output keeps the same number of weights, if no structure decides.

    Example: a method of your own, which keeps the largest weights.
      >>> import jax.numpy as jnp
      >>> def prune(w, values, keep):
      ...     mask = keep.best(jnp.abs(w))
      ...     return jnp.where(mask, w, 0.0), mask
      >>> OneShot(prune).prune(jnp.array([[1.0], [-2.0]]), None, Keep(1))[0].tolist()
      [[0.0], [-2.0]]
    """

    prune: Callable[[jax.Array, Any, Keep], tuple[jax.Array, jax.Array]]
    statistic: StatisticFn | None = None
    by_output: bool = False


def magnitude(*, by_output: bool = False) -> OneShot:
    """``|w|``: the largest weights are kept, without calibration.

    Source: Han et al. 2015, "Learning both weights and connections for efficient neural networks",
    section 3.

    Args:
      by_output: each output keeps the same number of weights. Which axes are outputs follows from
        the batch of :func:`granet_jax.one_shot.prune`, or from the statistics of ``prune_from``;
        without statistics the last axis is the outputs.

    Returns:
      A method for :func:`granet_jax.one_shot.prune`.

    Example:
      >>> import jax.numpy as jnp
      >>> magnitude().prune(jnp.array([[1.0], [-2.0]]), None, Keep(1))[1].tolist()
      [[False], [True]]
    """
    return _by_score(lambda w, _: jnp.abs(w), None, by_output)


def wanda(*, by_output: bool = True) -> OneShot:
    """``|w_ij| ||x_j||``: keeps large weights of inputs that are often large.

    Source: Sun et al. 2023, "A simple and effective pruning approach for large language models",
    section 3; each output keeps the same number of weights.

    Args:
      by_output: False = the best of the whole layer.

    Returns:
      A method for :func:`granet_jax.one_shot.prune`.

    Differs from the paper's code in its counts: the layer's count is divided equally among the
    outputs and rounded (halves up), at least one each; theirs removes ``int(inputs * sparsity)``.
    Ties are settled by index.

    Example: the second input is always 0.
      >>> import jax.numpy as jnp
      >>> w = jnp.array([[1.0], [5.0], [2.0]])
      >>> wanda().prune(w, jnp.array([4.0, 0.0, 1.0]), Keep(2))[1].ravel().tolist()
      [True, False, True]
    """
    return _by_score(lambda w, values: jnp.abs(w) * jnp.sqrt(values)[:, None], squares, by_output)


def ria(*, power: float = 0.5, by_output: bool = False) -> OneShot:
    """``(|w| / sum of its output + |w| / sum of its input) ||x||^power``: relative importance.

    An input or output with small weights is less likely to lose all of them than by magnitude.

    Source: Zhang et al. 2024, "Plug-and-play: an efficient post-training pruning method for large
    language models", where the power is .5.

    Args:
      power: of the norm of the inputs.
      by_output: each output keeps the same number of weights.

    Returns:
      A method for :func:`granet_jax.one_shot.prune`.

    Differs from the paper's code in that counts are exact; 0/0 is 0.

    Example: the weight .1 is most of its input and stays, while 2 is pruned.
      >>> import jax.numpy as jnp
      >>> w = jnp.array([[0.1, 0.02], [3.0, 4.0], [2.0, 3.0]])
      >>> ria().prune(w, jnp.ones(3), Keep(4))[1].tolist()
      [[True, False], [True, True], [False, True]]
    """

    def score(w: jax.Array, values: jax.Array) -> jax.Array:
        a = jnp.abs(w)
        shares = _share(a, jnp.sum(a, axis=0, keepdims=True))
        shares += _share(a, jnp.sum(a, axis=1, keepdims=True))
        return shares * (jnp.sqrt(values) ** power)[:, None]

    return _by_score(score, squares, by_output)


def _share(a: jax.Array, total: jax.Array) -> jax.Array:
    return a / jnp.where(total > 0, total, 1.0)


def _by_score(
    score: Callable[[jax.Array, Any], jax.Array], statistic: StatisticFn | None, by_output: bool
) -> OneShot:
    def prune(w: jax.Array, values: Any, keep: Keep) -> tuple[jax.Array, jax.Array]:
        mask = keep.best(score(w, values))
        return jnp.where(mask, w, 0.0), mask

    return OneShot(prune, statistic, by_output)
