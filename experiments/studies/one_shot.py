"""One-shot methods by name, what flags say of sparsities, and training under masks that stay."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import optax
from absl import flags

import granet_jax as gj
from granet_jax import one_shot

METHODS: dict[str, Callable[[], one_shot.OneShot]] = {
    "magnitude": one_shot.magnitude,
    "wanda": one_shot.wanda,
    "ria": one_shot.ria,
    "sparsegpt": one_shot.sparsegpt,
    "alps": one_shot.alps,
}
DEFAULT_METHODS = ("magnitude", "wanda", "ria", "sparsegpt")


def define_flags() -> None:
    """Defines the flags that say how to prune."""
    flags.DEFINE_list("methods", list(DEFAULT_METHODS), f"some of {', '.join(METHODS)}")
    flags.DEFINE_list("sparsities", ["0.5", "0.7", "2:4"], "fractions of zeros, or N:M")
    flags.DEFINE_bool("sequential", True, "each layer sees what the pruned ones before it make")


def check_flags() -> None:
    """Raises a ValueError for a method or a sparsity that there is not."""
    if unknown := [name for name in flags.FLAGS.methods if name not in METHODS]:
        raise ValueError(f"--methods: some of {', '.join(METHODS)}; got {unknown[0]}.")
    for sparsity in flags.FLAGS.sparsities:
        parse(sparsity)


def parse(sparsity: str) -> tuple[float, gj.trees.Structure | None]:
    """The fraction of zeros, and the structure, of 0.5 or 2:4.

    Raises:
      ValueError: it is neither a fraction nor N:M.

    Example:
      >>> parse("0.7"), parse("1:4")[0]
      ((0.7, None), 0.75)
    """
    try:
        if ":" in sparsity:
            n, m = map(int, sparsity.split(":"))
            fraction, structure = 1 - n / m, gj.structures.n_of_m(m)
        else:
            fraction, structure = float(sparsity), None
        if not 0 <= fraction < 1:
            raise ValueError("outside [0, 1)")
        return fraction, structure
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"--sparsities: fractions such as 0.5, or 2:4; got {sparsity}.") from error


def train_under_masks(
    loss: Callable[[Any, Any, Any, jax.Array], tuple[jax.Array, Any]],
    steps: int,
    learning_rate: float,
) -> Callable[[one_shot.Pruned, Any, Iterable[Any]], tuple[Any, Any]]:
    """Makes ``(pruned, variables, batches) -> (parameters, variables)``: Adam on a cosine.

    It is compiled once.

    Args:
      loss: ``(params, variables, batch, key) -> (scalar, variables)``; variables are what is not
        trained, such as the statistics of batch norm.
      steps: of the cosine; there are as many batches.
      learning_rate: at the start.
    """
    schedule = optax.cosine_decay_schedule(learning_rate, max(steps, 1))
    tx = gj.sparsify(optax.adam(schedule), gj.static())

    @jax.jit
    def step(params: Any, variables: Any, state: Any, batch: Any, key: jax.Array) -> Any:
        grads, variables = jax.grad(loss, has_aux=True)(params, variables, batch, key)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), variables, state

    def train(pruned: one_shot.Pruned, variables: Any, batches: Iterable[Any]) -> tuple[Any, Any]:
        params, state = pruned.params, gj.set_masks(tx.init(pruned.params), pruned.masks)
        for i, batch in enumerate(batches):
            key = jax.random.fold_in(jax.random.key(1), i)
            params, variables, state = step(params, variables, state, batch, key)
        return params, variables

    return train
