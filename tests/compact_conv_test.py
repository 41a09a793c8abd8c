"""Convolutions with live weights against numpy: odd sizes, steps, gaps, edges, groups."""

import functools
import math

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from granet_jax import compact, jaxprs
from granet_jax.compact import convolutions, layouts, native
from tests import compact_worker as worker


@pytest.fixture(autouse=True)
def _where_the_kernels_run():
    if not native.available():
        pytest.skip("native.cc is not built here")


def convolution(window, x, w, y):
    """The convolution, and its gradients of inputs and kernel, place by place of the window."""
    x, w, y = (a.astype(np.float64) for a in (x, w, y))
    out, of_x, of_w = np.zeros(y.shape), np.zeros(x.shape), np.zeros(w.shape)
    own = window.outputs // window.groups

    def inputs(axis, k):
        """Of each output: whether a place of the window has an input, and which."""
        o, step = np.arange(window.result[axis]), window.strides[axis]
        at = o * step + k * window.spread[axis] - window.pads[axis]
        i, rest = np.divmod(at, window.gaps[axis])
        inside = (rest == 0) & (i >= 0) & (i < window.image[axis])
        return o[inside], i[inside]

    for a, b in np.ndindex(*window.sizes):
        (rows, x_rows), (columns, x_columns) = inputs(0, a), inputs(1, b)
        of, at = np.ix_(rows, columns), np.ix_(x_rows, x_columns)
        for g in range(window.groups):
            i = slice(g * window.inputs, (g + 1) * window.inputs)
            o = slice(g * own, (g + 1) * own)
            seen, back = x[:, *at, i], y[:, *of, o]
            out[:, *of, o] += seen @ w[a, b, :, o]
            of_x[:, *at, i] += back @ w[a, b, :, o].T
            of_w[a, b, :, o] = np.einsum("nhwi,nhwo->io", seen, back)
    return out, of_x, of_w


def assert_right(window, images, live, seed=0):
    values, layout, w = worker.kernel(window, live, seed)
    x, y = worker.images(window, images)
    got = worker.convolutions(window, values, layout, x, y)
    wanted = convolution(window, x, w, y)
    sizes = convolution(window, *(np.abs(a) for a in (x, w, y)))
    index = np.asarray(layout.index)
    for one, right, size in zip(got[:2], wanted[:2], sizes[:2], strict=True):
        np.testing.assert_array_less(np.abs(one - right), 2e-6 * size + 1e-30)
    of_slots, size = (np.append(a[2].ravel(), 0)[index] for a in (wanted, sizes))
    np.testing.assert_array_less(np.abs(got[2] - of_slots), 2e-6 * size + 1e-30)
    assert not np.asarray(got[2])[index == w.size].any()


@pytest.mark.parametrize("name", worker.WINDOWS)
def test_sizes_of_all_kinds(name):
    for seed, live in enumerate(worker.LIVE):
        for images in (1, 3, 16, 21):
            assert_right(worker.WINDOWS[name], images, live, seed)


@st.composite
def windows(draw):
    def pair(low, high):
        return draw(st.tuples(st.integers(low, high), st.integers(low, high)))

    sizes, spread, pads, image = pair(1, 4), pair(1, 3), pair(-1, 4), pair(1, 12)
    strides, gaps = draw(
        st.sampled_from([((1, 1), (1, 1)), (pair(1, 3), (1, 1)), ((1, 1), pair(1, 3))])
    )
    groups, inputs, outputs = draw(st.sampled_from([1, 1, 1, 2, 3])), *pair(1, 20)
    result = pair(1, 12)
    return native.Window(
        *(sizes, strides, gaps, spread, pads, groups, inputs, groups * outputs, image, result)
    )


@settings(max_examples=60)
@given(windows(), st.sampled_from([1, 2, 11, 12, 17, 40]), st.sampled_from(list(worker.LIVE)))
def test_any_window(window, images, live):
    assert_right(window, images, live)


