"""A run of a language model in a folder: goes on where it was stopped, ends with its masks.

The folder holds settings.json, about.json (commands, versions, layers), metrics.jsonl (a line for
each evaluation), checkpoints/ and, at the end, masks.npz.
"""

import math
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

import granet_jax as gj
from experiments import checkpoints, distributed, files, lm_training, methods, text, weights
from experiments.lm_training import State, Trainer
from experiments.run import check_finite, check_sparse


class Result(NamedTuple):
    """What a run leaves behind."""

    state: Any  # a State
    masks: Any  # numpy, whole on each process
    history: list[files.Record]  # one record for each evaluation


def run(
    trainer: Trainer,
    data: text.Text,
    out_dir: pathlib.Path,
    *,
    resume: bool = True,
    checkpoint_seconds: float = 60.0,
    stop_at: int | None = None,
    show: Callable[[files.Record], None] = lambda record: None,
) -> Result:
    """Trains to the end, from the last checkpoint if there is one.

    A run that was stopped at any moment and goes on ends with the same bits as one straight
    through, on the same mesh.

    Args:
      trainer: what to train.
      data: the text.
      out_dir: the run's folder; made if missing.
      resume: False = a folder that holds a run is an error.
      checkpoint_seconds: a checkpoint is written after the first evaluation that ends this long
        after the last one, and at the end.
      stop_at: step after which to return early, with a checkpoint; None = at the end.
      show: called with the record of each evaluation.

    Raises:
      ValueError: the text is too short, or the folder holds a run of other settings or text.
      Diverged: the message says at which step; checkpoints from before it stay.
    """
    config = trainer.config
    num = lm_training.num_validation_windows(config)

    def masks_of(state: State) -> Any:
        return trainer.family.masks(state.params, state.opt_state)

    text.check_length(data, config.context + 1)
    with (
        files.opened(out_dir, config._asdict(), resume, config._field_defaults),
        checkpoints.open_manager(out_dir / "checkpoints") as manager,
    ):
        facts = text.facts(data)
        files.check_data(out_dir, facts)
        train_text = trainer.place(data.train)
        windows = trainer.place(text.held_out_windows(data, num, config.context + 1))
        kept = manager.latest_step()
        spent = 0.0  # forward passes so far, in units of those of the dense network
        if kept is None:
            state = trainer.init()
        else:
            example = trainer.abstract_state
            if trainer.family.two_programs:
                example = weights.with_capacity(example, checkpoints.shapes(manager, kept))
            state, notes = checkpoints.restore(manager, kept, example, {"spent": ()})
            spent = notes["spent"]
        history = files.rewind(out_dir, kept or 0, config.eval_every)
        files.write_about(out_dir, _layers(trainer), facts)
        saved_at = time.monotonic()
        last_step = config.total_steps if stop_at is None else stop_at
        for step in range(int(state.step), last_step, config.eval_every):
            old_masks = jax.tree.map(jnp.copy, masks_of(state))
            started = time.perf_counter()
            state, log = trainer.chunk(state, train_text)
            losses = np.asarray(log.loss)
            seconds = time.perf_counter() - started
            measured = _numbers(old_masks, masks_of(state), state.params)
            check_finite(losses, int(measured["nonfinite"]), step, manager)
            check_sparse(state, manager)
            if trainer.family.two_programs:
                state = weights.shrunk(state)
            spent += float(np.asarray(log.forward).sum(dtype=np.float64))
            record = _record(trainer, state, losses, spent, seconds, measured)
            record["validation"] = trainer.evaluate(state, windows)
            history.append(record)
            files.append_record(out_dir, record)
            show(record)
            due = record["step"] >= last_step or time.monotonic() - saved_at >= checkpoint_seconds
            if distributed.agree(due):  # clocks differ
                checkpoints.save(manager, int(record["step"]), state, {"spent": spent}, None)
                saved_at = time.monotonic()
        masks = _whole(masks_of(state))
        if jax.process_index() == 0:
            _write_masks(out_dir / "masks.npz", masks)
    return Result(state, masks, history)


def _layers(trainer: Trainer) -> list[dict[str, Any]]:
    """What there is to know of each leaf before training."""
    leaves = gj.trees.describe(trainer.abstract_params, lm_training.PRUNABLE)
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


