"""Checkpoints of runs with Orbax: written in the background, the newest ones and the best kept."""

import pathlib
import types
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

import granet_jax as gj
from experiments.engine.task import Told

KEEP = 2  # newest, beside the best


def open_manager(folder: pathlib.Path, read_only: bool = False) -> ocp.CheckpointManager:
    """Opens or makes a folder of checkpoints; what a killed run left half-written is ignored.

    Args:
      folder: of the checkpoints.
      read_only: another process may write to it.
    """

    def rank(metrics: dict[str, float]) -> Any:
        """First by fewer weights, then by the score, which was an accuracy in runs of before."""
        return -metrics["live"], metrics.get("score", metrics.get("accuracy", 0.0))

    policy = checkpoint_managers.AnyPreservationPolicy(
        [
            checkpoint_managers.LatestN(KEEP),
            checkpoint_managers.BestN(
                get_metric_fn=rank, n=1, keep_checkpoints_without_metrics=False
            ),
        ]
    )
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policy,
        best_fn=rank,  # without it metrics are not written, and forgotten between sessions
        cleanup_tmp_directories=True,
        enable_async_checkpointing=True,
        read_only=read_only,  # removes nothing
    )
    handlers = {"state": ocp.StandardCheckpointHandler(), "notes": ocp.JsonCheckpointHandler()}
    return ocp.CheckpointManager(folder.absolute(), options=options, item_handlers=handlers)


def save(
    manager: ocp.CheckpointManager,
    step: int,
    state: Any,
    notes: dict[str, Any],
    record: dict[str, float] | None,
    told: Told | None = None,
) -> None:
    """Begins to write a checkpoint; the state may be donated at once.

    Args:
      manager: where to.
      step: number of updates done.
      state: tree of arrays.
      notes: JSON, what else is needed to go on.
      record: by which the best is kept, with live weights and metrics; None within an epoch.
      told: of the task, which metric decides; with a record.
    """
    if step in manager.all_steps():
        return  # just written as the best
    metrics = record and told and {"live": record["live"], "score": told.score(record)}
    manager.save(
        step,
        args=ocp.args.Composite(state=ocp.args.StandardSave(state), notes=ocp.args.JsonSave(notes)),
        metrics=metrics,
        force=True,
    )


def shapes(manager: ocp.CheckpointManager, step: int) -> Any:
    """What the checkpoint of a step tells of its state before anything is read, a tree.

    Raises:
      ValueError: it cannot be read.
    """
    where = manager.directory / str(step)
    try:
        return manager.item_metadata(step)["state"].tree
    except (AttributeError, KeyError, OSError) as error:
        raise ValueError(f"{where} cannot be read: {error!r}. {_OTHERWISE}") from error


def restore(
    manager: ocp.CheckpointManager,
    step: int,
    example: Any,
    needed: Mapping[str, Sequence[str]] = types.MappingProxyType({}),
) -> tuple[Any, dict[str, Any]]:
    """Reads the checkpoint of a step.

    Args:
      manager: where from.
      step: one of ``manager.all_steps()``.
      example: tree of ``ShapeDtypeStruct``s with shardings.
      needed: the notes without which nothing goes on, and the entries of each.

    Returns:
      State and notes.

    Raises:
      ValueError: the checkpoint holds the state of another model or version, or lacks a note.
    """
    where = manager.directory / str(step)
    try:
        saved = shapes(manager, step)
        _check(where, saved, jax.tree.map(_as_saved, example))  # before anything is read
        by_path = gj.trees.paths(example)
        wanted = jax.tree.unflatten(
            jax.tree.structure(saved), [by_path[path] for path in gj.trees.paths(saved)]
        )
        read = manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(wanted), notes=ocp.args.JsonRestore()
            ),
        )
    except (AttributeError, KeyError, OSError) as error:
        raise ValueError(f"{where} cannot be read: {error!r}. {_OTHERWISE}") from error
    notes = dict(read["notes"] or {})
    for name, entries in needed.items():
        found = notes.get(name, {})
        if name not in notes or any(entry not in found for entry in entries):
            raise ValueError(
                f"{where} notes {found} as {name}, where {', '.join(entries) or 'more'} is "
                f"expected. {_OTHERWISE}"
            )
    return _check(where, read["state"], example), notes


_OTHERWISE = "Or take the version that wrote it, or another --out_dir."


def _check(where: pathlib.Path, restored: Any, example: Any) -> Any:
    try:
        return gj.check_restored(restored, example)
    except ValueError as error:
        raise ValueError(f"{where}: {error} {_OTHERWISE}") from error


def _as_saved(leaf: Any) -> Any:
    is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.eval_shape(jax.random.key_data, leaf) if is_key else leaf
