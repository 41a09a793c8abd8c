"""A run in a folder: goes on where it was stopped, and leaves all that people look at.

The folder holds settings.json, about.json (commands, versions, layers), metrics.jsonl (a line for
each epoch), checkpoints/, masks.npz, tensorboard/ (where tensorboardX is installed) and
report.html.
"""

import contextlib
import dataclasses
import importlib.util
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

import granet_jax as gj
from experiments.engine import checkpoints, distributed, files, page, records, settings, weights
from experiments.engine.records import Epoch, masks_of
from experiments.engine.training import State, Trainer

flags.disclaim_key_flags()  # as in settings


class Result(NamedTuple):
    """What a run leaves behind."""

    state: State  # after the last epoch
    weights: Any  # what the network uses at the end, zeros where masked
    masks: Any  # numpy, whole in each process
    history: list[files.Record]  # one record for each epoch
    shortfall: str = ""  # what was asked for and not got, in one line


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
    trainer: Trainer,
    out_dir: str | pathlib.Path,
    *,
    resume: bool = True,
    checkpoint_seconds: float = 60.0,
    show: Callable[[files.Record], None] = lambda record: None,
) -> Result:
    """Trains to the end, from the last checkpoint if there is one.

    A run that was stopped at any moment, even by ``kill -9``, and goes on, ends with the same bits
    as one straight through, on the same mesh in as many processes (on GPUs, as far as XLA's kernels
    give the same bits twice).

    Args:
      trainer: what to train; its settings tell the seed.
      out_dir: the run's folder; made if missing.
      resume: False = a folder that holds a run is an error.
      checkpoint_seconds: a checkpoint is written after the first chunk of steps that ends this long
        after the last one, by the clock of process 0, and at the end.
      show: called with the record of each epoch, in process 0.

    Returns:
      The last state and the records of all epochs.

    Raises:
      ValueError: the folder holds a run of other settings or on other data.
      Diverged: the message says at which step; checkpoints from before it stay.
    """
    config, out_dir = trainer.settings, pathlib.Path(out_dir)
    written = dataclasses.asdict(config)
    with (
        files.opened(out_dir, written, resume, settings.defaults(type(config), written)),
        checkpoints.open_manager(out_dir / "checkpoints") as manager,
    ):
        files.check_data(out_dir, trainer.facts)
        stream = trainer.open_stream(config.seed)
        state, epoch = _start(trainer, manager, stream)
        history = files.rewind(out_dir, int(state.step), trainer.length.epoch_steps)
        files.write_about(out_dir, records.layers(trainer), trainer.facts, trainer.told)
        try:
            with _logger(out_dir, history, show) as log:
                going = _Going(trainer, manager, stream, history, checkpoint_seconds, log)
                state = _train(going, state, epoch)
            shortfall = records.shortfall(trainer, state, history[-1])
            files.note_shortfall(out_dir, shortfall)
        finally:
            if jax.process_index() == 0 and files.read_history(out_dir):
                page.write(out_dir / "report.html", {config.method: [out_dir]})
        masks = whole(masks_of(trainer, state))
        files.write_masks(out_dir, masks)
    dense = trainer.family.weights(state.params, state.opt_state)
    return Result(state, dense, masks, history, shortfall)


def whole(tree: Any) -> Any:
    """Numpy arrays in each process, however the tree is spread over devices; leaf by leaf."""
    return jax.tree.map(
        lambda x: np.asarray(multihost_utils.process_allgather(x, tiled=True)), tree
    )


def _start(trainer: Trainer, manager: Any, stream: Any) -> tuple[State, Epoch]:
    """The last checkpoint, or the beginning."""
    step = manager.latest_step()
    if step is None:
        return trainer.init(trainer.settings.seed), Epoch()
    needed: dict[str, Sequence[str]] = {"stream": ()} if stream else {}
    if step % trainer.length.epoch_steps:
        needed["epoch"] = Epoch._fields
    state, notes = _restore(trainer, manager, step, needed)
    if stream:
        stream.set_state(notes["stream"])
    summed = (notes["epoch"][name] for name in needed.get("epoch", ()))
    return state, Epoch(*summed)


