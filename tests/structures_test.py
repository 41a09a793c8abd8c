"""Structures: every method keeps them, hand-set masks show them, bad ones are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import granet_jax as gj
from granet_jax import groups, selection, structures, trees
from tests.selection_test import by_argsort

STEPS = 24
KEY = jax.random.key(7)
ALL = ""
TIED = [
    ("conv/", structures.channel(tie="stream")),
    ("norm/", structures.channel(tie="stream")),
    ("hidden", structures.channel()),
    ("head", False),
]
MIXED = [("head", False), ("conv", structures.n_of_m(2)), (ALL, structures.block((4, 4)))]
# Rules, and the sparsity asked for.
STRUCTURES = {
    "2:4": ([(ALL, structures.n_of_m(4))], 0.5),
    "1:4": ([(ALL, structures.n_of_m(4))], 0.75),
    "2:4 along outputs": ([("head", False), (ALL, structures.n_of_m(4, axis=-1))], 0.5),
    "fan-in": ([(ALL, structures.fan_in())], 0.6),
    "fan-in, ablation": ([(ALL, structures.fan_in(ablation=0.6, spare="head"))], 0.6),
    "block": ([("conv", structures.block((2, 4))), (ALL, structures.block((3, 5)))], 0.5),
    "channel": ([("head", False), (ALL, structures.channel())], 0.5),
    "tied channels": (TIED, 0.5),
    "mixed": (
        [("head", False), ("conv", structures.n_of_m(2)), (ALL, structures.block((4, 4)))],
        0.5,
    ),
}


def exchanging(method, sparsity, rules):
    return method(
        sparsity=sparsity,
        update_every=4,
        total_steps=STEPS,
        start=gj.uniform,
        prunable=rules,
        key=KEY,
    )


METHODS = {
    "granet": lambda sparsity, rules: gj.granet(
        final_sparsity=sparsity,
        end_step=14,
        update_every=3,
        total_steps=STEPS,
        scope=gj.uniform,
        prunable=rules,
    ),
    "gmp": lambda sparsity, rules: gj.gmp(
        final_sparsity=sparsity, end_step=14, update_every=4, scope=gj.uniform, prunable=rules
    ),
    "rigl": lambda sparsity, rules: exchanging(gj.rigl, sparsity, rules),
    "set": lambda sparsity, rules: exchanging(gj.set_, sparsity, rules),
    "static": lambda sparsity, rules: gj.static(
        sparsity=sparsity, start=gj.uniform, prunable=rules, key=KEY
    ),
}


# GraNet goes through all code. `make test-all` has every pair.
FULL = [(method, name) for method in METHODS for name in STRUCTURES]
SOME = [
    *(("granet", name) for name in ("2:4", "fan-in, ablation", "block", "tied channels", "mixed")),
    ("gmp", "tied channels"),
    ("static", "block"),
]


@pytest.mark.parametrize("row", SOME, ids="-".join)
def test_methods_keep_structures(row):
    check(*row)


@pytest.mark.full
@pytest.mark.parametrize("row", sorted(set(FULL) - set(SOME)), ids="-".join)
def test_full_product(row):
    check(*row)


def check(method, name):
    rules, sparsity = STRUCTURES[name]
    gj.testing.check_method(METHODS[method](sparsity, rules), num_steps=STEPS, prunable=rules)


def run(step, masks, params, grads=None):
    """One mask step on a tree of one leaf, as an int list."""
    masks, params = ({"kernel": jnp.array(x)} for x in (masks, params))
    grads = {"kernel": jnp.array(params["kernel"] if grads is None else grads)}
    new, keep = step(masks, masks, gj.Event(params, grads, step=jnp.int32(1)))
    return new["kernel"].astype(int).tolist(), keep["kernel"].astype(int).tolist()


def count(num):
    return lambda shapes, step: jnp.array([num])


def test_n_of_m_keeps_the_best_of_each_group():
    step = gj.prune_to(count(4), prunable=[(ALL, structures.n_of_m(4))])
    weights = [[1.0, -9.0], [2.0, 8.0], [-3.0, 7.0], [4.0, 6.0]]
    masks, _ = run(step, jnp.ones((4, 2), bool), weights)
    assert masks == [[0, 1], [0, 1], [1, 0], [1, 0]]


def test_n_of_m_drops_by_layer_and_grows_where_it_dropped():
    rules = [(ALL, structures.n_of_m(2, axis=-1))]
    step = gj.regenerate(lambda step: 0.3, prunable=rules)
    # Of four live weights ceil(.3 * 4) = 2 go: .1 and .2. Their groups grow the larger gradient.
    masks, keep = run(
        step,
        [[True, False, True, False], [True, False, False, True]],
        [[0.1, 0.0, 3.0, 0.0], [0.2, 0.0, 0.0, 4.0]],
        [[1.0, 5.0, 0.0, 99.0], [6.0, 5.0, 99.0, 0.0]],
    )
    assert masks == [[0, 1, 1, 0], [1, 0, 0, 1]]
    assert keep == [[0, 0, 1, 0], [1, 0, 0, 1]]


def test_fan_in_drops_by_layer_and_grows_by_output():
    step = gj.regenerate(lambda step: 0.5, prunable=[(ALL, structures.fan_in())])
    # Outputs are columns. The two smallest, both of the second one, go; it grows two.
    masks, _ = run(
        step,
        [[True, True], [True, False], [False, True]],
        [[3.0, 0.1], [4.0, 0.0], [0.0, 0.2]],
        [[0.0, 1.0], [0.0, 9.0], [99.0, 2.0]],
    )
    assert masks == [[1, 0], [1, 1], [0, 1]]


def test_fan_in_ablates_outputs_without_salient_weights():
    weights = [[3.0, 0.1], [4.0, 0.2], [0.0, 0.0], [0.0, 0.0]]
    live = [[True, True], [True, True], [False, False], [False, False]]
    grads = [[0.0, 0.0], [0.0, 0.0], [9.0, 0.0], [8.0, 0.0]]
    rules = [(ALL, structures.fan_in(ablation=0.5))]
    step = gj.regenerate(lambda step: 0.5, prunable=rules)
    assert run(step, live, weights, grads)[0] == [[1, 0], [1, 0], [1, 0], [1, 0]]
    # The last layer is spared: its second output grows in place what it lost.
    rules = [(ALL, structures.fan_in(ablation=0.5, spare="kernel"))]
    step = gj.regenerate(lambda step: 0.5, prunable=rules)
    assert run(step, live, weights, grads)[0] == [[1, 1], [1, 1], [0, 0], [0, 0]]


def test_pruning_deals_a_count_out_over_live_outputs():
    step = gj.prune_to(count(3), prunable=[(ALL, structures.fan_in())])
    live = [[True, False], [True, False], [True, False], [True, False]]
    masks, _ = run(step, live, [[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [4.0, 0.0]])
    assert masks == [[0, 0], [1, 0], [1, 0], [1, 0]]


def test_block_scores_are_means_and_what_edges_lack_is_zero():
    step = gj.prune_to(count(2), prunable=[(ALL, structures.block((2, 2)))])
    # The means are 2, 3 / 4 at the edge of one column, 1 and 3 / 4 in the corner.
    weights = [[2.0, 2.0, 1.5], [2.0, 2.0, 1.5], [2.0, 2.0, 3.0]]
    masks, _ = run(step, jnp.ones((3, 3), bool), weights)
    assert masks == [[1, 1, 0], [1, 1, 0], [1, 1, 0]]


def test_tied_channels_go_together_and_vectors_have_no_say():
    rules = [(ALL, structures.channel(tie="a"))]
    params = {
        "a": {"bias": jnp.array([9.0, 0.0, 9.0]), "kernel": jnp.array([[1.0, 2.0, 1.0]])},
        "b": {"kernel": jnp.array([[1.0, 2.0, 2.0], [1.0, 2.0, 2.0]])},
    }
    step = gj.prune_to(count(1), prunable=rules)
    ones = gj.ones(params)
    masks, _ = step(ones, ones, gj.Event(params, params, step=jnp.int32(1)))
    for mask in jax.tree.leaves(masks):
        np.testing.assert_array_equal(np.asarray(mask).any(tuple(range(mask.ndim - 1))), [0, 1, 0])


def test_stacked_layers_have_structures_too():
    rules = [(ALL, gj.Stacked(1, structures.channel()))]
    step = gj.prune_to(lambda shapes, step: jnp.array([1, 2]), prunable=rules)
    weights = [[[1.0, 2.0, 3.0]], [[1.0, 2.0, 3.0]]]
    assert run(step, jnp.ones((2, 1, 3), bool), weights)[0] == [[[0, 0, 1]], [[0, 1, 1]]]


def test_global_ranking_ranks_units_alike():
    rules = [("a", structures.channel()), (ALL, structures.block((2, 2)))]
    params = {"a": jnp.array([[1.0, 4.0], [1.0, 4.0]]), "b": jnp.full((2, 4), 2.0)}
    step = gj.prune_to(gj.gradual_num_keep(gj.global_ranking, 0.0, 0.75, 0, 1), prunable=rules)
    ones = gj.ones(params)
    masks, _ = step(ones, ones, gj.Event(params, params, step=jnp.int32(1)))
    assert masks["a"].tolist() == [[False, True]] * 2
    assert not masks["b"].any()


def test_given_masks_with_parts_of_units_are_not_filled():
    step = gj.prune_to(count(1), prunable=[(ALL, structures.channel())])
    masks, _ = run(step, [[True, True], [False, True]], [[9.0, 1.0], [9.0, 1.0]])
    assert masks == [[1, 0], [0, 0]]


_top_k_of_rows = jax.jit(selection.top_k_of_rows)


@given(
    hnp.arrays(np.float32, (2, 3, 5), elements=st.sampled_from([0.0, -1.0, 2.0, np.nan, np.inf])),
    hnp.arrays(np.int32, (2, 3), elements=st.integers(-1, 6)),
    hnp.arrays(bool, (2, 3, 5)),
    st.booleans(),
)
def test_top_k_of_rows_equals_a_stable_argsort(scores, k, eligible, is_long):
    if is_long:
        scores, eligible = np.tile(scores, 8), np.tile(eligible, 8)
    masks = np.asarray(_top_k_of_rows(*map(jnp.asarray, (scores, k, eligible))))
    for index in np.ndindex(k.shape):
        wanted = by_argsort(scores[index], int(k[index]), eligible[index])
        np.testing.assert_array_equal(masks[index], wanted)


PARAMS = {"fc/kernel": jnp.ones((6, 5)), "fc/bias": jnp.ones(5)}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([(ALL, structures.n_of_m(4))], "axis -2 of fc/kernel.*has 6"),
        ([(ALL, structures.block((1, 2, 3)))], "more axes than fc/kernel"),
        ([(ALL, structures.channel(axis=3))], "has no axis 3"),
        ([(ALL, structures.channel(axis=0, tie="a"))], "different numbers of channels"),
    ],
)
def test_structures_that_do_not_fit_are_refused(rules, message):
    method = gj.static(sparsity=0.5, start=gj.uniform, prunable=rules, key=KEY)
    with pytest.raises(ValueError, match=message):
        method.init(PARAMS)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="m must be an int >= 1; got 0"):
        structures.n_of_m(0)
    with pytest.raises(ValueError, match="side_1 must be"):
        structures.block((2, 0))
    with pytest.raises(ValueError, match=r"ablation must be in \[0, 1\]"):
        structures.fan_in(ablation=2.0)
    rules = [(ALL, structures.fan_in())]
    with pytest.raises(ValueError, match=r"scope=granet_jax\.uniform"):
        gj.random_masks(KEY, PARAMS, 0.5, gj.global_ranking, rules)
    step = gj.regenerate(lambda step: 0.5, by_sign=True, prunable=rules)
    with pytest.raises(ValueError, match="by_sign and redistribute are for single weights"):
        step(gj.ones(PARAMS), gj.ones(PARAMS), gj.Event(PARAMS, PARAMS, step=1))
    method = gj.reparam.dst(prunable=rules)
    with pytest.raises(ValueError, match="trained thresholds have none"):
        method.init(PARAMS)


def test_shapes_and_units_are_those_of_trees_without_structures():
    params = gj.testing.example_params()
    leaves = trees.describe(params)
    assert structures.shapes(leaves) == trees.layer_shapes(leaves)
    stacks = trees.split(params, leaves)
    assert all(a is b for a, b in zip(structures.gather(stacks, leaves), stacks, strict=True))


def test_ablation_leaves_outputs_enough_for_the_weights():
    """Four outputs of 8 inputs with 4 weights each: 16 weights need two outputs.

    By salience alone the first would stay with 8 weights, and as many would be lost.
    """
    full, salient = jnp.array([[4, 4, 4, 4]]), jnp.array([[3, 1, 2, 0]])
    assert groups._after_ablation(full, salient, 0.95, inputs=8).tolist() == [[8, 0, 8, 0]]
    assert groups._after_ablation(full, salient, 0.5, inputs=8).tolist() == [[8, 0, 8, 0]]
    assert groups._after_ablation(full, salient, 0.25, inputs=8).tolist() == [[5, 5, 5, 0]]


def test_units_are_drawn_each_for_itself():
    """Means of draws would favour small units, and units at an edge would never be drawn."""
    edge = {"kernel": jnp.ones((5, 4))}
    rules = [(ALL, structures.block((4, 4)))]
    masks = jax.vmap(lambda key: gj.random_masks(key, edge, 0.5, gj.uniform, rules)["kernel"])(
        jax.random.split(KEY, 200)
    )
    assert 70 < int(masks[:, 4, 0].sum()) < 130
    assert (masks[:, 4, 0] != masks[:, 0, 0]).all()
    params = {"few": jnp.ones((3, 64)), "many": jnp.ones((3, 3, 64, 512))}
    rules = [(ALL, structures.channel())]
    masks = gj.random_masks(KEY, params, 0.5, gj.global_ranking, rules)
    densities = gj.metrics.densities(masks, params, rules)
    assert all(0.35 < float(x) < 0.65 for x in densities.values()), densities
