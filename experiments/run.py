"""A run in a folder: goes on where it was stopped, and leaves all that people look at.

The folder holds settings.json, about.json (commands, versions, layers), metrics.jsonl (a line for
each epoch), checkpoints/, tensorboard/ (where tensorboardX is installed) and report.html.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import granet_jax as gj
from experiments import (
    checkpoints,
    data,
    distributed,
    files,
    methods,
    optimizers,
    report,
    settings,
    training,
    weights,
)
from experiments.settings import Settings
from experiments.training import State, Trainer


class Result(NamedTuple):
    """What a run leaves behind."""

    state: State  # after the last epoch
    weights: Any  # what the network uses at the end, zeros where masked
    masks: Any
    history: list[files.Record]  # one record for each epoch
    shortfall: str = ""  # what was asked for and not got, in one line


def digest(tree: Any) -> str:
    """A sha256 over the bits of all arrays of a tree, in the order of its leaves."""
    hashed = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        hashed.update(np.asarray(leaf).tobytes())
    return hashed.hexdigest()


class Diverged(ArithmeticError):
    """A loss or a parameter is NaN or infinite, or a pruned weight is not 0."""


def define_flags() -> None:
    """Defines what does not change the result."""
    flags.DEFINE_boolean("resume", True, "go on with a run of the same settings in the folder")
    flags.DEFINE_float(
        "checkpoint_seconds", 60.0, "at least so long between checkpoints", lower_bound=0.0
    )


def from_flags() -> dict[str, Any]:
    """Those arguments of :func:`run`."""
    return {
        "resume": flags.FLAGS.resume,
        "checkpoint_seconds": flags.FLAGS.checkpoint_seconds,
    }


def run(
    config: Settings,
    dataset: data.Dataset,
    out_dir: str | pathlib.Path,
    model: nn.Module | None = None,
    *,
    resume: bool = True,
    checkpoint_seconds: float = 60.0,
    show: Callable[[files.Record], None] = lambda record: None,
) -> Result:
    """Trains to the end, from the last checkpoint if there is one.

    A run that was stopped at any moment, even by ``kill -9``, and goes on, ends with the same bits
    as one straight through, on as many devices in as many processes (on GPUs, as far as XLA's
    kernels give the same bits twice).

    Args:
      config: the settings.
      dataset: what to train and test on.
      out_dir: the run's folder; made if missing.
      model: a Flax module of your own, see :func:`experiments.training.make_trainer`.
      resume: False = a folder that holds a run is an error.
      checkpoint_seconds: a checkpoint is written after the first chunk of steps that ends this long
        after the last one, by the clock of process 0, and at the end.
      show: called with the record of each epoch, in process 0.

    Returns:
      The last state and the records of all epochs.

    Raises:
      ValueError: the settings do not fit, or the folder holds a run of other settings.
      Diverged: the message says at which step; checkpoints from before it stay.
    """
    trainer = training.make_trainer(config, dataset, model)
    return run_trainer(
        trainer,
        pathlib.Path(out_dir),
        resume=resume,
        checkpoint_seconds=checkpoint_seconds,
        show=show,
    )


def run_trainer(
    trainer: Trainer,
    out_dir: pathlib.Path,
    *,
    resume: bool,
    checkpoint_seconds: float,
    show: Callable[[files.Record], None],
) -> Result:
    """As :func:`run`, for a trainer that serves several seeds."""
    config = trainer.settings
    with (
        files.opened(
            out_dir, dataclasses.asdict(config), resume, settings.defaults(config.dataset)
        ),
        checkpoints.open_manager(out_dir / "checkpoints") as manager,
    ):
        files.check_data(out_dir, trainer.data_facts)
        stream = trainer.open_stream(config.seed)
        state, epoch = _start(trainer, manager, stream)
        history = files.rewind(out_dir, int(state.step), trainer.steps_per_epoch)
        files.write_about(out_dir, _layers(trainer, state), trainer.data_facts)
        try:
            with _logger(out_dir, history, show) as log:
                state = _train(
                    trainer, manager, state, stream, epoch, history, checkpoint_seconds, log
                )
            shortfall = _shortfall(trainer, state, history[-1])
            files.note_shortfall(out_dir, shortfall)
        finally:
            if jax.process_index() == 0 and files.read_history(out_dir):
                report.write(out_dir / "report.html", {config.method: [out_dir]})
    dense = trainer.family.weights(state.params, state.opt_state)
    return Result(state, dense, _masks(trainer, state), history, shortfall)


def _shortfall(trainer: Trainer, state: State, last: files.Record) -> str:
    """What was asked for and not got, in one line; "" where all is well."""
    config = trainer.settings
    if isinstance(state.opt_state, gj.reparam.PenaltyState):
        steered = optimizers.coefficient(config, trainer.steps_per_epoch)
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


def _layers(trainer: Trainer, state: State) -> list[dict[str, Any]]:
    """What there is to know of each leaf before training."""
    dense = jax.eval_shape(trainer.family.weights, state.params, state.opt_state)
    leaves = gj.trees.describe(dense, trainer.settings.prunable)
    return [
        {
            "path": leaf.path,
            "shape": list(leaf.shape),
            "weights": leaf.size,
            "prunable": leaf.prunable,
            "macs": cost.macs,
        }
        for leaf, cost in zip(leaves, trainer.costs.leaves, strict=True)
    ]


class _Epoch(NamedTuple):
    """What is summed up within an epoch."""

    steps: int = 0
    loss: float = 0.0
    grown: int = 0
    seconds: float = 0.0


def _start(trainer: Trainer, manager: Any, stream: Any) -> tuple[State, _Epoch]:
    """The last checkpoint, or the beginning."""
    step = manager.latest_step()
    if step is None:
        return trainer.init(trainer.settings.seed), _Epoch()
    needed: dict[str, Sequence[str]] = {"stream": ()} if stream else {}
    if step % trainer.steps_per_epoch:
        needed["epoch"] = _Epoch._fields
    example = trainer.abstract_state
    if trainer.family.two_programs:
        example = weights.with_capacity(example, checkpoints.shapes(manager, step))
    state, notes = checkpoints.restore(manager, step, example, needed)
    if stream:
        stream.set_state(notes["stream"])
    summed = (notes["epoch"][name] for name in needed.get("epoch", ()))
    return state, _Epoch(*summed)


def _train(
    trainer: Trainer,
    manager: Any,
    state: State,
    stream: Any,
    epoch: _Epoch,
    history: list[files.Record],
    checkpoint_seconds: float,
    log: Callable[[files.Record], None],
) -> State:
    """Runs chunk after chunk of steps; adds to the history and logs at the end of each epoch."""
    config, step = trainer.settings, int(state.step)
    chunk_steps = config.chunk_steps or trainer.steps_per_epoch
    total_steps = config.epochs * trainer.steps_per_epoch
    best_unsaved: tuple[Any, ...] | None = None
    saved_at = time.monotonic()
    while step < total_steps:
        num_steps = min(chunk_steps, trainer.steps_per_epoch - step % trainer.steps_per_epoch)
        old_masks = jax.tree.map(jnp.copy, _masks(trainer, state))
        started = time.perf_counter()
        state, device_losses = trainer.run(state, stream, num_steps)
        losses = np.asarray(device_losses)
        seconds = time.perf_counter() - started
        measured = _measure(trainer, old_masks, state)
        check_finite(losses, int(measured["nonfinite"]), step, manager, trainer.steps_per_epoch)
        check_sparse(state, manager)
        if trainer.family.two_programs:
            state = weights.shrunk(state)
        step += num_steps
        epoch = _Epoch(
            epoch.steps + num_steps,
            epoch.loss + float(losses.sum(dtype=np.float64)),
            epoch.grown + int(measured["grown"]),
            epoch.seconds + seconds,
        )
        record = None
        if step % trainer.steps_per_epoch == 0:
            record = _record(trainer, state, step, epoch, measured)
            epoch = _Epoch()
            history.append(record)
            log(record)
        notes = {"epoch": epoch._asdict(), "stream": stream.get_state() if stream else None}
        if record and files.best(history) is record:
            best_unsaved = (step, jax.tree.map(jnp.copy, state), notes, record)
        if step == total_steps or distributed.agree(
            time.monotonic() - saved_at >= checkpoint_seconds
        ):
            if best_unsaved:
                checkpoints.save(manager, *best_unsaved)
            checkpoints.save(manager, step, state, notes, record)
            best_unsaved, saved_at = None, time.monotonic()
    return state


def _record(
    trainer: Trainer, state: State, step: int, epoch: _Epoch, measured: dict[str, Any]
) -> files.Record:
    config = trainer.settings
    live = int(measured["live"])
    entry = methods.METHODS[config.method]
    schedule = optimizers.learning_rate(config, trainer.steps_per_epoch)
    return {
        "epoch": step // trainer.steps_per_epoch,
        "step": step,
        "loss": epoch.loss / epoch.steps,
        **{f"{name}_accuracy": value for name, value in trainer.evaluate(state).items()},
        "learning_rate": float(schedule(step - 1)),  # of the last update
        "sparsity": float(measured["sparsity"]),
        "live": live,
        "regeneration_fraction": entry.regeneration.at(
            step, config.epochs * trainer.steps_per_epoch
        ),
        "churn": epoch.grown / max(live, 1),
        "inference_flops": float(state.effort.ratio),
        "training_flops": gj.flops.training_ratio(
            training.mean_forward_ratio(state), entry.dense_gradients(config.update_every)
        ),
        "images_per_second": config.batch_size * epoch.steps / epoch.seconds,
        **{
            name: float(value)
            for name, value in measured.items()
            if name.startswith(("density/", "exploration"))
        },
    }


def _measure(trainer: Trainer, old_masks: Any, state: State) -> dict[str, Any]:
    explored = trainer.family.explored(state.opt_state)
    masks = _masks(trainer, state)
    return _numbers(trainer.settings.prunable, old_masks, masks, explored, state.params)


@functools.partial(jax.jit, static_argnums=0)
def _numbers(
    prunable: gj.trees.Rules, old_masks: Any, masks: Any, explored: Any, params: Any
) -> dict[str, Any]:
    def floats(tree: Any) -> Any:  # in place of the weights, of which shape and dtype matter
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), tree)

    numbers = {
        "sparsity": gj.metrics.sparsity(masks, floats(masks), prunable),
        "live": jnp.sum(gj.metrics.num_live(masks, floats(masks), prunable)),
        "grown": gj.metrics.num_grown(old_masks, masks),
        "nonfinite": gj.metrics.num_nonfinite(params),
        **_named("density", gj.metrics.densities(masks, floats(masks), prunable)),
    }
    if explored is not None:
        numbers["exploration"] = 1 - gj.metrics.sparsity(explored, floats(masks), prunable)
        numbers |= _named("exploration", gj.metrics.densities(explored, floats(masks), prunable))
    return numbers


def _masks(trainer: Trainer, state: State) -> Any:
    return trainer.family.masks(state.params, state.opt_state)


def _named(name: str, by_path: dict[str, Any]) -> dict[str, Any]:
    return {f"{name}/{path}": value for path, value in by_path.items()}


def check_finite(
    losses: np.ndarray, nonfinite: int, step: int, manager: Any, steps_per_epoch: int | None = None
) -> None:
    """Called before anything of a chunk of steps is written.

    Args:
      losses: of the chunk.
      nonfinite: how many parameters are NaN or infinite after it.
      step: before it.
      manager: of the checkpoints.
      steps_per_epoch: None = nothing is told of epochs.

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
        f"{what} at step {where}"
        + (f" (epoch {(where - 1) // steps_per_epoch + 1})" if steps_per_epoch else "")
        + f". {_last_good(manager)}Lower --learning_rate."
    )


