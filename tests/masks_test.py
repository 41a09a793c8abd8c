"""Mask updates worked by hand, so that a reader sees the algorithms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import granet_jax as gj

pytestmark = pytest.mark.usefixtures("compiled_well")  # bits depend on it


def grid(text, cast):
    return jnp.array([[cast(x) for x in row.split()] for row in text.strip().splitlines()])


def weights(text):
    """A dot is a weight that is off, and therefore 0."""
    return grid(text, lambda x: 0.0 if x == "." else float(x))


def mask(text):
    return grid(text, lambda x: x == "#")


def test_two_granet_events_by_hand():
    """Sparsity .5 -> .75 over two events of which the second is the last; p is .4 at the first.

    The layer has 12 weights, and starts from given masks with 6 live.
    """
    method = gj.granet(
        initial_sparsity=0.5,
        final_sparsity=0.75,
        end_step=20,
        update_every=10,
        total_steps=20,
        initial_fraction=0.6,
        final_fraction=0.2,
        masks={
            "kernel": mask("""# # # .
                                 # . # .
                                 # . . .""")
        },
    )
    state = method.init({"kernel": jnp.zeros((3, 4))})

    # Event 1, t = 10. The cubic keeps 3 + (6 - 3) * (1/2)^3 = 3.375, so 3 weights: 5, -4 and 3 of
    # 5 -4 3 -2 1 .5. Then p = .2 + .4 * (1 + cos(pi/2)) / 2 = .4: ceil(.4 * 3) = 2 are dropped,
    # 3 and -4, leaving 5; and grown are the two largest gradients among all that are then off:
    # 9 (where .5 has just been pruned) and 8 (where -4 has just been dropped).
    w = weights("""5 -4  3  .
                   1  . -2  .
                  .5  .  .  .""")
    g = weights("""9.9 8 -1  2
                   0   3  4 -5
                   9   6 -7  1""")
    state, keep = method.update(state, gj.Event({"kernel": w}, {"kernel": g}, step=jnp.int32(10)))
    np.testing.assert_array_equal(
        state.masks["kernel"],
        mask("""# # . .
                                                                 . . . .
                                                                 # . . ."""),
    )
    # -4 was dropped and regrown by the same regeneration: it keeps its value. The weight of
    # gradient 9 was pruned by the gradual prune before it was regrown: it starts again at 0.
    np.testing.assert_array_equal(
        keep["kernel"],
        mask("""# # . .
                                                          . . . .
                                                          . . . ."""),
    )

    # Event 2, t = 20. The schedule has ended: exactly 12 * .25 = 3 weights are kept, which are
    # the 3 that are live. p = .2: ceil(.2 * 3) = 1 is dropped, the smallest, .1; grown is the
    # largest gradient among those off, -7.
    w = weights("""4 -3  .  .
                   .  .  .  .
                  .1  .  .  .""")
    g = weights("""9  8 -1  2
                   0  3  4 -5
                   5  6 -7  1""")
    state, keep = method.update(state, gj.Event({"kernel": w}, {"kernel": g}, step=jnp.int32(20)))
    np.testing.assert_array_equal(
        state.masks["kernel"],
        mask("""# # . .
                                                                 . . . .
                                                                 . . # ."""),
    )
    np.testing.assert_array_equal(
        keep["kernel"],
        mask("""# # . .
                                                          . . . .
                                                          . . . ."""),
    )


def test_global_prune_then_regeneration_by_layer_by_hand():
    """Pruning ranks both layers as one; regeneration gives each layer back what it dropped."""
    method = gj.compose(
        gj.ones,
        gj.prune_to(lambda shapes, step: 6),
        gj.regenerate(lambda step: 0.25),
        is_update_step=gj.every(1),
    )
    w = {
        "a": weights("""9 8 7 6
                        5 1 1 1"""),
        "b": weights("""4 1
                        1 1"""),
    }
    g = {
        "a": weights("""0 0 0 0
                        1 2 3 4"""),
        "b": weights("""1 2
                        3 5"""),
    }
    state = method.init(w)
    # The six largest of both layers: 9 8 7 6 5 and 4. Layer a drops ceil(.25 * 5) = 2, namely 5
    # and 6, and grows the gradients 4 and 3; layer b drops ceil(.25 * 1) = 1 and grows 5.
    state, keep = method.update(state, gj.Event(w, g, step=jnp.int32(1)))
    np.testing.assert_array_equal(
        state.masks["a"],
        mask("""# # # .
                                                            . . # #"""),
    )
    np.testing.assert_array_equal(
        state.masks["b"],
        mask(""". .
                                                            . #"""),
    )
    np.testing.assert_array_equal(
        keep["a"],
        mask("""# # # .
                                                     . . . ."""),
    )
    assert not keep["b"].any()


def test_prune_to_never_revives():
    step = gj.prune_to(lambda shapes, step: 5)
    masks = {
        "k": mask("""# .
                          . #""")
    }
    values = {
        "k": weights("""0 9
                              9 0""")
    }
    pruned, keep = step(masks, masks, gj.Event(values, values, step=jnp.int32(1)))
    np.testing.assert_array_equal(pruned["k"], masks["k"])
    np.testing.assert_array_equal(keep["k"], masks["k"])


