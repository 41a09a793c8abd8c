"""What the engine trains: a task is one NamedTuple of pure functions and of data.

A batch is any tree of arrays whose first axis counts examples; parameters are any tree; variables
are what a network keeps besides (batch statistics), any tree, ``{}`` where there are none.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
from jax.sharding import PartitionSpec

import granet_jax as gj

Specs: TypeAlias = tuple[tuple[str, PartitionSpec], ...]


class Memory(NamedTuple):
    """Examples that fit into memory; each epoch goes through them in a new order."""

    arrays: Any  # a batch of all examples


class Streamed(NamedTuple):
    """Examples too many for memory."""

    size: int
    open: Callable[[int, int], Any]
    """(batch size over all processes, seed) -> this process's share of batches without end, an
    iterator with ``get_state`` and ``set_state``"""
    in_order: Callable[[int], Iterator[tuple[Any, Any]]]
    """batch size -> pairs of this process's share of a batch and bool ``(share,)``, where False
    marks padding; once through"""


class Drawn(NamedTuple):
    """Batches made of random numbers, from arrays that every device holds."""

    arrays: Any
    draw: Callable[[jax.Array, Any], Any]  # (key of the step, arrays) -> a batch
    epoch_steps: int  # after so many one evaluates


Source: TypeAlias = Memory | Streamed | Drawn


class Metric(NamedTuple):
    """A number by which networks are compared."""

    name: str  # records have it as SPLIT_NAME
    unit: str = ""
    higher_is_better: bool = True
    grain: float = 1.0  # a difference that matters; figures are linear below it

    def label(self, *words: str) -> str:
        """For an axis or a column: words of the split, the name, more words, the unit."""
        split, *more = words
        unit = f" ({self.unit})" if self.unit else ""
        return f"{split} {self.name.replace('_', ' ')}{''.join(more)}{unit}"

    @property
    def form(self) -> str:
        """How tables write it."""
        return "5.2f" if self.grain >= 1 else ".4f"

    @property
    def sign(self) -> int:
        """What makes larger better."""
        return 1 if self.higher_is_better else -1


class Unit(NamedTuple):
    """What speed counts."""

    name: str = "examples"
    in_example: int = 1


def _as_it_is(key: jax.Array, batch: Any) -> Any:
    return batch


def _whole_layers(structure: gj.trees.Structure | None) -> gj.trees.Rules:
    return () if structure is None else (("", structure),)


class Task(NamedTuple):
    """A network, its data, and what is measured.

    Attributes:
      init: key -> parameters and variables.
      loss: ``(parameters, variables, batch, key)`` -> the mean loss of a training batch, and the
        variables after it. The key is the step's, for dropout and the like.
      evaluate: ``(parameters, variables, batch)`` -> for each metric a float for each example.
      train: what to train on.
      held_out: what to evaluate on, by the name of the split. The first metric on "validation", or
        on the first split where there is no such, tells which epoch is the best.
      metrics: at least one.
      epochs: how often one evaluates.
      facts: JSON, by which other data are noticed; None = made of the arrays.
      forward: ``(parameters, variables, inputs)`` -> outputs; FLOPs are counted on it, and SynFlow
        sends ones through it. None = ``evaluate``, and no SynFlow.
      example: abstract inputs of ``forward``, one example; None = an example of ``train``.
      scored_loss: ``(parameters, variables, batch, temperature)`` -> the loss by which SNIP and
        GraSP prune; outputs are divided by the temperature. None = ``loss``, which has none.
      num_scored: examples that they are shown.
      augment: ``(key, batch)`` -> the batch as it is trained on.
      prunable: structure or None -> path rules.
      specs: how parameters are laid over a mesh with axes "fsdp" and "tensor": the first pattern
        found in the path decides. () = the largest axis that can be shared is, over "fsdp".
      loss_unit: what the loss is told in, and the factor from the function's.
      unit: what speed counts.
    """

    init: Callable[[jax.Array], tuple[Any, Any]]
    loss: Callable[..., tuple[jax.Array, Any]]
    evaluate: Callable[..., dict[str, jax.Array]]
    train: Source
    held_out: Mapping[str, Memory | Streamed]
    metrics: tuple[Metric, ...]
    epochs: int
    facts: dict[str, Any] | None = None
    forward: Callable[..., Any] | None = None
    example: Any = None
    scored_loss: Callable[..., jax.Array] | None = None
    num_scored: int = 128
    augment: Callable[[jax.Array, Any], Any] = _as_it_is
    prunable: Callable[[gj.trees.Structure | None], gj.trees.Rules] = _whole_layers
    specs: Specs = ()
    loss_unit: tuple[str, float] = ("", 1.0)
    unit: Unit = Unit()
    check_mesh: Callable[[Any], None] = lambda mesh: None  # raises a ValueError where it cannot be


class Told(NamedTuple):
    """What records, tables and pages need to know of a task; about.json holds it."""

    title: str
    metrics: tuple[Metric, ...]
    splits: tuple[str, ...]
    loss_label: str
    unit: str
    counts_units: bool  # records count units, for there are no passes over the data

    @property
    def chosen(self) -> str:
        """The split on which the best epoch is chosen."""
        return "validation" if "validation" in self.splits else self.splits[0]

    @property
    def shown(self) -> str:
        """The split that tables show: the test, where there is one."""
        return "test" if "test" in self.splits else self.splits[0]

    def score(self, record: Mapping[str, float]) -> float:
        """By which the best epoch is chosen, larger = better; NaN where the record lacks it."""
        return self.metrics[0].sign * record.get(self.key(self.chosen), math.nan)

    def key(self, split: str) -> str:
        """The name in the records of the first metric on a split."""
        return f"{split}_{self.metrics[0].name}"


def tell(title: str, task: Task) -> Told:
    """What about.json holds of a task."""
    unit = task.loss_unit[0]
    return Told(
        title,
        task.metrics,
        tuple(task.held_out),
        f"training loss ({unit})" if unit else "training loss",
        task.unit.name,
        isinstance(task.train, Drawn),
    )


def told_from_json(about: Mapping[str, Any], config: Mapping[str, Any]) -> Told:
    """What about.json tells of the task.

    Args:
      about: what it holds.
      config: what settings.json holds; folders from before there were other tasks hold images.
    """
    given = about.get("task")
    if given is None:
        title = f"{config.get('dataset')}, {config.get('model')}"
        held_out = [k.removesuffix("_images") for k in about.get("data", {"test_images": 0})]
        splits = tuple(name for name in ("test", "validation") if name in held_out) or ("test",)
        return Told(title, (ACCURACY,), splits, "training loss", "images", False)
    metrics = tuple(Metric(*metric) for metric in given["metrics"])
    return Told(**{**given, "metrics": metrics, "splits": tuple(given["splits"])})


ACCURACY = Metric("accuracy", "%")
