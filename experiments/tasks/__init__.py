"""What can be trained: a file each, or a file of yours.

A task's module has ``make(settings, mesh, data_dir) -> Task``, and where it has settings of its own
``Settings``, a subclass of :class:`experiments.engine.settings.Settings`.
"""

import contextlib
import importlib
import importlib.util
import pathlib
import sys
from typing import Any, NamedTuple

from absl import flags
from jax.sharding import Mesh

from experiments.engine import settings
from experiments.engine.settings import EpochSettings, Settings
from experiments.engine.task import Task

NAMES = ("images", "text")

flags.disclaim_key_flags()  # as in settings


class Kind(NamedTuple):
    """A task's module."""

    name: str
    settings: type[Settings]
    module: Any

    def make(self, config: Settings, mesh: Mesh, data_dir: str | None = None) -> Task:
        """The task that the settings name."""
        return self.module.make(config, mesh, data_dir)

    def from_flags(self, **given: Any) -> Settings:
        """Settings from the parsed flags; ``given`` stands in for flags left out."""
        return settings.from_flags(self.settings, task=self.name, **given)


def load(name: str) -> Kind:
    """Finds a task's module.

    Args:
      name: one of ``NAMES``, or the path of a file that ends in ``.py``.

    Raises:
      ValueError: there is no such task, or the file has no ``make``.
    """
    if name in NAMES:
        module: Any = importlib.import_module(f"experiments.tasks.{name}")
        return Kind(name, module.Settings, module)
    path = pathlib.Path(name)
    if path.suffix != ".py" or not path.exists():
        raise ValueError(f"--task={name}: give one of {', '.join(NAMES)}, or a file FILE.py.")
    spec = importlib.util.spec_from_file_location(f"task_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    if not hasattr(module, "make"):
        raise ValueError(f"--task={name}: the file has no make(settings, mesh, data_dir).")
    return Kind(path.stem, getattr(module, "Settings", EpochSettings), module)


def define_flags(argv: list[str], leave_out: tuple[str, ...] = (), default: str = "images") -> Kind:
    """Defines --task, --data_dir and the flags of the task that the command line names.

    Args:
      argv: the command line, from which --task is taken before all else.
      leave_out: settings that are no flags here.
      default: the task where none is named.
    """
    help_text = f"what to train: {', '.join(NAMES)}, or a file of yours, FILE.py"
    early = flags.FlagValues()
    flags.DEFINE_string("task", default, help_text, flag_values=early)
    with contextlib.suppress(flags.Error):  # told when all flags are read
        early(argv, known_only=True)
    flags.DEFINE_string("task", default, help_text)
    flags.DEFINE_string(
        "data_dir",
        None,
        "folder with data: of TFDS for images (default: ~/tensorflow_datasets), of text files for "
        "text (default: Python's own library)",
    )
    flags.DEFINE_alias("text_dir", "data_dir")
    with settings.errors_in_one_line():
        kind = load(str(early["task"].value))
    settings.define_flags(kind.settings, leave_out)
    return kind
