"""Scores that look at more than weights and gradients: by hand, and through sparsify."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import granet_jax as gj
from tests import tables
from tests.compact_transform_test import compact_step

PARAMS = {"kernel": jnp.array([[4.0, -2.0], [0.0, 6.0], [1.0, 0.0]])}


def score_of(score, **event):
    return np.asarray(score(gj.Event(PARAMS, **event))["kernel"])


def test_relative_importance_by_hand():
    """Sums of outputs are 5 and 8, of inputs 6, 6 and 1."""
    expected = [[4 / 5 + 4 / 6, 2 / 8 + 2 / 6], [0, 6 / 8 + 6 / 6], [1 / 5 + 1 / 1, 0]]
    np.testing.assert_allclose(score_of(gj.scores.relative_importance()), expected, rtol=1e-4)
    stack = {"kernel": jnp.stack([PARAMS["kernel"], 9 * PARAMS["kernel"]])}
    rules = (("kernel", gj.Stacked(1)),)
    stacked = gj.scores.relative_importance(rules)(gj.Event(stack))["kernel"]
    np.testing.assert_allclose(stacked, [expected] * 2, rtol=1e-4)


def test_scores_from_the_moments_of_the_optimizer():
    """Two steps of Adam by hand; live weights of small moments go first."""
    grads = {"kernel": jnp.array([[0.5, 0.1], [0.0, -1.0], [0.2, 0.3]])}
    state = optax.adam(1e-3).init(PARAMS)
    for _ in range(2):
        _, state = optax.adam(1e-3).update(grads, state, PARAMS)
    g = np.asarray(grads["kernel"])
    np.testing.assert_allclose(
        score_of(gj.scores.momentum, inner=state), np.abs(0.19 * g), rtol=1e-5
    )
    nu = 0.001 * (1 + 0.999) * g**2
    fisher = np.asarray(PARAMS["kernel"]) ** 2 * nu
    np.testing.assert_allclose(score_of(gj.scores.adam_fisher, inner=state), fisher, rtol=1e-5)
    trace = optax.sgd(0.1, momentum=0.9).init(PARAMS)
    assert not score_of(gj.scores.momentum, inner=trace).any()
    for inner in (optax.sgd(0.1).init(PARAMS), (state, state)):
        with pytest.raises(ValueError, match="needs one nu in the optimizer's state, found"):
            score_of(gj.scores.adam_fisher, inner=inner)


def test_a_method_that_drops_by_the_moments_of_adam():
    """What sparsify hands over is the state before the step, on slots as on dense weights."""
    params = {"kernel": jax.random.normal(tables.KEY, (8, 6))}
    method = gj.set_(
        sparsity=0.5,
        update_every=2,
        total_steps=20,
        drop=gj.scores.adam_fisher,
        key=tables.KEY,
    )
    dense = gj.sparsify(optax.adam(0.1), method)
    slots = gj.compact.sparsify(optax.adam(0.1), method)
    state, other = dense.init(params), slots.init(params)
    values = gj.compact.to_slots(params, gj.compact.get_layouts(other))
    params = gj.apply_masks(params, gj.get_masks(state))
    update = jax.jit(dense.update)
    for t in range(1, 9):
        grads = {"kernel": jax.random.normal(jax.random.fold_in(tables.KEY, t), (8, 6))}
        before = gj.get_masks(state)["kernel"]
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        values, other = compact_step(slots, grads, other, values)
        layouts = gj.compact.get_layouts(other)
        after = gj.get_masks(state)["kernel"]
        np.testing.assert_array_equal(gj.compact.masks(values, layouts)["kernel"], after)
        assert (t % 2 == 0) == bool((before != after).any())


def test_paths_by_hand():
    """CH3-L3 on 4 inputs and 5 outputs.

    1 1 . . .    Input 1 shares output 1 with input 0, and 2 with input 2. For the link (1, 0):
    . 1 1 . .    through input 0, which has output 0: input 1 has one output (2) that input 0 has
    . . 1 1 .    not, so 1/1. Through output 1, which input 1 has: output 0 has no input but those
    . . . . 1    of output 1, so 1/max(0, 1). Together 2.
    """
    mask = jnp.array([[1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]], bool)
    event = gj.Event({"kernel": jnp.zeros((4, 5))}, masks={"kernel": mask}, key=tables.KEY)
    scores = np.asarray(gj.scores.cannistraci_hebb()(event)["kernel"])
    # (0, 2): input 0 with 1, of which it lacks one and has one more: 1; output 2 with 1: 1.
    # (0, 3) is five links away; no way leads to the last row and column but their own.
    missing = {(0, 2): 2.0, (1, 0): 2.0, (1, 3): 2.0, (2, 1): 2.0}
    for (i, o), on in np.ndenumerate(np.asarray(mask)):
        if not on:
            wanted = missing.get((i, o))
            assert scores[i, o] == wanted if wanted else -1 <= scores[i, o] < 0, (i, o)
    stacked = gj.Event(
        {"kernel": jnp.zeros((2, 4, 5))}, masks={"kernel": jnp.stack([mask, mask])}, key=tables.KEY
    )
    both = np.asarray(gj.scores.cannistraci_hebb([("", gj.Stacked(1))])(stacked)["kernel"])
    np.testing.assert_array_equal(np.maximum(both, 0), np.maximum(np.stack([scores] * 2), 0))


def test_paths_through_neurons_that_are_wired_otherwise_count_less():
    """Against sums over all paths, written out."""
    mask = np.asarray(jax.random.bernoulli(tables.KEY, 0.3, (9, 7)))
    event = gj.Event({"kernel": jnp.zeros(mask.shape)}, masks={"kernel": mask}, key=tables.KEY)
    scores = np.asarray(gj.scores.cannistraci_hebb()(event)["kernel"])
    inputs, outputs = (
        [set(np.flatnonzero(row)) for row in mask],
        [set(np.flatnonzero(c)) for c in mask.T],
    )
    for (i, o), on in np.ndenumerate(mask):
        if on:
            continue
        paths = [
            1 / max(len(inputs[i] - inputs[k]), 1) for k in outputs[o] if inputs[i] & inputs[k]
        ]
        paths += [
            1 / max(len(outputs[o] - outputs[k]), 1) for k in inputs[i] if outputs[o] & outputs[k]
        ]
        if paths:
            np.testing.assert_allclose(scores[i, o], sum(paths), rtol=1e-6)
        else:
            assert scores[i, o] < 0


def test_movement_is_what_descent_did_to_the_size_of_weights():
    """The sum of -w g over steps; 0 where masked."""
    method = gj.gmp(final_sparsity=0.5, end_step=4, update_every=2, score=gj.scores.movement)
    tx = gj.sparsify(optax.chain(gj.scores.track_movement(), optax.sgd(1.0)), method)
    params = {"kernel": jnp.array([[4.0, 1.0], [-2.0, -1.0]])}
    state, total, update = tx.init(params), np.zeros((2, 2)), jax.jit(tx.update)
    grads = {"kernel": jnp.array([[0.5, -0.25], [0.5, 0.125]])}  # 4 shrinks, the others grow
    for t in range(1, 5):
        total -= np.asarray(params["kernel"] * grads["kernel"])
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        masks = np.asarray(gj.get_masks(state)["kernel"])
        total *= masks
        np.testing.assert_allclose(state.inner[0].movement["kernel"], total, rtol=1e-6)
        assert masks.tolist() == [[t < 2, True], [True, t < 2]]
    half = {"w": (PARAMS["kernel"] / 100).astype(jnp.float16)}
    tiny = jax.tree.map(lambda x: jnp.full_like(x, 1e-6), half)
    track = gj.scores.track_movement()
    moved = track.update(tiny, track.init(half), half)[1].movement["w"]
    assert bool((moved[half["w"] != 0] != 0).all())  # the product is below what float16 has
    with pytest.raises(ValueError, match="needs one movement in the optimizer's state, found 0"):
        score_of(gj.scores.movement, inner=optax.sgd(0.1).init(PARAMS))
    with pytest.raises(ValueError, match="needs the parameters"):
        gj.scores.track_movement().update(grads, gj.scores.track_movement().init(params))


def test_draws_by_a_score_have_its_odds():
    """Of weights 1 and 3 at T = 2 the first is drawn one time in ten; zeros come last."""
    params = {"kernel": jnp.tile(jnp.array([1.0, 3.0, 0.0]), (4000, 1))}
    score = gj.scores.sampled(gj.scores.magnitude, lambda step: 2.0)
    drawn = np.asarray(score(gj.Event(params, key=tables.KEY))["kernel"])
    first = (drawn[:, 0] > drawn[:, 1]).mean()
    np.testing.assert_allclose(first, 0.1, atol=0.02)
    assert np.all(np.isneginf(drawn[:, 2]))
    with pytest.raises(ValueError, match="Random scores need a key"):
        score(gj.Event(params))


def test_growth_sees_the_masks_after_the_drop():
    seen = []

    def grow(event):
        seen.append(event.masks["kernel"])
        return jax.tree.map(lambda m: m.astype(jnp.float32) * 0.0, event.masks)

    step = gj.regenerate(lambda step: 0.5, grow=grow)
    masks = {"kernel": jnp.array([[True, True], [True, True], [False, False]])}
    with jax.disable_jit():
        new, _ = step(masks, masks, gj.Event(PARAMS, PARAMS))
    assert np.asarray(seen[-1]).tolist() == [[True, False], [False, True], [False, False]]
    assert int(new["kernel"].sum()) == 4


def test_a_method_of_ten_lines_that_looks_at_all_there_is():
    """Step, moments, and the norms of activations that the training loop passes by name."""

    def grow(event):
        decay = 1.0 / (1.0 + event.step)
        return jax.tree.map(
            lambda g, m: decay * jnp.abs(g) * event.extra["norms"][:, None] + jnp.abs(m),
            event.grads,
            event.inner[0].mu,
        )

    method = gj.compose(
        gj.start_from(None, 0.5, gj.uniform, (), tables.KEY),
        gj.regenerate(lambda step: 0.34, drop=gj.scores.adam_fisher, grow=grow),
        is_update_step=gj.every(2),
        key=tables.KEY,
    )
    tx = gj.sparsify(optax.adam(0.1), method)
    params = {"kernel": jnp.ones((3, 4))}
    state = tx.init(params)
    params = gj.apply_masks(params, gj.get_masks(state))
    norms = jnp.array([0.0, 0.0, 9.0])  # nothing comes but from the third input
    start = np.asarray(gj.get_masks(state)["kernel"])
    grads = {"kernel": jnp.ones((3, 4))}
    for _ in range(2):
        updates, state = jax.jit(tx.update)(grads, state, params, norms=norms)
        params = optax.apply_updates(params, updates)
    grown = np.asarray(gj.get_masks(state)["kernel"]) & ~start
    assert int(gj.get_masks(state)["kernel"].sum()) == 6
    assert not start[2].all()
    assert grown[2].any()


def test_moments_are_found_beside_layers_that_are_called_like_them():
    """Variational autoencoders have layers called mu and nu."""
    params = {"mu": {"kernel": jnp.ones((2, 2))}, "nu": {"kernel": jnp.ones((2, 2))}}
    grads = jax.tree.map(lambda p: 2 * p, params)
    _, inner = optax.adam(0.1).update(grads, optax.adam(0.1).init(params))
    found = gj.scores.momentum(gj.Event(params, inner=inner))
    np.testing.assert_allclose(found["mu"]["kernel"], 0.2, rtol=1e-5)
    assert gj.scores.adam_fisher(gj.Event(params, inner=inner)).keys() == params.keys()


def test_a_score_of_one_leaf_may_read_another_that_is_dense():
    params = {"gate": jnp.array([[1.0, -3.0]]), "kernel": jnp.array([[2.0, 1.0]])}

    def score(event):
        return {**event.params, "kernel": jnp.abs(event.params["kernel"] * event.params["gate"])}

    step = gj.prune_to(lambda shapes, step: 1, score=score, prunable=[("gate", False)])
    masks, _ = step(gj.ones(params), gj.ones(params), gj.Event(params))
    assert masks["kernel"].tolist() == [[False, True]]


def test_a_prunable_scalar_has_no_paths():
    params = {"kernel": jnp.ones((3, 3)), "scalar": jnp.ones(())}
    masks = {"kernel": jnp.ones((3, 3), bool), "scalar": jnp.array(False)}
    event = gj.Event(params, masks=masks, key=jax.random.key(0))
    scores = gj.scores.cannistraci_hebb([("scalar", True)])(event)
    assert scores["scalar"] < 0 < scores["kernel"].min()
