"""Pruning before training against closed forms and a second implementation in numpy."""

import itertools
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import granet_jax as gj
from granet_jax.methods import at_init


def mlp(sizes, key=0, bias=False):
    keys = jax.random.split(jax.random.key(key), len(sizes) - 1)
    layers = [
        {"kernel": jax.random.normal(k, shape) * np.sqrt(2 / shape[0])}
        for k, shape in zip(keys, itertools.pairwise(sizes), strict=True)
    ]
    for layer in layers if bias else ():
        layer["bias"] = 0.3 * jnp.sin(jnp.arange(1.0, layer["kernel"].shape[1] + 1))
    return layers


def net(params, x):
    for i, layer in enumerate(params):
        x = x @ layer["kernel"] + layer.get("bias", jnp.zeros(1))[None]
        x = jax.nn.relu(x) if i < len(params) - 1 else x
    return x


def loss(params, batch):
    logits = net(params, batch[0])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]))


def batches(num, size, inputs, classes):
    keys = jax.random.split(jax.random.key(9), num)
    return [
        (jax.random.normal(k, (size, inputs)), jax.random.randint(k, (size,), 0, classes))
        for k in keys
    ]


def largest(scores, k):
    """The k largest of one numpy array, by a stable sort."""
    mask = np.zeros(scores.size, bool)
    mask[np.argsort(-scores.ravel(), kind="stable")[:k]] = True
    return mask.reshape(scores.shape)


def num_live(masks, params, prunable=()):
    return gj.metrics.num_live(masks, params, prunable).tolist()


# SNIP


def test_snip_on_linear_regression_in_closed_form():
    rng = np.random.default_rng(0)
    x, y, w = rng.normal(size=(20, 6)), rng.normal(size=(20, 3)), rng.normal(size=(6, 3))
    b = rng.normal(size=3)
    residual = x @ w + b - y
    expected = {"kernel": np.abs(w * (x.T @ residual)), "bias": np.abs(b * residual.sum(0))}

    def squares(params, batch):
        error = batch[0] @ params["kernel"] + params["bias"][None] - batch[1]
        return 0.5 * jnp.sum(error**2)

    params = {"kernel": jnp.float32(w), "bias": jnp.float32(b)}
    parts = [(jnp.float32(x[i]), jnp.float32(y[i])) for i in (slice(0, 7), slice(7, 20))]
    scores = at_init.snip_scores(squares, params, iter(parts))
    chex.assert_trees_all_close(scores, jax.tree.map(np.float32, expected), rtol=1e-4)
    masks = at_init.snip(squares, params, parts, sparsity=0.7)
    np.testing.assert_array_equal(masks["kernel"], largest(expected["kernel"], round(18 * 0.3)))
    assert masks["bias"].all()  # whatever it scores


def test_snip_sums_gradients_before_the_absolute_value():
    params = {"kernel": jnp.ones((1, 2))}
    linear = lambda params, batch: jnp.vdot(params["kernel"], batch)  # noqa: E731
    parts = [jnp.array([[5.0, 1.0]]), jnp.array([[-5.0, 1.0]])]
    scores = at_init.snip_scores(linear, params, parts)
    np.testing.assert_array_equal(scores["kernel"], [[0.0, 2.0]])


def test_snip_does_not_depend_on_the_scale_of_the_loss():
    params, data = mlp([8, 16, 4], bias=True), batches(2, 16, 8, 4)
    scaled = lambda params, batch: 64.0 * loss(params, batch)  # noqa: E731
    chex.assert_trees_all_equal(
        at_init.snip(loss, params, data, sparsity=0.8),
        at_init.snip(scaled, params, data, sparsity=0.8),
    )


# GraSP


def test_grasp_needs_no_derivatives_in_forward_mode():
    @jax.custom_vjp
    def cube(x):
        return x**3

    cube.defvjp(lambda x: (cube(x), x), lambda x, y: (3 * x**2 * y,))
    loss = lambda params, batch: batch * jnp.sum(cube(params["w"])) / 3  # noqa: E731
    scores = at_init.grasp_scores(loss, {"w": jnp.array([2.0, -1.0])}, [1.0])
    assert scores["w"].tolist() == [32.0, 2.0]