@pytest.mark.parametrize("images", [0, 1, 5])
def test_no_images_and_no_channels(images):
    for inputs, outputs in ((0, 3), (3, 0)):
        window = worker.window(8, inputs, outputs)
        layout = layouts.Layout(
            jnp.zeros(2, jnp.int32), None, None, layouts.written((), (3, 3, inputs), (outputs,))
        )
        x, y = worker.images(window, images)
        got = worker.convolutions(window, jnp.zeros(2), native.lists(layout), x, y)
        assert not any(np.asarray(a).any() for a in got)
    values, layout, _ = worker.kernel(worker.window(8, 3, 4), "half")
    x, y = worker.images(worker.window(8, 3, 4), 0)
    got = worker.convolutions(worker.window(8, 3, 4), values, layout, x, y)
    assert [a.shape for a in got] == [y.shape, x.shape, values.shape]
    assert not got[2].any()


def test_lists_and_windows_that_lie_are_refused():
    window = worker.window(8, 20, 6)
    values, layout, _ = worker.kernel(window, "half")
    x, y = worker.images(window, 2)
    for what, (ends_places_slots, message) in worker.lies(layout).items():
        false = layout._replace(by_output=layouts.Lists(*ends_places_slots))
        told = worker.refused(worker.convolutions, window, values, false, x, y)
        assert told, what
        assert f"granet_jax: lists {message}" in told, what
    for false, message in worker.false_windows(window).items():
        told = worker.refused(worker.convolutions, false, values, layout, x, y)
        assert told, false
        assert message in told


def test_the_same_bits_in_one_program_and_from_several_threads():
    window = worker.window(9, 20, 33)
    values, layout, _ = worker.kernel(window, "half")
    run = functools.partial(worker.convolutions, window)
    worker.at_once(values, layout, *worker.images(window, 40), times=3, products=run)


NUMBERS = ("NHWC", "HWIO", "NHWC")
CONVOLUTIONS = {
    "3x3": ((9, 8), (3, 3, 5, 7), {"padding": "SAME"}),
    "strides": ((9, 8), (3, 3, 5, 7), {"padding": "SAME", "window_strides": (2, 2)}),
    "gaps": ((5, 4), (4, 4, 5, 7), {"padding": [(2, 1), (1, 2)], "lhs_dilation": (2, 2)}),
    "spread": ((9, 8), (3, 2, 5, 7), {"padding": [(2, 1), (0, 3)], "rhs_dilation": (2, 1)}),
    "groups": ((7, 7), (3, 3, 2, 6), {"padding": "SAME", "feature_group_count": 3}),
    "1x1": ((7, 6), (1, 1, 5, 7), {"padding": "VALID"}),
    "1x1, strides": ((7, 6), (1, 1, 5, 7), {"padding": "VALID", "window_strides": (2, 3)}),
    "1x1, edges": ((7, 6), (1, 1, 5, 7), {"padding": [(1, 2), (0, 1)]}),
    "stride and gaps": (
        (7, 6),
        (3, 3, 5, 7),
        {"padding": [(1, 1), (1, 1)], "window_strides": (2, 2), "lhs_dilation": (2, 2)},
    ),
}


def of_case(name, dtype=jnp.float32):
    """A loss of a kernel and images, and both."""
    image, shape, how = CONVOLUTIONS[name]
    draw = np.random.default_rng(0)
    channels = shape[2] * how.get("feature_group_count", 1)
    x = jnp.asarray(draw.normal(size=(3, *image, channels)), dtype)
    w = jnp.asarray(draw.normal(size=shape) * (draw.random(shape) < 0.3), dtype)
    given = {"window_strides": (1, 1), "dimension_numbers": NUMBERS, **how}

    def loss(params, x):
        return jnp.sum(jnp.sin(jax.lax.conv_general_dilated(x, params["w"], **given)))

    return loss, {"w": w}, x


