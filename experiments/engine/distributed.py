"""Several processes that train together: their flags, and what must come before all else."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

flags.disclaim_key_flags()  # as in settings


def define_flags(flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines what tells a process of the others; with none of it, it is alone."""
    to: dict[str, Any] = {"flag_values": flag_values}
    flags.DEFINE_string("coordinator", None, "of several processes: HOST:PORT of process 0", **to)
    flags.DEFINE_integer(
        "num_processes", None, "of several processes: how many", lower_bound=1, **to
    )
    flags.DEFINE_integer(
        "process_id", None, "of several processes: which this is", lower_bound=0, **to
    )
    flags.DEFINE_boolean(
        "distributed",
        False,
        "several processes on a cluster that JAX knows, such as Slurm's",
        **to,
    )


def start(flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """Meets the other processes that the flags tell of. To be called before JAX has devices.

    Raises:
      ValueError: flags are missing or contradict each other, or no cluster is found.
      OSError: the processes did not meet.
    """
    given: dict[str, Any] = {
        name: flag_values[name].value for name in ("coordinator", "num_processes", "process_id")
    }
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given) and not flag_values.distributed:
        return
    if missing and not flag_values.distributed:
        raise ValueError(
            f"several processes need --{', --'.join(given)}; missing: --{', --'.join(missing)}. "
            "On a cluster that JAX knows, --distributed alone does."
        )
    if not missing and given["process_id"] >= given["num_processes"]:
        raise ValueError(
            f"--process_id={given['process_id']} must be below "
            f"--num_processes={given['num_processes']}: processes count from 0."
        )
    try:
        jax.distributed.initialize(*given.values())
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"JAX finds no cluster ({error}) Pass --coordinator, --num_processes and --process_id."
        ) from error
    except RuntimeError as error:
        raise OSError(f"the processes did not meet: {error}") from error


def agree(value: bool) -> bool:
    """What process 0 thinks, on all."""
    return bool(multihost_utils.broadcast_one_to_all(np.array(value)))


def first(action: Callable[[], object]) -> None:
    """Process 0 acts while the others wait; where it fails, all do.

    Raises:
      ValueError: as ``action`` does.
      OSError: as ``action`` does.
    """
    error: Exception | None = None
    if jax.process_index() == 0:
        try:
            action()
        except (ValueError, OSError) as raised:
            error = raised
    if agree(error is not None):
        raise error or ValueError("process 0 does not start; it tells why.")
