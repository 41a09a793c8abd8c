"""What a run is: one dataclass for each task, from which the absl flags are made."""

import contextlib
import dataclasses
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, TypeAlias, TypeVar

from absl import flags

import granet_jax as gj
from experiments.engine import methods

flags.disclaim_key_flags()  # --help of the program that defines the flags shows them

ByChoice: TypeAlias = Mapping[str, Mapping[str, Mapping[str, Any]]]


def flag(text: str, default: Any = dataclasses.MISSING, **kwargs: Any) -> Any:
    """A field that is a flag as well.

    Args:
      text: the flag's help.
      default: without it the field has to be given.
      **kwargs: ``choices``, or bounds ``low`` and ``high``.
    """
    return dataclasses.field(default=default, metadata={"help": text, **kwargs})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run of any task depends on, but for the task's own; subclasses add that.

    Equal settings on as many devices give equal results, bit by bit.
    """

    task: str
    method: str = flag(
        "how to train sparse; granet starts dense, granet_st starts from half of the weights",
        "granet",
        choices=methods.METHODS,  # as they are when flags are made
    )
    sparsity: float = flag("fraction of zeros among prunable weights at the end, in [0, 1)", 0.9)
    batch_size: int = flag("examples in a step, over all devices", 32, low=1)
    update_every: int = flag("steps between mask updates (Delta T)", 100, low=1)
    dense_layers: tuple[str, ...] = flag(
        "patterns of paths of weights that are never pruned, as in ^fc3/", ()
    )
    structure: str = flag(
        "how weights are grouped: none; N:M as in 2:4, with the sparsity that it has; block:RxC; "
        "fan_in or fan_in:ABLATION. Layers get equal sparsities then, and gradual methods have "
        "to, as granet_uniform",
        "none",
    )
    block_kernel: bool = flag(
        "dense layers multiply only by the blocks that are on, in training, too; with "
        "--structure=block:RxC on one GPU or TPU (on CPUs simulated, slowly)",
        False,
    )
    compact: bool = flag(
        "train live weights alone: time and memory are theirs; for methods that look at dense "
        "gradients at mask updates only",
        False,
    )
    prune_until: float = flag(
        "gradual pruning ends at this fraction of training", 0.5, low=0, high=1
    )
    penalty: float = flag(
        "coefficient of the penalty of dst and str; -1: steered so that --sparsity is met",
        -1.0,
        low=-1,
    )
    initial_threshold: float = flag("of str, before its sigmoid", -10.0)
    optimizer: str = flag("the optimizer inside", "sgd", choices=["sgd", "adamw"])
    learning_rate: float = flag("peak learning rate", 0.1, low=0)
    schedule: str = flag(
        "the learning rate falls in steps, or as a cosine", "steps", choices=["steps", "cosine"]
    )
    drop_at: tuple[float, ...] = flag(
        "with --schedule=steps: fractions of training after which the learning rate drops",
        (0.5, 0.75),
    )
    drop_factor: float = flag("what a drop multiplies the learning rate with", 0.1, low=0)
    final_rate: float = flag(
        "with --schedule=cosine: where it ends, as a fraction of the peak", 0.0, low=0, high=1
    )
    warmup_epochs: float = flag(
        "epochs in which the learning rate rises from 0; -1: 5 % of training", 0.0, low=-1
    )
    momentum: float = flag("of SGD", 0.9, low=0)
    nesterov: bool = flag("whether the momentum of SGD is Nesterov's", True)
    b2: float = flag("of AdamW, the decay of squared gradients", 0.999, low=0, high=1)
    young_ramp: int = flag(
        "with --optimizer=adamw: regrown weights are trained as by an Adam begun with them, and "
        "their steps rise to full size in so many updates; 0: as all others",
        0,
        low=0,
    )
    clip_norm: float = flag("largest norm of a step's gradients; 0: any", 0.0, low=0)
    weight_decay: float = flag("of SGD: L2 in the gradients; of AdamW: decoupled", 5e-4, low=0)
    decay_all: bool = flag("whether biases and norms decay as well", True)
    chunk_steps: int = flag(
        "steps run at once, after which a checkpoint can be written (0: an epoch)", 0, low=0
    )
    seed: int = flag("of the initial weights, the masks and the order of the data", 0, low=0)

    by_choice: ClassVar[ByChoice] = {}
    """field -> its value -> defaults of other fields, where they are not given"""

    @property
    def title(self) -> str:
        """What is trained, for people and for the names of folders."""
        return self.task

    @property
    def parsed_structure(self) -> gj.trees.Structure | None:
        """What ``structure`` names."""
        return methods.parse_structure(self.structure, self.sparsity)

    def __post_init__(self) -> None:
        methods.parse_structure(self.structure, self.sparsity)
        for field in dataclasses.fields(self):
            value, meta = getattr(self, field.name), field.metadata
            low, high = meta.get("low", -math.inf), meta.get("high", math.inf)
            if ("low" in meta or "high" in meta) and not low <= value <= high:
                raise ValueError(f"{field.name} must be in [{low}, {high}]; got {value}.")
            named_freely = field.name in self.by_choice or meta.get("free")
            if "choices" in meta and not named_freely and value not in meta["choices"]:
                choices = ", ".join(meta["choices"])
                raise ValueError(f"{field.name} must be one of {choices}; got {value!r}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpochSettings(Settings):
    """Of a task that goes over its data again and again."""

    epochs: int = flag("passes over the training data", 20, low=1)


def define_flags(
    kind: type[Settings],
    leave_out: tuple[str, ...] = (),
    flag_values: flags.FlagValues = flags.FLAGS,
) -> None:
    """Defines one absl flag for each setting that was made by :func:`flag`."""
    for field in dataclasses.fields(kind):
        if "help" in field.metadata and field.name not in leave_out:
            _define_flag(kind, field, {"flag_values": flag_values})


def _define_flag(kind: type[Settings], field: dataclasses.Field[Any], to: dict[str, Any]) -> None:
    meta, default = field.metadata, _default(field)
    text = meta["help"]
    bounds: dict[str, Any] = {"lower_bound": meta.get("low"), "upper_bound": meta.get("high")}
    for values in kind.by_choice.values():
        if listed := [f"{v[field.name]} for {k}" for k, v in values.items() if field.name in v]:
            default, text = None, f"{text} (default: {', '.join(listed)})"
    if "choices" in meta:
        flags.DEFINE_enum(field.name, default, list(meta["choices"]), text, **to)
    elif field.type is str:
        flags.DEFINE_string(field.name, default, text, **to)
    elif field.type is bool:
        flags.DEFINE_boolean(field.name, default, text, **to)
    elif field.type is int:
        flags.DEFINE_integer(field.name, default, text, **bounds, **to)
    elif field.type is float:
        flags.DEFINE_float(field.name, default, text, **bounds, **to)
    else:
        flags.DEFINE_list(field.name, [str(x) for x in default], text, **to)


Kind = TypeVar("Kind", bound=Settings)


def from_flags(kind: type[Kind], flag_values: flags.FlagValues = flags.FLAGS, **given: Any) -> Kind:
    """Settings from the parsed flags; ``given`` stands in for flags left out.

    Raises:
      ValueError: a list of numbers holds something else, or a setting without default is not given.
    """
    values = dict(given)
    for field in dataclasses.fields(kind):
        if field.name not in values and "help" in field.metadata:
            value = flag_values[field.name].value
            values[field.name] = tuple(value) if isinstance(value, list) else value
    chosen = defaults(kind, values)
    values = {k: chosen.get(k) if v is None else v for k, v in values.items()}
    if missing := [k for k, v in values.items() if v is None]:
        raise ValueError(f"--{', --'.join(missing)}: to be given, for there is no default.")
    try:
        values["drop_at"] = tuple(float(x) for x in values["drop_at"])
    except ValueError as error:
        raise ValueError(f"--drop_at takes numbers, as in 0.5,0.75: {error}.") from error
    return kind(**values)


def defaults(kind: type[Settings], given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that have a value if they are not given, beside those that are."""
    chosen = {field.name: _default(field) for field in dataclasses.fields(kind)}
    for name, values in kind.by_choice.items():
        chosen |= values.get(given.get(name, chosen[name]), {})
    return {name: value for name, value in chosen.items() if value is not None}


def from_json(kind: type[Kind], values: Mapping[str, Any]) -> Kind:
    """Settings as a run's settings.json has them; those that it lacks have their defaults.

    Raises:
      ValueError: it has others, or lacks some that have no default.
    """
    given: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v
        for k, v in (defaults(kind, values) | dict(values)).items()
    }
    names = {field.name for field in dataclasses.fields(kind)}
    odd = [f"{name} is missing" for name in sorted(names - given.keys())]
    odd += [f"{name} is no setting" for name in sorted(given.keys() - names)]
    if odd:
        raise ValueError(f"These are no settings of a run of this version: {', '.join(odd)}.")
    return kind(**given)


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
