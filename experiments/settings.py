"""What a run is: one dataclass, from which the absl flags are made."""

import contextlib
import dataclasses
import math
import sys
from collections.abc import Iterator
from typing import Any

from absl import flags

from experiments import augment, data, methods, models

flags.disclaim_key_flags()  # --help of the program that defines the flags shows them

# Where a flag is not given, its value comes from here: what suits the data.
_CIFAR = {"model": "resnet20", "epochs": 160, "batch_size": 128, "update_every": 1000}
BY_DATASET: dict[str, dict[str, Any]] = {
    "digits": {"model": "lenet_300_100", "epochs": 60, "batch_size": 32, "update_every": 40},
    "mnist": {"model": "lenet_300_100", "epochs": 20, "batch_size": 100, "update_every": 200},
    "cifar10": {**_CIFAR, "augment": "reflect"},
    "cifar100": {**_CIFAR, "augment": "zero"},
    "imagenet2012": {
        "model": "resnet50",
        "epochs": 100,
        "batch_size": 128,
        "update_every": 4000,
        "chunk_steps": 500,
    },
}
OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("steps", "cosine")


def _flag(text: str, default: Any = dataclasses.MISSING, **kwargs: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, **kwargs})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """All that a run depends on; equal settings on as many devices give equal results, bit by bit.

    Made from flags, ``dataset`` and ``model`` are names of tables; made by hand, any names.
    """

    dataset: str = _flag(
        "what to train on; digits ships with scikit-learn, others are read from --data_dir",
        choices=list(data.DATASETS),
    )
    model: str = _flag("the network", choices=list(models.MODELS))
    init: str = _flag(
        "initial weights: the model's own, or uniform within 1 / sqrt(fan-in) as PyTorch's",
        "own",
        choices=["own", "uniform"],
    )
    normalise: bool = _flag("inputs of mean 0 and deviation 1, instead of within [0, 1]", True)
    method: str = _flag(
        "how to train sparse; granet starts dense, granet_st starts from half of the weights",
        "granet",
        choices=list(methods.METHODS),
    )
    sparsity: float = _flag("fraction of zeros among prunable weights at the end, in [0, 1)", 0.98)
    epochs: int = _flag("passes over the training data", low=1)
    batch_size: int = _flag("images in a step, over all devices", low=1)
    update_every: int = _flag("steps between mask updates (Delta T)", low=1)
    dense_layers: tuple[str, ...] = _flag(
        "patterns of paths of weights that are never pruned, as in ^fc3/", ()
    )
    structure: str = _flag(
        "how weights are grouped: none; N:M as in 2:4, with the sparsity that it has; block:RxC; "
        "fan_in or fan_in:ABLATION. Layers get equal sparsities then, and gradual methods have "
        "to, as granet_uniform",
        "none",
    )
    block_kernel: bool = _flag(
        "dense layers multiply only by the blocks that are on, in training, too; with "
        "--structure=block:RxC on one GPU (elsewhere simulated, slowly)",
        False,
    )
    compact: bool = _flag(
        "train live weights alone: time and memory are theirs; for methods that look at dense "
        "gradients at mask updates only",
        False,
    )
    prune_until: float = _flag(
        "gradual pruning ends at this fraction of training", 0.5, low=0, high=1
    )
    penalty: float = _flag(
        "coefficient of the penalty of dst and str; -1: steered so that --sparsity is met",
        -1.0,
        low=-1,
    )
    initial_threshold: float = _flag("of str, before its sigmoid", -10.0)
    optimizer: str = _flag("the optimizer inside", "sgd", choices=list(OPTIMIZERS))
    learning_rate: float = _flag("peak learning rate", 0.1, low=0)
    schedule: str = _flag(
        "the learning rate falls in steps, or as a cosine to 0", "steps", choices=list(SCHEDULES)
    )
    drop_at: tuple[float, ...] = _flag(
        "with --schedule=steps: fractions of training after which the learning rate drops",
        (0.5, 0.75),
    )
    drop_factor: float = _flag("what a drop multiplies the learning rate with", 0.1, low=0)
    warmup_epochs: float = _flag("epochs in which the learning rate rises from 0", 0.0, low=0)
    momentum: float = _flag("of SGD", 0.9, low=0)
    nesterov: bool = _flag("whether the momentum of SGD is Nesterov's", True)
    weight_decay: float = _flag("of SGD: L2 in the gradients; of AdamW: decoupled", 5e-4, low=0)
    decay_all: bool = _flag("whether biases and batch norm decay as well", True)
    label_smoothing: float = _flag("share of the label spread over all classes", 0.0, low=0, high=1)
    augment: str = _flag(
        "pad by 4 pixels (reflect or zero), crop at random and mirror; or none",
        "none",
        choices=list(augment.AUGMENTATIONS),
    )
    validation: int = _flag(
        "training images held out; with them the best epoch is chosen on these", 0, low=0
    )
    precision: str = _flag(
        "of the arithmetic in the model; parameters, moments and rankings are f32 in both",
        "f32",
        choices=["f32", "bf16"],
    )
    chunk_steps: int = _flag(
        "steps run at once, after which a checkpoint can be written (0: an epoch)", 0, low=0
    )
    seed: int = _flag("of the initial weights, the masks and the order of the data", 0, low=0)

    @property
    def prunable(self) -> tuple[tuple[str, Any], ...]:
        """The path rules for the library."""
        dense = tuple((pattern, False) for pattern in self.dense_layers)
        structure = methods.parse_structure(self.structure, self.sparsity)
        return dense if structure is None else (*dense, ("", structure))

    def __post_init__(self) -> None:
        methods.parse_structure(self.structure, self.sparsity)
        for field in dataclasses.fields(self):
            value, meta = getattr(self, field.name), field.metadata
            low, high = meta.get("low", -math.inf), meta.get("high", math.inf)
            if "low" in meta and not low <= value <= high:
                raise ValueError(f"{field.name} must be in [{low}, {high}]; got {value}.")
            named_freely = field.name in ("dataset", "model")
            if "choices" in meta and not named_freely and value not in meta["choices"]:
                choices = ", ".join(meta["choices"])
                raise ValueError(f"{field.name} must be one of {choices}; got {value!r}.")


