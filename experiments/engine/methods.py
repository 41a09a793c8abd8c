"""The one table from the values of ``--method`` to methods of the library."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import jax
import optax

import granet_jax as gj
from granet_jax.types import Distribution, ScoreFn

SparseMethod: TypeAlias = gj.Method | gj.reparam.Reparameterisation


@functools.cache
def parse_structure(text: str, sparsity: float) -> gj.trees.Structure | None:
    """The value of ``--structure``; the same object for the same text.

    Raises:
      ValueError: it is none that the library has, or not of this sparsity.
    """
    if text == "none":
        return None
    name, _, number = text.partition(":")
    try:
        if name.isdecimal():
            n, m = int(name), int(number)
            if not math.isclose(1 - n / m, sparsity, abs_tol=1e-9):
                raise ValueError(f"{text} is a sparsity of {1 - n / m}, not {sparsity}")
            return gj.structures.n_of_m(m)
        if (sides := parse_block(text)) is not None:
            return gj.structures.block(sides)
        if name == "fan_in":
            return gj.structures.fan_in(ablation=float(number or 0))
        raise ValueError("expected none, 2:4 and the like, block:16x16, fan_in or fan_in:0.3")
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"structure {text!r}: {error}.") from error


def parse_block(text: str) -> tuple[int, ...] | None:
    """The sides of the blocks of a ``--structure``; None = it has others, or none."""
    name, _, number = text.partition(":")
    return tuple(int(side) for side in number.split("x")) if name == "block" else None


def parse_group(text: str) -> int:
    """M of a ``--structure`` such as 2:4; 0 = it has none."""
    name, _, number = text.partition(":")
    return int(number) if name.isdecimal() and number.isdecimal() else 0


def check_block_kernel(config: Any) -> None:
    """Whether ``--block_kernel``, if it is given, can be had.

    Args:
      config: settings with ``structure`` and ``block_kernel``.

    Raises:
      ValueError: the structure has no blocks of two sides, or there are several GPUs or TPUs.
    """
    if not config.block_kernel:
        return
    if len(parse_block(config.structure) or ()) != 2:
        raise ValueError(
            f"--block_kernel needs a structure as block:64x64; got {config.structure!r}."
        )
    if jax.default_backend() != "cpu" and jax.device_count() > 1:
        raise ValueError(
            f"--block_kernel works on one device; there are {jax.device_count()}. Leave it out, or "
            "hide the others, GPUs by CUDA_VISIBLE_DEVICES=0."
        )


@contextlib.contextmanager
def products(config: Any, opt_state: Any, is_update_step: jax.Array) -> Iterator[dict[str, Any]]:
    """How dense layers multiply in training: all, or only the blocks that are on.

    Args:
      config: settings with ``method``, ``structure``, ``block_kernel`` and ``update_every``.
      opt_state: holds the masks.
      is_update_step: whether this step's gradients may grow weights.

    Yields:
      What the model's variables have to hold besides, within the context.
    """
    if not config.block_kernel:
        yield {}
        return
    block = parse_block(config.structure)
    assert block is not None  # see check_block_kernel
    always = METHODS[config.method].dense_gradients(config.update_every) == 1.0
    with gj.kernels.dense_in_blocks(
        (block[0], block[1]),
        dense_gradient=is_update_step | always,
        interpret=jax.default_backend() == "cpu",
    ):
        yield {"masks": gj.get_masks(opt_state)}


class Plan(NamedTuple):
    """What a method needs to know of a run."""

    sparsity: float
    update_every: int
    prune_end_step: int
    total_steps: int
    initial_threshold: float
    prunable: gj.trees.Rules
    start: Distribution  # how a random start is spread over layers
    key: jax.Array
    group: int = 0  # M of an N:M structure; 0 = it is another, or none


class Regeneration(NamedTuple):
    """The share of live weights exchanged at an event: a cosine over the first part of training."""

    initial: float
    final: float
    until: float  # fraction of training

    def at(self, step: int, total_steps: int) -> float:
        """The share at a step; 0 after the last event."""
        last = int(self.until * total_steps)
        return float(gj.cosine(self.initial, self.final, last)(step)) if step <= last else 0.0


class AtInit(NamedTuple):
    """What a method that prunes before training is shown."""

    params: Any
    loss: Callable[..., Any]  # (params, batch, temperature=1) -> scalar; outputs / temperature
    apply: Callable[..., Any]  # (params, inputs) -> outputs
    batches: list[Any]
    example: Any  # abstract, one of the inputs
    sparsity: float
    prunable: gj.trees.Rules


class Entry(NamedTuple):
    """A row of the table."""

    make: Callable[[Plan], SparseMethod]
    regeneration: Regeneration = Regeneration(0.0, 0.0, 1.0)
    dense_gradients: Callable[[int], float] = lambda update_every: 0.0  # share of steps with them
    at_init: Callable[[AtInit], Any] | None = None  # gives the masks of the start
    needs_apply: bool = False  # at_init looks at AtInit.apply
    has_penalty: bool = False  # a coefficient steers the sparsity
    grows_dense: bool = False  # again and again: live weights alone would not fit
    inside: Callable[[], optax.GradientTransformation] | None = None  # first in the inner chain


RIGL = Regeneration(0.3, 0.0, 0.75)  # the defaults of the library, told for reports
ITOP = Regeneration(0.5, 0.005, 1.0)  # and GraNet's and SNFS'


def _dense(plan: Plan) -> gj.Method:
    return gj.static(prunable=plan.prunable)


def _static(plan: Plan) -> gj.Method:
    return gj.static(sparsity=plan.sparsity, start=plan.start, prunable=plan.prunable, key=plan.key)


def _magnitude(plan: Plan) -> gj.Method:
    return gj.magnitude(sparsity=plan.sparsity, at=plan.prune_end_step, prunable=plan.prunable)


def _granet(initial_sparsity: float, scope: Distribution) -> Entry:
    def make(plan: Plan) -> gj.Method:
        return gj.granet(
            initial_sparsity=initial_sparsity,
            final_sparsity=plan.sparsity,
            end_step=plan.prune_end_step,
            update_every=plan.update_every,
            total_steps=plan.total_steps,
            initial_fraction=ITOP.initial,
            final_fraction=ITOP.final,
            scope=scope,
            start=plan.start,
            prunable=plan.prunable,
            key=plan.key,
        )

    return Entry(make, ITOP)


def _ac_dc(plan: Plan) -> gj.Method:
    """The paper's schedule: of 100 epochs 10 of warm-up, phases of 5, 10 dense, 15 sparse."""
    shares = (0.1, 0.05, 0.75, 0.85)
    warmup, phase, last_dense, last_sparse = (max(1, round(x * plan.total_steps)) for x in shares)
    return gj.ac_dc(
        sparsity=plan.sparsity,
        warmup_steps=warmup,
        phase_steps=phase,
        last_dense_step=last_dense,
        last_sparse_step=last_sparse,
        scope=gj.global_ranking if plan.start is gj.erk else gj.uniform,
        prunable=plan.prunable,
    )


