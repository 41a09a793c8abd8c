"""Which method that prunes before training empties a layer, and at which compression. No training.

Example:
  python -m experiments.collapse
  python -m experiments.collapse --dataset=cifar10 --data_dir=FOLDER --seeds=3

Each method prunes a network to 10^-.25, 10^-.5, ... of its weights, until some layer has none left.
Prints the largest compression before that beside what the SynFlow paper found for VGG-16; leaves
table.txt and collapse.svg in --out_dir. Weights are drawn as in that paper's code, with variance
2 / fan-in in every layer. SNIP and GraSP score 10 images for each class; by default images and
labels are random, so that nothing has to be downloaded.
"""

import functools
import math
import pathlib
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from absl import app, flags
from matplotlib import pyplot as plt
from rich.console import Console

import granet_jax as gj
from experiments import models
from experiments.data import images as data
from experiments.data.streams import Batch
from experiments.engine import memory, output, settings
from granet_jax.methods import at_init

matplotlib.use("Agg")

STEP = 0.25  # of log10 compression
IMAGES_PER_CLASS = 10
BATCH_SIZE = 256  # at most
# Largest log10 compression before a layer of VGG-16 is empty, on CIFAR-100 (Tanaka et al. 2020).
PAPER = {"random": 3.25, "magnitude": 2.75, "snip": 3.5, "grasp": 3.5, "synflow": 6.0}


def define_flags() -> None:
    """Defines the flags."""
    flags.DEFINE_enum("model", "vgg16", list(models.MODELS), "the network")
    flags.DEFINE_enum("dataset", "random", ["random", *data.DATASETS], "where images come from")
    flags.DEFINE_string(
        "data_dir", None, f"folder with TFDS data sets (default: {data.DEFAULT_DATA_DIR})"
    )
    flags.DEFINE_integer("num_classes", 10, "with --dataset=random", lower_bound=1)
    flags.DEFINE_integer("seeds", 1, "seeds 0, 1, ... of weights and images", lower_bound=1)
    flags.DEFINE_integer("rounds", 100, "of SynFlow", lower_bound=1)
    flags.DEFINE_string("out_dir", None, "where to write (default: runs/collapse-DATASET-MODEL)")


class Network(NamedTuple):
    """A network as initialised, and what methods ask of it."""

    params: Any
    apply: Callable[..., jax.Array]  # (params, images) -> logits; batch norm in inference mode
    loss: Callable[..., jax.Array]  # (params, batch, temperature=1) -> scalar
    batches: Sequence[Batch]  # normalised images
    key: jax.Array


class Climb(NamedTuple):
    """What one method did to one network, compression by compression."""

    smallest: list[int]  # weights left in the smallest layer; 0 only at the end
    empty: list[str]  # paths of the layers that were empty at the end


Pruner = Callable[[float], Any]  # sparsity -> masks


def _ranked(network: Network, scores: Any) -> Pruner:
    return lambda sparsity: at_init.masks_from(scores, network.params, sparsity=sparsity)


def _random(network: Network) -> Pruner:
    return _ranked(network, gj.scores.random(gj.Event(network.params, key=network.key)))


def _magnitude(network: Network) -> Pruner:
    return lambda sparsity: at_init.magnitude(network.params, sparsity=sparsity)


def _snip(network: Network) -> Pruner:
    return _ranked(network, at_init.snip_scores(network.loss, network.params, network.batches))


def _grasp(network: Network) -> Pruner:
    loss = functools.partial(network.loss, temperature=200.0)
    return _ranked(network, at_init.grasp_scores(loss, network.params, network.batches))


def _synflow(network: Network) -> Pruner:
    image = network.batches[0].images[:1]
    return lambda sparsity: at_init.synflow(
        network.apply, network.params, image, sparsity=sparsity, rounds=flags.FLAGS.rounds
    )


METHODS: dict[str, Callable[[Network], Pruner]] = {
    "random": _random,
    "magnitude": _magnitude,
    "snip": _snip,
    "grasp": _grasp,
    "synflow": _synflow,
}


def make_network(model_name: str, num_classes: int, images: Batch, seed: int) -> Network:
    """A network with new weights.

    Args:
      model_name: one of ``models.MODELS``.
      num_classes: size of its output.
      images: what SNIP and GraSP score, normalised.
      seed: of the weights.
    """
    model = models.MODELS[model_name](num_classes=num_classes)
    init_key, key = jax.random.split(jax.random.key(seed))
    rest = dict(jax.jit(model.init)(init_key, images.images[:1]))
    params = _drawn_by_fan_in(init_key, rest.pop("params"))

    def apply(params: Any, x: jax.Array) -> Any:
        return model.apply({"params": params, **rest}, x)

    def loss(params: Any, batch: Batch, temperature: float = 1.0) -> jax.Array:
        logits = apply(params, batch.images) / temperature
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels))

    num_batches = math.ceil(len(images.labels) / BATCH_SIZE)
    parts = zip(*(np.array_split(array, num_batches) for array in images), strict=True)
    return Network(params, apply, loss, [Batch(*part) for part in parts], key)


def _drawn_by_fan_in(key: jax.Array, params: Any) -> Any:
    """Draws what is prunable anew; what collapses first depends on the scales of the layers."""
    arrays = [
        jax.random.normal(jax.random.fold_in(key, i), leaf.shape)
        * math.sqrt(2 / math.prod(leaf.shape[:-1]))
        if leaf.prunable
        else array
        for i, (array, leaf) in enumerate(
            zip(jax.tree.leaves(params), gj.trees.describe(params), strict=True)
        )
    ]
    return jax.tree.unflatten(jax.tree.structure(params), arrays)


