"""What sparsity adds to a whole training step."""

import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax

from experiments.benchmarks import network, step, timing
from experiments.benchmarks.tables import Table

EVERY = 100  # steps between mask updates
IMAGE = (32, 32, 3)


def tables(quick: bool) -> list[Table]:
    """The optimizer's share on ResNet-20, and images a second on ResNet-50."""
    return [share(quick), speed(quick)]


def share(quick: bool) -> Table:
    """Optimizer steps are measured by themselves: in whole steps their difference is lost."""
    name, size = ("lenet5", 2) if quick else ("resnet20", 128)
    model = network.make(name)
    init = functools.partial(network.init, model, IMAGE)
    params, _ = jax.jit(init)(jax.random.key(0))
    grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(1), p.shape), params)
    variants = {
        "dense optimizer step": network.INNER,
        "sparse, without mask update": step.sparse(network.INNER, step.NEVER),
        "sparse, with mask update": step.sparse(network.INNER, 1),
    }
    runs = {key: step.stepper(tx, params, grads).run for key, tx in variants.items()}
    times = timing.in_turns(runs, rounds=5 if quick else 100)
    dense, quiet, event = times.values()
    added = [
        ((EVERY - 1) * q + e) / EVERY - d
        for d, q, e in zip(dense.seconds, quiet.seconds, event.seconds, strict=True)
    ]
    train = _trainer(name, network.INNER, size, steps=1)
    whole = timing.in_turns({"dense": train}, rounds=2 if quick else 7)["dense"]
    seconds = {key: m.seconds for key, m in times.items()} | {
        "dense training step, whole": whole.seconds,
        f"sparsity adds, a mask update every {EVERY} steps": added,
    }
    rows = [
        {
            "what": key,
            "ms": timing.ms(statistics.median(values)),
            "quartiles": timing.quartiles(values, timing.ms),
            "% of the whole step": f"{100 * statistics.median(values) / whole.median:.2f}",
        }
        for key, values in seconds.items()
    ]
    note = (
        f"{name}, batch {size}, random images {IMAGE[0]}x{IMAGE[1]}, SGD with momentum. Optimizer "
        "steps are donated and take turns."
    )
    return Table("What sparsity adds to a training step", rows, note)


def speed(quick: bool) -> Table:
    """Images a second through the whole step; on CPU it would take minutes."""
    name, size, steps = ("lenet5", 2, 1) if quick else ("resnet50_cifar", 128, 10)
    variants = {"dense": network.INNER, "sparse": step.sparse(network.INNER, step.NEVER)}
    title = f"Images a second, {name}"
    note = f"Batch {size}, float32, images 32x32, {steps} steps in a call, no mask update."
    if jax.default_backend() == "cpu" and not quick:
        rows = [{"step": key, "images/s": "not measured"} for key in variants]
        return Table(title, rows, f"{note} On CPU it would take minutes.")
    runs = {key: _trainer(name, tx, size, steps) for key, tx in variants.items()}
    times = timing.in_turns(runs, rounds=9)
    slower = timing.ratios(times["sparse"], times["dense"])
    rows = [
        {
            "step": key,
            "images/s": f"{steps * size / m.median:,.0f}",
            "time over dense": f"{m.median / times['dense'].median:.3f}",
            "quartiles": timing.quartiles(slower, "{:.3f}".format) if key == "sparse" else "",
        }
        for key, m in times.items()
    ]
    return Table(title, rows, note)


def _trainer(name: str, tx: Any, size: int, steps: int) -> Callable[[], Any]:
    """A call that trains some steps further."""
    model = network.make(name)
    params, rest = jax.jit(functools.partial(network.init, model, IMAGE))(jax.random.key(0))
    carry = params, rest, tx.init(params)
    batch = network.batch(size, IMAGE)
    train = jax.jit(network.training_step(model, tx), donate_argnums=(0, 1, 2))

    def run() -> Any:
        nonlocal carry
        for _ in range(steps):
            carry = train(*carry, batch)
        return carry

    return run