def test_grasp_on_a_quadratic_loss_in_closed_form():
    rng = np.random.default_rng(1)
    halves = [rng.normal(size=(12, 12)) for _ in range(2)]
    matrices, bs = [h + h.T for h in halves], rng.normal(size=(2, 12))
    w = 0.1 * rng.normal(size=12)
    a, b = sum(matrices), bs.sum(0)
    expected = w * (a @ (a @ w - b))

    def quadratic(params, batch):
        flat = params["kernel"].ravel()
        return 0.5 * flat @ batch[0] @ flat - batch[1] @ flat

    params = {"kernel": jnp.float32(w).reshape(3, 4)}
    parts = [(jnp.float32(m), jnp.float32(v)) for m, v in zip(matrices, bs, strict=True)]
    scores = at_init.grasp_scores(quadratic, params, iter(parts))["kernel"]
    np.testing.assert_allclose(scores.ravel(), expected, rtol=1e-4, atol=1e-4)
    assert (expected < 0).sum() >= 3  # signed: these go first, however large
    masks = at_init.grasp(quadratic, params, parts, sparsity=0.75)
    np.testing.assert_array_equal(masks["kernel"].ravel(), largest(expected, 3))

    # What it is for: removing what scores highest costs most of the gradient's norm, to first order
    gradient = a @ w - b
    step = 1e-6
    for i in range(12):
        nudged = w.copy()
        nudged[i] -= step * w[i]
        change = ((a @ nudged - b) ** 2).sum() - (gradient**2).sum()
        np.testing.assert_allclose(change, -2 * step * expected[i], rtol=1e-2, atol=1e-8)


# SynFlow


@pytest.mark.parametrize("sparsity", [0.0, 0.8])
def test_synaptic_flow_is_conserved(sparsity):
    params = mlp([6, 20, 15, 30, 4])
    masks = jax.tree.map(
        lambda p: jax.random.bernoulli(jax.random.key(1), 1 - sparsity, p.shape), params
    )
    params = gj.apply_masks(params, masks)
    scores = at_init.synflow_scores(net, params, jnp.zeros((1, 6)))
    total = net(jax.tree.map(jnp.abs, params), jnp.ones((1, 6))).sum()
    assert total > 0
    for layer in jax.tree.leaves(scores):
        np.testing.assert_allclose(layer.sum(), total, rtol=1e-5)
    assert all(
        (s[~m] == 0).all() for s, m in zip(*map(jax.tree.leaves, (scores, masks)), strict=True)
    )


def numpy_synflow(params, sparsity, rounds):
    """All layers as one vector, float64, forward and backward by hand."""
    kernels = [np.abs(np.asarray(layer["kernel"], np.float64)) for layer in params]
    biases = [np.abs(np.asarray(layer.get("bias", 0.0), np.float64)) for layer in params]
    masks = [np.ones_like(k) for k in kernels]
    total = sum(k.size for k in kernels)
    for i in range(1, rounds + 1):
        live = [k * m for k, m in zip(kernels, masks, strict=True)]
        inputs = [np.ones((1, len(kernels[0])))]
        for k, b in zip(live, biases, strict=True):
            inputs.append(inputs[-1] @ k + b)  # all positive: a ReLU is the identity
        back = np.ones((1, kernels[-1].shape[1]))
        scores = []
        for k, x in zip(reversed(live), reversed(inputs[:-1]), strict=True):
            scores.insert(0, k * (x.T @ back))
            back = back @ k.T
        flat = np.concatenate([s.ravel() for s in scores])
        flat[np.concatenate([m.ravel() for m in masks]) == 0] = -1
        kept = largest(flat, round(total * (1 - sparsity) ** (i / rounds)))
        ends = np.cumsum([k.size for k in kernels])[:-1]
        masks = [m.reshape(k.shape) for m, k in zip(np.split(kept, ends), kernels, strict=True)]
    return masks