def _gmp(scope: Distribution, score: ScoreFn = gj.scores.magnitude) -> Entry:
    def make(plan: Plan) -> gj.Method:
        gj.schedules.check_end(plan.update_every, plan.prune_end_step, plan.total_steps)
        return gj.gmp(
            final_sparsity=plan.sparsity,
            end_step=plan.prune_end_step,
            update_every=plan.update_every,
            scope=scope,
            score=score,
            prunable=plan.prunable,
        )

    return Entry(make)


def _dynamic(
    method: Callable[..., gj.Method],
    regeneration: Regeneration,
    dense_gradients: Callable[[int], float] = lambda update_every: 0.0,
) -> Entry:
    def make(plan: Plan) -> gj.Method:
        return gj.track_exploration(
            method(
                sparsity=plan.sparsity,
                update_every=plan.update_every,
                total_steps=plan.total_steps,
                start=plan.start,
                prunable=plan.prunable,
                key=plan.key,
            )
        )

    return Entry(make, regeneration, dense_gradients)


def _before_training(find: Callable[[AtInit], Any], needs_apply: bool = False) -> Entry:
    return Entry(_dense, at_init=find, needs_apply=needs_apply)


def _snip(start: AtInit) -> Any:
    return gj.at_init.snip(
        start.loss, start.params, start.batches, sparsity=start.sparsity, prunable=start.prunable
    )


def _grasp(start: AtInit) -> Any:
    return gj.at_init.grasp(
        functools.partial(start.loss, temperature=200.0),
        start.params,
        start.batches,
        sparsity=start.sparsity,
        prunable=start.prunable,
    )


def _synflow(start: AtInit) -> Any:
    return gj.at_init.synflow(
        start.apply, start.params, start.example, sparsity=start.sparsity, prunable=start.prunable
    )


