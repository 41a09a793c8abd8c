"""Convolutions with live weights alone, by layer and in whole networks, against dense ones."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import granet_jax as gj
from experiments.benchmarks import timing
from experiments.benchmarks.tables import Table
from experiments.models import MODELS

SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
PARTS = ("forward", "of inputs", "of weights")
_NUMBERS = ("NHWC", "HWIO", "NHWC")


class Layer(NamedTuple):
    """One convolution."""

    image: int  # height and width
    inputs: int
    outputs: int
    window: int = 3
    stride: int = 1
    batch: int = 128

    @property
    def name(self) -> str:
        """As in tables."""
        sides = f"{self.image}x{self.image}x{self.inputs}"
        other = f" to {self.outputs}" if self.outputs != self.inputs else ""
        kind = f", {self.window}x{self.window}" if self.window != 3 else ""
        kind += f", stride {self.stride}" if self.stride > 1 else ""
        return sides + other + kind + (f", batch {self.batch}" if self.batch != 128 else "")


LAYERS = [
    Layer(32, 16, 16),
    Layer(16, 32, 32),
    Layer(8, 64, 64),
    Layer(16, 128, 128),
    Layer(4, 512, 512),
    Layer(2, 512, 512),
    Layer(32, 16, 32, stride=2),
    Layer(16, 32, 64, stride=2),
    Layer(16, 64, 128, window=1),
    Layer(32, 64, 128, window=1, stride=2),
    Layer(8, 64, 64, batch=1),
]
NETWORKS = [("resnet20", 32, 128), ("wrn_22_2", 32, 128), ("vgg19", 32, 128)]  # image, batch
QUICK = [Layer(4, 4, 4, batch=2), Layer(4, 4, 4, window=1, batch=2)]


class Calls(NamedTuple):
    """The three parts of training a layer, each a call without arguments."""

    forward: Callable[[], Any]
    of_inputs: Callable[[], Any]
    of_weights: Callable[[], Any]

    @classmethod
    def of(cls, function: Callable[..., Any], weights: Any, x: jax.Array, y: jax.Array) -> "Calls":
        """Of ``function(weights, x)``, and a gradient of its outputs."""

        def of_inputs(weights: Any, x: jax.Array, y: jax.Array) -> Any:
            return jax.vjp(functools.partial(function, weights), x)[1](y)

        def of_weights(weights: Any, x: jax.Array, y: jax.Array) -> Any:
            return jax.vjp(lambda weights: function(weights, x), weights)[1](y)

        return cls(
            functools.partial(jax.jit(function), weights, x),
            functools.partial(jax.jit(of_inputs), weights, x, y),
            functools.partial(jax.jit(of_weights), weights, x, y),
        )


def tables(quick: bool) -> list[Table]:
    """Dense convolutions by XLA and by this library; those with live weights alone."""
    layers, sparsities, rounds = (QUICK, (0.75,), 2) if quick else (LAYERS, SPARSITIES, 9)
    dense, sparse = [], []
    for layer in layers:
        times = _measure(layer, sparsities, rounds)
        dense.append(_dense_row(layer, times))
        sparse += [_sparse_row(layer, times, sparsity) for sparsity in sparsities]
    rival = (
        "One convolution of float32 and its two gradients, in ms. Dense is "
        "granet_jax.compact.conv_general_dilated, whose convolutions are those of XLA but for "
        "windows larger than their image; gradients of weights are its own from 5 x 5 places on."
    )
    return [
        Table("Dense convolutions", dense, rival),
        Table(
            "Convolutions with live weights",
            sparse,
            "Times faster than the dense convolution of the table before, all within one run; "
            "below 1 the layer is better unpacked.",
        ),
        _networks(quick),
    ]


def _measure(layer: Layer, sparsities: Any, rounds: int) -> dict[tuple[str, str], timing.Measured]:
    """By way and part."""
    draw = np.random.default_rng(0)
    shape = layer.batch, layer.image, layer.image, layer.inputs
    x = jnp.asarray(draw.normal(size=shape), jnp.float32)
    shape = layer.window, layer.window, layer.inputs, layer.outputs
    params = {"kernel": jnp.asarray(draw.normal(size=shape), jnp.float32)}

    def by(convolve: Callable[..., Any], params: Any, x: jax.Array) -> jax.Array:
        strides, edge = (layer.stride,) * 2, layer.window // 2
        edges, kernel = [(edge, edge)] * 2, params["kernel"]
        y: jax.Array = convolve(x, kernel, strides, edges, dimension_numbers=_NUMBERS)
        return y

    plain = functools.partial(by, jax.lax.conv_general_dilated)
    dense = functools.partial(by, gj.compact.conv_general_dilated)
    y = jnp.asarray(draw.normal(size=jax.eval_shape(plain, params, x).shape), jnp.float32)
    ways = {"XLA": Calls.of(plain, params, x, y), "dense": Calls.of(dense, params, x, y)}
    for sparsity in sparsities:
        masks = gj.static(sparsity=sparsity, key=jax.random.key(1)).init(params).masks
        values, layouts = gj.compact.pack(params, masks)
        function = gj.compact.sparse(plain, native=True)
        live = functools.partial(_of_values, function, layouts)
        ways[str(sparsity)] = Calls.of(live, values, x, y)
    runs = {
        (way, part): call
        for way, calls in ways.items()
        for part, call in zip(PARTS, calls, strict=True)
    }
    names = {f"{way} {part}": (way, part) for way, part in runs}
    times = timing.in_turns({name: runs[key] for name, key in names.items()}, rounds)
    return {names[name]: measured for name, measured in times.items()}


def _of_values(function: Callable[..., Any], layouts: Any, values: Any, x: jax.Array) -> Any:
    return function(values, layouts, x)


def _dense_row(layer: Layer, times: Any) -> dict[str, str]:
    row = {"layer": layer.name}
    for part in PARTS:
        row[f"{part}, XLA"] = timing.ms(times["XLA", part].median)
        row[f"{part}, dense"] = timing.ms(times["dense", part].median)
    row["whole: times faster"] = f"{_whole(times, 'XLA') / _whole(times, 'dense'):.2f}"
    return row


def _sparse_row(layer: Layer, times: Any, sparsity: float) -> dict[str, str]:
    way, row = str(sparsity), {"layer, sparsity": f"{layer.name}, {100 * sparsity:g} %"}
    for part in PARTS:
        row[part] = f"{times['dense', part].median / times[way, part].median:.2f}"
    row["whole"] = f"{_whole(times, 'dense') / _whole(times, way):.2f}"
    row["whole, against XLA"] = f"{_whole(times, 'XLA') / _whole(times, way):.2f}"
    return row


def _whole(times: Any, way: str) -> float:
    return sum(times[way, part].median for part in PARTS)


def _networks(quick: bool) -> Table:
    networks, sparsities = ([("lenet5", 16, 2)], (0.9,)) if quick else (NETWORKS, (0.9, 0.95))
    rows = []
    for name, image, batch in networks:
        steps = {"dense": _step(name, image, batch, None)}
        steps |= {f"{100 * s:g} %": _step(name, image, batch, s) for s in sparsities}
        times = timing.in_turns(steps, 2 if quick else 7)
        for way, m in times.items():
            rows.append(
                {
                    "network": f"{name}, batch {batch}, {way}",
                    "ms": timing.ms(m.median),
                    "images/s": f"{batch / m.median:,.0f}",
                    "times faster": f"{times['dense'].median / m.median:.2f}",
                    "quartiles": timing.quartiles(timing.ratios(times["dense"], m)),
                }
            )
    note = (
        "Whole steps (forward pass, gradients, SGD with momentum), without an event of RigL. Dense "
        "is plain training with the dense convolutions of the first table."
    )
    return Table("Networks of convolutions with live weights", rows, note)


def _step(name: str, image: int, batch: int, sparsity: float | None) -> Callable[[], Any]:
    """Steps that go on from each other; None = dense."""
    x = jax.random.normal(jax.random.key(0), (batch, image, image, 3))
    labels = jax.random.randint(jax.random.key(1), (batch,), 0, 10)
    model = MODELS[name](num_classes=10)
    variables = dict(jax.jit(model.init)(jax.random.key(2), x[:1]))
    params = variables.pop("params")

    def loss(params: Any, x: jax.Array) -> jax.Array:
        told: dict[str, Any] = {"train": True, "mutable": list(variables)} if variables else {}
        out: Any = model.apply({"params": params, **variables}, x, **told)
        logits = out[0] if variables else out
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    tx: Any = optax.sgd(0.1, momentum=0.9)
    if sparsity is not None:
        key = jax.random.key(3)
        method = gj.rigl(sparsity=sparsity, update_every=100, total_steps=10**6, key=key)
        tx = gj.compact.sparsify(tx, method)
    state = tx.init(params)
    if sparsity is not None:
        params = gj.compact.to_slots(params, gj.compact.get_layouts(state))

    def step(params: Any, state: Any, x: jax.Array) -> Any:
        if sparsity is None:
            updates, state = tx.update(jax.grad(loss)(params, x), state, params)
        else:
            layouts = gj.compact.get_layouts(state)
            grads = jax.grad(gj.compact.sparse(loss))(params, layouts, x)
            updates, state = tx.update(grads, state, params, event=False)
        return optax.apply_updates(params, updates), state

    jitted = jax.jit(step, donate_argnums=(0, 1))
    carry = params, state

    def run() -> None:
        nonlocal carry
        carry = jax.block_until_ready(jitted(*carry, x))  # donated by the next call

    return run
