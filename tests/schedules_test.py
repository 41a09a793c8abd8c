"""Schedules against the values that follow from the papers' formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import granet_jax as gj

LENET_300_100 = [(784, 300), (300, 100), (100, 10)]
N = 266_200


@pytest.mark.parametrize(
    ("initial", "final", "events", "values"),
    [  # sparsity after event 1, 2, 5, 10 of the GraNet paper's CIFAR-10 and ImageNet schedules
        (0.0, 0.90, 28, (0.0930, 0.1794, 0.4012, 0.6609)),
        (0.0, 0.98, 28, (0.1013, 0.1954, 0.4368, 0.7196)),
        (0.5, 0.95, 28, (0.5465, 0.5897, 0.7006, 0.8304)),
        (0.0, 0.80, 75, (0.0316, 0.0623, 0.1496, 0.2792)),
        (0.5, 0.90, 75, (0.5158, 0.5312, 0.5748, 0.6396)),
    ],
)
def test_cubic_of_the_paper(initial, final, events, values):
    sparsity = gj.cubic(initial, final, 0, events * 1000)
    got = [float(sparsity(k * 1000)) for k in (1, 2, 5, 10)]
    np.testing.assert_allclose(got, values, atol=5.1e-5)
    assert float(sparsity(events * 1000)) == np.float32(final)


def test_regeneration_fraction_of_the_paper():
    granet = gj.cosine(0.5, 0.005, 160 * 352)
    got = [float(granet(k * 1000)) for k in (1, 14, 28, 56)]
    np.testing.assert_allclose(got, (0.49962, 0.42829, 0.25471, 0.00504), atol=5e-6)
    rigl = gj.cosine(0.3, 0.0, 75_000)
    np.testing.assert_allclose([float(rigl(t)) for t in (0, 37_500, 75_000)], (0.3, 0.15, 0.0))


@pytest.mark.parametrize("initial", [0.0, 0.5])
@pytest.mark.parametrize("final", [0.8, 0.98])
@pytest.mark.parametrize(("begin", "end", "every"), [(0, 6000, 200), (100, 1111, 50)])
def test_counts_at_events_are_the_formula_rounded(initial, final, begin, end, every):
    num_keep = jax.jit(
        lambda t: gj.gradual_num_keep(gj.global_ranking, initial, final, begin, end)(
            LENET_300_100, t
        )
    )
    for t in range(every, end + 3 * every, every):
        left = min(1.0, max(0.0, 1 - (t - begin) / (end - begin)))
        sparsity = final + (initial - final) * left**3
        assert abs(int(num_keep(t)) - N * (1 - sparsity)) <= 0.5 + 1e-2, t
    assert int(num_keep(end)) == round(N * (1 - final))


def test_the_end_is_exact_where_float32_is_not():
    shapes = [(2**15, 2**15)]  # 2^30 weights
    for sparsity in (0.1, 0.3, 0.7, 0.9, 0.99, 0.999):
        exact = round(2**30 * (1 - sparsity))
        num_keep = gj.gradual_num_keep(gj.global_ranking, 0.0, sparsity, 0, 10)
        assert int(jax.jit(lambda t, f=num_keep: f(shapes, t))(10)) == exact


def test_counts_by_layer():
    num_keep = gj.gradual_num_keep(gj.erk, 0.5, 0.9, 0, 10)
    np.testing.assert_array_equal(num_keep(LENET_300_100, 10), gj.erk(LENET_300_100, 0.9))
    np.testing.assert_array_equal(num_keep(LENET_300_100, 0), gj.erk(LENET_300_100, 0.5))


def test_every_includes_both_ends():
    is_update_step = gj.every(5, begin_step=10, last_step=20)
    assert [t for t in range(1, 40) if is_update_step(t)] == [10, 15, 20]
    assert [t for t in range(1, 21) if gj.every(6)(t)] == [6, 12, 18]


def test_sparsity_and_fraction_may_be_traced():
    final = jnp.array([0.8, 0.4])
    got = jax.vmap(lambda f: gj.cubic(0.0, f, 0, 20)(jnp.int32(10)))(final)
    np.testing.assert_allclose(got, [0.7, 0.35], rtol=1e-6)
    got = jax.vmap(lambda f: gj.cosine(f, 0.0, 20)(jnp.int32(10)))(final)
    np.testing.assert_allclose(got, [0.4, 0.2], rtol=1e-6)


def test_the_sigmoid_of_chtss():
    """s0 + (s1 - s0) ((sig(u) - 1/2) / (sig(1) - sig(0)) + 1/2), sig of slope 6 about 1/2."""

    def sig(u):
        return 1 / (1 + np.exp(-6 * (2 * u - 1)))

    sparsity = gj.schedules.sigmoid(0.5, 0.99, 10, 50)
    for t in range(10, 51):
        wanted = 0.5 + 0.49 * ((sig((t - 10) / 40) - 0.5) / (sig(1) - sig(0)) + 0.5)
        np.testing.assert_allclose(sparsity(t), wanted, rtol=1e-6)
    assert float(sparsity(3)) == 0.5
    assert float(sparsity(50)) == float(sparsity(60)) == np.float32(0.99)
    num_keep = gj.gradual_num_keep(gj.uniform, 0.5, 0.99, 10, 50, gj.schedules.sigmoid)
    shapes = [(1000, 3000), (1000, 1000)]
    assert num_keep(shapes, 50).tolist() == [30_000, 10_000]
    assert num_keep(shapes, 30).tolist() == [765_000, 255_000]


@pytest.mark.parametrize("num_stairs", [1, 3, 16])
def test_stairs_are_equal_and_meet_both_ends(num_stairs):
    curve = gj.schedules.stairs(num_stairs)(1.0, 0.0, 5, 65)
    values = np.array([curve(t) for t in range(70)])
    assert np.all(values[:5] == 1.0)
    assert np.all(values[65:] == 0.0)
    assert len(np.unique(values)) == num_stairs + 1
    np.testing.assert_allclose(-np.diff(np.unique(values)[::-1]), 1 / num_stairs, rtol=1e-5)
    for wrong in (0, 1.5):
        with pytest.raises(ValueError, match="num_stairs"):
            gj.schedules.stairs(wrong)


@pytest.mark.usefixtures("compiled_well")  # an optimizing compiler divides otherwise
@pytest.mark.parametrize("num_stairs", [1, 3, 10, 20, 41, 1000])
def test_stairs_end_exactly_under_jit_and_do_not_overflow(num_stairs):
    end = 3_000_000
    curve = gj.schedules.stairs(num_stairs)(1.0, 0.0, 0, end)
    steps = jnp.array([end - 1, end, end + 1])
    below, *last = jax.jit(jax.vmap(curve))(steps).tolist()
    assert last == [0.0, 0.0]
    assert below == pytest.approx(1 / num_stairs, rel=1e-3)
    late = round(0.83 * end)
    expected = 1 - (late * (num_stairs - 1) // end + (num_stairs > 1)) / num_stairs
    assert float(curve(late)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.usefixtures("compiled_well")
@pytest.mark.parametrize("curve", ["cubic", "sigmoid", "cosine"])
def test_curves_end_exactly_under_jit(curve):
    """Weights times 1e-24 would not be masked."""
    for begin, end in ((0, 10), (3, 46), (7, 999), (1, 3_000_000)):
        if curve == "cosine":
            schedule = gj.cosine(1.0, 0.0, end)
        else:
            schedule = getattr(gj.schedules, curve)(1.0, 0.0, begin, end)
        assert jax.jit(jax.vmap(schedule))(jnp.array([end, end + 1])).tolist() == [0.0, 0.0]
