"""All that an hour on one accelerator can answer, in pieces of minutes, each written when done.

A run that was stopped goes on with the first piece that is not in the file; a training that was
stopped goes on from its last checkpoint.
"""

import functools
import json
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

import granet_jax as gj
from experiments.benchmarks import (
    bandwidth,
    compact,
    kernels,
    language,
    step,
    timing,
    training_step,
    update,
    weights,
)
from experiments.benchmarks.selection import mask_by_argsort
from experiments.benchmarks.tables import Table
from experiments.data.images import load
from experiments.engine import batches, files, mesh, run, training
from experiments.tasks import images

Piece = Callable[[], list[Table]]
VGG19 = ("dense", "gmp", "rigl", "granet", "granet_st")
SOURCES = {
    "vgg19": "As recipes/cifar10-vgg19-*.flags, but for the epochs and without held-out images",
    "mlp_3072": "As Zhang et al. 2024, but for the epochs, and the learning rate is a cosine",
}
PERCEPTRON = ("dense", "set", "rigl", "gmp", "granet", "chts", "chtss")


def tables(
    quick: bool, out: pathlib.Path, data_dir: str | None, epochs: int, keep: Callable[[Table], None]
) -> list[Table]:
    """Does what is not done yet.

    Args:
      quick: sizes so small that the figures say nothing.
      out: ``out.json`` beside it keeps what is done, the folder ``out.runs`` the trainings.
      data_dir: where CIFAR-10 is; digits are the data of ``quick``.
      epochs: of each training; 0 = those of the papers.
      keep: shown each table when it is there.

    Raises:
      ValueError: the file is of another device, or of other sizes.
    """
    store = out.with_suffix(".json")
    facts = {"device": jax.devices()[0].device_kind, "quick": quick, "epochs": epochs}
    done = _read(store, facts)
    for name, piece in pieces(quick, out.with_suffix(".runs"), data_dir, epochs).items():
        if name in done:
            continue
        print(f"piece {name}", flush=True)
        started = time.perf_counter()
        try:
            found = piece()
        except (RuntimeError, ValueError, NotImplementedError, OSError) as error:
            print(f"not measured: {type(error).__name__}: {error}", flush=True)
            continue
        seconds = round(time.perf_counter() - started, 1)
        rows = [[table.title, list(table.rows), table.note] for table in found]
        done[name] = {"seconds": seconds, "tables": rows}
        files.write(store, json.dumps({**facts, "pieces": done}, indent=1))
        for table in found:
            keep(table)
    return _merged(done)


def pieces(quick: bool, runs: pathlib.Path, data_dir: str | None, epochs: int) -> dict[str, Piece]:
    """What there is to measure, by name, in the order in which it is done."""
    train = functools.partial(_training, quick, runs, data_dir, epochs)
    first = 2 if quick else None  # of the methods
    return {
        "bandwidth": lambda: bandwidth.tables(quick),
        "blocks": lambda: kernels.tables(quick),
        "update": lambda: [*update.tables(quick), _selection(quick)],
        "language model": lambda: language.tables(quick),
        "memory": lambda: compact.on_accelerators(quick),
        "resnet50": lambda: [training_step.speed(quick)],
        "step": lambda: step.tables(quick),
        **{
            f"vgg19 {name}": functools.partial(train, "vgg19", 0.98, name) for name in VGG19[:first]
        },
        **{
            f"perceptron {name}": functools.partial(train, "mlp_3072", 0.99, name)
            for name in PERCEPTRON[:first]
        },
    }


