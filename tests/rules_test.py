"""Rules of dropping, growing and tracking beyond RigL's, worked by hand or by brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import granet_jax as gj
from tests import tables

ROW = {"kernel": jnp.array([[True] * 6 + [False] * 2])}


def one(values):
    return {"kernel": jnp.array([values])}


def test_drop_by_sign_takes_the_smallest_positive_and_the_largest_negative():
    weights = one([5.0, 1.0, 2.0, -9.0, -8.0, -7.0, 0.0, 0.0])
    grads = one([0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 3.0, 2.0])
    for by_sign, dropped, grown in (
        (False, [1, 2], [6, 7]),  # 1 and 2 are the smallest of all
        (True, [1, 5], [6, 7]),  # 1 of the positive, -7 of the negative
    ):
        step = gj.regenerate(lambda step: 1 / 3, by_sign=by_sign)
        masks, keep = step(ROW, ROW, gj.Event(weights, grads, step=jnp.int32(1)))
        expected = np.array([True] * 6 + [False] * 2)
        expected[dropped] = False
        np.testing.assert_array_equal(keep["kernel"][0], expected)
        expected[grown] = True
        np.testing.assert_array_equal(masks["kernel"][0], expected)


def test_drop_by_sign_counts_live_zeros_with_the_positive():
    weights = one([5.0, 0.0, -0.0, -9.0, -8.0, -7.0, 0.0, 0.0])
    step = gj.regenerate(lambda step: 1 / 3, by_sign=True)
    _, keep = step(ROW, ROW, gj.Event(weights, one(jnp.arange(8.0)), step=jnp.int32(1)))
    np.testing.assert_array_equal(keep["kernel"][0], [1, 1, 0, 1, 1, 0, 0, 0])  # ties stay in order


def test_mest_spares_small_weights_that_move():
    weights = one([5.0, 1.0, 2.0, 9.0, 8.0, 7.0, 0.0, 0.0])
    grads = one([0.0, 500.0, 0.0, 0.0, 0.0, 0.0, 3.0, 2.0])
    step = gj.regenerate(lambda step: 1 / 6, drop=gj.scores.magnitude_and_gradient(0.01))
    _, keep = step(ROW, ROW, gj.Event(weights, grads, step=jnp.int32(1)))
    np.testing.assert_array_equal(keep["kernel"][0], [1, 1, 0, 1, 1, 1, 0, 0])


def test_snfs_moves_weights_to_where_momentum_is():
    """Two layers of 6, 3 live each; each drops 1; the second has twice the momentum, and room."""
    method = gj.snfs(
        sparsity=0.5,
        update_every=1,
        total_steps=10,
        decay=0.5,
        initial_fraction=0.3,
        prunable=[("", True)],  # rows would pass for vectors
        masks={
            "a": jnp.array([[True, True, True, False, False, False]]),
            "b": jnp.array([[True, True, True, False, False, False]]),
        },
    )
    weights = {"a": jnp.array([[3.0, 2, 1, 0, 0, 0]]), "b": jnp.array([[3.0, 2, 1, 0, 0, 0]])}
    grads = {"a": jnp.array([[1.0, 1, 1, 9, 0, 0]]), "b": jnp.array([[-7.0, 7, 7, 5, -6, 0]])}
    state = method.observe(method.init(weights), grads)
    np.testing.assert_allclose(state.average["b"], [[-3.5, 3.5, 3.5, 2.5, -3, 0]])
    # Means of |momentum| over live weights are .5 and 3.5: an eighth and seven eighths of 2 make
    # .25 and 1.75, so 0 and 2. Layer b has just dropped its third weight, which has the largest
    # momentum of those off and comes back; -6 is next.
    zeros = jax.tree.map(jnp.zeros_like, grads)  # this batch alone does not matter
    state, keep = method.update(state, gj.Event(weights, zeros, step=jnp.int32(1)))
    np.testing.assert_array_equal(state.masks["a"], [[1, 1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(state.masks["b"], [[1, 1, 1, 0, 1, 0]])
    np.testing.assert_array_equal(keep["b"], [[1, 1, 1, 0, 0, 0]])


deal_out = jax.jit(gj.by_mean_score)


@given(
    num_live=st.lists(st.integers(0, 12), min_size=5, max_size=5),
    means=st.lists(st.floats(0, 1e6, width=32), min_size=5, max_size=5),
    fraction=st.floats(0, 1),
)
def test_redistribution_is_exact_and_fits(num_live, means, fraction):
    num_live, means = np.array(num_live), np.array(means)
    live = np.arange(12)[None] < num_live[:, None]
    scores = np.broadcast_to(means[:, None], live.shape).astype(np.float32)
    dropped = np.ceil(fraction * num_live).astype(np.int32)
    grown = np.asarray(deal_out(dropped, [scores[:2], scores[2:]], [live[:2], live[2:]]))
    room = 12 - num_live + dropped
    assert grown.sum() == dropped.sum()
    assert (grown >= 0).all()
    assert (grown <= room).all()
    means = means * (num_live > 0)
    share = dropped.sum() * means / max(means.sum(), 1e-30)
    if (share <= room).all() and means.sum() > 1e-20:
        assert (np.abs(grown - share) <= 1.01).all()


def test_redistribution_of_large_counts():
    live = [jnp.ones((1, 3000, 3000), bool), jnp.zeros((1, 3000, 3000), bool)]
    live[1] = live[1].at[0, :300].set(True)
    scores = [jnp.full(x.shape, 0.1) for x in live]
    dropped = jnp.array([4_500_001, 450_000])
    grown = gj.by_mean_score(dropped, scores, live)
    assert grown.sum() == dropped.sum()
    assert abs(int(grown[0]) - int(grown[1])) <= 10


def test_average_gradients_over_another_method_that_observes():
    inner = gj.average_gradients(gj.static(), decay=0.0)
    method = gj.average_gradients(inner, decay=0.5)
    state = method.init({"kernel": jnp.ones((2, 2))})
    state = method.observe(state, {"kernel": jnp.full((2, 2), 4.0, jnp.bfloat16)})
    assert state.average["kernel"].dtype == jnp.float32
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\)"):
        gj.average_gradients(inner, decay=1.0)


@pytest.mark.full
@pytest.mark.parametrize("name", ["set_itop_unexplored", "rigl_itop"])
def test_exploration_is_the_union_of_all_masks(name):
    tx = gj.sparsify(optax.sgd(0.1, momentum=0.9), (tables.METHODS | tables.VARIANTS)[name][0]())
    params = gj.testing.example_params()
    state = tx.init(params)
    union = jax.tree.map(np.asarray, gj.get_masks(state))
    update = jax.jit(tx.update)
    rates = []
    for t in range(1, tables.STEPS + 1):
        updates, state = update(tables.random_grads(params, t), state, params)
        params = optax.apply_updates(params, updates)
        union = jax.tree.map(lambda u, m: u | np.asarray(m), union, gj.get_masks(state))
        explored = gj.get_method_state(state).explored
        jax.tree.map(np.testing.assert_array_equal, explored, union)
        rates.append(1 - float(gj.metrics.sparsity(explored, params)))
    assert rates[0] == pytest.approx(0.2)
    assert rates == sorted(rates)
    assert rates[-1] > 0.35


def test_unexplored_weights_are_grown_first():
    method = gj.set_itop(
        sparsity=0.75,
        update_every=1,
        total_steps=100,
        key=tables.KEY,
        unexplored_first=True,
        masks={"kernel": jnp.arange(16).reshape(4, 4) < 4},
    )
    params = {"kernel": jnp.ones((4, 4))}
    state = method.init(params)
    explored = []
    for t in range(1, 8):  # about half of 4 weights are exchanged, and 12 have never been on
        state, _ = method.update(state, gj.Event(params, params, step=jnp.int32(t)))
        explored.append(int(state.explored["kernel"].sum()))
    assert explored == [6, 8, 10, 12, 14, 16, 16]


def test_set_masks_prunes_between_two_steps():
    tx = optax.chain(
        optax.identity(), gj.sparsify(optax.sgd(0.1, momentum=0.9), gj.static(sparsity=0.0))
    )
    params = {"kernel": jnp.arange(1.0, 7.0).reshape(2, 3), "bias": jnp.ones(3)}
    state = tx.init(params)
    grads = jax.tree.map(jnp.ones_like, params)
    _, state = tx.update(grads, state, params)
    masks = {"kernel": params["kernel"] > 3, "bias": jnp.ones(3, bool)}
    state = gj.set_masks(state, masks)
    updates, state = jax.jit(tx.update)(grads, state, params)
    params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(params["kernel"] != 0, masks["kernel"])
    trace = optax.tree.get(state, "trace")
    np.testing.assert_allclose(trace["kernel"], 1.9 * np.asarray(masks["kernel"]), rtol=1e-6)
    with pytest.raises(ValueError, match="masks are of another tree"):
        gj.set_masks(state, {"kernel": masks["kernel"]})
    with pytest.raises(ValueError, match="The mask of kernel has shape"):
        gj.set_masks(state, {**masks, "kernel": masks["kernel"].T})
