"""Inference: dense, sparse and compacted models side by side, on this machine.

Examples:
  python -m experiments.benchmarks.inference
  python -m experiments.benchmarks.inference --widths=512,2048,512 --batch_sizes=1,64
  python -m experiments.benchmarks.inference --run_dir=runs/NAME

Outputs of every model are compared with those of the dense one. With --run_dir a trained run is
exported: its test set runs through both, image by image.
"""

import functools
import itertools
import pathlib
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from jax.experimental import sparse
from rich.console import Console

import granet_jax as gj
from experiments import models
from experiments.benchmarks import network, tables, timing
from experiments.benchmarks.tables import Table
from experiments.data import images
from experiments.engine import batches, files, output, run, settings, training
from experiments.tasks.images import Settings
from experiments.tasks.images import task as image_task

WIDTHS = (2048, 2048, 2048, 2048)
SPARSITIES = (0.8, 0.9, 0.95, 0.98)
BATCH_SIZES = (1, 64, 256)
ROUNDS = 15


def tables_of(quick: bool) -> list[Table]:
    """What ``python -m experiments.benchmarks`` measures."""
    if quick:
        return [*perceptrons((8, 16, 4), (0.5, 0.9), (1, 2), 2), training_step(16, 4, 2)]
    narrow = perceptrons((512, 2048, 512), (0.9, 0.95, 0.98), (1, 64), ROUNDS)
    wide = perceptrons(WIDTHS, SPARSITIES, BATCH_SIZES, ROUNDS)
    return [*wide, *narrow[:1], training_step(2048, 256, ROUNDS), channels(64, ROUNDS)]


# --- Products ---


def perceptrons(
    widths: Sequence[int], sparsities: Sequence[float], batch_sizes: Sequence[int], rounds: int
) -> list[Table]:
    """Rows for each batch size, structure and sparsity; then where sparse begins to win."""
    rows, ratios = [], {}
    kinds = {"unstructured": (), "constant fan-in": (("", gj.structures.fan_in()),)}
    for batch, (kind, rules), sparsity in itertools.product(batch_sizes, kinds.items(), sparsities):
        params = _perceptron(widths, jax.random.key(0))
        masks = gj.random_masks(jax.random.key(1), params, sparsity, gj.uniform, rules)
        x = jax.random.normal(jax.random.key(2), (batch, widths[0]))
        sparse_apply = gj.export.compile(_apply_perceptron, params, masks, x)
        params = gj.apply_masks(params, masks)
        dense = jax.jit(_apply_perceptron)
        times = timing.in_turns(
            {"dense": lambda: dense(params, x), "sparse": lambda: sparse_apply(x)},  # noqa: B023
            rounds,
        )
        gain = timing.ratios(times["dense"], times["sparse"])
        ratios[batch, kind, sparsity] = times["dense"].median / times["sparse"].median
        rows.append(
            {
                "batch": str(batch),
                "masks": kind,
                "sparsity": f"{sparsity:.2f}",
                "dense (ms)": timing.ms(times["dense"].median),
                "exported (ms)": timing.ms(times["sparse"].median),
                "times faster": f"{ratios[batch, kind, sparsity]:.2f}",
                "quartiles": timing.quartiles(gain),
                "products": ", ".join(choice.taken for choice in sparse_apply.choices),
                **{f"one by {way} (ms)": ms for way, ms in _of_first(sparse_apply).items()},
                "largest error": _error(times["dense"].result, times["sparse"].result),
            }
        )
    title = f"A perceptron of {'-'.join(map(str, widths))}"
    note = (
        "ReLU, biases, random masks, the same sparsity in each layer. Exported: each product in "
        "the way that was fastest when it was tried; one by one the first product's times. "
        "Errors are relative to the largest output."
    )
    even = [
        {"batch": str(batch), "masks": kind, "sparse wins from a sparsity of": break_even(points)}
        for batch, kind in itertools.product(batch_sizes, kinds)
        for points in [[(s, ratios[batch, kind, s]) for s in sparsities]]
    ]
    told = "Between the sparsities measured, on a straight line. Below it, dense is faster."
    return [Table(title, rows, note), Table(f"{title}: break-even", even, told)]