@pytest.mark.parametrize("kernels", [True, False], ids=["native", "dense"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_models_with_convolutions(name, kernels):
    """Also by unpacking, and gradients of gradients."""
    loss, params, x = of_case(name)
    values, where = compact.pack(params, jax.tree.map(lambda x: x != 0, params))
    sparse = compact.sparse(loss, native=kernels)
    told = compact.table(loss, values, where, x, native=kernels)
    if name == "stride and gaps":
        assert "a stride and gaps" in told
    else:
        assert ("native" if kernels else "dense") in told.splitlines()[1]

    def twice(f):
        return lambda *args: sum(jnp.sum(jnp.sin(g)) for g in jax.grad(f, (0, -1))(*args)[1:])

    got = jax.jit(jax.value_and_grad(sparse, (0, 2)))(values, where, x)
    wanted = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x)
    in_slots = compact.to_slots(wanted[1][0], where)
    chex.assert_trees_all_close(got, (wanted[0], (in_slots, wanted[1][1])), rtol=1e-5, atol=1e-5)
    got = jax.jit(jax.grad(twice(sparse)))(values, where, x)
    wanted = compact.to_slots(jax.jit(jax.grad(twice(loss)))(params, x), where)
    chex.assert_trees_all_close(got, wanted, rtol=1e-4, atol=1e-4)
    dense = compact.value_and_dense_grad(loss, native=kernels)
    chex.assert_trees_all_close(
        jax.jit(dense)(values, where, x),
        jax.jit(jax.value_and_grad(loss))(params, x),
        rtol=1e-5,
        atol=1e-5,
    )


def test_what_is_told_of_convolutions():
    loss, params, x = of_case("3x3")
    values, where = compact.pack(params, jax.tree.map(lambda x: x != 0, params))
    line = compact.table(loss, values, where, x).splitlines()[1]
    assert "(3, 9, 8, 5) x (3, 3, 5, 7)" in line
    full, where = compact.pack(params, jax.tree.map(lambda x: jnp.ones_like(x, bool), params))
    assert "dense  density" in compact.table(loss, full, where, x)


def test_other_orders_of_axes():
    draw = np.random.default_rng(1)
    w = draw.normal(size=(3, 3, 4, 6)) * (draw.random((3, 3, 4, 6)) < 0.3)
    x = jnp.asarray(draw.normal(size=(2, 4, 7, 8)), jnp.float32)
    line, kernel = x[:, :, 0], w[0] * 1.0

    def images_last(params, x):
        numbers = ("NCHW", "HWIO", "NCHW")
        y = jax.lax.conv_general_dilated(x, params["w"], (1, 1), "SAME", dimension_numbers=numbers)
        return jnp.sum(jnp.sin(y))

    def transposed(params, x):
        numbers = ("NCHW", "OIHW", "NHWC")
        w = params["w"].transpose(3, 2, 0, 1)
        y = jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers)
        return jnp.sum(jnp.sin(y))

    def of_lines(params, x):
        numbers = ("NCH", "HIO", "NHC")
        y = jax.lax.conv_general_dilated(x, params["w"], (2,), "SAME", dimension_numbers=numbers)
        return jnp.sum(jnp.sin(y))

    for loss, image, leaf in (
        (images_last, x, w),
        (transposed, x, w),
        (of_lines, line, kernel),
    ):
        params = {"w": jnp.asarray(leaf, jnp.float32)}
        values, where = compact.pack(params, jax.tree.map(lambda x: x != 0, params))
        sparse = compact.sparse(loss, native=True)
        assert "native" in compact.table(loss, values, where, image, native=True)
        got = jax.jit(jax.value_and_grad(sparse, (0, 2)))(values, where, image)
        value, (of_w, of_x) = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, image)
        wanted = value, (compact.to_slots(of_w, where), of_x)
        chex.assert_trees_all_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axes", [(None, 0), (0, 0), (0, None)], ids=str)
