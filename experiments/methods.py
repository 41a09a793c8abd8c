"""The one table from the values of ``--method`` to methods of the library."""

from collections.abc import Callable
from typing import NamedTuple

import jax

import granet_jax as gj
from granet_jax.types import Distribution


class Plan(NamedTuple):
    """What a method needs to know of a run."""

    sparsity: float
    update_every: int
    prune_end_step: int
    total_steps: int
    key: jax.Array


class Regeneration(NamedTuple):
    """The share of live weights exchanged at an event: a cosine over the first part of training."""

    initial: float
    final: float
    until: float  # fraction of training

    def at(self, step: int, total_steps: int) -> float:
        """The share at a step; 0 after the last event."""
        last = int(self.until * total_steps)
        return float(gj.cosine(self.initial, self.final, last)(step)) if step <= last else 0.0


class Entry(NamedTuple):
    """A row of the table."""

    make: Callable[[Plan], gj.Method]
    regeneration: Regeneration = Regeneration(0.0, 0.0, 1.0)


RIGL = Regeneration(0.3, 0.0, 0.75)  # the defaults of the library, told for reports
ITOP = Regeneration(0.5, 0.005, 1.0)  # and GraNet's


def _granet(plan: Plan, initial_sparsity: float, scope: Distribution) -> gj.Method:
    return gj.granet(
        initial_sparsity=initial_sparsity,
        final_sparsity=plan.sparsity,
        end_step=plan.prune_end_step,
        update_every=plan.update_every,
        total_steps=plan.total_steps,
        initial_fraction=ITOP.initial,
        final_fraction=ITOP.final,
        scope=scope,
        key=plan.key,
    )


def _gmp(plan: Plan, scope: Distribution) -> gj.Method:
    gj.schedules.check_end(plan.update_every, plan.prune_end_step, plan.total_steps)
    return gj.gmp(
        final_sparsity=plan.sparsity,
        end_step=plan.prune_end_step,
        update_every=plan.update_every,
        scope=scope,
    )


def _dynamic(method: Callable[..., gj.Method], regeneration: Regeneration) -> Entry:
    def make(plan: Plan) -> gj.Method:
        return method(
            sparsity=plan.sparsity,
            update_every=plan.update_every,
            total_steps=plan.total_steps,
            last_step=int(regeneration.until * plan.total_steps),
            initial_fraction=regeneration.initial,
            final_fraction=regeneration.final,
            key=plan.key,
        )

    return Entry(make, regeneration)


METHODS: dict[str, Entry] = {
    "dense": Entry(lambda plan: gj.static(sparsity=0.0)),
    "static": Entry(lambda plan: gj.static(sparsity=plan.sparsity, key=plan.key)),
    "set": _dynamic(gj.set_, RIGL),
    "rigl": _dynamic(gj.rigl, RIGL),
    "set_itop": _dynamic(gj.set_, ITOP),
    "rigl_itop": _dynamic(gj.rigl, ITOP),
    "magnitude": Entry(lambda plan: gj.magnitude(sparsity=plan.sparsity, at=plan.prune_end_step)),
    "gmp": Entry(lambda plan: _gmp(plan, gj.global_ranking)),
    "gmp_uniform": Entry(lambda plan: _gmp(plan, gj.uniform)),
    "granet": Entry(lambda plan: _granet(plan, 0.0, gj.global_ranking), ITOP),
    "granet_st": Entry(lambda plan: _granet(plan, 0.5, gj.global_ranking), ITOP),
    "granet_uniform": Entry(lambda plan: _granet(plan, 0.0, gj.uniform), ITOP),
}
