"""One-shot methods by scores: magnitude, Wanda, RIA. Each prunes one layer, seen as a matrix."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from granet_jax import selection, structures
from granet_jax.one_shot.statistics import StatisticFn, squares


class Keep(NamedTuple):
    """What is kept of a layer ``(inputs, outputs)``.

    Attributes:
      num_keep: weights of the whole layer.
      group: as many are kept among so many inputs in a row of each output, at least one; 0 = the
        best of all.
    """

    num_keep: int
    group: int = 0

    def best(self, scores: jax.Array) -> jax.Array:
        """The mask of the highest scores, ``(inputs, outputs)``."""
        if not self.group:
            return selection.top_k([scores[None]], jnp.array([self.num_keep]))[0][0]
        rows = scores.T.reshape(1, scores.shape[1], -1, self.group)
        live = jnp.ones_like(rows, dtype=bool)
        best = structures.best_in_groups(rows, jnp.array([self.num_keep]), live, fixed=True)
        return best.reshape(scores.shape[1], -1).T


class OneShot(NamedTuple):
    """A method that prunes a layer once, by what its inputs were.

    Attributes:
      prune: ``(w, values, keep) -> (w, mask)``: float32 or wider ``(inputs, outputs)``, the mean of
        the statistic over rows, a :class:`Keep` with static numbers; what is masked is 0 after it.
      statistic: what it has to know of the inputs; None = nothing.
      by_output: whether each output keeps as many weights, where no structure says how.
    """

    prune: Callable[[jax.Array, Any, Keep], tuple[jax.Array, jax.Array]]
    statistic: StatisticFn | None = None
    by_output: bool = False


def magnitude(*, by_output: bool = False) -> OneShot:
    """``|w|``, without calibration: Han et al. 2015.

    Args:
      by_output: each output keeps as many weights. What outputs are a batch tells, for
        :func:`prune`, or statistics; without either they are the last axis.
    """
    return _by_score(lambda w, _: jnp.abs(w), None, by_output)


def wanda(*, by_output: bool = True) -> OneShot:
    """``|w_ij| ||x_j||``: large weights of inputs that are often large.

    Source: Sun et al. 2023, "A simple and effective pruning approach for large language models",
    section 3; each output keeps as many weights.

    Args:
      by_output: False = the best of the whole layer.

    Differs from the paper's code in that counts are those of the library: of a layer's count each
    output gets the same, rounded, halves up, at least one (theirs removes ``int(inputs *
    sparsity)``); of equal scores the lower index stays.

    Example: the second input is never seen.
      >>> import jax.numpy as jnp
      >>> w = jnp.array([[1.0], [5.0], [2.0]])
      >>> wanda().prune(w, jnp.array([4.0, 0.0, 1.0]), Keep(2))[1].ravel().tolist()
      [True, False, True]
    """
    return _by_score(lambda w, values: jnp.abs(w) * jnp.sqrt(values)[:, None], squares, by_output)


def ria(*, power: float = 0.5, by_output: bool = False) -> OneShot:
    """``(|w| / sum of its output + |w| / sum of its input) ||x||^power``: relative importance.

    No input and no output loses all that it has as easily as by size alone.

    Source: Zhang et al. 2024, "Plug-and-play: an efficient post-training pruning method for large
    language models", where the power is .5.

    Args:
      power: of the norm of the inputs.
      by_output: each output keeps as many weights.

    Differs from the paper's code in that counts are exact; 0/0 is 0.
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