def test_vmap(axes):
    loss, params, x = of_case("strides")
    values, where = compact.pack(params, jax.tree.map(lambda x: x != 0, params))
    many = {"w": jnp.stack([values["w"], 2 * values["w"]])}, jnp.stack([x, x + 1])
    args = [a if axis is None else b for axis, a, b in zip(axes, (values, x), many, strict=True)]
    gradients = jax.grad(lambda values, x: compact.sparse(loss)(values, where, x), (0, 1))
    got = jax.jit(jax.vmap(gradients, axes))(*args)
    for i in range(2):
        own = [
            a if axis is None else jax.tree.map(lambda z, i=i: z[i], a)
            for axis, a in zip(axes, args, strict=True)
        ]
        mine = jax.tree.map(lambda z, i=i: z[i], got)
        chex.assert_trees_all_close(mine, jax.jit(gradients)(*own), rtol=1e-5, atol=1e-5)


def test_half_precision_is_summed_in_float32():
    loss, params, x = of_case("3x3", jnp.bfloat16)
    values, where = compact.pack(params, jax.tree.map(lambda x: x != 0, params))
    got = jax.grad(compact.sparse(loss))(values, where, x)
    f32 = jax.tree.map(lambda x: x.astype(jnp.float32), (values, x))
    wanted = jax.grad(compact.sparse(loss))(f32[0], where, f32[1])
    assert got["w"].dtype == jnp.bfloat16
    chex.assert_trees_all_close(got["w"].astype(jnp.float32), wanted["w"], rtol=0.05, atol=0.3)


DENSE = {
    "3x3": worker.window(9, 5, 7),
    "strides": worker.window(12, 4, 9, stride=2),
    "spread": worker.window(9, 5, 7, spread=2, pad=2),
    "smaller than the window": worker.window(2, 5, 7),
    "one place": worker.window(1, 5, 7),
    "1x1": worker.window(8, 9, 13, size=1, pad=0),
    "1x1, strides": worker.window(12, 9, 13, size=1, stride=2, pad=0),
    "edges cut off": worker.window(12, 5, 6, pad=-1),
}


@pytest.mark.parametrize("images", [1, 13, 70])
@pytest.mark.parametrize("name", DENSE)
def test_gradients_of_dense_convolutions(name, images):
    window = DENSE[name]
    x, y = worker.images(window, images)
    shape = *window.sizes, window.inputs, window.outputs
    w = np.random.default_rng(2).normal(size=shape).astype(np.float32)
    how = {
        "window_strides": window.strides,
        "padding": convolutions._edges(window),
        "rhs_dilation": window.spread,
        "dimension_numbers": NUMBERS,
    }

    def run(function):
        out, back = jax.vjp(lambda x, w: function(x, w, **how), x, w)
        return out, *back(y)

    got = jax.jit(lambda: run(compact.conv_general_dilated))()
    wanted = convolution(window, x, w, y)
    sizes = convolution(window, *(np.abs(a) for a in (x, w, y)))
    for one, right, size in zip(got, wanted, sizes, strict=True):
        np.testing.assert_array_less(np.abs(one - right), 2e-6 * size + 1e-30)
    text = str(jax.make_jaxpr(lambda: run(compact.conv_general_dilated))())
    is_large = images * math.prod(window.result) >= convolutions._LEAST
    is_large = is_large and min(window.result) > convolutions._FEW
    assert ("granet_jax_sample_all" in text) == is_large
    all_weights = native.sample_all(window, x, y)
    np.testing.assert_array_less(np.abs(all_weights - wanted[2]), 2e-6 * sizes[2] + 1e-30)


def test_inputs_that_no_output_reads_are_not_cut_off():
    window = DENSE["1x1, strides"]  # reads places 0 to 10 of 12
    assert convolutions._edges(window) == [(0, 0), (0, 0)]
    assert convolutions._edges(DENSE["edges cut off"]) == [(-1, -1), (-1, -1)]
    x, w = jnp.ones((2, 1, 1, 3)), jnp.ones((1, 1, 3, 4))
    none = {"padding": [(0, -1)] * 2, "window_strides": (2, 2), "dimension_numbers": NUMBERS}
    chex.assert_shape(compact.conv_general_dilated(x, w, **none), (2, 0, 0, 4))


