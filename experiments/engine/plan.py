"""What a training step will take on each device of a mesh, told by the compiler alone."""

import math
import re
import time
from typing import Any, NamedTuple

from rich.console import Console

import granet_jax as gj
from experiments.engine import output
from experiments.engine.training import Trainer

_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "s8": 8, "u8": 8, "bf16": 16, "f16": 16, "f64": 64, "s64": 64, "u64": 64}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(_KINDS)})(?:-start)?\(")


class Collective(NamedTuple):
    """One instruction by which devices exchange arrays."""

    kind: str
    bytes: int  # of its result, on one device


class Plan(NamedTuple):
    """The compiled step; memory is of one device, in bytes."""

    title: str
    parameters: int
    prunable: int
    memory: dict[str, int]
    collectives: list[Collective]
    seconds: float  # that compiling took
    step: str  # what is in the program
    compiled: Any


def plan(trainer: Trainer) -> Plan:
    """Compiles the training step for the mesh without making a single array.

    Raises:
      ValueError: the data are streamed.
    """
    started = time.perf_counter()
    compiled = trainer.lower().compile()
    seconds = time.perf_counter() - started
    stats = compiled.memory_analysis()
    memory = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "aliased": stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "in all": stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes,
        "peak": stats.peak_memory_in_bytes,  # on CPU without the temporaries
    }
    setup, config = trainer.setup, trainer.settings
    leaves = gj.trees.describe(setup.abstract_params, setup.rules)
    mesh = " x ".join(f"{size} {name}" for name, size in setup.mesh.shape.items())
    step = "mask updates included"
    if trainer.family.two_programs:
        step = "but for mask updates, which are a program of their own"
    return Plan(
        f"{config.task}, {config.method}, batches of {config.batch_size}; {mesh}",
        sum(leaf.size for leaf in leaves),
        gj.trees.num_prunable(leaves),
        memory,
        collectives(compiled.as_text()),
        seconds,
        step,
        compiled,
    )


def collectives(hlo: str) -> list[Collective]:
    """The collectives in the text of a compiled module, each instruction once.

    Example:
      >>> collectives("%a = (f32[2,3]{1,0}, pred[4]{0}) all-reduce(%b, %c), channel_id=1")
      [Collective(kind='all-reduce', bytes=28)]
    """
    return [
        Collective(kind, sum(_size(*array) for array in _ARRAY.findall(shapes)))
        for shapes, kind in _COLLECTIVE.findall(hlo)
    ]


def _size(dtype: str, shape: str) -> int:
    return _BITS.get(dtype, 32) // 8 * math.prod(int(n) for n in shape.split(",") if n)


def show(console: Console, planned: Plan) -> None:
    """Prints a plan: memory and collectives, a table each."""
    console.print(
        f"{planned.parameters:,} parameters, {planned.prunable:,} of them prunable; "
        f"compiled in {planned.seconds:.1f} s",
        highlight=False,
    )
    memory = {k: f"{v / 2**30:.3f}" for k, v in planned.memory.items()}
    output.print_table(console, planned.title, [{"memory of a device": "GiB", **memory}])
    rows = []
    for kind in _KINDS:
        sizes = [c.bytes for c in planned.collectives if c.kind == kind]
        if sizes:
            rows.append(
                {
                    "collective": kind,
                    "instructions": str(len(sizes)),
                    "largest (bytes)": f"{max(sizes):,}",
                }
            )
    if rows:
        output.print_table(console, f"collectives of a step, {planned.step}", rows)
