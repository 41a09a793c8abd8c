"""The native kernels against numpy: odd sizes, lists that lie, derivatives, any threads."""

import importlib.metadata
import operator
import os
import pathlib
import re
import shutil
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from granet_jax.compact import layouts, native, packing
from granet_jax.compact import products as sparse_products
from tests import compact_worker as worker

ROOT = pathlib.Path(__file__).parents[1]
NATIVE = sparse_products.How(True, jnp.float32)
DENSE = sparse_products.How(False, jnp.float32)


@pytest.fixture(autouse=True)
def _where_the_kernels_run(request):
    if "anywhere" not in request.node.name and not native.available():
        pytest.skip("native.cc is not built here")


def test_they_run_anywhere_they_could_be_built():
    try:
        importlib.metadata.version("granet_jax")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package is not installed, so nothing has built its kernels")
    if not any(map(shutil.which, ("c++", "g++"))):
        pytest.skip("no C++ compiler")
    assert native.available()


def test_one_tile_in_both_languages():
    source = pathlib.Path(native.__file__).with_name("native.h").read_text()
    assert re.findall(r"kTile = (\d+);", source) == [str(native._TILE)]


def assert_sums(got, wanted, of_magnitudes):
    """Equal but for the rounding of sums of products of such magnitudes."""
    assert got.dtype == np.float32
    assert got.shape == wanted.shape
    np.testing.assert_array_less(np.abs(got - wanted), 1e-6 * of_magnitudes + 1e-30)


@pytest.mark.parametrize("sides", worker.SIDES, ids=str)
def test_products_of_odd_sizes(sides):
    for seed, live in enumerate(worker.LIVE):
        values, layout, w = worker.laid_out(*sides, live, seed)
        index, w64 = np.asarray(layout.index), w.astype(np.float64)
        for batch in worker.BATCHES:
            x, y = worker.rows(batch, *sides)
            xw, yw, xy = map(np.asarray, worker.multiplied(values, layout, x, y))
            assert_sums(xw, x @ w64, np.abs(x) @ np.abs(w64))
            assert_sums(yw, y @ w64.T, np.abs(y) @ np.abs(w64.T))
            dead = index == w.size
            assert not xy[dead].any()
            outer, size = (
                np.append(a.T.astype(np.float64) @ b, 0) for a, b in ((x, y), abs_(x, y))
            )
            assert_sums(xy, np.where(dead, 0, outer[index]), np.where(dead, 0, size[index]))


def abs_(*arrays):
    return [np.abs(x) for x in arrays]