def test_dense_convolutions_are_plain_where_they_are_read():
    loss, params, x = of_case("3x3")

    def with_own(params, x):
        y = compact.conv_general_dilated(x, params["w"], (1, 1), "SAME", dimension_numbers=NUMBERS)
        return jnp.sum(jnp.sin(y))

    values, where = compact.pack(params, jax.tree.map(lambda x: x != 0, params))
    assert compact.table(with_own, values, where, x) == compact.table(loss, values, where, x)
    chex.assert_trees_all_close(
        jax.jit(jax.value_and_grad(with_own))(params, x),
        jax.jit(jax.value_and_grad(loss))(params, x),
        rtol=1e-5,
        atol=1e-5,
    )
    twice = jax.grad(lambda params: jnp.sum(jnp.sin(jax.grad(with_own)(params, x)["w"])))
    right = jax.grad(lambda params: jnp.sum(jnp.sin(jax.grad(loss)(params, x)["w"])))
    chex.assert_trees_all_close(twice(params), right(params), rtol=1e-4, atol=1e-4)


def test_what_is_read_is_not_what_jax_traced_before():
    """Calls and loops of which JAX keeps a trace, first traced as they are, and then read."""
    _, params, x = of_case("3x3")

    def own(params, x):
        return compact.conv_general_dilated(
            x, params["w"], (1, 1), "SAME", dimension_numbers=NUMBERS
        )

    def body(total, x):
        return total + jnp.sum(own(params, x)), None

    called, again = jax.jit(own), jax.checkpoint(own)
    values, where = compact.pack(params, jax.tree.map(lambda x: x != 0, params))
    for function in (called, again):
        before = str(jax.make_jaxpr(function)(params, x))
        assert "custom_vjp" in before
        assert "own derivative" not in compact.table(function, values, where, x)
        assert str(jax.make_jaxpr(function)(params, x)) == before
    looped = jax.make_jaxpr(lambda xs: jax.lax.scan(body, 0.0, xs))
    assert "custom_vjp" in str(looped(x[None]))
    read, _ = jaxprs.trace(lambda xs: jax.lax.scan(body, 0.0, xs), x[None])
    assert "custom_vjp" not in str(read)
    assert "custom_vjp" in str(looped(x[None]))


@pytest.mark.parametrize("live", [0.3, 1.0])
@pytest.mark.parametrize("image", [(9, 8), (2, 2)], ids=["", "wide"])
@pytest.mark.parametrize("kernels", [True, False, None], ids=str)
def test_results_of_a_wider_type(kernels, image, live):
    """Of bfloat16, summed in float32 and left so; gradients are bfloat16 again."""
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.normal(size=(3, *image, 5)), jnp.bfloat16)
    mask = jnp.asarray(draw.random((3, 3, 5, 7)) < live)
    params = {"w": jnp.where(mask, draw.normal(size=mask.shape), 0).astype(jnp.bfloat16)}
    how = {"dimension_numbers": NUMBERS, "preferred_element_type": jnp.float32}

    def convolved(params, x):
        return jax.lax.conv_general_dilated(x, params["w"], (1, 1), "SAME", **how)

    def loss(params, x):
        return jnp.sum(jnp.sin(convolved(params, x)))

    values, where = compact.pack(params, {"w": mask})
    got = compact.sparse(convolved, native=kernels)(values, where, x)
    chex.assert_trees_all_close(got, convolved(params, x), rtol=1e-5, atol=1e-5)

    def in_f32(params, x):  # JAX 0.6 has no gradient of the other
        return loss(*jax.tree.map(lambda x: x.astype(jnp.float32), (params, x)))

    of_w, of_x = jax.grad(in_f32, (0, 1))(params, x)
    grads = jax.grad(compact.sparse(loss, native=kernels), (0, 2))(values, where, x)
    wanted = compact.to_slots(of_w, where), of_x
    chex.assert_trees_all_equal_dtypes(grads, wanted)
    as_f32 = (jax.tree.map(lambda x: x.astype(jnp.float32), tree) for tree in (grads, wanted))
    chex.assert_trees_all_close(*as_f32, rtol=0.02, atol=0.02)
    _, dense = compact.value_and_dense_grad(loss, native=kernels)(values, where, x)
    chex.assert_trees_all_equal_dtypes(dense, of_w)


