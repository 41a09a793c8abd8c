"""The one table from the values of ``--method`` to methods of the library."""

from collections.abc import Callable
from typing import NamedTuple

import jax

import granet_jax as gj


class Plan(NamedTuple):
    """What a method needs to know of a run."""

    sparsity: float
    update_every: int
    prune_end_step: int
    total_steps: int
    key: jax.Array


def _granet(plan: Plan, initial_sparsity: float) -> gj.Method:
    return gj.granet(
        initial_sparsity=initial_sparsity,
        final_sparsity=plan.sparsity,
        end_step=plan.prune_end_step,
        update_every=plan.update_every,
        total_steps=plan.total_steps,
        key=plan.key,
    )


def _gmp(plan: Plan) -> gj.Method:
    gj.schedules.check_end(plan.update_every, plan.prune_end_step, plan.total_steps)
    return gj.gmp(
        final_sparsity=plan.sparsity,
        end_step=plan.prune_end_step,
        update_every=plan.update_every,
    )


def _dynamic(plan: Plan, method: Callable[..., gj.Method]) -> gj.Method:
    return method(
        sparsity=plan.sparsity,
        update_every=plan.update_every,
        total_steps=plan.total_steps,
        key=plan.key,
    )


METHODS: dict[str, Callable[[Plan], gj.Method]] = {
    "dense": lambda plan: gj.static(sparsity=0.0),
    "static": lambda plan: gj.static(sparsity=plan.sparsity, key=plan.key),
    "set": lambda plan: _dynamic(plan, gj.set_),
    "rigl": lambda plan: _dynamic(plan, gj.rigl),
    "magnitude": lambda plan: gj.magnitude(sparsity=plan.sparsity, at=plan.prune_end_step),
    "gmp": _gmp,
    "granet": lambda plan: _granet(plan, initial_sparsity=0.0),
    "granet_st": lambda plan: _granet(plan, initial_sparsity=0.5),
}