@jax.jit
def _numbers(old_masks: Any, masks: Any, params: Any) -> dict[str, jax.Array]:
    rules = lm_training.PRUNABLE
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), masks)
    return {
        "sparsity": gj.metrics.sparsity(masks, shapes, rules),
        "live": jnp.sum(gj.metrics.num_live(masks, shapes, rules)),
        "grown": gj.metrics.num_grown(old_masks, masks),
        "nonfinite": gj.metrics.num_nonfinite(params),
    }


def _record(
    trainer: Trainer,
    state: State,
    losses: np.ndarray,
    spent: float,
    seconds: float,
    measured: dict[str, jax.Array],
) -> files.Record:
    """Numbers of one chunk; losses in bits for each byte."""
    config, step = trainer.config, int(state.step)
    bytes_in_step = config.batch_size * config.context
    entry = methods.METHODS[config.method]
    return {
        "step": step,
        "bytes": step * bytes_in_step,
        "loss": float(losses.mean(dtype=np.float64)) / math.log(2),
        "learning_rate": float(lm_training.learning_rate(config)(step - 1)),
        "sparsity": float(measured["sparsity"]),
        "live": int(measured["live"]),
        "churn": int(measured["grown"]) / max(int(measured["live"]), 1),
        "inference_flops": float(state.forward),
        "training_flops": gj.flops.training_ratio(
            spent / step, entry.dense_gradients(config.update_every)
        ),
        "bytes_per_second": len(losses) * bytes_in_step / seconds,
    }


def _whole(tree: Any) -> Any:
    """Numpy arrays on each process, however the tree is spread over devices; leaf by leaf."""
    return jax.tree.map(
        lambda x: np.asarray(multihost_utils.process_allgather(x, tiled=True)), tree
    )


def _write_masks(path: pathlib.Path, masks: Any) -> None:
    """The bits of each mask by its path; a byte holds eight."""
    flat = gj.trees.by_path(masks)
    packed: dict[str, Any] = {"/".join(words): np.packbits(x) for words, x in flat.items()}
    np.savez(path, **packed)


def read_masks(path: pathlib.Path, like: Any) -> Any:
    """The masks of a finished run.

    Args:
      path: its masks.npz.
      like: tree of arrays or ``ShapeDtypeStruct``s of the masks' shapes.

    Raises:
      ValueError: there are none, or they are of another network.
    """
    if not path.exists():
        raise ValueError(f"--reference: there is no {path}; name the --out_dir of a finished run.")
    wanted = gj.trees.by_path(like)
    with np.load(path) as packed:
        held = {name: packed[name] for name in packed.files}
    masks = []
    for words, leaf in wanted.items():
        bits = held.get("/".join(words))
        if bits is None or bits.size != -(-leaf.size // 8):
            raise ValueError(f"--reference: {path} holds the masks of another network.")
        masks.append(np.unpackbits(bits, count=leaf.size).reshape(leaf.shape).astype(bool))
    return jax.tree.unflatten(jax.tree.structure(like), masks)


def agreement(masks: Any, others: Any) -> tuple[float, float]:
    """Share of the live weights that are live in other masks too, and what chance would give.

    By chance: masks with the same number of live weights in each layer, drawn without regard to
    each other.

    Example:
      >>> import numpy as np
      >>> a = {"blocks": {"kernel": np.array([[[True, True], [False, False]]])}}
      >>> b = {"blocks": {"kernel": np.array([[[True, False], [True, False]]])}}
      >>> agreement(a, b)
      (0.5, 0.5)
    """
    leaves = gj.trees.describe(
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), masks),
        lm_training.PRUNABLE,
    )
    shared = expected = live = 0.0
    pairs = zip(leaves, jax.tree.leaves(masks), jax.tree.leaves(others), strict=True)
    for leaf, mask, other in pairs:
        if leaf.prunable:
            mine, theirs = (x.reshape(leaf.num_layers, -1) for x in (mask, other))
            shared += float((mine & theirs).sum())
            expected += float((mine.sum(1) * theirs.mean(1)).sum())
            live += float(mine.sum())
    return shared / max(live, 1.0), expected / max(live, 1.0)