EMPTY = {  # images, kernel, and how
    "no place": ((2, 2, 2, 3), (3, 3, 3, 4), {"window_strides": (2, 2), "padding": "VALID"}),
    "no input": ((2, 2, 2, 0), (3, 3, 0, 4), {"padding": "SAME"}),
    "no output": ((2, 2, 2, 3), (3, 3, 3, 0), {"padding": "SAME"}),
    "no image": ((0, 2, 2, 3), (3, 3, 3, 4), {"padding": "SAME"}),
    "no row, gaps": (
        (2, 0, 5, 3),
        (3, 3, 3, 4),
        {"padding": [(3, 3), (1, 1)], "lhs_dilation": (2, 2)},
    ),
    "all cut off": (
        (2, 3, 3, 3),
        (1, 1, 3, 4),
        {"padding": [(-3, 0), (0, 0)], "window_strides": (3, 3)},
    ),
}


@pytest.mark.parametrize("name", EMPTY)
def test_empty_convolutions(name):
    image, shape, how = EMPTY[name]
    x, w = jnp.ones(image), jnp.ones(shape)
    given = {"window_strides": (1, 1), "dimension_numbers": NUMBERS, **how}

    def run(function):
        out, back = jax.vjp(lambda x, w: function(x, w, **given), x, w)
        return out, *back(jnp.ones_like(out))

    wanted = run(jax.lax.conv_general_dilated)
    chex.assert_trees_all_close(run(compact.conv_general_dilated), wanted)
    if not w.size:
        return  # no leaf to prune
    values, where = compact.pack({"w": w}, {"w": jnp.ones(shape, bool)})
    for kernels in (True, False):
        sparse = compact.sparse(
            lambda p, x: jax.lax.conv_general_dilated(x, p["w"], **given), native=kernels
        )
        out, back = jax.vjp(lambda values, x, f=sparse: f(values, where, x), values, x)
        of_w, of_x = back(jnp.ones_like(out))
        in_slots = compact.to_slots({"w": wanted[2]}, where)
        chex.assert_trees_all_close((out, of_x, of_w), (*wanted[:2], in_slots))


def test_sizes_that_are_not_known():
    """``jax.export`` with symbols for the number of images, and for their sides."""
    _, params, x = of_case("3x3")
    values, where = compact.pack(params, jax.tree.map(lambda x: x != 0, params))

    def own(x):
        return compact.conv_general_dilated(
            x, params["w"], (1, 1), "SAME", dimension_numbers=NUMBERS
        )

    def in_slots(x):
        how = {"dimension_numbers": NUMBERS}
        return compact.sparse(
            lambda p, x: jax.lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", **how)
        )(values, where, x)

    for sizes in ("n, 9, 8, 5", "n, 2, 2, 5", "n, h, h, 5"):
        shape = jax.ShapeDtypeStruct(jax.export.symbolic_shape(sizes), jnp.float32)
        image = x if "h" not in sizes else x[:, :8]
        image = image[:, :2, :2] if "2" in sizes else image
        for function in (own, in_slots):
            exported = jax.export.export(jax.jit(function))(shape)
            np.testing.assert_allclose(exported.call(image), function(image), rtol=1e-5, atol=1e-5)
        exported = jax.export.export(jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(own(x))))))(shape)
        assert exported.call(image).shape == image.shape
