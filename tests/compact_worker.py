"""What the tests of the native kernels run: here, with other threads, and under sanitizers."""

import concurrent.futures
import functools
import hashlib
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from granet_jax.compact import layouts, native, packing, products

# Across the tile of 512 inputs, in both directions; odd ones; blocks of 16 by 16.
SIDES = [
    *[(1, 1), (1, 7), (7, 1), (13, 5), (33, 47), (64, 64)],
    *[(511, 3), (512, 3), (513, 3), (1025, 3), (3, 511), (3, 512), (3, 513), (3, 1025), (600, 550)],
]
BATCHES = (0, 1, 2, 8, 9, 16, 17, 32, 33, 64, 65, 130)
LIVE = {  # which weights are live, of draws between 0 and 1
    "none": lambda draw: draw > 1,
    "all": lambda draw: draw <= 1,
    "few": lambda draw: draw < 0.1,
    "half": lambda draw: draw < 0.5,
    "empty rows and columns": lambda draw: (
        (draw < 0.5) & (draw[:, :1] < 0.6) & (draw[:1] < 0.6) & (np.arange(draw.shape[1]) > 0)
    ),
}
SPARE = 3  # dead slots


def window(image, inputs, outputs, size=3, stride=1, gap=1, spread=1, pad=1, groups=1):
    """Of square images; as many outputs as find an input, or fewer."""
    reach = (image - 1) * gap + 2 * pad - (size - 1) * spread
    result = max(1, reach // stride + 1)
    pairs = ((n, n) for n in (size, stride, gap, spread, pad))
    return native.Window(*pairs, groups, inputs, groups * outputs, (image,) * 2, (result,) * 2)


WINDOWS = {
    "32 places": window(32, 3, 16),
    "8 places": window(8, 33, 47),
    "7 places, stride": window(7, 16, 5, stride=2),
    "12 places, stride 3": window(12, 7, 16, size=2, stride=3, pad=0),
    "5 places, gaps": window(5, 6, 17, size=4, gap=2, pad=2),
    "4 places, many channels": window(4, 130, 70),
    "2 places": window(2, 64, 64),
    "1 place": window(1, 17, 33),
    "a wide window": window(9, 4, 3, size=5, spread=2, pad=4),
    "1x1, stride": window(9, 20, 10, size=1, stride=2, pad=0),
    "edges cut off": window(9, 5, 6, pad=-1),
    "groups": window(6, 3, 4, stride=2, groups=5),
    "a channel each": window(11, 1, 1, groups=19),
    "one channel": window(6, 1, 1),
    "across tiles of lists": window(3, 600, 9, size=2, pad=0),
}


def kernel(window, live, seed=0):
    """As :func:`laid_out`, of the kernel of a convolution."""
    shape = *window.sizes, window.inputs, window.outputs
    values, layout, w = laid_out(math.prod(shape[:3]), shape[3], live, seed)
    layout = layout._replace(sizes=layouts.written((), shape[:3], shape[3:]))
    return values, layout, w.reshape(shape)


def images(window, num, seed=1):
    """Inputs, and what could be a gradient of outputs."""
    draw = np.random.default_rng(seed)
    shapes = window.shape(num, True), window.shape(num, False)
    return [draw.normal(size=shape).astype(np.float32) for shape in shapes]


@functools.partial(jax.jit, static_argnums=0)
def convolutions(window, values, layout, x, y):
    """The convolution, the gradient of its inputs, and that of its slots."""
    of_slots = products.convolution_of_slots(window, layout, x, y)
    return (
        native.convolve(layout.by_output, window, False, x, values),
        native.convolve(layout.by_input, window, True, y, values),
        of_slots,
    )


def false_windows(window):
    """Windows that are not those of the arrays, and what is said of them."""
    return {
        window._replace(groups=2): "channels of other groups",
        window._replace(sizes=(0, 3)): "a window without a size",
        window._replace(strides=(2, 1), gaps=(2, 1)): "a stride and gaps in one convolution",
        window._replace(sizes=(3, 4)): "lists of a layer of another shape",
    }


def laid_out(inputs, outputs, live, seed=0, spare=SPARE, kernels=True):
    """Drawn values in shuffled slots, some of them dead; their layout and the dense weights."""
    draw = np.random.default_rng(seed)
    size = inputs * outputs
    places = np.flatnonzero(LIVE[live](draw.random((inputs, outputs)))).astype(np.int32)
    index = np.full(size + spare, size, np.int32)
    index[: len(places)] = places
    draw.shuffle(index)
    values = np.where(index < size, draw.normal(size=len(index)), 0).astype(np.float32)
    weights = np.zeros(size + 1, np.float32)
    weights[index] = values
    weights[size] = 0
    sizes = layouts.written((), (inputs,), (outputs,))
    layout = layouts.Layout(jnp.asarray(index), None, None, sizes)
    layout = native.lists(layout) if kernels else layout
    return jnp.asarray(values), layout, weights[:size].reshape(inputs, outputs)


def rows(batch, inputs, outputs, seed=1):
    draw = np.random.default_rng(seed)
    return [draw.normal(size=(batch, n)).astype(np.float32) for n in (inputs, outputs)]


@jax.jit
def multiplied(values, layout, x, y):
    """``x @ w``, ``y @ w.T`` and ``x.T @ y`` at the slots."""
    inputs, outputs = layouts.sides(layout)
    return (
        native.multiply(layout.by_output, outputs, x, values),
        native.multiply(layout.by_input, inputs, y, values),
        native.sample(layout.by_output, layout.capacity, x, y),
    )


@jax.jit
def event(layout, masks, keep):
    return packing.reslot(layout, masks, keep)


def lies(layout):
    """Lists that are not those of the layer, and what is said of them."""
    ends, places, slots = layout.by_output
    inputs, num = layouts.sides(layout)[0], len(places)
    beyond = "that end beyond their entries"
    outside = "with places or slots that the layer has not"
    return {
        "last end": ((ends.at[-1].set(num + 1), places, slots), beyond),
        "largest end": ((ends.at[-1].set(2**31 - 1), places, slots), beyond),
        "first end": ((ends.at[0].set(-1), places, slots), beyond),
        "negative end": ((ends.at[1].set(-5), places, slots), "that end before they begin"),
        "falling end": (
            (ends.at[1].set(ends[-1] + 1), places, slots),
            "that end before they begin",
        ),
        "fewer ends": ((ends[:-1], places, slots), "of a layer of another shape"),
        "more ends": ((jnp.pad(ends, (0, 1)), places, slots), "of a layer of another shape"),
        "fewer slots": ((ends, places, slots[:-1]), "of two lengths"),
        "fewer entries": ((ends, places[: num // 4], slots[: num // 4]), beyond),
        "place": ((ends, places.at[2].set(inputs), slots), outside),
        "last place": ((ends, places.at[ends[-1] - 1].set(2**31 - 1), slots), outside),
        "negative place": ((ends, places.at[0].set(-1), slots), outside),
        "slot": ((ends, places, slots.at[2].set(num)), outside),
        "negative slot": ((ends, places, slots.at[0].set(-(2**31))), outside),
    }


def refused(f, *args):
    """The message of the error that a program ends with; None = it ends with none."""
    try:
        jax.block_until_ready(f(*args))
    except jax.errors.JaxRuntimeError as error:
        return str(error)
    return None


def digest(tree):
    hashed = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        hashed.update(np.asarray(leaf).tobytes())
    return hashed.hexdigest()


def at_once(values, layout, x, y, times=8, products=multiplied):
    """The same products in one program and from several threads; all have the same bits."""
    alone = digest(products(values, layout, x, y))
    together = jax.jit(lambda *args: [products(*args) for _ in range(times)])
    assert {digest(out) for out in together(values, layout, x, y)} == {alone}
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(products, values, layout, x, y) for _ in range(4 * times)]
        assert {digest(call.result()) for call in calls} == {alone}


def all_of_it(sides=SIDES, batches=BATCHES):
    """The outputs of all kernels for all there is."""
    outs = []
    for inputs, outputs in sides:
        for seed, live in enumerate(LIVE):
            values, layout, weights = laid_out(inputs, outputs, live, seed)
            draw = np.random.default_rng(seed)
            masks = draw.random(weights.shape) < 0.5
            keep = masks & (weights != 0) & (draw.random(weights.shape) < 0.8)
            outs.append([layout, event(layout, jnp.asarray(masks), jnp.asarray(keep))])
            outs += [multiplied(values, layout, *rows(n, inputs, outputs)) for n in batches]
    for shape in WINDOWS.values():
        for seed, live in enumerate(LIVE):
            values, layout, _ = kernel(shape, live, seed)
            if shape.groups == max(shape.gaps) == 1:
                outs += [native.sample_all(shape, *images(shape, n)) for n in (1, 21)]
            outs += [convolutions(shape, values, layout, *images(shape, n)) for n in (1, 3, 16, 21)]
    values, layout, _ = laid_out(600, 550, "half")
    for batch in (1, 65):
        at_once(values, layout, *rows(batch, 600, 550))
    values, layout, _ = laid_out(30, 20, "half")
    for what, (ends_places_slots, message) in lies(layout).items():
        false = layout._replace(by_output=layouts.Lists(*ends_places_slots))
        told = refused(multiplied, values, false, *rows(2, 30, 20))
        assert told, what
        assert message in told, (what, told)
    shape = window(8, 20, 6)
    values, layout, _ = kernel(shape, "half")
    for what, (ends_places_slots, message) in lies(layout).items():
        false = layout._replace(by_output=layouts.Lists(*ends_places_slots))
        told = refused(convolutions, shape, values, false, *images(shape, 2))
        assert told, what
        assert message in told, (what, told)
    return outs


if __name__ == "__main__":
    _, library = sys.argv
    native._FILE = pathlib.Path(library)
    assert native.available()
    print(digest(all_of_it()))
