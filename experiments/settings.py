"""What a run is: one dataclass, from which the absl flags are made."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

from absl import flags

from experiments import data, methods, models

flags.disclaim_key_flags()  # --help of the program that defines the flags shows them

# Where a flag is not given, its value comes from here: what suits the size of the data.
BY_DATASET = {
    "digits": {"epochs": 60, "batch_size": 32, "update_every": 40},
    "mnist": {"epochs": 20, "batch_size": 100, "update_every": 200},
}


def _flag(default: Any, text: str, **kwargs: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, **kwargs})


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that a run depends on; equal settings and seeds give equal results."""

    dataset: str = _flag(
        "digits",
        "what to train on; digits ships with scikit-learn, mnist is read from --data_dir",
        choices=list(data.DATASETS),
    )
    model: str = _flag("lenet_300_100", "the network", choices=list(models.MODELS))
    method: str = _flag(
        "granet",
        "how to train sparse; granet starts dense, granet_st starts from half of the weights",
        choices=list(methods.METHODS),
    )
    sparsity: float = _flag(0.98, "fraction of zeros among prunable weights at the end, in [0, 1)")
    epochs: int = _flag(0, "passes over the training data", low=1)
    batch_size: int = _flag(0, "images in a step", low=1)
    learning_rate: float = _flag(0.1, "of SGD; dropped x0.1 at 1/2 and at 3/4 of training", low=0)
    momentum: float = _flag(0.9, "Nesterov momentum of SGD", low=0)
    weight_decay: float = _flag(5e-4, "L2, added to the gradients of all parameters", low=0)
    update_every: int = _flag(0, "steps between mask updates (Delta T)", low=1)
    prune_until: float = _flag(
        0.5, "gradual pruning ends at this fraction of training", low=0, high=1
    )
    data_dir: str | None = _flag(None, "folder with TFDS data sets in array_record form")
    seed: int = _flag(0, "of the initial weights, the masks and the order of the data", low=0)


def define_flags(leave_out: tuple[str, ...] = ()) -> None:
    """Defines one absl flag for each setting."""
    for field in dataclasses.fields(Settings):
        if field.name in leave_out:
            continue
        meta = dict(field.metadata)
        text = meta.pop("help")
        default: Any = field.default
        if field.name in BY_DATASET["digits"]:
            default = None
            by_dataset = ", ".join(f"{v[field.name]} for {k}" for k, v in BY_DATASET.items())
            text = f"{text} (default: {by_dataset})"
        if "choices" in meta:
            flags.DEFINE_enum(field.name, default, meta["choices"], text)
        elif field.type is int:
            flags.DEFINE_integer(field.name, default, text, lower_bound=meta["low"])
        elif field.type is float:
            flags.DEFINE_float(
                field.name, default, text, lower_bound=meta.get("low"), upper_bound=meta.get("high")
            )
        else:
            flags.DEFINE_string(field.name, default, text)


def from_flags(**given: Any) -> Settings:
    """Settings from the parsed flags; ``given`` stands in for flags left out."""
    values = dict(given)
    for field in dataclasses.fields(Settings):
        if field.name not in values:
            value = flags.FLAGS[field.name].value
            if value is None:
                value = BY_DATASET[flags.FLAGS.dataset].get(field.name)
            values[field.name] = value
    return Settings(**values)


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Ends the program with one line where settings or data are wrong, or training fails."""
    try:
        yield
    except (ValueError, OSError, ArithmeticError) as error:
        message = " ".join(str(error).split())
        sys.exit(f"error: {message}")