def load_images(dataset: data.Dataset, seed: int) -> Batch:
    """10 training images for each class, on average, normalised to mean 0 and deviation 1."""
    images, labels = data.sample(dataset.train, IMAGES_PER_CLASS * dataset.num_classes, seed)
    scaled = (images.astype(np.float32) / 255 - dataset.mean) / dataset.std
    return Batch(scaled.astype(np.float32), labels)


def random_images(num_classes: int, seed: int) -> Batch:
    """As many standard normal images of 32x32 with random labels."""
    draw = np.random.default_rng(seed)
    num = IMAGES_PER_CLASS * num_classes
    images = draw.standard_normal((num, 32, 32, 3), np.float32)
    return Batch(images, draw.integers(num_classes, size=num, dtype=np.int32))


def climb(find: Pruner, params: Any, show: Callable[[float], None] = lambda c: None) -> Climb:
    """Prunes ever more, until a layer is empty or there are fewer weights than layers.

    Args:
      find: gives masks at a sparsity.
      params: what the masks are for.
      show: called with each log10 compression before it is tried.
    """
    smallest: list[int] = []
    for i in range(1, int(_limit(params) / STEP) + 1):
        show(STEP * i)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that layers collapse is what we ask
            masks = find(1 - 10 ** (-STEP * i))
        smallest.append(int(gj.metrics.num_live(masks, params).min()))
        if smallest[-1] == 0:
            return Climb(smallest, gj.collapsed(masks, params))
    return Climb(smallest, [])


def _limit(params: Any) -> float:
    """Above this log10 compression there are fewer weights than layers."""
    leaves = gj.trees.describe(params)
    return math.log10(gj.trees.num_prunable(leaves) / len(gj.trees.layer_shapes(leaves)))


def reached(one: Climb) -> float:
    """The largest log10 compression before a layer is empty."""
    return STEP * sum(num > 0 for num in one.smallest)


def row(method: str, climbs: Sequence[Climb], with_paper: bool) -> dict[str, str]:
    """A row of the table."""
    empty = sorted({path.removesuffix("/kernel") for one in climbs for path in one.empty})
    shown = {
        "method": method,
        "log10 compression": ", ".join(f"{reached(one):.2f}" for one in climbs),
        "empty at the next": ", ".join(empty) or "-",
    }
    return shown | ({"paper": f"{PAPER[method]:.2f}"} if with_paper else {})


def draw(path: pathlib.Path, climbs: Mapping[str, Sequence[Climb]], title: str) -> None:
    """A line for each seed: how many weights the smallest layer keeps; a cross where it is empty.

    Args:
      path: an .svg file.
      climbs: one for each seed, by method.
      title: of the figure.
    """
    figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    for i, (method, group) in enumerate(climbs.items()):
        for one in group:
            x = STEP * np.arange(1, len(one.smallest) + 1)
            label = method if one is group[0] else None
            axes.plot(x, one.smallest, color=f"C{i}", label=label)
            if one.smallest[-1] == 0:
                axes.plot(x[-1], 0, "x", color=f"C{i}")
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(bottom=-0.2)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("log10 compression")
    axes.set_title(f"{title}: weights left in the smallest layer", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main(argv: list[str]) -> None:
    """Runs what the flags say."""
    if len(argv) > 1:
        sys.exit(f"error: {argv[1]!r} is no flag; flags look like --seeds=3. See --help.")
    console, name, source = Console(), flags.FLAGS.model, flags.FLAGS.dataset
    climbs: dict[str, list[Climb]] = {method: [] for method in METHODS}
    memory.keep()
    with settings.errors_in_one_line(), console.status("scoring") as status:

        def show(compression: float) -> None:
            status.update(f"seed {seed}, {method}, log10 compression {compression:.2f}")

        dataset = None if source == "random" else data.load(source, flags.FLAGS.data_dir)
        num_classes = dataset.num_classes if dataset else flags.FLAGS.num_classes
        for seed in range(flags.FLAGS.seeds):
            images = load_images(dataset, seed) if dataset else random_images(num_classes, seed)
            network = make_network(name, num_classes, images, seed)
            for method, prepare in METHODS.items():
                climbs[method].append(climb(prepare(network), network.params, show))
                print(f"seed {seed}  {method:9}  {reached(climbs[method][-1]):.2f}", flush=True)
        out_dir = pathlib.Path(flags.FLAGS.out_dir or f"runs/collapse-{source}-{name}")
        out_dir.mkdir(parents=True, exist_ok=True)

    weights = gj.trees.num_prunable(gj.trees.describe(network.params))
    title = f"{name}, {weights:,} weights, {source} images, {num_classes} classes"
    rows = [row(method, group, name == "vgg16") for method, group in climbs.items()]
    (out_dir / "table.txt").write_text(output.print_table(console, title, rows))
    print(
        f"The largest compression, in steps of {STEP:g}, that leaves each layer a weight. Above "
        f"{_limit(network.params):.2f} there are fewer weights than layers."
    )
    draw(out_dir / "collapse.svg", climbs, name)
    print(f"written: {out_dir}/table.txt and collapse.svg")


if __name__ == "__main__":
    define_flags()
    app.run(main)
