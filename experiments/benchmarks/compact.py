"""Training with live weights alone, against plain dense and masked training."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import granet_jax as gj
from experiments.benchmarks import language, timing
from experiments.benchmarks.tables import Table
from experiments.tasks import text

EVERY = 100  # steps between mask updates
LAYERS = 3
INNERS = {"SGD, momentum": optax.sgd(0.01, momentum=0.9), "AdamW": optax.adamw(1e-3)}
CASES = [  # width, batch, optimizer, sparsities
    (2048, 128, "SGD, momentum", (0.8, 0.9, 0.95, 0.98)),
    (2048, 128, "AdamW", (0.9, 0.95)),
    (2048, 16, "SGD, momentum", (0.8, 0.9, 0.95)),
    (2048, 512, "SGD, momentum", (0.9, 0.95)),
    (512, 128, "SGD, momentum", (0.8, 0.9, 0.95)),
]
QUICK = [(16, 4, "AdamW", (0.75,))]


class Run(NamedTuple):
    """One way to train: calls that go on from each other, and what its programs need."""

    step: Callable[[], Any]  # ordinary steps
    event: Callable[[], Any]  # one with a mask update
    state_bytes: int  # parameters, state of the optimizer, layouts
    temporaries: int  # of an ordinary step
    compile_seconds: float  # of all programs


class Row(NamedTuple):
    """What was measured of one sparsity."""

    name: str
    times: dict[str, timing.Measured]
    needs: dict[str, Run]
    steps: int  # in a call
    share_of_peak: float


def tables(quick: bool) -> list[Table]:
    """Steps, memory, products, the language model."""
    runs = [row for case in (QUICK if quick else CASES) for row in _case(quick, *case)]
    return [_speed(runs), _memory(runs), _products(quick), _language_model(quick)]


def on_accelerators(quick: bool) -> list[Table]:
    """One wide perceptron, whose steps and memory are told: weights one by one, and in blocks."""
    width, batch, sparsities = (16, 4, (0.75,)) if quick else (8192, 2048, (0.9, 0.95))
    sides = (0, 4) if quick else (0, 64, 128)
    case = functools.partial(_case, quick, width, batch, "AdamW", sparsities)
    runs = [row for side in sides for row in case((side, side) if side else ())]
    return [_speed(runs), _memory(runs)]


def _case(
    quick: bool,
    width: int,
    batch: int,
    optimizer: str,
    sparsities: Any,
    block: tuple[int, ...] = (),
) -> list[Row]:
    steps, rounds = (1, 2) if quick else (4, 7)
    multiply = jax.jit(lambda x: x @ x)
    make = functools.partial(_run, width, batch, INNERS[optimizer], steps, block)
    runs = {"dense": make("dense", 0.0), "masked": make("masked", sparsities[0])}
    runs |= {str(sparsity): make("compact", sparsity) for sparsity in sparsities}
    calls = {name: run.step for name, run in runs.items()}
    calls |= {f"event {sparsity}": runs[str(sparsity)].event for sparsity in sparsities}
    peak = jnp.ones((width, width))
    times = timing.in_turns(calls | {"peak": lambda: multiply(peak)}, rounds)
    found = []
    for sparsity in sparsities:
        of_row = {"compact": str(sparsity), "event": f"event {sparsity}"}
        of_row = {name: name for name in ("dense", "masked")} | of_row
        measured = {name: times[key] for name, key in of_row.items()}
        # Three products of each layer, but for the first layer's gradient of its inputs.
        flops = 2 * batch * width**2 * (3 * LAYERS - 1) * (1 - sparsity)
        rate = flops / (measured["compact"].median / steps)
        name = f"{width} wide, batch {batch}, {optimizer}, {100 * sparsity:g} %"
        name += f", blocks of {' x '.join(map(str, block))}" if block else ""
        share = rate / (2 * width**3 / times["peak"].median)
        needs = {kind: runs[key] for kind, key in of_row.items() if kind != "event"}
        found.append(Row(name, measured, needs, steps, share))
    return found


def _loss(params: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
    for i in range(LAYERS):
        layer = params[f"layer{i}"]
        x = x @ layer["kernel"] + layer["bias"][None]
        x = jax.nn.relu(x) if i < LAYERS - 1 else x
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(x, labels))


def _params(width: int) -> Any:
    draw = jax.nn.initializers.lecun_normal()
    keys = jax.random.split(jax.random.key(0), LAYERS)
    return {
        f"layer{i}": {"kernel": draw(key, (width, width)), "bias": jnp.zeros(width)}
        for i, key in enumerate(keys)
    }


def _run(
    width: int,
    batch: int,
    inner: Any,
    steps: int,
    block: tuple[int, ...],
    kind: str,
    sparsity: float,
) -> Run:
    params = _params(width)
    x = jax.random.normal(jax.random.key(2), (batch, width))
    labels = jax.random.randint(jax.random.key(3), (batch,), 0, width)
    rules: gj.trees.Rules = [("", gj.structures.block(block))] if block else []
    method = gj.rigl(
        sparsity=sparsity,
        update_every=EVERY,
        total_steps=10**6,
        key=jax.random.key(1),
        prunable=rules,
    )
    if kind == "compact":
        sides = (block[0], block[1]) if block else None
        tx = gj.compact.sparsify(inner, method, rules, block=sides)
        state = tx.init(params)
        carry = gj.compact.to_slots(params, gj.compact.get_layouts(state)), state
        one = functools.partial(_compact_step, tx)
    else:
        tx = inner if kind == "dense" else gj.sparsify(inner, method)
        carry = params, tx.init(params)
        one = functools.partial(_dense_step, tx)
    jitted = jax.jit(one, donate_argnums=(0, 1), static_argnums=4)
    started = time.perf_counter()
    events = (False, True) if kind == "compact" else (False,)
    programs = [jitted.lower(*carry, x, labels, event).compile() for event in events]
    seconds = time.perf_counter() - started
    planned: Any = programs[0].memory_analysis()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(carry))

    def run(num: int, program: Any) -> Any:
        nonlocal carry
        for _ in range(num):
            carry = program(*carry, x, labels)

    return Run(
        lambda: (run(steps, programs[0]), jax.block_until_ready(carry))[0],
        lambda: (run(1, programs[-1]), jax.block_until_ready(carry))[0],
        size,
        planned.temp_size_in_bytes,
        seconds,
    )


def _dense_step(tx: Any, params: Any, state: Any, x: Any, labels: Any, event: bool) -> Any:
    grads = jax.grad(_loss)(params, x, labels)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def _compact_step(tx: Any, values: Any, state: Any, x: Any, labels: Any, event: bool) -> Any:
    layouts = gj.compact.get_layouts(state)
    dense = None
    if event:
        _, dense = gj.compact.value_and_dense_grad(_loss)(values, layouts, x, labels)
        grads = gj.compact.to_slots(dense, layouts)
    else:
        grads = jax.grad(gj.compact.sparse(_loss))(values, layouts, x, labels)
    updates, state = tx.update(grads, state, values, dense_grads=lambda: dense, event=event)
    return optax.apply_updates(values, updates), state


def _speed(runs: list[Row]) -> Table:
    rows = []
    for row in runs:
        dense, masked, compact, event = row.times.values()
        ordinary = timing.ratios(dense, compact)
        seconds = (EVERY - 1) * compact.median / row.steps + event.median
        rows.append(
            {
                "perceptron": row.name,
                "dense (ms)": timing.ms(dense.median / row.steps),
                "masked / dense": f"{masked.median / dense.median:.2f}",
                "compact (ms)": timing.ms(compact.median / row.steps),
                "times faster": f"{dense.median / compact.median:.2f}",
                "quartiles": timing.quartiles(ordinary),
                "event (dense steps)": f"{event.median * row.steps / dense.median:.2f}",
                f"times faster, an event every {EVERY}": (
                    f"{EVERY * dense.median / row.steps / seconds:.2f}"
                ),
                "share of the peak": f"{100 * row.share_of_peak:.0f} %",
            }
        )
    note = (
        f"Whole steps of {LAYERS} layers (forward pass, both gradients, optimizer), RigL, donated. "
        "Dense is the inner optimizer on dense arrays. The peak is that of a dense product of two "
        "square matrices as wide; the share counts multiplications with live weights alone."
    )
    return Table("Training with live weights alone", rows, note)


def _memory(runs: list[Row]) -> Table:
    rows = []
    for row in runs:
        dense, masked, compact = row.needs.values()
        rows.append(
            {
                "perceptron": row.name,
                "dense (MB)": f"{dense.state_bytes / 1e6:.1f}",
                "masked (MB)": f"{masked.state_bytes / 1e6:.1f}",
                "compact (MB)": f"{compact.state_bytes / 1e6:.1f}",
                "compact / dense": f"{100 * compact.state_bytes / dense.state_bytes:.1f} %",
                "temporaries, dense": f"{dense.temporaries / 1e6:.1f}",
                "temporaries, compact": f"{compact.temporaries / 1e6:.1f}",
                "compiled in, dense (s)": f"{dense.compile_seconds:.2f}",
                "compact, both programs (s)": f"{compact.compile_seconds:.2f}",
            }
        )
    note = (
        "Parameters, state of the optimizer and layouts, as they lie between steps; temporaries of "
        "the ordinary step, as XLA plans them."
    )
    return Table("Memory of training with live weights alone", rows, note)


def _products(quick: bool) -> Table:
    width, batches, rounds = (16, (4,), 2) if quick else (2048, (16, 128, 512), 15)
    rows = []
    for batch in batches:
        x = jax.random.normal(jax.random.key(0), (batch, width))
        kernel = _params(width)["layer0"]["kernel"]
        dense = {
            "x @ w": jax.jit(lambda x, w: x @ w),
            "y @ w.T": jax.jit(lambda y, w: y @ w.T),
            "x.T @ y": jax.jit(lambda x, _: x.T @ x),
        }
        for sparsity in (0.75,) if quick else (0.6, 0.65, 0.7, 0.75, 0.8, 0.9, 0.95, 0.98):
            masks = gj.static(sparsity=sparsity, key=jax.random.key(1)).init({"w": kernel}).masks
            values, layouts = gj.compact.pack({"w": kernel}, masks)
            faster = {}
            for name, product in dense.items():
                sparse = jax.jit(_sparse(name))
                calls = {
                    "dense": functools.partial(product, x, kernel),
                    "sparse": functools.partial(sparse, values, layouts, x),
                }
                times = timing.in_turns(calls, rounds)
                faster[name] = f"{times['dense'].median / times['sparse'].median:.2f}"
            rows.append({"batch, sparsity": f"{batch}, {100 * sparsity:g} %", **faster})
    note = f"One layer {width} x {width}: times faster than the dense product."
    return Table("Products with live weights", rows, note)


def _sparse(name: str) -> Callable[..., Any]:
    def forward(values: Any, layouts: Any, x: jax.Array) -> jax.Array:
        product: jax.Array = gj.compact.sparse(_product, native=True)(values, layouts, x)
        return product

    def of_values(values: Any, layouts: Any, x: jax.Array) -> Any:
        return jax.vjp(lambda values: forward(values, layouts, x), values)[1](x)

    def transposed(values: Any, layouts: Any, y: jax.Array) -> Any:
        return gj.compact.sparse(_transposed, native=True)(values, layouts, y)

    return {"x @ w": forward, "y @ w.T": transposed, "x.T @ y": of_values}[name]


def _product(params: Any, x: jax.Array) -> jax.Array:
    return x @ params["w"]


def _transposed(params: Any, y: jax.Array) -> jax.Array:
    return y @ params["w"].T


def _language_model(quick: bool) -> Table:
    size, rounds = ("1m", 1) if quick else ("10m", 5)
    rows: list[dict[str, str]] = []
    for sparsity in (0.9,) if quick else (0.9, 0.95):
        config = text.Settings(method="rigl", size=size, sparsity=sparsity)
        if quick:
            config = dataclasses.replace(config, context=8, batch_size=2)
        steppers = {
            "dense": language.dense(config),
            "masked": language.sparse(config),
            "compact": language.sparse(dataclasses.replace(config, compact=True)),
        }
        calls = {name: stepper.run for name, stepper in steppers.items()}
        times = timing.in_turns(calls, rounds)
        for name, m in times.items():
            bytes_held = sum(x.nbytes for x in jax.tree.leaves(steppers[name].held()))
            rows.append(
                {
                    "step": f"{name}, {100 * sparsity:g} %",
                    "ms": timing.ms(m.median),
                    "times faster than dense": f"{times['dense'].median / m.median:.2f}",
                    "quartiles": timing.quartiles(timing.ratios(times["dense"], m)),
                    "parameters and state (MB)": f"{bytes_held / 1e6:.0f}",
                }
            )
    note = (
        f"--size={size}: whole steps without an event; dense is plain AdamW with clipping. In the "
        "masked program the event is inside."
    )
    return Table("Language model with live weights alone", rows, note)
