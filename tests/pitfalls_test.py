"""What users of other libraries ran into: leaves in another order, odd names, odd masks."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import granet_jax as gj
from granet_jax import trees

KEY = jax.random.key(0)


def layers(num=12):
    """A list of layers, more than ten, each of another size."""
    return [{"kernel": jnp.ones((4 + i, 6)), "bias": jnp.ones(6)} for i in range(num)]


def from_file(tree):
    """As a file gives it back: dicts with strings, in which 10 comes before 2."""
    return {str(i): layer for i, layer in enumerate(tree)}


def test_masks_in_another_order_find_their_layers():
    params = layers()
    masks = gj.random_masks(KEY, params, 0.5)
    read = from_file(masks)
    assert [x.shape for x in jax.tree.leaves(read)] != [x.shape for x in jax.tree.leaves(masks)]
    chex.assert_trees_all_equal(
        gj.metrics.num_live(read, params), gj.metrics.num_live(masks, params)
    )
    assert gj.metrics.densities(read, params) == gj.metrics.densities(masks, params)
    assert gj.metrics.sparsity(read, params) == gj.metrics.sparsity(masks, params)
    assert gj.metrics.num_grown(masks, read) == 0
    assert gj.report.table(params, read) == gj.report.table(params, masks)
    assert gj.collapsed(read, params) == []
    chex.assert_trees_all_equal(gj.apply_masks(params, read), gj.apply_masks(params, masks))
    chex.assert_trees_all_equal(gj.static(masks=read).init(params).masks, masks)
    chex.assert_trees_all_equal(
        *(gj.lottery.prune(params, m, by_layer=True) for m in (read, masks))
    )
    step = gj.regenerate(lambda step: 0.5)
    new, _ = step(read, read, gj.Event(params, params, step=jnp.int32(1)))
    wanted, _ = step(masks, masks, gj.Event(params, params, step=jnp.int32(1)))
    chex.assert_trees_all_equal(new, from_file(wanted))


def test_gradients_in_another_order_find_their_layers():
    keys = jax.random.split(KEY, 11)
    params = [{"kernel": jnp.ones((4, 4))} for _ in keys]
    grads = [{"kernel": jax.random.normal(key, (4, 4))} for key in keys]
    masks = gj.random_masks(KEY, params, 0.5)
    step = gj.regenerate(lambda step: 0.5)
    wanted = step(masks, masks, gj.Event(params, grads, step=jnp.int32(1)))
    got = step(masks, masks, gj.Event(params, from_file(grads), step=jnp.int32(1)))
    chex.assert_trees_all_equal(got, wanted)


def test_masks_of_layers_of_one_shape_in_another_order():
    params = [{"kernel": jnp.ones((4, 4))} for _ in range(11)]
    masks = [{"kernel": jnp.arange(16).reshape(4, 4) <= i} for i in range(11)]
    densities = gj.metrics.densities(from_file(masks), params)
    assert {path: 16 * float(x) for path, x in densities.items()} == {
        f"{i}/kernel": i + 1 for i in range(11)
    }


def test_a_tree_without_a_leaf_is_refused():
    params = layers(2)
    masks = gj.ones(params)
    with pytest.raises(ValueError, match=r"expected shape \(5, 6\) at 1/kernel, got nothing"):
        gj.metrics.densities(masks[:1], params)
    with pytest.raises(
        ValueError, match=r"expected shape \(4, 6\) at 0/kernel, got shape \(5, 6\)"
    ):
        gj.report.table(params, masks[::-1])


def test_paths_that_read_alike_are_told_apart():
    params = {"a": {"b": jnp.ones((4, 4))}, "a/b": jnp.ones((3, 3))}
    masks = {"a": {"b": jnp.zeros((4, 4), bool)}, "a/b": jnp.ones((3, 3), bool)}
    densities = gj.metrics.densities(masks, params)
    assert {k: float(v) for k, v in densities.items()} == {"a/b": 0.0, "'a/b'": 1.0}
    extra = gj.reparam.dst().init(params)
    assert {path: x.shape for path, x in extra.items()} == {"a/b": (4,), "'a/b'": (3,)}
    costs = gj.flops.count(lambda p, x: x @ p["a"]["b"] @ jnp.ones((4, 3)) @ p["a/b"], params, X4)
    assert [leaf.path for leaf in costs.leaves] == ["a/b", "'a/b'"]
    rules = [("^a/b$", False)]
    assert [x.prunable for x in trees.describe(params, rules)] == [False, True]


X4 = jax.ShapeDtypeStruct((2, 4), jnp.float32)
DENSE = [  # paths and shapes of leaves that are no kernels
    ("batch_norm/offset", (1, 1, 1, 8)),  # Haiku
    ("batch_norm/scale", (1, 1, 1, 8)),
    ("resnet/~/initial_batchnorm/gain", (1, 1, 8)),
    ("conv/b", (8, 1, 1)),
    ("transformer/wte", (50, 8)),
    ("transformer/wpe/weight", (50, 8)),
    ("pos", (16, 8)),
    ("encoder/pos_emb", (1, 16, 8)),
    ("vit/position_embeddings", (1, 16, 8)),
    ("cls_token", (1, 1, 8)),
    ("vit/mask_token", (4, 8)),
    ("head/probe", (4, 8)),
    ("block/layer_scale", (4, 8)),
    ("block/ls1/gamma", (4, 8)),
    ("LayerNorm_0/weight", (16, 16)),
    ("layers/0/ln_1/weight", (16, 16)),
    ("attention/in_proj_bias", (3, 8)),
    ("attention/relative_position_bias_table", (49, 8)),
    ("q_proj/lora_a", (8, 2)),
    ("q_proj/lora_B/default/weight", (2, 8)),
    ("adapter/down/kernel", (8, 2)),
    ("tok_emb/weight", (50, 8)),
    ("embedding/embeddings", (50, 8)),  # Keras
    ("layer_normalization/gamma", (4, 8)),
]
KERNELS = [
    ("conv/kernel", (3, 3, 1, 8)),
    ("PreNorm_0/Attention_0/to_qkv/kernel", (8, 24)),
    ("exploration/linear/w", (8, 8)),  # "lora" lies in it
    ("lstm_cell/recurrent_kernel", (8, 32)),
    ("layers/0/weight_ih", (32, 8)),
    ("norm_mlp/dense/kernel", (8, 8)),
    ("position_wise/Dense_0/kernel", (8, 8)),
    ("head/kernel", (8, 1)),
    ("input/kernel", (1, 8)),
    ("experts/wi_0", (4, 8, 16)),
    ("7", (8, 8)),
    ("mlp/gating_einsum", (2, 8, 16)),
]


@pytest.mark.parametrize(("path", "shape"), DENSE)
def test_dense_by_default(path, shape):
    params = {path: jnp.ones(shape), "fc": {"kernel": jnp.ones((4, 4))}}
    leaf = next(x for x in trees.describe(params) if x.path == path)
    assert not leaf.prunable
    assert f"dense: {leaf.why}" in gj.report.table(params)


@pytest.mark.parametrize(("path", "shape"), KERNELS)
def test_prunable_by_default(path, shape):
    assert trees.describe({path: jnp.ones(shape)})[0].prunable


def test_the_class_of_a_module_tells_a_norm():
    eqx = pytest.importorskip("equinox")

    class Net(eqx.Module):
        layers: list

    net = Net(
        [eqx.nn.LayerNorm((4, 6)), eqx.nn.Linear(6, 6, key=KEY), eqx.nn.Embedding(9, 6, key=KEY)]
    )
    params = eqx.filter(net, eqx.is_array)
    found = {x.path: (x.prunable, x.why) for x in trees.describe(params)}
    assert found["layers/0/weight"] == (False, "in layernorm")
    assert found["layers/2/weight"] == (False, "in embedding")
    assert found["layers/1/weight"] == (True, "rank 2")


def test_nothing_prunable_tells_dtypes():
    with pytest.raises(ValueError, match=r"kernel \(4, 4\) int8 \[no floats\]"):
        trees.describe({"kernel": jnp.ones((4, 4), jnp.int8)})


NM = [("", gj.structures.n_of_m(4))]


def odd_masks(shape, sparsity):
    draw = np.random.default_rng(0).random(shape)
    return {"kernel": jnp.asarray(draw > sparsity)}


NM_METHODS = {
    "gmp": lambda m: gj.gmp(
        final_sparsity=0.5, end_step=3, update_every=1, scope=gj.uniform, masks=m, prunable=NM
    ),
    "granet": lambda m: gj.granet(
        final_sparsity=0.5,
        end_step=3,
        update_every=1,
        total_steps=5,
        scope=gj.uniform,
        masks=m,
        prunable=NM,
    ),
    "magnitude": lambda m: gj.magnitude(sparsity=0.5, at=1, scope=gj.uniform, masks=m, prunable=NM),
    "rigl": lambda m: gj.rigl(
        sparsity=0.5, update_every=1, total_steps=5, masks=m, prunable=NM, key=KEY
    ),
    "set": lambda m: gj.set_(
        sparsity=0.5, update_every=1, total_steps=5, masks=m, prunable=NM, key=KEY
    ),
}


@pytest.mark.parametrize("name", NM_METHODS)
def test_no_group_keeps_more_than_its_share_whatever_the_masks(name):
    params = {"kernel": jax.random.normal(KEY, (64, 8))}
    masks = odd_masks((64, 8), 0.5 if name in ("rigl", "set") else 0.7)
    if name in ("rigl", "set"):  # as many as they are asked for
        flat = np.argsort(np.asarray(masks["kernel"]).ravel(), kind="stable")
        masks = {"kernel": jnp.zeros(512, bool).at[flat[256:]].set(True).reshape(64, 8)}
    assert in_groups(masks).max() > 2
    method = NM_METHODS[name](masks)
    state = method.init(params)
    for step in (1, 2, 3):
        if method.is_update_step(jnp.int32(step)):
            state, keep = jax.jit(method.update)(
                state, gj.Event(params, params, step=jnp.int32(step))
            )
            most = 2 if name not in ("gmp", "granet") or step == 3 else 4
            assert in_groups(state.masks).max() <= most
            assert not (keep["kernel"] & ~state.masks["kernel"]).any()
    assert in_groups(state.masks).max() == 2


def in_groups(masks):
    return np.asarray(masks["kernel"]).reshape(16, 4, 8).sum(1)


def test_no_group_keeps_more_than_its_share_from_the_first_event_on():
    params = {"kernel": jax.random.normal(KEY, (64, 8))}
    masks = odd_masks((64, 8), 0.7)
    method = gj.gmp(
        initial_sparsity=0.5,
        final_sparsity=0.5,
        end_step=9,
        update_every=1,
        scope=gj.uniform,
        masks=masks,
        prunable=NM,
    )
    state, _ = method.update(method.init(params), gj.Event(params, params, step=jnp.int32(1)))
    was = in_groups(masks)
    np.testing.assert_array_equal(in_groups(state.masks), np.minimum(was, 2))


@pytest.mark.parametrize("sparsity", [0.6, 0.9])
def test_a_sparsity_that_n_of_m_has_not_is_refused(sparsity):
    params = {"kernel": jnp.ones((64, 8))}
    message = r"no sparsity of {}: .* nearest are {}".format(
        sparsity, r"0.75 \(1:4\) and 0.5 \(2:4\)" if sparsity == 0.6 else r"0.75 \(1:4\)"
    )
    rules = {"prunable": NM}
    calls = [
        lambda: gj.static(sparsity=sparsity, start=gj.uniform, key=KEY, **rules).init(params),
        lambda: gj.static(sparsity=sparsity, key=KEY, **rules).init(
            params
        ),  # one layer: as uniform
        lambda: gj.gmp(
            final_sparsity=sparsity, end_step=3, update_every=1, scope=gj.uniform, **rules
        ).init(params),
        lambda: gj.magnitude(sparsity=sparsity, at=1, scope=gj.uniform, **rules).init(params),
        lambda: gj.random_masks(KEY, params, sparsity, gj.uniform, NM),
        lambda: gj.at_init.magnitude(params, sparsity=sparsity, scope=gj.uniform, **rules),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()


def test_masks_of_another_sparsity_are_refused():
    params = {"kernel": jnp.ones((20, 20)), "bias": jnp.ones(20)}
    masks = gj.random_masks(KEY, params, 0.9)
    kwargs = {"update_every": 1, "total_steps": 9, "key": KEY}
    message = r"keep 40 of 400 .* sparsity of 0.9000, .* asked for 0.5, which is 200"
    for make in (gj.rigl, gj.set_, gj.snfs, gj.rigl_itop, gj.set_itop):
        with pytest.raises(ValueError, match=message):
            make(sparsity=0.5, masks=masks, **kwargs).init(params)
        make(sparsity=0.9, masks=masks, **kwargs).init(params)
    with pytest.raises(ValueError, match=message):
        gj.static(sparsity=0.5, masks=masks).init(params)
    gj.static(masks=masks).init(params)
    with pytest.raises(ValueError, match=message):
        gj.granet(
            initial_sparsity=0.5, final_sparsity=0.95, end_step=5, masks=masks, **kwargs
        ).init(params)


def test_masks_of_zeros_leave_biases_alone():
    params = {"kernel": jnp.array([[1.0, 0.0], [0.0, 2.0]]), "bias": jnp.zeros(2)}
    masks = gj.masks_from_zeros(params)
    assert masks["bias"].all()
    np.testing.assert_array_equal(masks["kernel"], params["kernel"] != 0)
    naive = jax.tree.map(lambda p: p != 0, params)
    message = r"mask of bias switches off 2 of 2 .*not prunable \(rank 1\).*masks_from_zeros"
    tx = gj.sparsify(optax.sgd(0.1), gj.static())
    for call in (
        lambda: gj.static(masks=naive).init(params),
        lambda: gj.set_masks(tx.init(params), naive),
        lambda: gj.lottery.prune(params, naive),
        lambda: gj.rigl(sparsity=0.5, update_every=1, total_steps=9, masks=naive).init(params),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    gj.static(masks=naive, prunable=[("", True)]).init(params)
    gj.set_masks(tx.init(params), naive, [("", True)])


def test_lottery_warns_of_a_layer_that_it_empties():
    params = {"a": {"kernel": jnp.full((4, 4), 0.1)}, "b": {"kernel": jnp.ones((4, 4))}}
    masks = gj.ones(params)
    with pytest.warns(
        UserWarning, match=r"no weight is left in a/kernel\. Take a smaller fraction"
    ):
        masks = gj.lottery.prune(params, masks, fraction=0.5)
    gj.lottery.prune(params, masks, fraction=0.5)  # it was empty before


def test_masks_of_tied_channels_are_put_in_by_their_rules():
    rules = [("", gj.structures.channel(tie="a"))]
    params = {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}
    masks = {
        "kernel": jnp.broadcast_to(jnp.array([True, False]), (4, 2)),
        "bias": jnp.ones(2, bool),
    }
    masks = gj.structures.complete(masks, params, rules)
    state = gj.sparsify(optax.sgd(0.1), gj.static()).init(params)
    with pytest.raises(ValueError, match=r"mask of bias switches off 1 of 2 weights"):
        gj.set_masks(state, masks)
    chex.assert_trees_all_equal(gj.get_masks(gj.set_masks(state, masks, rules)), masks)


def test_a_wrapper_that_passes_all_arguments_on_is_not_given_one_more():
    """Its inner transformation takes none; what others inside need is still passed on."""
    plain = optax.sgd(0.1)

    def update(updates, state, params=None, *, loss, **extra):
        return plain.update(jax.tree.map(lambda g: g * loss, updates), state, params, **extra)

    def fails(updates, state, params=None, **extra):
        raise TypeError("of its own")

    params = {"kernel": jnp.ones((4, 4))}
    method = gj.static(sparsity=0.5, key=KEY)
    tx = gj.sparsify(optax.GradientTransformationExtraArgs(plain.init, update), method)
    updates, _ = tx.update(params, tx.init(params), params, loss=2.0)
    masks = gj.get_masks(tx.init(params))
    np.testing.assert_allclose(updates["kernel"], jnp.where(masks["kernel"], -0.2, -1.0))
    tx = gj.sparsify(optax.GradientTransformationExtraArgs(plain.init, fails), method)
    with pytest.raises(TypeError, match="of its own"):
        tx.update(params, tx.init(params), params)


def test_another_schedule_goes_on_where_an_event_was_the_last_step():
    """What the last event grew is in keep from the next step on, whatever that is."""
    params = layers()
    changes = {"sparsity": 0.5, "total_steps": 100, "key": KEY}
    first, other = (
        gj.sparsify(optax.adam(1e-2), gj.rigl(**changes, update_every=every)) for every in (3, 50)
    )
    state = first.init(params)
    params = gj.apply_masks(params, gj.get_masks(state))
    for tx in (first, first, first, other, other):
        grads = jax.tree.map(jnp.cos, params)
        updates, state = jax.jit(tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
    chex.assert_trees_all_equal(state.keep, gj.get_masks(state))
    alive = jax.tree.map(lambda x, m: bool((x != 0)[m].all()), params, gj.get_masks(state))
    assert all(jax.tree.leaves(alive))


def test_outside_jit_a_step_without_event_does_not_trace_one():
    traced = 0

    def counted(event):
        nonlocal traced
        traced += 1
        return gj.scores.gradient(event)

    method = gj.rigl(sparsity=0.5, update_every=3, total_steps=100, key=KEY, grow=counted)
    tx, params = gj.sparsify(optax.sgd(0.1), method), layers()
    state, counts = tx.init(params), []
    traced = 0
    for _ in range(4):
        _, state = tx.update(params, state, params)
        counts.append(traced)
    assert 0 < counts[0] == counts[1] < counts[2] == counts[3]  # the first, to find errors early
