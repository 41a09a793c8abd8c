"""Optimizer steps without mask update, donated: time and memory beside the dense optimizer's."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import granet_jax as gj
from experiments.benchmarks import timing, weights
from experiments.benchmarks.tables import Table

SPARSITY = 0.9
NEVER = 10**6
OPTIMIZERS = {
    "SGD, momentum": optax.sgd(0.1, momentum=0.9),
    "AdamW": optax.adamw(1e-3),
}


class Stepper(NamedTuple):
    """One optimizer's step and the state it goes on from."""

    run: Callable[[], Any]  # does a step
    memory: Any  # what XLA says of it


def stepper(tx: optax.GradientTransformation, params: Any, grads: Any) -> Stepper:
    """Compiles a step that is donated a copy of ``params`` and all state."""
    carry = jax.tree.map(jnp.copy, params), tx.init(params)
    compiled = jax.jit(update(tx), donate_argnums=(0, 1)).lower(*carry, grads).compile()

    def run() -> Any:
        nonlocal carry
        carry = compiled(*carry, grads)
        return carry

    return Stepper(run, compiled.memory_analysis())


def update(tx: optax.GradientTransformation) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    """``(params, state, grads) -> (params, state)``."""

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def sparse(inner: optax.GradientTransformation, update_every: int) -> Any:
    """GraNet around an optimizer, sparse from the start."""
    method = gj.granet(
        initial_sparsity=SPARSITY,
        final_sparsity=SPARSITY,
        end_step=NEVER,
        update_every=update_every,
        total_steps=NEVER,
        key=jax.random.key(2),
    )
    return gj.sparsify(inner, method)


def tables(quick: bool) -> list[Table]:
    """A row for each optimizer."""
    shapes = weights.shapes(quick)
    params, grads = weights.random_tree(shapes, 0), weights.random_tree(shapes, 1)
    total = sum(x.size for x in jax.tree.leaves(params))
    rows = []
    for name, inner in OPTIMIZERS.items():
        variants = {"dense": inner, "again": inner, "sparse": sparse(inner, NEVER)}
        steppers = {key: stepper(tx, params, grads) for key, tx in variants.items()}
        runs = {key: stepper.run for key, stepper in steppers.items()}
        times = timing.in_turns(runs, rounds=5 if quick else 60)
        noise = timing.ratios(times["again"], times["dense"])
        slower = timing.ratios(times["sparse"], times["dense"])
        temporaries, peak = (
            (of(steppers["sparse"].memory) - of(steppers["dense"].memory)) / total
            for of in (lambda memory: memory.temp_size_in_bytes, _peak)
        )
        rows.append(
            {
                "optimizer": name,
                "dense (ms)": timing.ms(times["dense"].median),
                "sparse (ms)": timing.ms(times["sparse"].median),
                "sparse / dense": f"{times['sparse'].median / times['dense'].median:.2f}",
                "quartiles": timing.quartiles(slower),
                "dense / dense": f"{times['again'].median / times['dense'].median:.2f}",
                "its quartiles": timing.quartiles(noise),
                "more temporaries": f"{temporaries:.2f}",
                "more at the peak": f"{peak:.2f}",
            }
        )
    note = (
        f"{weights.described(shapes)}, sparsity {SPARSITY:.0%}; ratios are of medians, quartiles "
        "of the ratio in each round; dense / dense is the noise. Memory in bytes a weight above "
        "the dense step's, as XLA plans it, the branch that updates masks included; at the peak: "
        "arguments, results that take no argument's place, temporaries."
    )
    return [Table("Optimizer steps without mask update, donated", rows, note)]


def _peak(memory: Any) -> int:
    """Bytes of arguments, results and temporaries; XLA:CPU's own peak leaves these last out."""
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return int(memory.argument_size_in_bytes + results + memory.temp_size_in_bytes)