@pytest.mark.parametrize(
    ("fraction", "live", "exchanged"),
    [(0.0, 10, 0), (0.3, 10, 3), (0.31, 10, 4), (0.05, 60, 3), (1.0, 10, 10), (1e-4, 10, 1)],
)
def test_regenerate_exchanges_the_ceil(fraction, live, exchanged):
    masks = {"k": (jnp.arange(100) < live).reshape(10, 10)}
    w = {"k": jnp.arange(1.0, 101.0).reshape(10, 10)}
    grads = {"k": w["k"] - 1000.0 * ~masks["k"]}  # growth prefers what was off
    step = gj.regenerate(lambda step: fraction)
    new, keep = step(masks, masks, gj.Event(w, grads, step=jnp.int32(1)))
    assert new["k"].sum() == live
    assert (new["k"] & ~masks["k"]).sum() == exchanged
    assert keep["k"].sum() == live - exchanged


def test_regenerate_leaves_a_dense_layer_alone():
    masks = {"k": jnp.ones((4, 4), bool)}
    w = {"k": jax.random.normal(jax.random.key(0), (4, 4))}
    new, keep = gj.regenerate(lambda step: 0.5)(masks, masks, gj.Event(w, w, step=jnp.int32(1)))
    assert new["k"].all()
    assert keep["k"].all()


def test_random_masks_have_exact_counts_and_follow_the_key():
    params = {
        "a": jnp.zeros((20, 30)),
        "b": {"kernel": jnp.zeros((3, 3, 4, 5)), "bias": jnp.zeros(5)},
    }
    draws = [gj.random_masks(jax.random.key(i), params, 0.8) for i in (0, 0, 1)]
    for masks in draws:
        assert masks["a"].sum() + masks["b"]["kernel"].sum() == round(780 * 0.2)
        assert masks["b"]["bias"].all()
    np.testing.assert_array_equal(draws[0]["a"], draws[1]["a"])
    assert (draws[0]["a"] != draws[2]["a"]).any()


def test_given_masks_are_copied_and_checked():
    params = {"kernel": jnp.ones((2, 2))}
    given = {"kernel": jnp.array([[True, False], [True, True]])}
    method = gj.static(masks=given)
    state = method.init(params)
    jax.jit(lambda s: jax.tree.map(jnp.logical_not, s.masks), donate_argnums=0)(state)
    np.testing.assert_array_equal(given["kernel"], [[True, False], [True, True]])
    assert method.init(jax.eval_shape(lambda: params)).masks["kernel"].sum() == 3


def test_apply_masks_gives_plus_zero_even_for_nan():
    p = {"w": jnp.array([jnp.nan, -jnp.inf, -3.0, 2.0])}
    out = gj.apply_masks(p, {"w": jnp.array([False, False, False, True])})["w"]
    np.testing.assert_array_equal(
        np.asarray(out).view(np.uint32), np.float32([0, 0, 0, 2]).view(np.uint32)
    )


def test_phases_of_ac_dc_by_hand():
    """Four weights, half of them: dense to 1, sparse from 2, dense from 4, sparse from 6 on."""
    method = gj.ac_dc(
        sparsity=0.5, warmup_steps=2, phase_steps=2, last_dense_step=4, last_sparse_step=6
    )
    tx = gj.sparsify(optax.sgd(1.0, momentum=0.5), method)
    params = {"kernel": jnp.array([[4.0, 1.0], [3.0, -2.0]])}
    state = tx.init(params)
    grads = {"kernel": jnp.array([[0.0, -1.0], [0.5, 0.0]])}
    on, sparse = [[True, True], [True, True]], [[True, True], [False, False]]
    wanted = {
        1: ([[4.0, 2.0], [2.5, -2.0]], on),
        2: ([[4.0, 3.5], [0.0, 0.0]], sparse),
        3: ([[4.0, 5.25], [0.0, 0.0]], sparse),
        4: ([[4.0, 7.125], [0.0, 0.0]], on),  # at 0, without moments
        5: ([[4.0, 9.0625], [-0.5, 0.0]], on),
        6: ([[4.0, 11.03125], [0.0, 0.0]], sparse),
        7: ([[4.0, 13.015625], [0.0, 0.0]], sparse),
    }
    for step, (kernel, mask) in wanted.items():
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        assert params["kernel"].tolist() == kernel, step
        assert gj.get_masks(state)["kernel"].tolist() == mask, step


def test_chts_drops_by_importance_and_grows_where_paths_lead():
    """At a temperature at which nothing is left to chance."""
    method = gj.chts(
        sparsity=0.5,
        update_every=1,
        total_steps=4,
        temperature=1e6,
        fraction=0.25,
        key=jax.random.key(0),
        masks={"kernel": jnp.array([[1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 0, 1], [0, 0, 1, 1]], bool)},
    )
    params = {"kernel": jnp.array([[4.0, 1, 0, 0], [0, 4, 4, 0], [1.0, 0, 0, 4], [0, 0, 4, 4]])}
    state = method.init(params)
    event = gj.Event(params, masks=state.masks, step=jnp.int32(1))
    new, keep = method.update(state, event)
    # The two ones matter least, 1/5 + 1/5. Without them row 0 has one link and row 2 one, and
    # a path of three links leads from row 1 by column 1 to column 0, and from row 3 likewise, so
    # that what is grown is as good as the best among the missing.
    left = np.asarray(state.masks["kernel"]) & (np.asarray(params["kernel"]) != 1)
    np.testing.assert_array_equal(keep["kernel"] & left, left)
    seen = event._replace(masks={"kernel": jnp.asarray(left)}, key=jax.random.key(1))
    scores = np.asarray(gj.scores.cannistraci_hebb()(seen)["kernel"])
    grown = np.asarray(new.masks["kernel"]) & ~left
    assert grown.sum() == 2
    assert scores[grown].min() >= scores[~grown & ~left].max()
    assert (scores[~left] > 0).sum() > 2