@pytest.mark.parametrize(
    ("sparsity", "rounds", "bias"), [(0.5, 1, False), (0.9, 7, True), (0.98, 30, False)]
)
def test_synflow_equals_numpy(sparsity, rounds, bias):
    params = mlp([7, 25, 12, 3], bias=bias)
    example = jax.ShapeDtypeStruct((1, 7), jnp.float32)
    masks = at_init.synflow(net, params, example, sparsity=sparsity, rounds=rounds)
    expected = numpy_synflow(params, sparsity, rounds)
    for layer, kernel in zip(masks, expected, strict=True):
        np.testing.assert_array_equal(layer["kernel"], kernel)
        assert "bias" not in layer or layer["bias"].all()


@pytest.mark.parametrize("scope", [gj.global_ranking, gj.uniform, gj.erk])
def test_synflow_keeps_exact_counts_and_never_revives(scope):
    params = mlp([10, 40, 40, 5])
    shapes = [(10, 40), (40, 40), (40, 5)]
    example = jnp.zeros((1, 10))
    scored = []

    def watched(params, x):  # each round starts from what the last one left
        jax.debug.callback(lambda ps: scored.append([np.asarray(p) != 0 for p in ps]), params)
        return net([{"kernel": p} for p in params], x)

    kernels = [layer["kernel"] for layer in params]
    for sparsity in (0.0, 0.5, 0.937, 0.99):
        scored.clear()
        masks = at_init.synflow(watched, kernels, example, sparsity=sparsity, rounds=9, scope=scope)
        jax.effects_barrier()
        counts = scope(shapes, sparsity)
        live = num_live(masks, kernels)
        assert live == list(counts) if isinstance(counts, tuple) else sum(live) == counts
        assert len(scored) == 9
        for before, after in zip(scored, [*scored[1:], masks], strict=True):
            assert all(not (b & ~a).any() for a, b in zip(before, after, strict=True))
        sizes = [sum(int(m.sum()) for m in masks) for masks in [*scored, masks]]
        assert sizes == sorted(sizes, reverse=True)


def test_rounds_save_the_layers_of_synflow():
    params = mlp([10, 300, 300, 10])
    prune = lambda rounds: at_init.synflow(  # noqa: E731
        net, params, jnp.zeros((1, 10)), sparsity=1 - 60 / 96_000, rounds=rounds
    )
    with pytest.warns(UserWarning, match=r"Layer collapse: no weight is left in 1/kernel\."):
        once = prune(1)
    assert num_live(once, params)[1] == 0
    often = prune(100)  # without a warning
    assert min(num_live(often, params)) > 0
    assert sum(num_live(once, params)) == sum(num_live(often, params)) == 60


def test_synflow_tells_when_nothing_flows_any_more():
    params = [jnp.ones((1, 1)), jnp.ones((1, 4)), jnp.ones((4, 1))]
    chain = lambda params, x: x @ params[0] @ params[1] @ params[2]  # noqa: E731
    with (
        pytest.warns(UserWarning, match="Layer collapse"),
        pytest.warns(UserWarning, match="after round 1 of 2 no path leads"),
    ):
        masks = at_init.synflow(chain, params, jnp.zeros((1, 1)), sparsity=8 / 9, rounds=2)
    assert sum(num_live(masks, params)) == 1


def test_synflow_beyond_float32_is_an_error_that_scaling_mends():
    params = [1e6 * layer["kernel"] for layer in mlp([8] * 9)]
    deep = lambda params, x: net([{"kernel": p} for p in params], x)  # noqa: E731
    small = lambda params, x: 1e-25 * deep(params, 1e-25 * x)  # noqa: E731
    with pytest.raises(ValueError, match=r"The scores of .*7.* hold NaN or infinite values"):
        at_init.synflow(deep, params, jnp.zeros((1, 8)), sparsity=0.9, rounds=10)
    masks = at_init.synflow(small, params, jnp.zeros((1, 8)), sparsity=0.9, rounds=10)
    expected = numpy_synflow([{"kernel": p} for p in params], 0.9, 10)
    chex.assert_trees_all_equal(masks, [jnp.array(m) for m in expected])


# All of them


