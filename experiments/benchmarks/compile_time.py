"""How much longer a training step compiles."""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from experiments.benchmarks import network, step
from experiments.benchmarks.tables import Table


class Seconds(NamedTuple):
    """To trace and compile."""

    wall: float
    cpu: float  # of all threads


def tables(quick: bool) -> list[Table]:
    """Rows on the whole step and on the optimizer alone."""
    name, image, size, rounds = (
        ("lenet5", (28, 28, 1), 2, 1) if quick else ("resnet50_cifar", (32, 32, 3), 8, 2)
    )
    model = network.make(name)
    init = functools.partial(network.init, model, image)
    params, rest = jax.eval_shape(init, jax.random.key(0))
    batch = jax.eval_shape(lambda: network.batch(size, image))
    rows = []
    for what in ("forward, backward, optimizer", "the optimizer alone"):
        times: dict[str, list[Seconds]] = {"dense": [], "granet": []}
        for _ in range(rounds):
            for variant, taken in times.items():
                tx = network.INNER
                tx = step.sparse(tx, 100) if variant == "granet" else tx
                state = jax.eval_shape(tx.init, params)
                if what == "the optimizer alone":
                    taken.append(_compile(step.update(tx), params, state, params))
                else:
                    train = network.training_step(model, tx)
                    taken.append(_compile(train, params, rest, state, batch))
        row = {"what": what}
        for i, clock in enumerate(("wall", "CPU")):
            dense, granet = (statistics.median(x[i] for x in taken) for taken in times.values())
            row[f"dense ({clock} s)"] = f"{dense:.2f}"
            row[f"granet ({clock} s)"] = f"{granet:.2f}"
            row[f"granet / dense ({clock})"] = f"{granet / dense:.2f}"
        rows.append(row)
    note = (
        f"{name}, batch {size}, images {image[0]}x{image[1]}, SGD with momentum; tracing and "
        f"compilation, in turns, medians of {rounds}. CPU seconds are those of all threads."
    )
    return [Table("Time to compile a training step", rows, note)]


def _compile(function: Callable[..., Any], *args: Any) -> Seconds:
    wall, cpu = time.perf_counter(), time.process_time()
    jax.jit(function).lower(*args).compile()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)
