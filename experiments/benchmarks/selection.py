"""An exact top-k mask of one array: beside sorting, and as the array grows."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import granet_jax as gj
from experiments.benchmarks import timing
from experiments.benchmarks.tables import Table

DENSITY = 0.1
OURS, STREAM, ARGSORT = "gj.top_k_mask", "one pass, sum(|x|)", "mask by jnp.argsort"


def mask_by_argsort(scores: jax.Array, k: jax.Array) -> jax.Array:
    """The usual way: sort all, scatter ones to the first k."""
    order = jnp.argsort(-scores.ravel(), stable=True)
    mask = jnp.zeros(scores.size, bool).at[order].set(jnp.arange(scores.size) < k)
    return mask.reshape(scores.shape)


def tables(quick: bool) -> list[Table]:
    """Both comparisons."""
    size, sizes = (10_000, [100, 1_000, 10_000]) if quick else (25_000_000, [10**5, 10**6, 10**7])
    return [beside_sorting(size), scaling(sizes, 10 * sizes[-1])]


def beside_sorting(size: int) -> Table:
    """Time and memory of ways to the same mask."""
    num_keep = int(DENSITY * size)

    def threshold_by_sort(scores: jax.Array, k: jax.Array) -> jax.Array:
        return jnp.sort(scores)[size - k]

    def mask_by_lax_top_k(scores: jax.Array, k: jax.Array) -> jax.Array:
        del k  # has to be known when compiled
        return jnp.zeros(size, bool).at[jax.lax.top_k(scores, num_keep)[1]].set(True)

    ways = {
        STREAM: _stream,
        OURS: gj.top_k_mask,
        ARGSORT: mask_by_argsort,
        "threshold alone, jnp.sort": threshold_by_sort,
        "mask by jax.lax.top_k": mask_by_lax_top_k,
    }
    args = _scores(size), jnp.int32(num_keep)
    compiled = {name: jax.jit(way).lower(*args).compile() for name, way in ways.items()}
    runs = {name: _bind(call, args) for name, call in compiled.items()}
    measured = timing.in_turns({name: runs.pop(name) for name in (STREAM, OURS)}, rounds=9)
    measured |= timing.in_turns(runs, rounds=2)  # these take seconds
    rows = []
    for name, m in measured.items():
        same = np.array_equal(m.result, measured[ARGSORT].result) if "mask" in name else None
        rows.append(
            {
                "what": name,
                "ms": timing.ms(m.median),
                "quartiles": timing.quartiles(m.seconds, timing.ms),
                "passes": timing.figure(m.median / measured[STREAM].median),
                "temporaries (bytes a weight)": f"{temporaries(compiled[name]) / size:.2f}",
                "same mask": "" if same is None else str(same),
            }
        )
    return Table(
        f"Exact top-k mask, {size:,} weights",
        rows,
        f"|x| of normal float32, k = {num_keep:,}. A pass is the first row, measured in turns with "
        "the second; the others are measured twice. The number to keep is traced, except for "
        "`jax.lax.top_k`, which has to know it when it is compiled.",
    )


def scaling(sizes: list[int], largest: int) -> Table:
    """The same at many sizes; argsort at all but the largest."""
    rows, lines = [], {name: dict[int, float]() for name in (OURS, STREAM, ARGSORT)}
    for size in (*sizes, largest):
        args = _scores(size), jnp.int32(DENSITY * size)
        runs = {
            name: _bind(jax.jit(way), args)
            for name, way in ((OURS, gj.top_k_mask), (STREAM, _stream))
        }
        measured = timing.in_turns(runs, rounds=int(np.clip(2e7 / size, 5, 50)))
        if size != largest:
            sort = {ARGSORT: _bind(jax.jit(mask_by_argsort), args)}
            measured |= timing.in_turns(sort, rounds=2)
        for name, m in measured.items():
            lines[name][size] = m.median
        ours, stream = measured[OURS], measured[STREAM]
        rows.append(
            {
                "weights": f"{size:,}",
                "mask (ms)": timing.ms(ours.median),
                "quartiles": timing.quartiles(ours.seconds, timing.ms),
                "ns a weight": f"{1e9 * ours.median / size:.3g}",
                "pass (ms)": timing.ms(stream.median),
                "pass, ns a weight": f"{1e9 * stream.median / size:.3g}",
                "passes": timing.figure(ours.median / stream.median),
                "argsort (ms)": timing.ms(lines[ARGSORT][size]) if size in lines[ARGSORT] else "",
            }
        )
    note = "`gj.top_k_mask` of |x|, k = 10 %, and one pass, sum(|x|), in turns."
    return Table("Exact top-k masks by size", rows, note, ("selection.png", _draw(lines)))


def temporaries(compiled: Any) -> int:
    """Bytes that a compiled function needs beside its arguments and results."""
    return int(compiled.memory_analysis().temp_size_in_bytes)


def _scores(size: int) -> jax.Array:
    return jnp.abs(jax.random.normal(jax.random.key(0), (size,)))


def _stream(scores: jax.Array, k: jax.Array) -> jax.Array:
    del k
    return jnp.sum(jnp.abs(scores))


def _bind(call: Callable[..., Any], args: tuple[Any, ...]) -> Callable[[], Any]:
    return lambda: call(*args)


def _draw(lines: dict[str, dict[int, float]]) -> Figure:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, times in lines.items():
        axes.loglog(list(times), [1000 * t for t in times.values()], "o-", label=name)
    axes.set_xlabel("weights")
    axes.set_ylabel("ms")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    return figure