def define_flags(
    leave_out: tuple[str, ...] = (), flag_values: flags.FlagValues = flags.FLAGS
) -> None:
    """Defines one absl flag for each setting, and --data_dir."""
    to: dict[str, Any] = {"flag_values": flag_values}
    for field in dataclasses.fields(Settings):
        if field.name in leave_out:
            continue
        meta = dict(field.metadata)
        text = meta.pop("help")
        default = _default(field)
        if by_dataset := {k: v[field.name] for k, v in BY_DATASET.items() if field.name in v}:
            default = None
            listed = ", ".join(f"{v} for {k}" for k, v in by_dataset.items())
            text = f"{text} (default: {listed})"
        if field.name == "dataset":
            default = "digits"
        if "choices" in meta:
            flags.DEFINE_enum(field.name, default, meta["choices"], text, **to)
        elif field.type is str:
            flags.DEFINE_string(field.name, default, text, **to)
        elif field.type is bool:
            flags.DEFINE_boolean(field.name, default, text, **to)
        elif field.type is int:
            flags.DEFINE_integer(field.name, default, text, lower_bound=meta["low"], **to)
        elif field.type is float:
            low, high = meta.get("low"), meta.get("high")
            flags.DEFINE_float(field.name, default, text, lower_bound=low, upper_bound=high, **to)
        else:
            flags.DEFINE_list(field.name, [str(x) for x in default], text, **to)
    flags.DEFINE_string(
        "data_dir", None, f"folder with TFDS data sets (default: {data.DEFAULT_DATA_DIR})", **to
    )


def from_flags(flag_values: flags.FlagValues = flags.FLAGS, **given: Any) -> Settings:
    """Settings from the parsed flags; ``given`` stands in for flags left out.

    Raises:
      ValueError: a list of numbers holds something else.
    """
    values = dict(given)
    for field in dataclasses.fields(Settings):
        if field.name in values:
            continue
        value = flag_values[field.name].value
        if value is None:
            value = defaults(flag_values.dataset)[field.name]
        values[field.name] = value
    values["dense_layers"] = tuple(values["dense_layers"])
    try:
        values["drop_at"] = tuple(float(x) for x in values["drop_at"])
    except ValueError as error:
        raise ValueError(f"--drop_at takes numbers, as in 0.5,0.75: {error}.") from error
    return Settings(**values)


def defaults(dataset: str) -> dict[str, Any]:
    """The settings that have a value if they are not given, for a data set."""
    by_dataset = BY_DATASET.get(dataset, {})
    chosen = {x.name: by_dataset.get(x.name, _default(x)) for x in dataclasses.fields(Settings)}
    return {name: value for name, value in chosen.items() if value is not None}


def from_json(values: dict[str, Any]) -> Settings:
    """Settings as a run's settings.json has them; those that it lacks have their defaults.

    Raises:
      ValueError: it has others, or lacks some that have no default.
    """
    given: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v
        for k, v in (defaults(values.get("dataset", "")) | values).items()
    }
    names = {field.name for field in dataclasses.fields(Settings)}
    odd = [f"{name} is missing" for name in sorted(names - given.keys())]
    odd += [f"{name} is no setting" for name in sorted(given.keys() - names)]
    if odd:
        raise ValueError(f"These are no settings of a run of this version: {', '.join(odd)}.")
    return Settings(**given)


def _default(field: dataclasses.Field[Any]) -> Any:
    return None if field.default is dataclasses.MISSING else field.default


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Ends the program with one line where settings or data are wrong, or training fails."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit("stopped.")
    except (ValueError, OSError, ArithmeticError) as error:
        message = " ".join(str(error).split())
        sys.exit(f"error: {message}")
