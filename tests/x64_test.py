"""With ``jax_enable_x64``: the same masks and dtypes as without, and float64 ranked as float64."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import granet_jax as gj
from granet_jax import compact, selection
from granet_jax.methods import lottery
from tests import acceptance_test, tables

ROWS = list(itertools.product(tables.METHODS, tables.INNERS, ("float32", "float64")))
_cheap = itertools.cycle([("momentum", "float32"), ("sgd", "float64")])
SLICE = [(method, *next(_cheap)) for method in tables.METHODS]
NEAR = 1 + 2.0**-40  # more than 1 in float64, but not in float32


@pytest.fixture(autouse=True)
def _x64():
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.config.update("jax_enable_x64", False)


@pytest.fixture(params=["many devices", "one device"])
def devices(request, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1 if request.param == "one device" else 8)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize("row", SLICE, ids="-".join)
def test_each_method(row):
    method, inner, dtype = row
    acceptance_test.check(method, inner, "plain", dtype)


@pytest.mark.full
@pytest.mark.parametrize("row", sorted(set(ROWS) - set(SLICE)), ids="-".join)
def test_all_pairs(row):
    method, inner, dtype = row
    acceptance_test.check(method, inner, "plain", dtype)


def test_float32_parameters_get_the_masks_of_before():
    params = jax.tree.map(np.asarray, gj.testing.example_params())
    grads = jax.tree.map(np.asarray, tables.random_grads(params, 1))
    names = ("granet_sparse_start", "snfs", "set_by_sign", "set_itop_unexplored")
    makers = [(tables.METHODS | tables.VARIANTS)[name][0] for name in names]

    def event(method, params, grads):
        state = method.init(params)
        state = state if method.observe is None else method.observe(state, grads)
        return method.update(state, gj.Event(params, grads, step=jnp.int32(12)))[0].masks

    def masks_of_all():
        methods = [make() for make in makers]
        return jax.device_get(
            jax.jit(lambda *args: [event(m, *args) for m in methods])(params, grads)
        )

    with_x64 = masks_of_all()
    jax.config.update("jax_enable_x64", False)
    chex.assert_trees_all_equal(with_x64, masks_of_all())


def by_sort(scores, k):
    """Best first: inf, numbers, -inf, NaN; ties by index. float64 by numpy's own order."""
    rank = np.where(np.isnan(scores), 0, np.sign(scores) * np.isinf(scores) + 2)
    finite = np.where(np.isfinite(scores), scores, 0.0) + 0.0
    mask = np.zeros(scores.shape, bool)
    mask[np.lexsort((np.arange(scores.size), -finite, -rank))[: max(0, k)]] = True
    return mask


@pytest.mark.usefixtures("devices")
def test_float64_scores_beside_float32_ones():
    wide = [0.0, -0.0, 1.0, NEAR, 1 + 2.0**-52, -1.0, -NEAR, 1e300, 5e-324, -1e-310]
    wide += [np.inf, -np.inf, np.nan]
    narrow = np.array([0.0, 1.0, 1e-42, -1e-45, 1 + 2.0**-23, np.inf, -np.inf, np.nan], np.float32)
    top_k, rng = jax.jit(selection.top_k), np.random.default_rng(0)
    for _ in range(20):
        stacks = [rng.choice(wide, (2, 30)), rng.choice(narrow, (1, 50))]
        layers = [layer.astype(np.float64) for stack in stacks for layer in stack]
        k, ks = rng.integers(0, 112), rng.integers(0, 31, 3)
        together = np.concatenate([np.ravel(m) for m in top_k(stacks, k)])
        np.testing.assert_array_equal(together, by_sort(np.concatenate(layers), k))
        each = [layer for mask in top_k(stacks, ks) for layer in mask]
        for mask, layer, k in zip(each, layers, ks, strict=True):
            np.testing.assert_array_equal(mask, by_sort(layer, k))


@pytest.mark.usefixtures("devices")
def test_large_arrays_that_differ_in_float64_alone():
    scores = 1 + 1e-12 * np.random.default_rng(0).normal(size=30_001)
    mask = jax.jit(gj.top_k_mask)(scores, 7_000)
    np.testing.assert_array_equal(mask, by_sort(scores, 7_000))


def test_float64_in_rows():
    scores = jnp.array([[1.0, NEAR, 1.0], [NEAR, 1.0, 1.0]])
    mask = selection.top_k_of_rows(scores, jnp.array([1, 2]), jnp.ones((2, 3), bool))
    np.testing.assert_array_equal(mask, [[0, 1, 0], [1, 1, 0]])