def _perceptron(widths: Sequence[int], key: jax.Array) -> list[dict[str, jax.Array]]:
    keys = jax.random.split(key, len(widths) - 1)
    return [
        {"kernel": jax.random.normal(k, (a, b)) / a**0.5, "bias": jnp.zeros(b)}
        for k, (a, b) in zip(keys, itertools.pairwise(widths), strict=True)
    ]


def _apply_perceptron(params: list[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"][None])
    return x @ params[-1]["kernel"] + params[-1]["bias"][None]


def _of_first(sparse_apply: gj.export.SparseApply) -> dict[str, str]:
    """Milliseconds of the first product in each way."""
    first = sparse_apply.choices[0].milliseconds
    ways = ("dense", "bcsr", "bcsr2", "bcsr4", "gather")
    return {way: timing.figure(first[way]) if way in first else "not tried" for way in ways}


def _error(wanted: Any, got: Any) -> str:
    wanted, got = np.asarray(wanted), np.asarray(got)
    return f"{np.abs(got - wanted).max() / max(np.abs(wanted).max(), 1e-30):.1e}"


def break_even(points: Sequence[tuple[float, float]]) -> str:
    """Where the ratio passes 1 for good, of ``(sparsity, ratio)`` in order."""
    if points[-1][1] < 1:
        return "none of these"
    for (low, below), (high, above) in reversed(list(itertools.pairwise(points))):
        if below < 1:
            return f"{low + (high - low) * (1 - below) / (above - below):.2f}"
    return f"{points[0][0]:.2f} or less"


def training_step(width: int, batch: int, rounds: int) -> Table:
    """A product and both its gradients, dense under a mask and through BCSR."""
    rows = []
    x = jax.random.normal(jax.random.key(0), (batch, width))
    for sparsity in (0.9, 0.98):
        kernel = jax.random.normal(jax.random.key(1), (width, width))
        masks = gj.random_masks(jax.random.key(2), {"kernel": kernel}, sparsity)
        kernel = gj.apply_masks({"kernel": kernel}, masks)["kernel"]
        matrix = sparse.BCSR.fromdense(kernel.T)

        @jax.jit
        def dense(kernel: jax.Array, x: jax.Array) -> Any:
            return jax.grad(lambda k, x: jnp.sum((x @ k) ** 2), (0, 1))(kernel, x)

        @jax.jit
        def through_bcsr(values: jax.Array, where: tuple[jax.Array, jax.Array], x: Any) -> Any:
            def loss(values: jax.Array, x: jax.Array) -> jax.Array:
                matrix = sparse.BCSR((values, *where), shape=(width, width))
                return jnp.sum((matrix @ x.T) ** 2)

            return jax.grad(loss, (0, 1))(values, x)

        where = matrix.indices, matrix.indptr
        times = timing.in_turns(
            {
                "dense": functools.partial(dense, kernel, x),
                "bcsr": functools.partial(through_bcsr, matrix.data, where, x),
            },
            rounds,
        )
        rows.append(
            {
                "sparsity": f"{sparsity:.2f}",
                "dense (ms)": timing.ms(times["dense"].median),
                "BCSR (ms)": timing.ms(times["bcsr"].median),
                "BCSR / dense": f"{times['bcsr'].median / times['dense'].median:.2f}",
                "quartiles": timing.quartiles(timing.ratios(times["bcsr"], times["dense"])),
                "error of dx": _error(times["dense"].result[1], times["bcsr"].result[1]),
            }
        )
    note = f"Forward and both gradients of one product, {batch} x {width} times {width} x {width}."
    return Table("Training through sparse products: do not", rows, note)


# --- Compaction ---


def channels(batch: int, rounds: int) -> Table:
    """Networks that lose half of their channels to GraNet, whole under masks and cut."""
    rows = []
    for name in ("resnet20", "vgg19"):
        model, image = network.make(name), (32, 32, 3)
        params, rest = jax.jit(functools.partial(network.init, model, image))(jax.random.key(0))
        x = jax.random.normal(jax.random.key(1), (batch, *image))

        def apply_with(rest: Any, params: Any, x: jax.Array) -> Any:
            return model.apply({"params": params, **rest}, x, False)  # noqa: B023

        trace = functools.partial(
            gj.export.channel_rules, functools.partial(apply_with, rest), params, x
        )
        params, rest, masks = _prune_channels(
            model, params, rest, trace(vectors=False), trace(vectors=True)
        )
        apply_fn = functools.partial(apply_with, rest)
        small = gj.export.compact(apply_fn, params, masks, x)
        masked, cut = jax.jit(apply_fn), jax.jit(small.apply)
        times = timing.in_turns(
            {
                "masked": functools.partial(masked, params, x),
                "cut": functools.partial(cut, small.params, x),
            },
            rounds,
        )
        costs = [
            gj.flops.forward(gj.flops.count(apply, weights, x)) / 2 / batch
            for apply, weights in ((apply_fn, params), (small.apply, small.params))
        ]
        sizes = [sum(w.size for w in jax.tree.leaves(t)) for t in (params, small.params)]
        rows.append(
            {
                "network": name,
                "masked (ms)": timing.ms(times["masked"].median),
                "cut (ms)": timing.ms(times["cut"].median),
                "times faster": f"{times['masked'].median / times['cut'].median:.2f}",
                "quartiles": timing.quartiles(timing.ratios(times["masked"], times["cut"])),
                "parameters": f"{sizes[0]:,} to {sizes[1]:,}",
                "MACs of an image": f"{costs[0]:,.0f} to {costs[1]:,.0f}",
                "largest error": _error(times["masked"].result, times["cut"].result),
            }
        )
    note = (
        f"GraNet by channel to half of the channels of each layer, 12 steps on random images; "
        f"inference, batch {batch}. Channels on one residual stream are pruned and cut as one."
    )
    return Table("Channels cut out", rows, note)


def _prune_channels(
    model: Any, params: Any, rest: Any, kernels: gj.trees.Rules, channels: gj.trees.Rules
) -> tuple[Any, Any, Any]:
    """Some steps of GraNet on filters, then some with their norms pruned as well."""
    granet = gj.granet(
        final_sparsity=0.5,
        end_step=6,
        update_every=2,
        total_steps=8,
        scope=gj.uniform,
        prunable=kernels,
    )
    batch, inner = network.batch(32, (32, 32, 3)), optax.sgd(0.01, momentum=0.9)
    masks = None
    for method, num_steps in ((granet, 9), (gj.static(), 3)):
        tx = gj.sparsify(inner, method)
        state = tx.init(params)
        state = state if masks is None else gj.set_masks(state, masks, channels)
        step = jax.jit(network.training_step(model, tx))
        for _ in range(num_steps):
            params, rest, state = step(params, rest, state, batch)
        masks = gj.structures.complete(gj.get_masks(state), params, channels)
    return gj.apply_masks(params, masks), rest, masks


# --- A trained run ---


def trained(run_dir: pathlib.Path, data_dir: str | None, batch_sizes: Sequence[int]) -> Table:
    """The model of a run on images, from its newest checkpoint: dense, exported, and its file.

    Raises:
      ValueError: ``run_dir`` holds no run, or one without checkpoint.
    """
    if not (run_dir / "settings.json").exists():
        raise ValueError(f"--run_dir={run_dir} holds no run: there is no settings.json in it.")
    config = settings.from_json(Settings, files.read_json(run_dir, "settings.json"))
    dataset = images.load(config.dataset, data_dir, config.validation)
    trainer = training.make_trainer(config, image_task(config, dataset))
    state = run.newest(trainer, run_dir)
    masks = trainer.family.masks(state.params, state.opt_state)
    params = gj.apply_masks(trainer.family.weights(state.params, state.opt_state), masks)
    model = models.MODELS[config.model](num_classes=dataset.num_classes)

    def apply_fn(params: Any, pixels: jax.Array) -> Any:
        x = pixels.astype(jnp.float32) / 255
        if config.normalise:
            x = (x - dataset.mean.reshape(1, 1, 1, -1)) / dataset.std.reshape(1, 1, 1, -1)
        return model.apply({"params": params, **state.model_state}, x, train=False)

    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "model.safetensors"
        size = gj.export.save(path, params, masks)
        params = gj.export.load(path, like=params).params
    dense_size = sum(x.nbytes for x in jax.tree.leaves(params))
    test = trainer.setup.task.held_out["test"]
    rows = [
        {
            "batch": str(batch_size),
            **_guesses(apply_fn, params, list(batches.in_order(test, batch_size))),
            "file": f"{size:,} of {dense_size:,} bytes",
        }
        for batch_size in batch_sizes
    ]
    note = f"{config.model}, {config.method}, sparsity {config.sparsity}; the whole test set."
    return Table(f"The run in {run_dir.name}", rows, note)


def _guesses(apply_fn: Any, params: Any, pairs: list[tuple[Any, Any]]) -> dict[str, str]:
    """Times and hits on batches, each with what is no padding in it."""
    inputs = [jnp.asarray(batch.images) for batch, _ in pairs]
    labels = np.concatenate([batch.labels for batch, _ in pairs])
    valid = np.concatenate([some for _, some in pairs])
    dense = jax.jit(functools.partial(apply_fn, params))
    exported = jax.jit(gj.export.compile(apply_fn, params, None, inputs[0]))
    times = timing.in_turns(
        {
            "dense": lambda: [dense(x) for x in inputs],
            "exported": lambda: [exported(x) for x in inputs],
        },
        rounds=5,
    )
    guesses = {
        name: np.concatenate([np.asarray(y).argmax(1) for y in measured.result])
        for name, measured in times.items()
    }
    hits = {name: int(((guess == labels) & valid).sum()) for name, guess in guesses.items()}
    differ = int(((guesses["dense"] != guesses["exported"]) & valid).sum())
    return {
        "images": f"{valid.sum():,}",
        "dense (s)": timing.figure(times["dense"].median),
        "exported (s)": timing.figure(times["exported"].median),
        "times faster": f"{times['dense'].median / times['exported'].median:.2f}",
        "right, dense": f"{hits['dense']:,}",
        "right, exported": f"{hits['exported']:,}",
        "labelled otherwise": str(differ),
    }


def _define_flags() -> None:
    flags.DEFINE_list("widths", [str(x) for x in WIDTHS], "of the layers of a perceptron")
    flags.DEFINE_list("sparsities", [str(x) for x in SPARSITIES], "fractions of zeros")
    flags.DEFINE_list("batch_sizes", [str(x) for x in BATCH_SIZES], "inputs at a time")
    flags.DEFINE_string("run_dir", None, "folder of a trained run to export and time instead")
    flags.DEFINE_string("data_dir", None, f"folder with TFDS data sets ({images.DEFAULT_DATA_DIR})")


def main(argv: list[str]) -> None:
    """Runs what the flags say."""
    if len(argv) > 1:
        sys.exit(f"error: {argv[1]!r} is no flag; flags look like --widths=512,512. See --help.")
    given = flags.FLAGS
    with settings.errors_in_one_line():
        print(tables.machine(), flush=True)
        batch_sizes = [int(x) for x in given.batch_sizes]
        if given.run_dir:
            measured = [trained(pathlib.Path(given.run_dir), given.data_dir, batch_sizes)]
        else:
            widths = [int(x) for x in given.widths]
            sparsities = [float(x) for x in given.sparsities]
            if len(widths) < 2 or min(widths) < 1 or min(batch_sizes) < 1:
                raise ValueError("--widths takes two sizes or more, --batch_sizes sizes from 1 on.")
            measured = [
                *perceptrons(widths, sorted(sparsities), batch_sizes, ROUNDS),
                training_step(max(widths), max(batch_sizes), ROUNDS),
            ]
        for table in measured:
            output.print_table(Console(), table.title, table.rows)
            print(f"{table.note}\n", flush=True)


if __name__ == "__main__":
    _define_flags()
    app.run(main)
