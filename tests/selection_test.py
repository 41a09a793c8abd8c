"""Selection against a stable argsort, and both ways of counting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from granet_jax import selection

pytestmark = pytest.mark.usefixtures("compiled_well")  # bits depend on it

VALUES = [0.0, -0.0, 1.0, -1.0, 2.0, np.inf, -np.inf, np.nan, 1e-42, -1e-42, 1.17549435e-38, 3e38]


def by_argsort(scores, k, eligible):
    """The definition: ineligible < NaN < -inf < ... < -0 = +0 < ... < inf, ties by index."""
    flat = np.asarray(scores, np.float32).astype(np.float64).ravel()  # float64 has room below -inf
    clean = np.where(np.isnan(flat), -2e308, np.clip(flat, -1e300, 1e300)) + 0.0
    order = np.argsort(-clean, kind="stable")
    order = [i for i in order if np.asarray(eligible).ravel()[i]]
    mask = np.zeros(flat.size, bool)
    mask[order[: max(0, k)]] = True
    return mask.reshape(np.shape(scores))


@st.composite
def cases(draw, shapes=((), (0,), (1,), (2, 3), (4, 8), (3, 0), (5, 7), (2, 2, 2, 3), (16,))):
    shape = draw(st.sampled_from(shapes))
    size = int(np.prod(shape))
    dtype = draw(st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]))
    element = st.sampled_from(VALUES) | st.floats(width=32)
    flat = np.array(draw(st.lists(element, min_size=size, max_size=size)), np.float32)
    with np.errstate(over="ignore"):
        scores = np.asarray(flat.astype(dtype)).reshape(shape)
    eligible = np.array(draw(st.lists(st.booleans(), min_size=size, max_size=size)), bool)
    k = draw(st.sampled_from([0, 1, size // 2, size, size + 3, -1]))
    return scores, k, eligible.reshape(shape)


_compiled = jax.jit(selection.top_k_mask)


@pytest.fixture(params=["many devices", "one device"])
def devices(request, monkeypatch):
    """On one CPU device there are samples, merged stacks and another way of counting."""
    monkeypatch.setattr(jax, "device_count", lambda: 1 if request.param == "one device" else 8)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.usefixtures("devices")
def test_equals_a_stable_argsort():
    @given(cases())
    def check(case):
        scores, k, eligible = case
        mask = _compiled(jnp.asarray(scores), k, jnp.asarray(eligible))
        np.testing.assert_array_equal(np.asarray(mask), by_argsort(scores, k, eligible))

    check()


@pytest.mark.usefixtures("devices")
def test_stacks_one_ranking_or_one_each():
    stacks = st.tuples(*(cases(shapes=[shape]) for shape in ((2, 6), (1, 5))))
    top_k = jax.jit(lambda *args: selection.top_k(*args))  # compiled for each pair of dtypes

    @settings(max_examples=50)
    @given(stacks, st.data())
    def check(stack_cases, data):
        scores = [jnp.asarray(c[0]) for c in stack_cases]
        eligible = [jnp.asarray(c[2]) for c in stack_cases]
        flat = np.concatenate([np.asarray(s, np.float32).ravel() for s in scores])
        flat_eligible = np.concatenate([e.ravel() for e in eligible])

        k = data.draw(st.integers(0, flat.size + 1))
        together = top_k(scores, jnp.array(k), eligible)
        np.testing.assert_array_equal(
            np.concatenate([np.asarray(m).ravel() for m in together]),
            by_argsort(flat, k, flat_eligible),
        )
        layers = [(s, e) for c in stack_cases for s, e in zip(c[0], c[2], strict=True)]
        ks = [data.draw(st.integers(0, s.size)) for s, _ in layers]
        each = top_k(scores, jnp.array(ks), eligible)
        each = [layer for mask in each for layer in np.asarray(mask)]
        for mask, (s, e), k in zip(each, layers, ks, strict=True):
            np.testing.assert_array_equal(mask, by_argsort(s, k, e))

    check()


def test_order_of_the_special_values():
    scores = jnp.array([-jnp.inf, jnp.nan, -0.0, 0.0, -1e-42, 1e-42, jnp.inf, -1.0])
    best_first = [6, 5, 2, 3, 4, 7, 0, 1]  # -0 before +0: equal, so by index
    for k in range(9):
        mask = np.zeros(8, bool)
        mask[best_first[:k]] = True
        np.testing.assert_array_equal(np.asarray(selection.top_k_mask(scores, k)), mask)


@pytest.mark.usefixtures("devices")
def test_k_and_scores_may_be_batched():
    scores = jax.random.normal(jax.random.key(0), (5, 3, 8)).round(1)
    ks = jnp.array([0, 3, 7, 24, 11])
    masks = jax.vmap(selection.top_k_mask)(scores, ks)
    np.testing.assert_array_equal(masks.sum((1, 2)), ks)
    for s, k, m in zip(scores, ks, masks, strict=True):
        np.testing.assert_array_equal(m, by_argsort(s, int(k), np.ones_like(s, bool)))


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("decimals", [1, 9])
def test_large_arrays_with_and_without_ties(decimals):
    """Large enough that a sample is no longer everything; sizes that 8 does not divide."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(1, 301, 333), (2, 5_001), (1, 301, 333)]
    stacks = [
        jax.random.normal(key, x).round(decimals) for key, x in zip(keys, shapes, strict=True)
    ]
    flat = np.concatenate([np.ravel(x) for x in stacks])
    top_k = jax.jit(selection.top_k)
    for k in (1, 4_321, flat.size // 2, flat.size - 1):
        together = np.concatenate([np.ravel(m) for m in top_k(stacks, k)])
        np.testing.assert_array_equal(together, by_argsort(flat, k, np.ones_like(together)))
    ks = jnp.array([50_000, 77, 5_000, 99_999])
    each = [layer for mask in top_k(stacks, ks) for layer in np.asarray(mask)]
    layers = [layer for stack in stacks for layer in stack]
    for mask, x, k in zip(each, layers, ks, strict=True):
        np.testing.assert_array_equal(mask, by_argsort(x, int(k), np.ones_like(mask)))


def test_same_mask_on_a_sharded_array():
    scores = jax.random.normal(jax.random.key(0), (64, 32)).round(1)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", "y"))
    sharded = _compiled(jax.device_put(scores, spec), 777)
    np.testing.assert_array_equal(sharded, _compiled(scores, 777))


def test_too_many_for_int32_counts():
    huge = jax.ShapeDtypeStruct((1, 2**16, 2**15), jnp.float32)
    with pytest.raises(ValueError, match="does not fit int32 counts"):
        jax.eval_shape(lambda x: selection.top_k([x], 5), huge)