@pytest.mark.parametrize("of_width", [int, np.int64, np.uint64, jnp.int64, jnp.uint32, jnp.int32])
def test_counts_of_any_width(of_width):
    scores = jnp.array([3.0, 1.0, 2.0])
    assert gj.top_k_mask(scores, of_width(1)).tolist() == [True, False, False]
    most = 2**31 - 1 if of_width is jnp.int32 else 3 * 2**30 if of_width is jnp.uint32 else 2**40
    assert gj.top_k_mask(scores, of_width(most)).all()
    if of_width in (int, np.int64, jnp.int64):
        assert not gj.top_k_mask(scores, of_width(-(2**40))).any()


def near(values):
    return {"kernel": jnp.array([[1.0 if v == 0 else NEAR] for v in values])}


def test_each_score_tells_float64_apart():
    params, ones = near([0, 1, 0]), near([0, 0, 0])
    for score in (gj.scores.magnitude, gj.scores.saliency, gj.scores.magnitude_and_gradient(0.5)):
        masks = gj.at_init.masks_from(score(gj.Event(params, ones)), params, sparsity=0.6)
        assert masks["kernel"].tolist() == [[False], [True], [False]]
    assert gj.scores.gradient(gj.Event(None, params))["kernel"][1, 0] == NEAR
    mixed = gj.scores.saliency(gj.Event(params, {"kernel": jnp.ones((3, 1), jnp.float32)}))
    assert mixed["kernel"].dtype == jnp.float64


@pytest.mark.parametrize("name", ["snip", "grasp", "synflow", "magnitude", "lottery"])
def test_pruning_once_tells_float64_apart(name):
    params, few = near([0, 1, 0]), {"sparsity": 0.6}
    loss = lambda params, batch: batch * jnp.sum(params["kernel"] ** 3)  # noqa: E731
    masks = {
        "snip": lambda: gj.at_init.snip(loss, params, [1.0], **few),
        "grasp": lambda: gj.at_init.grasp(loss, params, [1.0], **few),
        "synflow": lambda: gj.at_init.synflow(
            lambda params, x: x * params["kernel"], params, jnp.ones((3, 1)), rounds=2, **few
        ),
        "magnitude": lambda: gj.at_init.magnitude(params, **few),
        "lottery": lambda: lottery.prune(params, gj.ones(params), fraction=0.6),
    }[name]()
    assert masks["kernel"].tolist() == [[False], [True], [False]]


@pytest.mark.parametrize(
    ("structure", "kernel"),
    [
        (gj.structures.n_of_m(2), [[1.0, NEAR], [NEAR, 1.0]]),
        (gj.structures.fan_in(), [[1.0, NEAR], [NEAR, 1.0]]),
        (gj.structures.block((1, 2)), [[1.0, 1.0], [NEAR, NEAR]]),
        (gj.structures.channel(), [[1.0, NEAR], [1.0, NEAR]]),
        (gj.structures.channel(tie="a"), [[1.0, NEAR], [1.0, NEAR]]),
    ],
    ids=["n_of_m", "fan_in", "block", "channel", "tied"],
)
def test_structures_tell_float64_apart(structure, kernel):
    params = {"a": jnp.array(kernel), "b": jnp.array(kernel)}
    step = gj.prune_to(lambda shapes, step: gj.uniform(shapes, 0.5), prunable=[("", structure)])
    masks, _ = step(gj.ones(params), gj.ones(params), gj.Event(params, None, step=jnp.int32(0)))
    np.testing.assert_array_equal(masks["a"], params["a"] > 1)


def test_momentum_keeps_float64():
    method = gj.average_gradients(gj.static(), decay=0.5)
    for dtype, mean in (("float64", "float64"), ("float32", "float32"), ("bfloat16", "float32")):
        params = {"kernel": jnp.ones((2, 2), dtype)}
        state = method.observe(method.init(params), params)
        assert state.average["kernel"].dtype == mean


def test_schedules_and_counts_have_the_bits_of_before():
    def numbers():
        steps = (0, 1, 333, 500, 999, 1000, 2000)
        shapes = [(100, 100), (37, 11)]
        num_keep = gj.gradual_num_keep(gj.erk, 0.1, 0.9, 100, 1000)
        fraction, sparsity = gj.cosine(0.5, 0.005, 1000), gj.cubic(0.1, 0.9, 100, 1000)
        counts = [num_keep(shapes, jnp.int32(t)) for t in steps]
        values = [f(t) for f in (fraction, sparsity) for t in steps]
        assert {x.dtype.name for x in counts} == {"int32"}
        assert {x.dtype.name for x in values} == {"float32"}
        return jax.device_get((counts, values))

    with_x64 = numbers()
    jax.config.update("jax_enable_x64", False)
    chex.assert_trees_all_equal(with_x64, numbers())