def newest(trainer: Trainer, run_dir: pathlib.Path) -> State:
    """The newest state of a run.

    Raises:
      ValueError: the run has no checkpoint, or one of another model.
    """
    if not (run_dir / "checkpoints").exists():
        raise ValueError(f"--run_dir={run_dir} has no checkpoint.")
    with checkpoints.open_manager(run_dir / "checkpoints", read_only=True) as manager:
        step = manager.latest_step()
        if step is None:
            raise ValueError(f"--run_dir={run_dir} has no checkpoint.")
        state, _ = _restore(trainer, manager, step, {})
    return state


def _restore(
    trainer: Trainer, manager: Any, step: int, needed: Mapping[str, Sequence[str]]
) -> tuple[State, dict[str, Any]]:
    """State and notes; the lists of live weights are made for the kernels of this machine."""
    example = _portable(trainer.abstract_state)
    slots = trainer.setup.slots
    if slots is None:
        return checkpoints.restore(manager, step, example, needed)
    example = weights.with_capacity(example, checkpoints.shapes(manager, step))
    state, notes = checkpoints.restore(manager, step, example, needed)
    return gj.compact.relist(state, slots.kernels), notes


def _portable(state: State) -> State:
    """As it is written: without the lists of live weights, which differ from machine to machine."""
    return gj.compact.relist(state, kernels=False)


class _Going(NamedTuple):
    """What stays the same while a run goes on."""

    trainer: Trainer
    manager: Any
    stream: Any
    history: list[files.Record]
    checkpoint_seconds: float
    log: Callable[[files.Record], None]


def _train(going: _Going, state: State, epoch: Epoch) -> State:
    """Runs chunk after chunk of steps; adds to the history and logs at the end of each epoch."""
    trainer, manager, stream, history, checkpoint_seconds, log = going
    epoch_steps, told = trainer.length.epoch_steps, trainer.told
    chunk_steps = trainer.settings.chunk_steps or epoch_steps
    step, total_steps = int(state.step), trainer.length.steps
    best_unsaved: tuple[int, State, dict[str, Any], files.Record] | None = None
    saved_at = time.monotonic()
    while step < total_steps:
        num_steps = min(chunk_steps, epoch_steps - step % epoch_steps)
        state, epoch, measured = _chunk(going, state, epoch, num_steps)
        step += num_steps
        record = None
        if step % epoch_steps == 0:
            record = records.record(trainer, state, epoch, measured)
            epoch = Epoch()
            history.append(record)
            log(record)
        notes = {"epoch": epoch._asdict(), "stream": stream.get_state() if stream else None}
        if record and files.best(history, told) is record:
            best_unsaved = (step, jax.tree.map(jnp.copy, _portable(state)), notes, record)
        if step == total_steps or distributed.agree(
            time.monotonic() - saved_at >= checkpoint_seconds
        ):
            if best_unsaved:
                checkpoints.save(manager, *best_unsaved, told)
            checkpoints.save(manager, step, _portable(state), notes, record, told)
            best_unsaved, saved_at = None, time.monotonic()
    return state


def _chunk(
    going: _Going, state: State, epoch: Epoch, num_steps: int
) -> tuple[State, Epoch, dict[str, Any]]:
    """Some steps; nothing of them is written before they are known to be good."""
    trainer, step = going.trainer, int(state.step)
    old_masks = jax.tree.map(jnp.copy, masks_of(trainer, state))
    started = time.perf_counter()
    state, device_losses = trainer.run(state, going.stream, num_steps)
    losses = np.asarray(device_losses)
    seconds = time.perf_counter() - started
    measured = records.measure(trainer, old_masks, state)
    nonfinite = int(measured["nonfinite"])
    records.check_finite(losses, nonfinite, step, trainer.length.epoch_steps, going.manager)
    records.check_sparse(state, going.manager)
    if trainer.family.two_programs:
        state = weights.shrunk(state)
    return state, epoch.plus(losses, int(measured["grown"]), seconds), measured


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
