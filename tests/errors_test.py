"""Wrong calls: each raises early, in one line, with what was got and what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import granet_jax as gj
from granet_jax import selection

KEY = jax.random.key(0)
PARAMS = {"fc": {"kernel": jnp.ones((8, 6)), "bias": jnp.ones(6)}}
GMP = {"final_sparsity": 0.5, "end_step": 10, "update_every": 2}
RIGL = {"sparsity": 0.5, "update_every": 2, "total_steps": 20, "key": KEY}
GRANET = {"final_sparsity": 0.5, "end_step": 10, "update_every": 2, "total_steps": 20}


def changed(base, **changes):
    return {**base, **changes}


def start(method, params=PARAMS):
    return gj.sparsify(optax.sgd(0.1), method).init(params)


WRONG_CALLS = {
    "sparsity in words": (
        lambda: gj.rigl(**changed(RIGL, sparsity="0.9")),
        "sparsity must be a number; got '0.9'",
    ),
    "a score in words": (
        lambda: gj.gmp(**GMP, score="magnitude"),
        "score has to be a function, such as .*; got 'magnitude'",
    ),
    "a distribution in words": (
        lambda: gj.rigl(**RIGL, start="erk"),
        "distribution has to be a function, such as .*; got 'erk'",
    ),
    "a fraction instead of a schedule": (
        lambda: gj.regenerate(0.3),
        "fraction has to be a function, .*; got 0.3",
    ),
    "a step instead of a schedule": (
        lambda: gj.compose(gj.ones, is_update_step=2),
        "is_update_step has to be a function, .*; got 2",
    ),
    "a fraction in percent": (
        lambda: gj.chts(**RIGL, fraction=30),
        r"fraction must be in \[0, 1\]; got 30",
    ),
    "a model instead of its parameters": (
        lambda: start(gj.gmp(**GMP), {"fc": {"kernel": jnp.ones((8, 6)), "activation": jnp.tanh}}),
        "fc/activation is no array but .*tanh.* Give parameters alone: flax.nnx.state",
    ),
    "a layer that loses all": (
        lambda: start(gj.static(sparsity=0.5, start=gj.by_path([("fc", 0.99)]), key=KEY)),
        "by_path leaves none of the 48 weights of fc/kernel at a sparsity of 0.99",
    ),
    "a start that is sparser than the end in a layer": (
        lambda: start(
            gj.granet(
                **changed(GRANET, final_sparsity=0.55),
                initial_sparsity=0.5,
                scope=gj.uniform,
                key=KEY,
            ),
            {"a": jnp.ones((64, 512)), "b": jnp.ones((512, 512)), "c": jnp.ones((16, 32))},
        ),
        "The start gives .* weights to b .512, 512., and the end .*: pruning adds none",
    ),
    "SynFlow with a tuple of inputs": (
        lambda: gj.at_init.synflow(lambda p, x: x, PARAMS, (jnp.ones(3),), sparsity=0.5),
        "The example is one array of inputs; got tuple",
    ),
    "a penalty without the pair": (
        lambda: gj.reparam.penalise(optax.sgd(0.1), gj.reparam.dst(), 1.0).init(PARAMS),
        r"penalise needs parameters as a pair: .*; got dict",
    ),
    "a seed instead of a key": (
        lambda: gj.rigl(**changed(RIGL, key=0)),
        r"key is a key of JAX, as jax.random.key\(0\) gives it; got 0",
    ),
    "a pattern without a decision": (
        lambda: start(gj.gmp(**GMP, prunable=["^fc/"])),
        r"A rule is a pair of .*prunable=\[\('\^head/', False\)\]; got '\^fc/'",
    ),
    "a rule instead of rules": (
        lambda: start(gj.gmp(**GMP, prunable=("fc", False))),
        "A rule is a pair of .*; got 'fc'",
    ),
    "a pattern that is none": (
        lambda: start(gj.gmp(**GMP, prunable=[("(fc", False)])),
        r"got \('\(fc', False\): missing \)",
    ),
    "trained thresholds under sparsify": (
        lambda: gj.sparsify(optax.sgd(0.1), gj.reparam.dst()),
        r"granet_jax.reparam go around by penalise\(inner, method, coefficient\)",
    ),
    "sparsity as percent": (
        lambda: gj.rigl(**changed(RIGL, sparsity=90)),
        r"sparsity must be in \[0, 1\), the fraction of zeros; got 90.0. .* is 0.9",
    ),
    "negative sparsity": (
        lambda: gj.gmp(**changed(GMP, final_sparsity=-0.1)),
        r"final_sparsity must be in \[0, 1\).*got -0.1",
    ),
    "sparsity of one": (
        lambda: gj.magnitude(sparsity=1.0, at=5),
        r"sparsity must be in \[0, 1\).*got 1.0",
    ),
    "sparsity that falls": (
        lambda: gj.granet(**GRANET, initial_sparsity=0.8, key=KEY),
        "initial_sparsity 0.8 is above final_sparsity 0.5",
    ),
    "sparse start without key": (
        lambda: gj.granet(**GRANET, initial_sparsity=0.4),
        r"draws random masks: pass key=jax.random.key\(seed\), or masks=",
    ),
    "schedule that ends before it begins": (
        lambda: gj.gmp(**GMP, begin_step=10),
        "end_step must come after begin_step; got begin_step=10, end_step=10",
    ),
    "schedule cut off by the end of training": (
        lambda: gj.granet(**changed(GRANET, end_step=19, update_every=6)),
        "short of its final sparsity: end_step=19.*Use end_step <= 18",
    ),
    "no event at all": (
        lambda: gj.rigl(**changed(RIGL, update_every=100)),
        "No step in .0, 15. is a multiple of update_every=100.*Lower update_every",
    ),
    "update_every of zero": (
        lambda: gj.rigl(**changed(RIGL, update_every=0)),
        "update_every must be >= 1 update; got 0",
    ),
    "steps as a float": (
        lambda: gj.gmp(**changed(GMP, end_step=0.5 * 21)),
        "end_step must be an int, a number of updates; got 10.5",
    ),
    "fraction above one": (
        lambda: gj.rigl(**RIGL, initial_fraction=30),
        r"fraction must be in \[0, 1\]; got 30",
    ),
    "one-shot at step zero": (
        lambda: gj.magnitude(sparsity=0.5, at=0),
        "at >= 1; got at=0. Steps count from 1",
    ),
    "infeasible ERK": (
        lambda: start(gj.rigl(**changed(RIGL, sparsity=0.99)), {"a": jnp.ones((9, 9)), **PARAMS}),
        "erk cannot meet sparsity 0.99: 1 of 129 weights .* The maximum .* is 0.98",
    ),
    "nothing prunable": (
        lambda: start(gj.gmp(**GMP), {"scale": jnp.ones(3), "bias": jnp.ones((2, 2))}),
        r"No parameter is prunable: .*bias \(2, 2\).*prunable=\[\('kernel', True\)\]",
    ),
    "rule that matches nothing": (
        lambda: start(gj.gmp(**GMP, prunable=[("conv", True)])),
        "rule 'conv' matches no parameter; the paths are: fc/bias, fc/kernel",
    ),
    "masks of another tree": (
        lambda: start(gj.static(masks={"kernel": jnp.ones((8, 6), bool)})),
        "another tree: 1 leaves, .* 2; only one of the two has fc/bias, fc/kernel, kernel",
    ),
    "masks of another shape": (
        lambda: start(gj.static(masks={"fc": {"kernel": jnp.ones((6, 8), bool), "bias": ONES_6}})),
        r"mask of fc/kernel has shape \(6, 8\) and dtype bool; expected \(8, 6\) and bool",
    ),
    "masks that are floats": (
        lambda: start(gj.static(masks=PARAMS)),
        "mask of fc/bias has shape .* and dtype float32; expected .* and bool",
    ),
    "masks applied to another model": (
        lambda: gj.apply_masks({"fc": {"kernel": jnp.ones((8, 6))}}, gj.ones(PARAMS)),
        "another tree: the mask of fc/bias has shape .6,., its parameter none",
    ),
    "update without params": (
        lambda: gj.sparsify(optax.sgd(0.1), gj.gmp(**GMP)).update(
            PARAMS, start(gj.gmp(**GMP)), None
        ),
        r"needs the parameters: call tx.update\(grads, opt_state, params\)",
    ),
    "optimizer that flattens": (
        lambda: gj.sparsify(optax.flatten(optax.adam(1e-3)), gj.gmp(**GMP)).init(PARAMS),
        r"cannot be masked: ScaleByAdamState holds 0/mu of shape \(54,\)",
    ),
    "optimizer with a history": (
        lambda: gj.sparsify(optax.scale_by_lbfgs(4), gj.gmp(**GMP)).init(PARAMS),
        "cannot be masked: ScaleByLBFGSState holds diff_params_memory/fc/kernel",
    ),
    "method not called": (
        lambda: gj.sparsify(optax.sgd(0.1), gj.granet),
        r"needs a Method, got function. Call the method first",
    ),
    "arguments swapped": (
        lambda: gj.sparsify(gj.gmp(**GMP), optax.sgd(0.1)),
        "wraps an optax transformation, got Method",
    ),
    "no masks in the state": (
        lambda: gj.get_masks(optax.adam(1e-3).init(PARAMS)),
        "Expected one sparsify state in the optimizer state, found 0 in a tuple",
    ),
    "random growth without key": (
        lambda: gj.granet(**GRANET, grow=gj.scores.random).update(
            gj.granet(**GRANET).init(PARAMS), gj.Event(PARAMS, PARAMS, step=jnp.int32(2))
        ),
        r"Random scores need a key: give the method key=jax.random.key\(seed\)",
    ),
}
ONES_6 = jnp.ones(6, bool)


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_wrong_call(name):
    call, message = WRONG_CALLS[name]
    with pytest.raises((ValueError, TypeError), match=message) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("where", ["gradients", "weights", "both"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nonfinite_values_change_no_count_and_are_reported(where, value):
    method = gj.granet(**GRANET, initial_sparsity=0.25, key=KEY)
    tx = gj.sparsify(optax.sgd(0.1, momentum=0.9), method)
    params = {"kernel": jax.random.normal(KEY, (10, 10)), "bias": jnp.zeros(10)}
    state = tx.init(params)
    update = jax.jit(tx.update)
    expected = [75] + [round(100 - 50 + 25 * (1 - t / 10) ** 3) for t in (2, 4, 6, 8, 10)]
    for t in range(1, 21):
        grads = jax.tree.map(lambda p, t=t: jnp.cos(p + t), params)
        if where != "weights":
            grads["kernel"] = grads["kernel"].at[::2].set(value)
        if where != "gradients":
            params["kernel"] = params["kernel"].at[:, ::3].set(value)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        assert gj.get_masks(state)["kernel"].sum() == expected[min(t // 2, 5)]
        assert gj.metrics.num_nonfinite(params) > 0
    assert gj.metrics.num_nonfinite({"a": jnp.array([1.0, np.nan, -np.inf])}) == 2


def test_pruned_weights_that_are_nan_are_told_as_such():
    tx = gj.sparsify(optax.sgd(0.1), gj.static(sparsity=0.5, key=KEY))
    state = tx.init(PARAMS)
    nans = jax.tree.map(lambda x: x * jnp.nan, PARAMS)
    message = r"24 weights of fc/kernel .* NaN or infinite.*apply_masks"
    with pytest.raises(ValueError, match=message):
        gj.check_sparse(nans, state)
    assert gj.check_sparse(gj.apply_masks(nans, gj.get_masks(state)), state) == 0


def test_gradual_pruning_by_chance():
    """A score that draws needs a key, which gradual pruning takes as well."""
    method = gj.gmp(**GMP, score=gj.scores.random, key=KEY)
    tx = gj.sparsify(optax.sgd(0.1), method)
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(10):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        params = optax.apply_updates(params, updates)
    assert gj.get_masks(state)["fc"]["kernel"].sum() == 24


def test_apply_if_finite_outside_skips_the_step_whole():
    tx = optax.apply_if_finite(gj.sparsify(optax.adam(0.1), gj.gmp(**GMP)), 5)
    state = tx.init(PARAMS)
    nan = jax.tree.map(lambda p: p * jnp.nan, PARAMS)
    for _ in range(3):
        updates, state = jax.jit(tx.update)(nan, state, PARAMS)
    assert state.inner_state.mask_step == 0
    assert gj.metrics.num_nonfinite(updates) == 0


def test_counts_beyond_int32_are_told(monkeypatch):
    """Wrapped sums would be negative, or 0."""
    monkeypatch.setattr(selection, "MOST", 100)
    flags = [jnp.ones((40, 5), bool), jnp.zeros((2, 3), bool), jnp.array(True)]
    assert selection.total(flags) == jax.jit(selection.total)(flags) == 100
    assert selection.total([x & (jnp.arange(x.size) < 7).reshape(x.shape) for x in flags]) == 8


def test_gradients_and_thresholds_that_do_not_fit_the_pair_are_told():
    method = gj.reparam.dst()
    pair = (PARAMS, method.init(PARAMS))
    tx = gj.reparam.penalise(optax.sgd(0.1), method, 1.0)
    with pytest.raises(ValueError, match="penalise needs gradients as a pair"):
        tx.update(PARAMS, tx.init(pair), pair)
    with pytest.raises(ValueError, match=r"thresholds of fc/kernel have shape \(4,\), expected \("):
        method.masks(PARAMS, {"fc/kernel": jnp.zeros(4)})


def test_a_single_event_is_enough_for_chts():
    method = gj.chts(
        sparsity=0.5, update_every=10, begin_step=10, last_step=10, total_steps=20, key=KEY
    )
    assert int(method.init(PARAMS).masks["fc"]["kernel"].sum()) == 24