def test_magnitude_ranks_all_layers_as_one_or_each_for_itself():
    params = {"a": jnp.array([[5.0, -6.0], [7.0, 8.0]]), "b": jnp.array([[-1.0, 2.0], [3.0, 0.5]])}
    masks = at_init.magnitude(params, sparsity=0.25)
    np.testing.assert_array_equal(masks["a"], np.ones((2, 2), bool))
    np.testing.assert_array_equal(masks["b"], [[False, True], [True, False]])
    masks = at_init.magnitude(params, sparsity=0.5, scope=gj.uniform)
    np.testing.assert_array_equal(masks["a"], [[False, False], [True, True]])
    np.testing.assert_array_equal(masks["b"], [[False, True], [True, False]])


def test_collapse_is_told():
    params = {"a": jnp.array([[5.0], [-6]]), "b": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    with pytest.warns(UserWarning, match=r"no weight is left in b/kernel\. Lower the sparsity"):
        masks = at_init.magnitude(params, sparsity=2 / 3)
    assert gj.collapsed(masks, params) == ["b/kernel"]
    assert gj.collapsed(gj.ones(params), params) == []
    rules = [("b/kernel", False)]
    assert gj.collapsed(masks, params, rules) == []
    assert at_init.magnitude(params, sparsity=0.5, prunable=rules)["b"]["kernel"].all()


def test_stacked_layers_are_layers():
    kernel = jax.random.normal(jax.random.key(0), (2, 3, 6, 6)).at[1, 2].multiply(1e-3)
    stacked, rules = {"scan": {"kernel": kernel}}, [("scan", gj.Stacked(2))]
    masks = at_init.magnitude(stacked, sparsity=0.5, scope=gj.uniform, prunable=rules)
    apart = {f"{i}{j}": kernel[i, j] for i in range(2) for j in range(3)}
    expected = at_init.magnitude(apart, sparsity=0.5, scope=gj.uniform)
    for i in range(2):
        for j in range(3):
            np.testing.assert_array_equal(masks["scan"]["kernel"][i, j], expected[f"{i}{j}"])
    with pytest.warns(UserWarning, match=r"no weight is left in scan/kernel\[1, 2\]\."):
        masks = at_init.magnitude(stacked, sparsity=0.5, prunable=rules)
    assert gj.collapsed(masks, stacked, rules) == ["scan/kernel[1, 2]"]
    assert gj.report.table(stacked, masks, rules).endswith("is left in scan/kernel[1, 2].")


def test_jit_changes_nothing():
    params, image = mlp([6, 8]), jnp.ones((1, 6))
    prune = lambda params: at_init.synflow(net, params, image, sparsity=0.8, rounds=2)  # noqa: E731
    chex.assert_trees_all_equal(prune(params), jax.jit(prune)(params))


def test_tuples_path_rules_and_low_precision():
    params = tuple(jax.tree.map(lambda p: p.astype(jnp.bfloat16), mlp([6, 12, 4], bias=True)))
    data, rules = batches(1, 8, 6, 4), [("^1/kernel", False)]
    image = data[0][0][:1]
    common = {"sparsity": 0.8, "prunable": rules}
    for prune in (
        lambda params: at_init.snip(loss, params, data, **common),
        lambda params: at_init.grasp(loss, params, data, **common),
        lambda params: at_init.synflow(net, params, image, rounds=2, **common),
    ):
        masks = prune(params)
        chex.assert_trees_all_equal_structs(masks, params)
        assert num_live(masks, params, rules) == [round(72 * 0.2)]
        assert masks[1]["kernel"].all()
        assert masks[0]["bias"].all()
    for scores in (
        at_init.snip_scores(loss, params, data),
        at_init.grasp_scores(loss, params, data),
        at_init.synflow_scores(net, params, image),
    ):
        chex.assert_trees_all_equal_shapes(scores, params)
        assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(scores))


