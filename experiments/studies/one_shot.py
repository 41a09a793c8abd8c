"""Which one-shot methods there are, and what flags say of sparsities."""

from collections.abc import Callable

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
            return 1 - n / m, gj.structures.n_of_m(m)
        return float(sparsity), None
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"--sparsities: fractions such as 0.5, or 2:4; got {sparsity}.") from error
