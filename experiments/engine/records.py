"""The numbers of an epoch, and what stops a run."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import granet_jax as gj
from experiments.engine import methods, optimizers, training
from experiments.engine.files import Record
from experiments.engine.training import State, Trainer


class Diverged(ArithmeticError):
    """A loss or a parameter is NaN or infinite, or a pruned weight is not 0."""


class Epoch(NamedTuple):
    """What is summed up within an epoch."""

    steps: int = 0
    loss: float = 0.0
    grown: int = 0
    seconds: float = 0.0

    def plus(self, losses: np.ndarray, grown: int, seconds: float) -> "Epoch":
        """With the steps of one more chunk."""
        return Epoch(
            self.steps + len(losses),
            self.loss + float(losses.sum(dtype=np.float64)),
            self.grown + grown,
            self.seconds + seconds,
        )


def masks_of(trainer: Trainer, state: State) -> Any:
    """The masks, wherever the method has them."""
    return trainer.family.masks(state.params, state.opt_state)


def record(trainer: Trainer, state: State, epoch: Epoch, measured: dict[str, Any]) -> Record:
    """What metrics.jsonl says of an epoch; the state is that at its end."""
    config, setup, step = trainer.settings, trainer.setup, int(state.step)
    live = int(measured["live"])
    entry = methods.METHODS[config.method]
    schedule = optimizers.learning_rate(config, trainer.length)
    unit = setup.task.unit
    in_step = config.batch_size * unit.in_example
    densities = {
        name.removeprefix("density/"): value
        for name, value in measured.items()
        if name.startswith("density/")
    }
    return {
        "epoch": step // trainer.length.epoch_steps,
        "step": step,
        **({unit.name: step * in_step} if trainer.told.counts_units else {}),
        "loss": epoch.loss / epoch.steps * setup.task.loss_unit[1],
        **trainer.evaluate(state),
        "learning_rate": float(schedule(step - 1)),  # of the last update
        "sparsity": float(measured["sparsity"]),
        "live": live,
        "regeneration_fraction": entry.regeneration.at(step, trainer.length.steps),
        "churn": epoch.grown / max(live, 1),
        "inference_flops": float(training.ratio(setup, densities)),
        "training_flops": gj.flops.training_ratio(
            training.mean_forward_ratio(state), entry.dense_gradients(config.update_every)
        ),
        f"{unit.name}_per_second": in_step * epoch.steps / epoch.seconds,
        **{
            name: float(value)
            for name, value in measured.items()
            if name.startswith(("density/", "exploration"))
        },
    }


def measure(trainer: Trainer, old_masks: Any, state: State) -> dict[str, Any]:
    """Numbers of the masks: how many live, where, and how many grew since ``old_masks``."""
    explored = trainer.family.explored(state.opt_state)
    masks = masks_of(trainer, state)
    return _numbers(trainer.setup.rules, old_masks, masks, explored, state.params)


@functools.partial(jax.jit, static_argnums=0)
def _numbers(
    prunable: gj.trees.Rules, old_masks: Any, masks: Any, explored: Any, params: Any
) -> dict[str, Any]:
    # In place of the weights, of which shape and dtype matter.
    floats = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), masks)
    numbers = {
        "sparsity": gj.metrics.sparsity(masks, floats, prunable),
        "live": jnp.sum(gj.metrics.num_live(masks, floats, prunable)),
        "grown": gj.metrics.num_grown(old_masks, masks),
        "nonfinite": gj.metrics.num_nonfinite(params),
        **_named("density", gj.metrics.densities(masks, floats, prunable)),
    }
    if explored is not None:
        numbers["exploration"] = 1 - gj.metrics.sparsity(explored, floats, prunable)
        numbers |= _named("exploration", gj.metrics.densities(explored, floats, prunable))
    return numbers


def _named(name: str, by_path: dict[str, Any]) -> dict[str, Any]:
    return {f"{name}/{path}": value for path, value in by_path.items()}


def layers(trainer: Trainer) -> list[dict[str, Any]]:
    """What there is to know of each leaf before training."""
    setup = trainer.setup
    leaves = gj.trees.describe(setup.abstract_params, setup.rules)
    return [
        {
            "path": leaf.path,
            "shape": list(leaf.shape),
            "weights": leaf.size,
            "prunable": leaf.prunable,
            "macs": cost.macs,
        }
        for leaf, cost in zip(leaves, setup.costs.leaves, strict=True)
    ]


def shortfall(trainer: Trainer, state: State, last: Record) -> str:
    """What was asked for and not got, in one line; "" where all is well."""
    config = trainer.settings
    if isinstance(state.opt_state, gj.reparam.PenaltyState):
        steered = optimizers.coefficient(config, trainer.length)
        if not isinstance(steered, gj.reparam.Controller):
            return ""
        return gj.reparam.shortfall(state.opt_state, steered)
    reached = last.get("sparsity", config.sparsity)
    if config.method == "dense" or abs(reached - config.sparsity) <= gj.reparam.MISSED:
        return ""
    return (
        f"Sparsity {reached:.4f} was reached, {config.sparsity:g} was asked for. With --structure="
        f"{config.structure} layers have few sparsities: choose smaller units, or ask for another."
    )


def check_finite(
    losses: np.ndarray, nonfinite: int, step: int, epoch_steps: int, manager: Any = None
) -> None:
    """Called before anything of a chunk of steps is written.

    Args:
      losses: of the chunk.
      nonfinite: how many parameters are NaN or infinite after it.
      step: before it.
      epoch_steps: steps of an epoch.
      manager: of the checkpoints; None = nothing is told of them.

    Raises:
      Diverged: a loss or a parameter is not finite.
    """
    finite = np.isfinite(losses)
    if finite.all() and not nonfinite:
        return
    what, where = f"{nonfinite:,} parameters are NaN or infinite", step + len(losses)
    if not finite.all():
        what, where = f"the loss is {losses[~finite][0]}", step + int(np.argmin(finite)) + 1
    raise Diverged(
        f"{what} at step {where} (epoch {(where - 1) // epoch_steps + 1}). {_last_good(manager)}"
        "Lower --learning_rate."
    )


def check_sparse(state: State, manager: Any = None) -> None:
    """Called before anything of a chunk of steps is written.

    Args:
      state: after it.
      manager: of the checkpoints; None = nothing is told of them.

    Raises:
      Diverged: a weight is not 0 though its mask is off; a fault of optimizer or method.
    """
    if isinstance(state.opt_state, gj.reparam.PenaltyState):
        return  # masks follow from the weights
    if isinstance(state.opt_state, gj.compact.CompactState):
        gj.compact.check(state.opt_state)
        return
    if not int(_num_odd(state.params, state.opt_state)):
        return
    try:
        gj.check_sparse(state.params, state.opt_state)
    except ValueError as error:
        raise Diverged(f"at step {int(state.step)}: {_last_good(manager)}{error}") from error


_num_odd = jax.jit(gj.check_sparse)


def _last_good(manager: Any) -> str:
    if manager is None:
        return ""
    manager.wait_until_finished()
    kept = manager.latest_step()
    if kept is None:
        return "No checkpoint had been written. "
    return f"The last good checkpoint is of step {kept}. " if kept else ""