def test_a_traced_sparsity_in_float64_gives_exact_counts():
    shapes = [(1000, 1000, 1000)]
    counts = jax.jit(lambda s: (gj.global_ranking(shapes, s), gj.uniform(shapes, s)[0]))(0.9)
    assert [int(x) for x in counts] == [100_000_000] * 2
    assert {x.dtype.name for x in counts} == {"int32"}


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("make", [gj.reparam.dst, gj.reparam.str_])
def test_trained_thresholds_keep_their_dtypes(make, dtype):
    method = make()
    params = gj.testing.example_params(dtype)
    extra = method.init(params)
    wide = "float64" if dtype == "float64" else "float32"
    assert {x.dtype.name for x in extra.values()} == {wide}
    controller = gj.reparam.steer(0.9, end_step=100)
    tx = gj.reparam.penalise(optax.sgd(0.1, momentum=0.9), method, controller)
    pair = (params, extra)

    def step(pair, state):
        grads = jax.grad(lambda pair: jnp.sum(method.effective(*pair)["head"]["kernel"]))(pair)
        updates, state = tx.update(grads, state, pair)
        return optax.apply_updates(pair, updates), state, method.penalty(pair[1])

    before = jax.eval_shape(lambda: (pair, tx.init(pair)))
    *after, penalty = jax.eval_shape(step, *before)
    assert penalty.dtype == jnp.float32
    chex.assert_trees_all_equal_shapes_and_dtypes(before, tuple(after))


def test_numbers_about_masks():
    params = gj.testing.example_params("float64")
    masks = gj.ones(params)
    assert gj.metrics.num_live(masks, params).dtype == jnp.int32
    assert gj.metrics.sparsity(masks, params).dtype == jnp.float32
    assert gj.metrics.num_grown(masks, masks).dtype == jnp.int32
    assert gj.metrics.num_nonfinite(params).dtype == jnp.int32
    assert {x.dtype.name for x in gj.metrics.densities(masks, params).values()} == {"float32"}


@pytest.mark.full
@pytest.mark.parametrize("method", tables.METHODS | tables.VARIANTS)
def test_conformance_kit_on_float64(method):
    make_method, num_live = (tables.METHODS | tables.VARIANTS)[method]
    params = gj.testing.example_params("float64")
    known = num_live if num_live(0) is not None else None
    gj.testing.check_method(make_method(), params=params, num_live=known)


@pytest.mark.parametrize("kernels", [True, None], ids=str)
def test_results_of_double_precision(kernels):
    """Of products and convolutions of float32 that are to be summed in float64."""
    x, w = (jnp.full(shape, 1 / 3, jnp.float32) for shape in ((2, 9, 9, 3), (3, 3, 3, 4)))
    params = {"conv": w, "kernel": w[0, 0]}
    values, where = compact.pack(params, jax.tree.map(lambda x: jnp.ones(x.shape, bool), params))
    how = {"preferred_element_type": jnp.float64}
    numbers = ("NHWC", "HWIO", "NHWC")

    def convolved(params, x, convolve=jax.lax.conv_general_dilated):
        return convolve(x, params["conv"], (1, 1), "SAME", dimension_numbers=numbers, **how)

    def multiplied(params, x):
        return jnp.dot(x, params["kernel"], **how)

    own = convolved(params, x, compact.conv_general_dilated)
    slots = [compact.sparse(f, native=kernels)(values, where, x) for f in (convolved, multiplied)]
    wanted = convolved(params, x), multiplied(params, x)
    for one, right in zip((own, *slots), (wanted[0], *wanted), strict=True):
        assert one.dtype == np.float64
        np.testing.assert_allclose(one, right, rtol=1e-14)


@pytest.mark.parametrize("name", ["sparsegpt", "alps"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_repaired_weights_keep_their_type(name, dtype):
    draw = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(draw.normal(size=(8, 6)), dtype)}
    batch = jnp.asarray(draw.normal(size=(20, 8)), dtype)
    method = getattr(gj.one_shot, name)()
    found = gj.one_shot.prune(method, lambda p, x: x @ p["kernel"], params, [batch], sparsity=0.5)
    assert found.params["kernel"].dtype == dtype
    assert int(found.masks["kernel"].sum()) == 24