def test_what_is_off_takes_no_part():
    """Not even where its input is infinite or NaN; live weights pass these on."""
    values, layout, w = worker.laid_out(20, 30, "half", spare=5)
    draw = np.random.default_rng(2)
    x, y = worker.rows(9, 20, 30)
    x[3, 4] = np.inf
    x[5, 6] = np.nan
    xw, yw, xy = worker.multiplied(values, layout, x, y)
    reached = np.zeros((9, 30), bool)
    reached[3], reached[5] = w[4] != 0, w[6] != 0
    np.testing.assert_array_equal(~np.isfinite(xw), reached)
    assert np.isfinite(yw).all()
    live = np.asarray(layout.index)
    np.testing.assert_array_equal(~np.isfinite(xy), np.isin(live // 30, [4, 6]) & (live < 600))
    values = values + jnp.asarray(
        np.where(live == 600, draw.normal(size=len(live)), 0), jnp.float32
    )
    chex.assert_trees_all_equal(worker.multiplied(values, layout, x, y), (xw, yw, xy))


RESLOTTED = [(1, 1), (7, 3), (8, 8), (16, 5), (29, 40), (70, 20)]
jitted = {"native": jax.jit(native.reslot), "jnp": jax.jit(packing._reslot)}


def both_ways(index, masks, keep):
    """New slots by the kernel, which are those of the other way."""
    args = np.asarray(index, np.int32), np.asarray(masks, bool), np.asarray(keep, bool)
    outs = {way: f(*args) for way, f in jitted.items()}
    chex.assert_trees_all_equal(*outs.values())
    chex.assert_trees_all_equal_dtypes(*outs.values())
    return map(np.asarray, outs["native"])


@st.composite
def events(draw):
    size, capacity = draw(st.sampled_from(RESLOTTED))
    num = draw(st.integers(0, min(size, capacity)))
    live = draw(st.permutations(range(size)))[:num]
    index = draw(st.permutations(live + [size] * (capacity - num)))
    bools = st.lists(st.booleans(), min_size=size, max_size=size)
    kept = [i for i, wanted in enumerate(draw(bools)) if wanted and i in live]
    masks = [on or i in kept for i, on in enumerate(draw(bools))]
    return index, masks, kept


@given(events())
def test_slots_at_an_event(event):
    index, masks, kept = event
    size, keep = len(masks), np.isin(range(len(masks)), kept)
    new, stays, outgrown = both_ways(index, masks, keep)
    np.testing.assert_array_equal(stays, np.isin(index, kept))
    np.testing.assert_array_equal(new[stays], np.asarray(index)[stays])  # in the slots of before
    grown = [i for i in range(size) if masks[i] and not keep[i]]
    free = new[~stays]
    found = len(grown) - outgrown
    assert free[:found].tolist() == grown[:found]  # by index
    assert (free[found:] == size).all()  # dead
    assert outgrown == max(0, len(grown) - len(free))


def test_slots_of_many_weights():
    draw = np.random.default_rng(0)
    for size, capacity in ((100_003, 30_000), (100_000, 100_000), (4097, 10)):
        live = draw.choice(size, capacity // 2, replace=False)
        index = np.full(capacity, size)
        index[draw.choice(capacity, len(live), replace=False)] = live
        keep = np.zeros(size, bool)
        keep[live] = draw.random(len(live)) < 0.7
        for density in (0.0, 0.2, 1.0):
            both_ways(index, keep | (draw.random(size) < density), keep)
        both_ways(index, keep, np.zeros(size, bool))


LISTED = [(1, 1), (3, 5), (5, 520), (520, 5), (600, 513), (3, 1025)]
make_lists = jax.jit(native.lists)


@given(st.sampled_from(LISTED), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.03, 0.5, 1.0]))
def test_lists_hold_each_live_weight_once(sides, seed, density):
    draw = np.random.default_rng(seed)
    size = sides[0] * sides[1]
    index = np.where(draw.random(size) < density, np.arange(size), size).astype(np.int32)
    if draw.random() < 0.8:
        draw.shuffle(index)
    layout = make_lists(layouts.Layout(index, None, None, layouts.written((), *zip(sides))))
    live = np.flatnonzero(index < size)
    place_of = np.divmod(index, sides[1])
    for own, inputs in ((layout.by_output, 0), (layout.by_input, 1)):
        ends, places, slots = map(np.asarray, own)
        outputs = sides[1 - inputs]
        assert ends[0] == 0
        assert ends[-1] == len(live)
        assert sorted(slots[: len(live)]) == live.tolist()
        assert not places[len(live) :].any()
        assert not slots[len(live) :].any()
        lists = np.repeat(np.arange(len(ends) - 1), np.diff(ends))
        tiles, output = np.divmod(lists, outputs)
        slots, places = slots[: len(live)], places[: len(live)]
        np.testing.assert_array_equal(places, place_of[inputs][slots])
        np.testing.assert_array_equal(output, place_of[1 - inputs][slots])
        np.testing.assert_array_equal(tiles, places // native._TILE)
        assert (np.diff(places)[np.diff(lists) == 0] > 0).all()


def test_lists_of_stacked_layers():
    draw = np.random.default_rng(0)
    index = np.stack([draw.permutation(40)[:25] for _ in range(6)]).reshape(2, 3, 25)
    index = jnp.asarray(index, jnp.int32)
    stacked = native.lists(layouts.Layout(index, None, None, layouts.written((2, 3), (5,), (8,))))
    sizes = layouts.written((), (5,), (8,))
    for i, j in np.ndindex(2, 3):
        alone = native.lists(layouts.Layout(index[i, j], None, None, sizes))
        mine = jax.tree.map(lambda x, at=(i, j): x[at], tuple(stacked[:3]))
        chex.assert_trees_all_equal(mine, tuple(alone[:3]))


def test_lists_that_lie_are_refused():
    values, layout, w = worker.laid_out(30, 20, "half")
    x, y = worker.rows(2, 30, 20)
    for what, (ends_places_slots, message) in worker.lies(layout).items():
        lists = layouts.Lists(*ends_places_slots)
        for call in (
            lambda lists=lists: native.multiply(lists, 20, x, values),
            lambda lists=lists: native.sample(lists, layout.capacity, x, y),
        ):
            told = worker.refused(call)
            assert told, what
            assert f"granet_jax: lists {message}" in told, what
    told = worker.refused(lambda: native.sample(layout.by_output, layout.capacity, x, y[:1]))
    assert "inputs and outputs of two batches" in told
    masks = jnp.ones(600, bool)
    told = worker.refused(lambda: native.reslot(layout.index, masks, masks[:-1]))
    assert "masks of no layer" in told
    other = layout._replace(sizes=layouts.written((), (2,), (3,)))
    told = worker.refused(lambda: native.multiply(native.lists(other).by_output, 20, x, values))
    assert "lists of a layer of another shape" in told
    np.testing.assert_allclose(  # all is well after that
        native.multiply(layout.by_output, 20, x, values), x @ w, rtol=1e-4, atol=1e-5
    )


def test_an_index_that_lies_gives_no_lists_beyond_the_layer():
    index = jnp.asarray([-1, 5, 12, 2**31 - 1, -(2**31), 3, 3, 11], jnp.int32)
    layout = native.lists(layouts.Layout(index, None, None, layouts.written((), (3,), (4,))))
    assert layout.by_output.ends[-1] == layout.by_input.ends[-1] == 4
    chex.assert_trees_all_equal(
        layouts.dense(jnp.ones(8), layout).ravel(), jnp.zeros(12).at[jnp.array([3, 5, 11])].set(1)
    )


def quadratic(how, layout):
    """Of values, x and y, by all three products; and the same by dense weights."""

    def sparse(values, x, y):
        xw = sparse_products.multiply(how, values, layout, x)
        yw = sparse_products.multiply_transposed(how, values, layout, y)
        return jnp.sum(jnp.sin(xw) * y) + jnp.sum(jnp.cos(yw) * x)

    def dense(values, x, y):
        w = layouts.dense(values, layout)
        return jnp.sum(jnp.sin(x @ w) * y) + jnp.sum(jnp.cos(y @ w.T) * x)

    return sparse, dense


def higher(f, order):
    """The gradients of the squared norm of the gradients of ..., for values, x and y."""
    for _ in range(order - 1):
        f = (lambda g: lambda *args: sum(jnp.sum(jnp.sin(x)) for x in g(*args)))(
            jax.grad(f, (0, 1, 2))
        )
    return jax.grad(f, (0, 1, 2))


@pytest.mark.parametrize("how", [NATIVE, DENSE], ids=["native", "dense"])
def test_derivatives_of_any_order(how):
    values, layout, _ = worker.laid_out(14, 9, "half")
    args = values, *map(jnp.asarray, worker.rows(5, 14, 9))
    live = layouts.live(layout)
    sparse, dense = quadratic(how, layout)
    for order in (1, 2, 3):
        got, wanted = jax.jit(higher(sparse, order))(*args), jax.jit(higher(dense, order))(*args)
        wanted = (jnp.where(live, wanted[0], 0), *wanted[1:])
        chex.assert_trees_all_close(got, wanted, rtol=1e-3, atol=1e-3)
        assert not jnp.any(got[0][~live])


def test_derivatives_by_one_argument_alone():
    values, layout, w = worker.laid_out(14, 9, "half")
    x, _ = map(jnp.asarray, worker.rows(5, 14, 9))
    multiply = sparse_products.multiply
    chex.assert_trees_all_close(
        jax.jit(jax.jacrev(lambda x: multiply(NATIVE, values, layout, x)))(x),
        jax.jacrev(lambda x: x @ w)(x),
        rtol=1e-5,
        atol=1e-6,
    )
    by_slots = jax.jit(jax.jacrev(lambda v: multiply(NATIVE, v, layout, x)))(values)
    wanted = jax.jacrev(lambda v: x @ layouts.dense(v, layout))(values)
    chex.assert_trees_all_close(by_slots, wanted, rtol=1e-5, atol=1e-6)
    text = str(jax.make_jaxpr(jax.grad(lambda x: jnp.sum(multiply(NATIVE, values, layout, x))))(x))
    compiled = jax.jit(jax.grad(lambda x: jnp.sum(multiply(NATIVE, values, layout, x)))).lower(x)
    assert "granet_jax_sample" in text
    assert "granet_jax_sample" not in compiled.compile().as_text()  # unused, so dropped


def vmapped_over():
    """The axes of values, layout, x and y."""
    return {
        "x": (None, None, 0, None),
        "x and y": (None, None, 0, 0),
        "values": (0, None, None, None),
        "layouts": (None, 0, None, None),
        "all": (0, 0, 0, 0),
        "columns": (0, None, 1, 1),
    }


@pytest.mark.parametrize("case", vmapped_over())
def test_vmap(case):
    axes = vmapped_over()[case]
    each = [worker.laid_out(17, 11, "half", seed) for seed in range(3)]
    rows = [worker.rows(5, 17, 11, seed) for seed in range(3)]
    stacked = [
        jax.tree.map(lambda *x: jnp.stack(x), *[one[i] for one in each]) for i in range(2)
    ] + [jnp.stack([pair[i] for pair in rows]) for i in range(2)]
    alone = [each[0][0], each[0][1], *map(jnp.asarray, rows[0])]
    args = [
        one if axis is None else jnp.moveaxis(many, 0, axis) if axis else many
        for axis, one, many in zip(axes, alone, stacked, strict=True)
    ]

    def loss(values, layout, x, y):
        return quadratic(NATIVE, layout)[0](values, x, y)

    def all_of_it(*args):
        return worker.multiplied(*args), jax.grad(loss, (0, 2, 3))(*args)

    outs = jax.jit(jax.vmap(all_of_it, axes))(*args)
    for i, (values, layout, _) in enumerate(each):
        own = [values, layout, *map(jnp.asarray, rows[i])]
        mine = [one if axis is None else x for axis, one, x in zip(axes, alone, own, strict=True)]
        got = jax.tree.map(operator.itemgetter(i), outs)
        chex.assert_trees_all_close(got, all_of_it(*mine), rtol=1e-5, atol=1e-5)


def test_vmap_within_vmap_and_of_nothing():
    values, layout, w = worker.laid_out(6, 4, "half")
    multiply = jax.vmap(jax.vmap(lambda x: native.multiply(layout.by_output, 4, x, values)))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5, 6)), jnp.float32)
    np.testing.assert_allclose(multiply(x), x @ w, rtol=1e-5, atol=1e-6)
    assert multiply(x[:, :, :0]).shape == (2, 3, 0, 4)
    assert multiply(x[:, :0]).shape == (2, 0, 5, 4)
    both = jax.vmap(jax.vmap(native.multiply, (None, None, 0, None)), (None, None, None, 0))
    np.testing.assert_allclose(
        both(layout.by_output, 4, x[0], jnp.stack([values, 2 * values]))[1],
        2 * x[0] @ w,
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("sides", [(0, 4), (4, 0), (0, 0)], ids=str)
def test_layers_without_weights(sides):
    layout = native.lists(
        layouts.Layout(jnp.zeros(2, jnp.int32), None, None, layouts.written((), *zip(sides)))
    )
    values = jnp.zeros(2)
    for batch in (0, 1, 3):
        x, y = map(jnp.asarray, worker.rows(batch, *sides))
        xw, yw, xy = worker.multiplied(values, layout, x, y)
        chex.assert_trees_all_equal(
            (xw, yw, xy), (jnp.zeros((batch, sides[1])), jnp.zeros((batch, sides[0])), values)
        )
        stacked = jax.vmap(worker.multiplied, (None, None, 0, 0))(
            values, layout, jnp.stack([x, x]), jnp.stack([y, y])
        )
        assert [z.shape for z in stacked] == [(2, *z.shape) for z in (xw, yw, xy)]


@pytest.mark.parametrize("slots", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_half_precision_is_summed_in_float32(slots):
    values, layout, _ = worker.laid_out(40, 30, "half")
    values = values.astype(slots)
    x, y = (jnp.asarray(a, jnp.bfloat16) for a in worker.rows(5, 40, 30))
    how = sparse_products.How(True, jnp.bfloat16)

    def product(values, x):
        return sparse_products.multiply(how, values, layout, x)

    xw, back = jax.vjp(product, values, x)
    of_values, of_x = back(y)
    assert (xw.dtype, of_values.dtype, of_x.dtype) == (jnp.bfloat16, slots, jnp.bfloat16)
    f32 = [a.astype(jnp.float32) for a in (values, x, y)]
    wanted, back = jax.vjp(lambda v, x: sparse_products.multiply(NATIVE, v, layout, x), *f32[:2])
    chex.assert_trees_all_equal(xw, wanted.astype(jnp.bfloat16))
    wanted = back(f32[2])
    chex.assert_trees_all_equal(of_values, wanted[0].astype(slots))
    chex.assert_trees_all_equal(of_x, wanted[1].astype(jnp.bfloat16))


def test_the_same_bits_in_one_program_and_from_several_threads():
    values, layout, _ = worker.laid_out(600, 550, "few")
    for batch in (1, 16, 65):
        worker.at_once(values, layout, *worker.rows(batch, 600, 550), times=3)


@pytest.mark.parametrize(
    "of", ["two threads", pytest.param("more threads", marks=pytest.mark.full)]
)
def test_the_same_bits_for_any_number_of_threads(of):
    counts = ("1", "2") if of == "two threads" else ("1", "3", "8")
    program = (
        "from tests import compact_worker as worker\n"
        "sides = worker.SIDES if {full} else [(33, 47), (1025, 3), (600, 550)]\n"
        "print(worker.digest(worker.all_of_it(sides, (1, 8, 33, 130))))"
    ).format(full=of == "more threads")
    told = set()
    for count in counts:  # of XLA's threads
        environment = os.environ | {"NPROC": count, "JAX_NUM_CPU_DEVICES": "1"}
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        told.add(done.stdout)
    assert len(told) == 1
