"""Path rules, and leaves seen as stacks of layers."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import granet_jax as gj
from granet_jax import trees

PARAMS = {
    "embedding": jnp.zeros((9, 4)),
    "conv": {"kernel": jnp.zeros((3, 3, 2, 4)), "bias": jnp.zeros(4)},
    "blocks": {
        "attention": {"kernel": jnp.zeros((6, 4, 8)), "bias": jnp.zeros((6, 8))},
        "norm": {"scale": jnp.zeros((6, 4))},
    },
    "heads": {"bias": jnp.zeros((2, 4))},
    "ids": jnp.zeros((4, 4), jnp.int32),
    "empty": {"kernel": jnp.zeros((0, 4))},
}


def prunable(rules=()):
    return {leaf.path for leaf in trees.describe(PARAMS, rules) if leaf.prunable}


def test_default_takes_kernels_only():
    assert prunable() == {"conv/kernel", "blocks/attention/kernel"}


def test_first_rule_wins():
    assert prunable([("conv", False)]) == {"blocks/attention/kernel"}
    assert prunable([("conv/kernel", True), ("conv", False)]) == prunable()
    assert prunable([("^embedding$", True), (".", False)]) == {"embedding"}


def test_stacked_layers_are_decided_by_what_one_layer_is():
    leaves = {x.path: x for x in trees.describe(PARAMS, [("^blocks/", gj.Stacked(1))])}
    kernel = leaves["blocks/attention/kernel"]
    assert (kernel.prunable, kernel.num_layers, kernel.layer_shape) == (True, 6, (4, 8))
    assert not leaves["blocks/norm/scale"].prunable
    shapes = trees.layer_shapes(tuple(leaves.values()))
    assert shapes == [(4, 8)] * 6 + [(3, 3, 2, 4)]


def test_split_and_join_undo_each_other():
    params = jax.tree.map(lambda p: jnp.arange(p.size).reshape(p.shape), PARAMS)
    leaves = trees.describe(PARAMS, [("^blocks/", gj.Stacked(1))])
    stacks = trees.split(params, leaves)
    assert [s.shape for s in stacks] == [(6, 4, 8), (1, 3, 3, 2, 4)]
    chex.assert_trees_all_equal(trees.join(stacks, params, leaves), params)
    negated = trees.join([-s for s in stacks], params, leaves)
    np.testing.assert_array_equal(negated["conv"]["kernel"], -params["conv"]["kernel"])
    np.testing.assert_array_equal(negated["embedding"], params["embedding"])


def test_stacked_layers_are_pruned_as_if_they_were_apart():
    stacked = {"kernel": jax.random.normal(jax.random.key(0), (3, 8, 6))}
    apart = {f"{i}": {"kernel": stacked["kernel"][i]} for i in range(3)}
    results = []
    for params, rules in ((stacked, [("kernel", gj.Stacked(1))]), (apart, ())):
        method = gj.granet(
            final_sparsity=0.7,
            end_step=2,
            update_every=1,
            total_steps=4,
            scope=gj.uniform,
            prunable=rules,
        )
        state = method.init(params)
        for t in (1, 2):
            grads = jax.tree.map(jnp.sin, jax.tree.map(lambda p, t=t: 99 * t * p, params))
            state, _ = method.update(state, gj.Event(params, grads, step=jnp.int32(t)))
        results.append(state.masks)
    together = jnp.stack([results[1][f"{i}"]["kernel"] for i in range(3)])
    np.testing.assert_array_equal(results[0]["kernel"], together)
    assert together.sum() == round(144 * 0.3)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("conv_1", False)], "matches no parameter; the paths are: .*conv/kernel"),
        ([(".", False)], "No parameter is prunable"),
        ([("heads/bias", gj.Stacked(3))], r"stacks 3 axes of heads/bias, which has shape \(2, 4\)"),
        ([("conv", 0.5)], r"decides 0.5; expected True, False, Stacked\(axes\) or one"),
    ],
)
def test_wrong_rules(rules, message):
    with pytest.raises(ValueError, match=message):
        trees.describe(PARAMS, rules)


def test_a_tree_without_leaves_passes():
    assert trees.describe({}, [("kernel", True)]) == ()


def test_paths_that_read_alike_are_two_leaves():
    params = {"a": {"1": jnp.zeros((4, 4))}, "a/1": jnp.zeros((3, 3))}  # as Haiku names modules
    assert [leaf.shape for leaf in trees.describe(params)] == [(4, 4), (3, 3)]
    masks = gj.static(sparsity=0.2, key=jax.random.key(0)).init(params).masks
    assert sum(int(m.sum()) for m in jax.tree.leaves(masks)) == 20