def check_sparse(state: Any, manager: Any = None) -> None:
    """Called before anything of a chunk of steps is written.

    Args:
      state: after it; with fields ``step``, ``params`` and ``opt_state``.
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
        told = _last_good(manager) if manager else ""
        raise Diverged(f"at step {int(state.step)}: {told}{error}") from error


_num_odd = jax.jit(gj.check_sparse)


def _last_good(manager: Any) -> str:
    manager.wait_until_finished()
    kept = manager.latest_step()
    if kept is None:
        return "No checkpoint had been written. "
    return f"The last good checkpoint is of step {kept}. " if kept else ""


@contextlib.contextmanager
def _logger(
    out_dir: pathlib.Path, history: list[files.Record], show: Callable[[files.Record], None]
) -> Iterator[Callable[[files.Record], None]]:
    """Gives a function that writes a record to metrics.jsonl and event files, and shows it.

    Event files are written anew in each session, for a killed one may not have flushed its own.
    """
    if jax.process_index() != 0:
        yield lambda record: None
        return
    writer: Any = contextlib.nullcontext()
    if importlib.util.find_spec("tensorboardX"):
        from tensorboardX import SummaryWriter

        shutil.rmtree(out_dir / "tensorboard", ignore_errors=True)
        writer = SummaryWriter(str(out_dir / "tensorboard"))
    with writer as events:

        def write_events(record: files.Record) -> None:
            for name, value in record.items() if events else ():
                events.add_scalar(name, value, record["step"])

        def log(record: files.Record) -> None:
            files.append_record(out_dir, record)
            write_events(record)
            show(record)

        for record in history:
            write_events(record)
        yield log