def test_errors():
    params, data = mlp([6, 8, 4]), batches(1, 8, 6, 4)
    with pytest.raises(ValueError, match="at least one batch"):
        at_init.snip(loss, params, iter([]), sparsity=0.5)

    def spoilt(params, batch):  # the root of 0 has no gradient
        return loss(params, batch) + jnp.sqrt(jnp.sum(0.0 * params[1]["kernel"]))

    with pytest.raises(ValueError, match=r"The scores of 1/kernel hold NaN or infinite"):
        at_init.snip(spoilt, params, data, sparsity=0.5)
    zero_head = [params[0], {"kernel": jnp.zeros((8, 4))}]
    for prune in (
        lambda: at_init.snip(loss, zero_head, data, sparsity=0.5),
        lambda: at_init.synflow(net, zero_head, data[0][0][:1], sparsity=0.5),
    ):
        with pytest.raises(ValueError, match=r"0/kernel, 1/kernel\) are 0: there is nothing to"):
            prune()
    with pytest.raises(ValueError, match="at least one round"):
        at_init.synflow(net, params, data[0][0][:1], sparsity=0.5, rounds=0)
    for prune in (
        lambda: at_init.magnitude(params, sparsity=0.999),
        lambda: at_init.synflow(net, params, data[0][0][:1], sparsity=0.999),
    ):
        with pytest.raises(ValueError, match=r"cannot meet sparsity 0\.999"):
            prune()


EVENTS = {"update_every": 2, "total_steps": 12}


@pytest.mark.parametrize(
    ("make", "kept"),
    [
        (lambda masks: gj.static(masks=masks), 80),
        (lambda masks: gj.rigl(sparsity=0.8, masks=masks, **EVENTS), 80),
        (lambda masks: gj.granet(final_sparsity=0.9, end_step=8, masks=masks, **EVENTS), 40),
    ],
    ids=["static", "rigl", "granet"],
)
def test_methods_train_on_from_these_masks(make, kept):
    params, data = mlp([10, 40], bias=True), batches(1, 32, 10, 4)
    masks = at_init.magnitude(params, sparsity=0.8)
    tx = gj.sparsify(optax.sgd(0.1, momentum=0.9), make(masks))
    state, params = tx.init(params), gj.apply_masks(params, masks)
    chex.assert_trees_all_equal(gj.get_masks(state), masks)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params, data[0]), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(12):
        params, state = step(params, state)
    end = gj.get_masks(state)
    assert num_live(end, params) == [kept]
    assert (params[0]["kernel"][~end[0]["kernel"]] == 0).all()


@pytest.mark.full
def test_the_collapse_study_as_a_person_runs_it(tmp_path):
    flags = ["--dataset=digits", "--model=lenet_300_100", "--rounds=5", f"--out_dir={tmp_path}"]
    program = [sys.executable, "-m", "experiments.collapse", *flags]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reached = {}
    for line in (tmp_path / "table.txt").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        if len(cells) == 3:
            reached[cells[0]] = float(cells[1])
    assert list(reached) == ["random", "magnitude", "snip", "grasp", "synflow"]
    # The weights of the layer with the largest fan-in are the smallest; SynFlow evens them out.
    assert reached["magnitude"] < reached["snip"] < reached["synflow"] <= 4.0
    assert "Above 4.22 there are fewer weights than layers" in done.stdout
    assert (tmp_path / "collapse.svg").read_text().startswith("<?xml")


def test_structures_hold_before_training_too():
    params = {"kernel": jax.random.normal(jax.random.key(0), (8, 6))}
    rules = [("", gj.structures.n_of_m(4))]
    masks = gj.at_init.magnitude(params, sparsity=0.5, scope=gj.uniform, prunable=rules)
    groups = np.asarray(jnp.abs(params["kernel"])).reshape(2, 4, 6)
    best = np.argsort(np.argsort(-groups, axis=1), axis=1) < 2
    np.testing.assert_array_equal(masks["kernel"].reshape(2, 4, 6), best)


def test_what_is_prunable_follows_from_the_parameters_not_from_their_scores():
    """Scores are floats where parameters are integers. Rules may be lists, as a file gives them."""
    params = {"kernel": jnp.arange(8.0).reshape(2, 4), "table": jnp.ones((2, 4), jnp.int32)}
    scores = jax.tree.map(lambda p: 9 * p.astype(jnp.float32), params)
    for made in (at_init.masks_from, jax.jit(at_init.masks_from, static_argnames="sparsity")):
        masks = made(scores, params, sparsity=0.5)
        assert masks["table"].all()
        assert masks["kernel"].tolist() == [[False] * 4, [True] * 4]
    listed = at_init.masks_from(scores, params, sparsity=0.5, prunable=[["kernel", True]])
    chex.assert_trees_all_equal(listed, masks)
