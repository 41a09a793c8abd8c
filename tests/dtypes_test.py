"""Complex parameters give the right numbers; strict dtype promotion goes through everywhere."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import granet_jax as gj
from granet_jax import export
from granet_jax.methods import lottery
from tests import tables

WEIGHTS = {"kernel": jnp.array([[1j, 2.0], [3j, 0.5]])}
REAL_METHODS = [x for x in tables.METHODS | tables.VARIANTS if x not in ("static", "set_by_sign")]


def as_complex(pair):
    return {"kernel": jax.lax.complex(pair["re"], pair["im"])}


def quartic(params, batch):
    """No function of moduli alone, and not of the parts one by one."""
    w = params["kernel"]
    return jnp.sum(jnp.abs(w @ batch) ** 4) + jnp.sum((w**3).real) + jnp.sum(w.imag)


def one_event(method, params, grads, step):
    state = method.init(params)
    state = state if method.observe is None else method.observe(state, grads)
    state, keep = method.update(state, gj.Event(params, grads, step=jnp.int32(step)))
    return state.masks, keep


def test_scores_of_complex_weights():
    grads = {"kernel": jnp.array([[3 + 4j, 1j], [1.0, -2.0]])}
    for score, expected in (
        (gj.scores.magnitude, [[1.0, 2.0], [3.0, 0.5]]),
        (gj.scores.gradient, [[5.0, 1.0], [1.0, 2.0]]),
        (gj.scores.saliency, [[5.0, 2.0], [3.0, 1.0]]),
        (gj.scores.magnitude_and_gradient(1.0), [[6.0, 3.0], [4.0, 2.5]]),
    ):
        scores = score(gj.Event(WEIGHTS, grads))["kernel"]
        assert scores.dtype == jnp.float32
        np.testing.assert_allclose(scores, expected)
    assert gj.scores.random(gj.Event(WEIGHTS, key=tables.KEY))["kernel"].dtype == jnp.float32


def test_snip_of_complex_weights():
    loss = lambda params, batch: batch * jnp.sum(jnp.abs(params["kernel"]) ** 2)  # noqa: E731
    scores = gj.at_init.snip_scores(loss, WEIGHTS, [0.5, 0.5])["kernel"]
    np.testing.assert_allclose(scores, [[2, 8], [18, 0.5]])
    masks = gj.at_init.snip(loss, WEIGHTS, [1.0], sparsity=0.5)["kernel"]
    np.testing.assert_array_equal(masks, [[0, 1], [1, 0]])


def test_grasp_of_complex_weights_is_that_of_their_parts():
    keys = jax.random.split(jax.random.key(0), 6)
    pair = {"re": jax.random.normal(keys[0], (3, 2)), "im": jax.random.normal(keys[1], (3, 2))}
    batches = [jax.random.normal(k, (2, 4), jnp.complex64) for k in keys[2:4]]
    scores = gj.at_init.grasp_scores(quartic, as_complex(pair), batches)["kernel"]
    by_part = gj.at_init.grasp_scores(lambda p, b: quartic(as_complex(p), b), pair, batches)
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, by_part["re"] + by_part["im"], rtol=1e-4)


def test_synflow_of_complex_weights_is_that_of_their_moduli():
    params = [jnp.array([[-1j, 2.0]]), jnp.array([[4.0], [0.6 - 0.8j]])]
    net = lambda params, x: x @ params[0] @ params[1]  # noqa: E731
    example = jnp.zeros((1, 1), jnp.complex64)
    scores = gj.at_init.synflow_scores(net, params, example)
    np.testing.assert_allclose(scores[0], [[4.0, 2.0]])
    np.testing.assert_allclose(scores[1], [[4.0], [2.0]])
    all_of_them = [("", True)]
    masks = gj.at_init.synflow(net, params, example, sparsity=0.5, rounds=2, prunable=all_of_them)
    assert [m.tolist() for m in masks] == [[[True, False]], [[True], [False]]]


def test_lottery_and_magnitude_of_complex_weights():
    expected = [[False, True], [True, False]]
    assert gj.at_init.magnitude(WEIGHTS, sparsity=0.5)["kernel"].tolist() == expected
    assert lottery.prune(WEIGHTS, gj.ones(WEIGHTS), fraction=0.5)["kernel"].tolist() == expected


@pytest.mark.parametrize("structure", [gj.structures.block((1, 2)), gj.structures.channel(axis=0)])
def test_units_of_complex_weights_are_ranked_by_mean_size(structure):
    params = {"kernel": jnp.array([[2j, -2j], [1.0, 1.0]])}
    step = gj.prune_to(lambda *_: 1, prunable=[("", structure)])
    masks, _ = step(gj.ones(params), gj.ones(params), gj.Event(params, None, step=jnp.int32(0)))
    assert masks["kernel"].tolist() == [[True, True], [False, False]]


def test_methods_rank_complex_weights_by_size():
    params = gj.testing.example_params(jnp.complex64)
    grads = jax.tree.map(lambda p: jnp.flip(p) * 1j, params)
    method = tables.METHODS["granet"][0]()
    event = jax.jit(lambda params, grads: one_event(method, params, grads, 12))
    sizes = [jax.tree.map(jnp.abs, x) for x in (params, grads)]
    chex.assert_trees_all_equal(event(params, grads), event(*sizes))


def test_complex_training_keeps_zeros_dtypes_and_mean_gradients():
    params = {"kernel": jnp.array([[4j, 3.0], [2 + 2j, 1.0]]), "bias": jnp.ones(4, jnp.complex64)}
    masks = {"kernel": jnp.array([[True] * 2, [False] * 2]), "bias": jnp.ones(4, bool)}
    method = gj.snfs(sparsity=0.5, update_every=1, total_steps=4, decay=0.5, masks=masks)
    tx = gj.sparsify(optax.sgd(0.5, momentum=0.5), method)
    state = tx.init(params)
    params = gj.apply_masks(params, masks)
    grads = jax.tree.map(lambda p: jnp.full_like(p, 2j), params)
    types = jax.tree.map(jax.typeof, (params, state))
    updates, state = jax.jit(tx.update)(grads, state, params)
    params = optax.apply_updates(params, updates)
    assert jax.tree.map(jax.typeof, (params, state)) == types
    np.testing.assert_array_equal(gj.get_method_state(state).average["bias"], [1j] * 4)
    np.testing.assert_array_equal(params["bias"], [1 - 1j] * 4)
    live = gj.get_masks(state)["kernel"]
    assert live.sum() == 2
    assert not params["kernel"][~live].any()


def test_what_needs_real_numbers_refuses_complex_ones():
    by_sign = (tables.METHODS | tables.VARIANTS)["set_by_sign"][0]()
    with pytest.raises(ValueError, match="What by_sign splits has to be real, and that of kernel"):
        one_event(by_sign, WEIGHTS, WEIGHTS, 4)
    step = gj.prune_to(lambda *_: 1, score=lambda event: event.params)
    masks = gj.ones(WEIGHTS)
    with pytest.raises(ValueError, match="A score has to be real, and that of kernel is complex"):
        step(masks, masks, gj.Event(WEIGHTS, WEIGHTS, step=jnp.int32(0)))
    with pytest.raises(ValueError, match="Complex scores have no order"):
        gj.top_k_mask(WEIGHTS["kernel"], 1)


@pytest.mark.parametrize("make", [gj.reparam.dst, gj.reparam.str_])
def test_thresholds_of_complex_weights(make):
    """Against the same formula on the two parts; masks by modulus."""
    method = make()
    pair = {"re": jnp.array([[3.0], [0.1], [-1.0]]), "im": jnp.array([[4.0], [-0.2], [0.5]])}
    weights, upstream = as_complex(pair), jnp.array([[1 + 2j], [3.0], [1j]])
    extra = jax.tree.map(lambda t: jnp.full_like(t, 0.6), method.init(weights))
    t = 0.6 if make is gj.reparam.dst else jax.nn.sigmoid(0.6)
    shrunk = 0.0 if make is gj.reparam.dst else t
    size = np.abs(np.asarray(weights["kernel"]))
    expected = weights["kernel"] * np.where(size > t, (size - shrunk) / size, 0)
    np.testing.assert_allclose(method.effective(weights, extra)["kernel"], expected, rtol=1e-6)
    np.testing.assert_array_equal(method.masks(weights, extra)["kernel"], size > t)
    assert extra["kernel"].dtype == jnp.float32

    def loss(weights):
        return jnp.sum(method.effective(weights, extra)["kernel"] * upstream).real

    grad = jax.grad(loss)(weights)["kernel"]
    if make is gj.reparam.str_:  # the derivative of DST's step is another by design
        for part, direction in ((grad.real, 1e-3), (-grad.imag, 1e-3j)):
            moved = [
                method.effective({"kernel": weights["kernel"] + sign * direction}, extra)["kernel"]
                for sign in (1, -1)
            ]
            slope = ((moved[0] - moved[1]) * upstream).real / 2e-3
            np.testing.assert_allclose(part, slope, atol=2e-3)


def test_numbers_that_are_not_finite():
    odd = jnp.array([1.0 + 0j, complex(np.nan, 0), complex(0, np.inf)])
    assert gj.metrics.num_nonfinite({"a": odd}) == 2


@pytest.fixture(autouse=True)
def _compile_quickly():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.complex64])
def test_every_method_promotes_nothing(dtype):
    params = gj.testing.example_params(dtype)
    for name in REAL_METHODS + (["set_by_sign"] if dtype != jnp.complex64 else []):
        tx = gj.sparsify(
            optax.sgd(0.1, momentum=0.9), (tables.METHODS | tables.VARIANTS)[name][0]()
        )
        state = jax.eval_shape(tx.init, params)
        updates, after = jax.eval_shape(tx.update, params, state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes((params, state), (updates, after))


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
    "structure",
    [
        gj.structures.n_of_m(2, axis=-1),
        gj.structures.fan_in(ablation=0.3),
        gj.structures.block((2, 2)),
        gj.structures.channel(tie="a"),
    ],
    ids=["n_of_m", "fan_in", "block", "channel"],
)
def test_every_structure_promotes_nothing(structure):
    params = {"a": jnp.ones((4, 4), jnp.bfloat16), "b": jnp.ones((4, 4), jnp.bfloat16)}
    tx = gj.sparsify(
        optax.sgd(0.1),
        gj.rigl(
            sparsity=0.5,
            update_every=2,
            total_steps=9,
            key=tables.KEY,
            start=gj.uniform,
            drop=gj.scores.magnitude_and_gradient(0.1),
            grow=gj.scores.saliency,
            prunable=[("", structure)],
        ),
    )
    jax.eval_shape(lambda params: tx.update(params, tx.init(params), params), params)


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_pruning_once_promotes_nothing(dtype):
    params = {"kernel": jnp.array([[3.0, 1.0], [2.0, 4.0]], dtype), "other": jnp.ones((2, 2))}
    loss = lambda params, batch: jnp.sum(params["kernel"] ** 3) * batch  # noqa: E731
    net = lambda params, x: x * params["kernel"]  # noqa: E731
    batches, half = [jnp.ones([], dtype)], {"sparsity": 0.5, "prunable": [("other", False)]}
    rules = half["prunable"]
    for masks in (
        gj.at_init.snip(loss, params, batches, **half),
        gj.at_init.grasp(loss, params, batches, **half),
        gj.at_init.synflow(net, params, jnp.ones((2, 2), dtype), rounds=2, **half),
        lottery.prune(params, gj.ones(params), fraction=0.5, by_layer=True, prunable=rules),
    ):
        assert masks["kernel"].tolist() == [[True, False], [False, True]]
    jax.jit(lambda s: gj.uniform([(4, 4)], s)[0] + gj.global_ranking([(4, 4)], s))(0.5)


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.complex64])
@pytest.mark.parametrize("make", [gj.reparam.dst, gj.reparam.str_])
def test_trained_thresholds_promote_nothing(make, dtype):
    method, params = make(), {"kernel": jnp.ones((3, 2), dtype), "bias": jnp.ones(2, dtype)}
    controller = gj.reparam.steer(0.9, end_step=100)
    tx = gj.reparam.penalise(optax.sgd(0.1, momentum=0.9), method, controller)

    def step(pair):
        grads = jax.grad(lambda pair: jnp.sum(method.effective(*pair)["kernel"]).real)(pair)
        updates, state = tx.update(grads, tx.init(pair), pair)
        return optax.apply_updates(pair, updates), gj.reparam.export(method, *pair), state

    pair = params, method.init(params)
    after, *_ = jax.eval_shape(step, pair)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, pair)


@pytest.mark.usefixtures("strict")
def test_services_promote_nothing(tmp_path):
    params = gj.testing.example_params(jnp.bfloat16)
    masks = jax.tree.map(lambda p: p > 0, params)
    gj.metrics.num_live(masks, params), gj.metrics.num_grown(masks, masks)
    gj.metrics.sparsity(masks, params), gj.metrics.densities(masks, params)
    gj.report.table(params, masks)
    params = gj.apply_masks(params, masks)
    pytest.importorskip("safetensors")
    export.save(tmp_path / "model.safetensors", params, masks)
    chex.assert_trees_all_equal(export.load(tmp_path / "model.safetensors").params, params)
