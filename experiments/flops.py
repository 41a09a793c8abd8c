"""What sparse networks cost: the FLOPs ratios that papers print, computed from the networks.

Example:
  python -m experiments.flops --models=resnet50,wrn_22_2 --sparsities=0.8,0.9

For each network: FLOPs of inference and of training, over those of the dense network, with the
sparsity spread by ERK and uniformly. Training is that of RigL with an update every 100 steps, for
as long as the dense network and five times as long, and that of SNFS. No weights are made.
"""

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import app, flags
from rich.console import Console

import granet_jax as gj
from experiments.engine import output, settings
from experiments.models import MODELS
from granet_jax import flops
from granet_jax.types import Distribution, PyTree


class Network(NamedTuple):
    """A network for the images and classes of a data set."""

    model: str
    num_classes: int
    image: tuple[int, int, int]
    uniform_rules: gj.trees.Rules = ()  # what stays dense in the papers' uniform runs


_CIFAR = (32, 32, 3)
NETWORKS = {
    "resnet50": Network("resnet50", 1000, (224, 224, 3), (("stem", False),)),
    "vgg19": Network("vgg19", 10, _CIFAR),
    "wrn_22_2": Network("wrn_22_2", 10, _CIFAR),
    "resnet20": Network("resnet20", 10, _CIFAR),
    "resnet50_cifar10": Network("resnet50_cifar", 10, _CIFAR),
    "resnet50_cifar100": Network("resnet50_cifar", 100, _CIFAR),
    "lenet5": Network("lenet5", 10, (28, 28, 1)),
    "lenet_300_100": Network("lenet_300_100", 10, (28, 28, 1)),
}
RIGL = 1 / 101  # share of dense gradients with an update every 100 steps


def define_flags() -> None:
    """Defines the flags."""
    flags.DEFINE_list("models", list(NETWORKS), f"of: {', '.join(NETWORKS)}")
    flags.DEFINE_list(
        "sparsities",
        ["0.5", "0.8", "0.9", "0.95", "0.965", "0.98", "0.99"],
        "fractions of zeros among prunable weights",
    )
    flags.DEFINE_integer(
        "per_output",
        2,
        "FLOPs added for each output of a layer, at any sparsity; 2 is RigL's counter, 0 leaves "
        "the multiply-adds",
        lower_bound=0,
    )
    flags.DEFINE_boolean("layers", False, "also print each layer's share, sparse by ERK")


def count(network: Network) -> tuple[PyTree, flops.Costs]:
    """Abstract parameters, and what one image costs."""
    model = MODELS[network.model](num_classes=network.num_classes)
    image = jax.ShapeDtypeStruct((1, *network.image), jnp.float32)
    variables = dict(jax.eval_shape(model.init, jax.random.key(0), image))
    params = variables.pop("params")

    def apply(params: PyTree, rest: PyTree, images: jax.Array) -> Any:
        return model.apply({"params": params, **rest}, images)

    return params, flops.count(apply, params, variables, image)


def densities(
    params: PyTree, distribution: Distribution, sparsity: float, rules: gj.trees.Rules = ()
) -> dict[str, float]:
    """Kept fraction of each prunable leaf by its path; no leaf may stack layers."""
    leaves = [leaf for leaf in gj.trees.describe(params, rules) if leaf.prunable]
    num_keep = distribution(gj.trees.layer_shapes(leaves), sparsity)
    return {leaf.path: k / leaf.size for leaf, k in zip(leaves, num_keep, strict=True)}


def ratios(
    costs: flops.Costs, by_spread: Mapping[str, Mapping[str, float]], per_output: int
) -> dict[str, float]:
    """FLOPs over those of the dense network; a column of the table for each."""
    row = {}
    for name, kept in by_spread.items():
        forward = flops.ratio(costs, kept, per_output=per_output)
        row[f"{name} inference"] = forward
        row[f"{name} RigL"] = flops.training_ratio(forward, RIGL)
        row[f"{name} RigL 5x"] = 5 * row[f"{name} RigL"]
        row[f"{name} SNFS"] = flops.training_ratio(forward, 1)
    return row


def main(argv: list[str]) -> None:
    """Prints a table for each model."""
    if len(argv) > 1:
        sys.exit(f"error: {argv[1]!r} is no flag; flags look like --models=resnet50. See --help.")
    console = Console()
    with settings.errors_in_one_line():
        names, per_output = flags.FLAGS.models, flags.FLAGS.per_output
        if not names or any(name not in NETWORKS for name in names):
            raise ValueError(f"--models={','.join(names)}: name some of {', '.join(NETWORKS)}.")
        try:
            sparsities = [float(x) for x in flags.FLAGS.sparsities or [""]]
        except ValueError as error:
            raise ValueError(f"--sparsities takes numbers, as in 0.8,0.9: {error}.") from error
        for name in names:
            network = NETWORKS[name]
            params, costs = count(network)
            rows = []
            for sparsity in sparsities:
                by_spread = {
                    "ERK": densities(params, gj.erk, sparsity),
                    "uniform": densities(params, gj.uniform, sparsity, network.uniform_rules),
                }
                if flags.FLAGS.layers:
                    print(f"{name}, sparsity {sparsity:g}, ERK, one image")
                    print(flops.table(costs, by_spread["ERK"]) + "\n")
                row = ratios(costs, by_spread, per_output)
                rows.append({"sparsity": f"{sparsity:g}"} | {k: f"{v:.4f}" for k, v in row.items()})
            weights = gj.trees.num_prunable(gj.trees.describe(params))
            macs = sum(leaf.macs for leaf in costs.leaves) + costs.other
            title = (
                f"{name}: {weights:,} prunable weights, {macs:,} MACs, "
                f"{flops.forward(costs, per_output=per_output):.3e} FLOPs an image"
            )
            output.print_table(console, title, rows)
    print("FLOPs over those of the dense network; see granet_jax.flops for the conventions.")


if __name__ == "__main__":
    define_flags()
    app.run(main)
