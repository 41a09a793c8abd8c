"""Whole steps of the language model."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmarks import timing
from experiments.benchmarks.tables import Table
from experiments.data.text import Text
from experiments.engine import mesh, optimizers, training
from experiments.tasks import text

LETTERS = np.random.default_rng(0).integers(97, 122, 100_000, dtype=np.uint8)
SPARSITY = 0.8


class Stepper(NamedTuple):
    """A model in training."""

    run: Callable[[], Any]  # trains it one step further
    held: Callable[[], Any]  # parameters, and the state of the optimizer


def tables(quick: bool) -> list[Table]:
    """Dense, under masks, and by blocks, which all multiply alike or save what is off."""
    size, windows, context, side, rounds = ("100m", 32, 256, 64, 5)
    if quick:
        size, windows, context, side, rounds = ("1m", 8, 8, 16, 1)
    config = text.Settings(
        method="rigl",
        size=size,
        sparsity=SPARSITY,
        batch_size=windows,
        context=context,
        precision="bf16",
    )
    structure = f"block:{side}x{side}"
    blocks = dataclasses.replace(config, structure=structure)
    kernel = dataclasses.replace(blocks, block_kernel=True)
    calls = {
        "dense": dense(config).run,
        "masked": sparse(config).run,
        f"masked, {structure}": sparse(blocks).run,
        f"{structure}, --block_kernel": sparse(kernel).run,
    }
    for call in calls.values():
        call()  # once more than the warm-up: the first result lies otherwise than what was given
    times = timing.in_turns(calls, rounds)
    tokens = windows * context
    rows = [
        {
            "step": name,
            "ms": timing.ms(m.median),
            "bytes/s": f"{tokens / m.median:,.0f}",
            "times faster than dense": f"{times['dense'].median / m.median:.2f}",
            "quartiles": timing.quartiles(timing.ratios(times["dense"], m)),
        }
        for name, m in times.items()
    ]
    note = (
        f"--size={size} --batch_size={windows} --precision=bf16, RigL at {SPARSITY:.0%}: whole "
        "steps without an event, which is inside the program of all but the dense one (plain "
        "AdamW, clipping)."
    )
    return [Table("Steps of the language model", rows, note)]


def dense(config: text.Settings) -> Stepper:
    """A dense model, and the optimizer alone."""
    trainer, batch = _make(dataclasses.replace(config, method="dense"))
    tx = optimizers.inner(config, trainer.length)
    params = trainer.init(0).params
    held = params, tx.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, key: jax.Array) -> Any:
        loss = trainer.setup.task.loss
        grads = jax.grad(loss, has_aux=True)(params, {}, batch(key), key)[0]
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def run() -> Any:
        nonlocal held
        held = step(*held, jax.random.key(1))
        return held

    return Stepper(run, lambda: held)


def sparse(config: text.Settings) -> Stepper:
    """A model under the method of the settings, between its events."""
    trainer, batch = _make(config)
    event = False if trainer.family.two_programs else None
    step = jax.jit(lambda state: trainer.step(state, batch(state.key), event), donate_argnums=0)
    state = trainer.init(0)

    def run() -> Any:
        nonlocal state
        state, loss = step(state)
        return loss

    return Stepper(run, lambda: (state.params, state.opt_state))


def _make(config: text.Settings) -> tuple[training.Trainer, Callable[..., Any]]:
    """A trainer, and what draws a batch by a key."""
    devices = mesh.make()
    task = text.task(config, devices, Text(LETTERS, LETTERS))
    held = jnp.asarray(LETTERS)

    def batch(key: jax.Array) -> jax.Array:
        return text.draw_windows(key, held, config.batch_size, config.context + 1)

    return training.make_trainer(config, task, devices), batch
