"""How much longer a training step compiles."""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.benchmarks import network, step
from experiments.benchmarks.tables import Table


class Seconds(NamedTuple):
    """To trace and compile."""

    wall: float
    cpu: float  # of all threads


class Case(NamedTuple):
    """What is compiled, as functions of an optimizer."""

    inner: optax.GradientTransformation
    function: Callable[[optax.GradientTransformation], Callable[..., Any]]
    args: Callable[[optax.GradientTransformation], tuple[Any, ...]]


def tables(quick: bool) -> list[Table]:
    """Rows on whole steps and on the optimizer alone."""
    name, image, size, layers, rounds = (
        ("lenet5", (28, 28, 1), 2, (2, 3), 1)
        if quick
        else ("resnet50_cifar", (32, 32, 3), 8, (100, 200), 2)
    )
    cases = _of_network(name, image, size)
    cases |= {f"perceptron of {n} layers, AdamW": perceptron(n) for n in layers}
    rows = []
    for what, case in cases.items():
        times: dict[str, list[Seconds]] = {"dense": [], "granet": []}
        for _ in range(rounds):
            for variant, taken in times.items():
                tx = step.sparse(case.inner, 100) if variant == "granet" else case.inner
                taken.append(_compile(case.function(tx), *case.args(tx)))
        row = {"what": what}
        for i, clock in enumerate(("wall", "CPU")):
            dense, granet = (statistics.median(x[i] for x in taken) for taken in times.values())
            row[f"dense ({clock} s)"] = f"{dense:.2f}"
            row[f"granet ({clock} s)"] = f"{granet:.2f}"
            row[f"granet / dense ({clock})"] = f"{granet / dense:.2f}"
        rows.append(row)
    note = (
        f"{name}, batch {size}, images {image[0]}x{image[1]}, SGD with momentum; perceptrons of "
        "unrolled layers 64x64 with biases, forward, backward and optimizer. Tracing and "
        f"compilation, in turns, medians of {rounds}. CPU seconds are those of all threads."
    )
    return [Table("Time to compile a training step", rows, note)]


def perceptron(num_layers: int) -> Case:
    """A whole training step; its layers are leaves of their own."""
    layer = {"kernel": jnp.zeros((64, 64)), "bias": jnp.zeros(64)}
    params = jax.eval_shape(lambda: {f"dense_{i}": layer for i in range(num_layers)})

    def loss(params: Any, x: jax.Array) -> jax.Array:
        for i in range(num_layers):
            layer = params[f"dense_{i}"]
            x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
        return jnp.mean(x**2)

    def function(tx: optax.GradientTransformation) -> Callable[..., Any]:
        def train(params: Any, state: Any, x: jax.Array) -> Any:
            return step.update(tx)(params, state, jax.grad(loss)(params, x))

        return train

    def args(tx: optax.GradientTransformation) -> tuple[Any, ...]:
        batch = jax.ShapeDtypeStruct((32, 64), jnp.float32)
        return params, jax.eval_shape(tx.init, params), batch

    return Case(step.OPTIMIZERS["AdamW"], function, args)


def _of_network(name: str, image: tuple[int, ...], size: int) -> dict[str, Case]:
    model = network.make(name)
    init = functools.partial(network.init, model, image)
    params, rest = jax.eval_shape(init, jax.random.key(0))
    batch = jax.eval_shape(lambda: network.batch(size, image))

    def whole(tx: optax.GradientTransformation) -> tuple[Any, ...]:
        return params, rest, jax.eval_shape(tx.init, params), batch

    def alone(tx: optax.GradientTransformation) -> tuple[Any, ...]:
        return params, jax.eval_shape(tx.init, params), params

    train = functools.partial(network.training_step, model)
    return {
        "forward, backward, optimizer": Case(network.INNER, train, whole),
        "the optimizer alone": Case(network.INNER, step.update, alone),
    }


def _compile(function: Callable[..., Any], *args: Any) -> Seconds:
    wall, cpu = time.perf_counter(), time.process_time()
    jax.jit(function).lower(*args).compile()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)