def _magnitude_at_init(start: AtInit) -> Any:
    return gj.at_init.magnitude(start.params, sparsity=start.sparsity, prunable=start.prunable)


def _ste(plan: Plan) -> gj.reparam.Reparameterisation:
    return gj.reparam.ste(
        sparsity=plan.sparsity,
        end_step=plan.prune_end_step,
        scope=plan.start,
        prunable=plan.prunable,
    )


def _sr_ste(plan: Plan) -> gj.reparam.Reparameterisation:
    return gj.reparam.sr_ste(sparsity=plan.sparsity, scope=plan.start, prunable=plan.prunable)


def _mask_decay(plan: Plan) -> gj.reparam.Reparameterisation:
    return gj.reparam.mask_decay(
        sparsity=plan.sparsity,
        end_step=plan.prune_end_step,
        scope=plan.start,
        prunable=plan.prunable,
    )


def _structure_decay(plan: Plan) -> gj.reparam.Reparameterisation:
    if not plan.group:
        raise ValueError("--method=structure_decay goes from M-1:M to N:M: give --structure=2:4.")
    return gj.reparam.structure_decay(
        sparsity=plan.sparsity,
        m=plan.group,
        end_step=plan.prune_end_step,
        scope=plan.start,
        prunable=plan.prunable,
    )


def _chts(initial_sparsity: float | None) -> Entry:
    def make(plan: Plan) -> gj.Method:
        return gj.chts(
            sparsity=plan.sparsity,
            initial_sparsity=initial_sparsity,
            update_every=plan.update_every,
            total_steps=plan.total_steps,
            scope=plan.start,
            prunable=plan.prunable,
            key=plan.key,
        )

    return Entry(make, Regeneration(0.3, 0.3, 0.75))


def _str(plan: Plan) -> gj.reparam.Reparameterisation:
    return gj.reparam.str_(initial=plan.initial_threshold, prunable=plan.prunable)


_mest = functools.partial(gj.set_, drop=gj.scores.magnitude_and_gradient(0.01))
_unfired = functools.partial(gj.set_itop, unexplored_first=True)

METHODS: dict[str, Entry] = {
    "dense": Entry(_dense),
    "static": Entry(_static),
    "snip": _before_training(_snip),
    "grasp": _before_training(_grasp),
    "synflow": _before_training(_synflow, needs_apply=True),
    "magnitude_at_init": _before_training(_magnitude_at_init),
    "set": _dynamic(gj.set_, RIGL),
    "set_by_sign": _dynamic(functools.partial(gj.set_, by_sign=True), RIGL),
    "mest": _dynamic(_mest, RIGL),
    "rigl": _dynamic(gj.rigl, RIGL, lambda update_every: 1 / (update_every + 1)),
    "set_itop": _dynamic(gj.set_itop, ITOP),
    "set_itop_unfired": _dynamic(_unfired, ITOP),
    "rigl_itop": _dynamic(gj.rigl_itop, ITOP),
    "snfs": _dynamic(gj.snfs, ITOP, lambda update_every: 1.0),
    "rigl_fisher": _dynamic(
        functools.partial(gj.rigl, drop=gj.scores.adam_fisher),
        RIGL,
        lambda update_every: 1 / (update_every + 1),
    ),
    "chts": _chts(None),
    "chtss": _chts(0.5),
    "ac_dc": Entry(_ac_dc, grows_dense=True),
    "magnitude": Entry(_magnitude),
    "gmp": _gmp(gj.global_ranking),
    "gmp_uniform": _gmp(gj.uniform),
    "movement": _gmp(gj.global_ranking, gj.scores.movement)._replace(
        inside=gj.scores.track_movement
    ),
    "granet": _granet(0.0, gj.global_ranking),
    "granet_st": _granet(0.5, gj.global_ranking),
    "granet_uniform": _granet(0.0, gj.uniform),
    "ste": Entry(_ste, dense_gradients=lambda update_every: 1.0),
    "sr_ste": Entry(_sr_ste, dense_gradients=lambda update_every: 1.0),
    "mask_decay": Entry(_mask_decay, dense_gradients=lambda update_every: 1.0),
    "structure_decay": Entry(_structure_decay, dense_gradients=lambda update_every: 1.0),
    "dst": Entry(
        lambda plan: gj.reparam.dst(prunable=plan.prunable),
        dense_gradients=lambda update_every: 1.0,  # reach weights that are off
        has_penalty=True,
    ),
    "str": Entry(_str, has_penalty=True),
}