def _read(store: pathlib.Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    if not store.exists():
        return {}
    found = json.loads(store.read_text())
    if odd := [f"{key} {found.get(key)!r}" for key in facts if found.get(key) != facts[key]]:
        raise ValueError(
            f"{store} holds figures of {', '.join(odd)}; this run is of "
            f"{', '.join(f'{k} {v!r}' for k, v in facts.items())}. Give another --out."
        )
    pieces: dict[str, Any] = found["pieces"]
    return pieces


def _merged(done: Mapping[str, Any]) -> list[Table]:
    """The tables of all pieces; those of one title are one."""
    merged: dict[str, Table] = {}
    for piece in done.values():
        for title, rows, note in piece["tables"]:
            before = merged[title].rows if title in merged else []
            merged[title] = Table(title, [*before, *rows], note)
    seconds = [{"piece": name, "seconds": f"{piece['seconds']:g}"} for name, piece in done.items()]
    if seconds:
        note = "With all that is compiled and read."
        merged["What the pieces took"] = Table("What the pieces took", seconds, note)
    return list(merged.values())


def _selection(quick: bool) -> Table:
    """One exact mask of all weights: ours, by argsort as JaxPruner's, and by lax.top_k."""
    shapes = weights.shapes(quick)
    total = sum(x.size for x in jax.tree.leaves(weights.random_tree(shapes, 0)))
    x = jnp.abs(jax.random.normal(jax.random.key(0), (total,)))
    k = total // 10

    @jax.jit
    def by_top_k(x: jax.Array) -> jax.Array:
        return jnp.zeros(x.shape, bool).at[jax.lax.top_k(x, k)[1]].set(True)

    stream = jax.jit(lambda x: jnp.sum(jnp.abs(x)))
    ours = jax.jit(lambda x: gj.top_k([x[None]], jnp.int32(k))[0][0])
    by_argsort = jax.jit(lambda x: mask_by_argsort(x, jnp.int32(k)))
    runs = {
        "one pass, sum(|x|)": stream,
        "top_k (ours)": ours,
        "argsort": by_argsort,
        "lax.top_k": by_top_k,
    }
    calls = {name: functools.partial(f, x) for name, f in runs.items()}
    times = timing.in_turns(calls, rounds=2 if quick else 9)
    rows = [
        {
            "selection": name,
            "ms": timing.ms(m.median),
            "quartiles": timing.quartiles(m.seconds, timing.ms),
            "passes": timing.figure(m.median / times["one pass, sum(|x|)"].median),
            "weights in the mask": "" if m.result.ndim == 0 else f"{int(m.result.sum()):,}",
        }
        for name, m in times.items()
    ]
    return Table("The largest tenth of all weights", rows, f"{total:,} float32 in one array.")


def _training(
    quick: bool,
    runs: pathlib.Path,
    data_dir: str | None,
    epochs: int,
    model: str,
    sparsity: float,
    method: str,
) -> list[Table]:
    """A row: what a method reaches, and how fast it trains."""
    config = _settings(model, sparsity, method, epochs)
    if quick:
        config = images.Settings(
            model="lenet_300_100",
            method=method,
            sparsity=config.sparsity,
            epochs=2,
            batch_size=32,
            update_every=20,
        )
    devices = mesh.make()
    task = batches.placed(images.task(config, _dataset(config.dataset, data_dir)), devices)
    trainer = training.make_trainer(config, task, devices)
    folder = runs / f"{model}-{method}"
    is_fresh, started = not folder.exists(), time.perf_counter()
    result = run.run(trainer, folder)
    seconds = time.perf_counter() - started
    last = result.history[-1]
    epochs_done = len(result.history)
    row = {
        "network and method": f"{model}, {method}",
        "sparsity": f"{last['sparsity']:.4f}",
        "test accuracy": f"{last['test_accuracy']:.2f} %",
        "epochs": f"{epochs_done}",
        "images/s": f"{last['images_per_second']:,.0f}",
        "whole run (s)": f"{seconds:.0f}" if is_fresh else "in parts",
    }
    source = "small" if quick else SOURCES[model]
    note = f"{source}; one seed, test accuracy of the last epoch."
    return [Table(f"Trainings, {config.title}", [row], note)]


_dataset = functools.cache(load)


def _settings(model: str, sparsity: float, method: str, epochs: int) -> images.Settings:
    common: dict[str, Any] = {
        "dataset": "cifar10",
        "model": model,
        "method": method,
        "sparsity": 0.0 if method == "dense" else sparsity,
        "weight_decay": 5e-4,
    }
    if model == "vgg19":  # as recipes/shared/granet_cifar.flags
        return images.Settings(
            **common,
            epochs=epochs or 160,
            batch_size=128,
            update_every=1000,
            augment="reflect",
            decay_all=True,
        )
    return images.Settings(  # Cannistraci-Hebb training, CIFAR-10
        **common,
        epochs=epochs or 100,
        batch_size=32,
        learning_rate=0.025,
        schedule="cosine",
        final_rate=0.01,
        update_every=1562,
        dense_layers=("^out/",),
        augment="none",
    )
