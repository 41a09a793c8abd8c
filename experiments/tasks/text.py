"""A byte-level language model: ``make(settings, mesh, data_dir)``.

Windows are drawn from the source of Python's own library, or from all files of a folder; whole
files are held out. An epoch is ``eval_every`` steps.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

import granet_jax as gj
from experiments.data import text
from experiments.engine import mesh as meshes
from experiments.engine.settings import Settings as AnySettings
from experiments.engine.settings import flag
from experiments.engine.task import Drawn, Memory, Metric, Specs, Task, Unit
from experiments.models import transformer

VALIDATION_WINDOWS = 128  # at least; as many whole batches as hold them

# A kernel's input side is split over "fsdp" and gathered where it is used, its output side over
# "tensor"; of the second matrix of a pair the other way round, so that between the two nothing has
# to move.
_SPECS: Specs = (
    ("embedding", PartitionSpec(None, ("fsdp", "tensor"))),
    ("/(query|key|value|gate|up)/kernel", PartitionSpec(None, "fsdp", "tensor")),
    ("/(out|down)/kernel", PartitionSpec(None, "tensor", "fsdp")),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(AnySettings):
    """Of a language model."""

    task: str = "text"
    size: str = flag(
        "weights outside the embedding", "10m", choices=list(transformer.SIZES), free=True
    )
    context: int = flag("bytes that the model sees at once", 256, low=2)
    batch_size: int = flag("windows in a step, over all devices", 16, low=1)
    bytes: int = flag("of training text in all", 2_500_000, low=1)
    eval_every: int = flag("steps between evaluations, an epoch", 50, low=1)
    sparsity: float = flag("fraction of zeros among prunable weights at the end, in [0, 1)", 0.8)
    update_every: int = flag("steps between mask updates (Delta T)", 20, low=1)
    optimizer: str = flag("the optimizer inside", "adamw", choices=["sgd", "adamw"])
    learning_rate: float = flag("peak learning rate", 2e-3, low=0)
    schedule: str = flag(
        "the learning rate falls in steps, or as a cosine", "cosine", choices=["steps", "cosine"]
    )
    final_rate: float = flag(
        "with --schedule=cosine: where it ends, as a fraction of the peak", 0.1, low=0, high=1
    )
    warmup_epochs: float = flag(
        "epochs in which the learning rate rises from 0; -1: 5 % of training", -1.0, low=-1
    )
    b2: float = flag("of AdamW, the decay of squared gradients", 0.95, low=0, high=1)
    clip_norm: float = flag("largest norm of a step's gradients; 0: any", 1.0, low=0)
    weight_decay: float = flag("of SGD: L2 in the gradients; of AdamW: decoupled", 0.1, low=0)
    decay_all: bool = flag("whether norms decay as well", False)
    precision: str = flag(
        "of the model's arithmetic; parameters are f32", "f32", choices=["f32", "bf16"]
    )
    remat: bool = flag("compute layers again in the backward pass, for memory", False)

    @property
    def title(self) -> str:
        """What is trained."""
        return f"text, {self.size}"


def make(config: Settings, mesh: Mesh, data_dir: str | None = None) -> Task:
    """The task that the settings name.

    Args:
      config: the settings.
      mesh: the devices, over which the layers' inputs are spread.
      data_dir: folder of text; None = Python's own library.

    Raises:
      ValueError: the text is too short, or as :func:`experiments.data.text.read`.
    """
    return task(config, mesh, text.read(data_dir))


def task(config: Settings, mesh: Mesh, data: text.Text) -> Task:
    """A language model of any text.

    Raises:
      ValueError: the text is shorter than a window, or ``bytes`` ends before an evaluation.
    """
    text.check_length(data, config.context + 1)
    epochs = config.bytes // (config.batch_size * config.context) // config.eval_every
    if epochs < 1:
        taken = config.batch_size * config.context * config.eval_every
        raise ValueError(
            f"--bytes={config.bytes} ends before the first evaluation: --eval_every="
            f"{config.eval_every} steps take {taken} bytes. Lower --eval_every, or raise --bytes."
        )
    net = _Net(config, mesh)
    windows = -(-VALIDATION_WINDOWS // config.batch_size) * config.batch_size
    draw = functools.partial(draw_windows, num=config.batch_size, length=config.context + 1)
    return Task(
        init=net.init,
        loss=net.loss,
        evaluate=net.evaluate,
        train=Drawn(data.train, draw, config.eval_every),
        held_out={"validation": Memory(text.held_out_windows(data, windows, config.context + 1))},
        metrics=(Metric("bits_per_byte", higher_is_better=False, grain=0.01),),
        epochs=epochs,
        facts=text.facts(data),
        forward=net.forward,
        example=net.window,
        scored_loss=net.scored_loss,
        num_scored=4 * config.batch_size,
        prunable=lambda structure: (("^blocks/", gj.Stacked(1, structure)),),
        specs=_SPECS,
        loss_unit=("bits per byte", 1 / math.log(2)),
        unit=Unit("bytes", config.context),
        check_mesh=net.check_mesh,
    )


def draw_windows(key: jax.Array, data: jax.Array, num: int, length: int) -> jax.Array:
    """``num`` pieces of a text ``(n,)`` from random places, uint8 ``(num, length)``."""
    offsets = jax.random.randint(key, (num, 1), 0, len(data) - length + 1)
    return jnp.asarray(data)[offsets + jnp.arange(length)[None, :]]


@dataclasses.dataclass(frozen=True)
class _Net:
    """A transformer on a mesh."""

    config: Settings
    mesh: Mesh

    @property
    def window(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, self.config.context), jnp.int32)

    @property
    def single(self) -> transformer.Transformer:
        """For one window, which no mesh divides."""
        return transformer.Transformer(transformer.SIZES[self.config.size])

    @property
    def model(self) -> transformer.Transformer:
        return transformer.Transformer(
            transformer.SIZES[self.config.size],
            jnp.bfloat16 if self.config.precision == "bf16" else jnp.float32,
            self.config.remat,
            meshes.of_batch(self.mesh) if self.mesh.size > 1 else None,
        )

    def init(self, key: jax.Array) -> tuple[Any, dict[str, Any]]:
        zeros = jnp.zeros(self.window.shape, self.window.dtype)
        return self.single.init(key, zeros)["params"], {}

    def forward(self, params: Any, variables: Any, tokens: jax.Array) -> Any:
        return self.single.apply({"params": params, **variables}, tokens)

    def losses(self, params: Any, variables: Any, windows: Any, temperature: float = 1.0) -> Any:
        tokens = windows.astype(jnp.int32)
        logits: Any = self.model.apply({"params": params, **variables}, tokens[:, :-1])
        if temperature != 1.0:
            logits = logits / temperature
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])

    def loss(self, params: Any, variables: Any, windows: Any, key: jax.Array) -> Any:
        return jnp.mean(self.losses(params, variables, windows)), {}

    def scored_loss(self, params: Any, variables: Any, windows: Any, temperature: float) -> Any:
        return jnp.mean(self.losses(params, variables, windows, temperature))

    def evaluate(self, params: Any, variables: Any, windows: Any) -> dict[str, jax.Array]:
        nats = jnp.mean(self.losses(params, variables, windows), axis=1)
        return {"bits_per_byte": nats / math.log(2)}

    def check_mesh(self, mesh: Mesh) -> None:
        heads = transformer.SIZES[self.config.size].heads
        if heads % mesh.shape["tensor"]:
            raise ValueError(
                f"--tensor={mesh.shape['tensor']} does not divide the {heads} heads of "
                f"{self.config.size}."
            )
