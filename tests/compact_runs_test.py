"""``--compact``: runs with live weights alone do as masked ones do, and go on to the same bits."""

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import granet_jax as gj
from experiments.engine import files, plan, run, weights
from experiments.engine.files import digest
from granet_jax.compact import native
from tests import images, lm_test
from tests.lm_test import _tiny, mesh_of, numbers, run_until  # noqa: F401
from tests.run_test import OwnNet, own_data, own_settings


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("method", [pytest.param("rigl", marks=pytest.mark.full), "granet"])
def test_images_go_on_to_the_same_bits(method, devices, tmp_path):
    """GraNet starts dense: its slots are repacked on the way, and a checkpoint has fewer.

    One device has the native kernels, and their lists, which no checkpoint has.
    """
    config = own_settings(
        method=method, sparsity=0.75, chunk_steps=3, epochs=5, prune_until=0.4, compact=True
    )
    mesh = mesh_of(devices, 1, 1)
    trainer = images.make_trainer(config, own_data(80), OwnNet(8), mesh)  # 5 steps an epoch
    straight = run.run(trainer, tmp_path / "a", checkpoint_seconds=0)
    for epoch in (1, 3):
        run_until(epoch, trainer, tmp_path / "b")
    resumed = run.run(trainer, tmp_path / "b", checkpoint_seconds=0)
    chex.assert_trees_all_equal(resumed.state.params, straight.state.params)
    chex.assert_trees_all_equal(resumed.masks, straight.masks)
    assert [r["loss"] for r in resumed.history] == [r["loss"] for r in straight.history]
    leaves = gj.trees.describe(straight.weights)
    kept = {x.path: 0 for x in leaves if x.prunable}
    for path, layout in gj.compact.get_layouts(resumed.state.opt_state).items():
        kept[path] = layout.capacity
        live = int(gj.trees.paths(straight.masks)[path].sum())
        assert live <= layout.capacity <= live / 0.7 + 9
        assert (layout.by_output is not None) == (devices == 1 and native.available())
    total = gj.trees.num_prunable(leaves)
    assert straight.history[-1]["live"] == round(total * 0.25)
    assert gj.check_sparse(straight.weights, _masked_state(straight)) == 0


@pytest.mark.skipif(not native.available(), reason="there are no kernels to go without")
@pytest.mark.parametrize("at_first", [True, False])
def test_a_run_goes_on_where_there_are_no_kernels_and_back(at_first, tmp_path, monkeypatch):
    config = own_settings(method="rigl", sparsity=0.75, compact=True)

    def trainer(compact, has_kernels):
        monkeypatch.setattr(native, "available", lambda: has_kernels)
        chosen = dataclasses.replace(config, compact=compact)
        return images.make_trainer(chosen, own_data(80), OwnNet(8), mesh_of(1, 1, 1))

    run_until(1, trainer(True, at_first), tmp_path)
    result = run.run(trainer(True, not at_first), tmp_path)
    for layout in gj.compact.get_layouts(result.state.opt_state).values():
        assert (layout.by_output is None) == at_first
    masked = run.run(trainer(False, True), tmp_path / "masked")
    chex.assert_trees_all_equal(result.masks, masked.masks)


def _masked_state(result):
    method = gj.static(masks=result.masks)
    return gj.sparsify(optax.sgd(0.1), method).init(result.weights)


@pytest.mark.parametrize(
    "method",
    ["rigl", "gmp"]
    + [pytest.param(x, marks=pytest.mark.full) for x in ("set", "static", "granet_st")],
)
def test_images_do_as_masked_ones(method):
    config = own_settings(method=method, sparsity=0.75, epochs=4, update_every=4)
    states = {}
    for compact in (False, True):
        chosen = dataclasses.replace(config, compact=compact)
        trainer = images.make_trainer(chosen, own_data(80), OwnNet(8))
        state, losses = trainer.run(trainer.init(0), None, 8)
        states[compact] = state, losses
        masks = trainer.family.masks(state.params, state.opt_state)
        dense = trainer.family.weights(state.params, state.opt_state)
        states[compact] = losses, masks, dense
    np.testing.assert_allclose(*(states[x][0] for x in (False, True)), rtol=1e-4)
    chex.assert_trees_all_equal(*(states[x][1] for x in (False, True)))
    chex.assert_trees_all_close(*(states[x][2] for x in (False, True)), atol=1e-4)


class ConvNet(nn.Module):
    """What is no product, and more than weights: convolutions, batch norm, dropout."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(not train)(nn.Conv(4, (3, 3), strides=2)(x))
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x).reshape(len(x), -1))
        return nn.Dense(3)(x)


def test_convolutions_norms_and_dropout():
    config = own_settings(method="rigl", sparsity=0.75)
    losses = []
    for compact in (False, True):
        chosen = dataclasses.replace(config, compact=compact)
        trainer = images.make_trainer(chosen, own_data(), ConvNet())
        state, each = trainer.run(trainer.init(0), None, 4)
        assert state.model_state["batch_stats"]["BatchNorm_0"]["mean"].any()
        losses.append((each, trainer.evaluate(state)["test_accuracy"]))
    np.testing.assert_allclose(losses[0][0], losses[1][0], rtol=1e-4)
    assert losses[0][1] == losses[1][1]


@pytest.mark.full
def test_text_goes_on_to_the_same_bits_and_masks_are_those_of_masked_training(tmp_path):
    trainer = lm_test.make_trainer(method="rigl", compact=True)
    straight = run.run(trainer, tmp_path / "straight")
    run_until(3, trainer, tmp_path / "stopped")
    resumed = run.run(trainer, tmp_path / "stopped")
    assert digest(resumed.masks) == digest(straight.masks)
    assert digest(resumed.state.params) == digest(straight.state.params)
    assert numbers(resumed.history) == numbers(straight.history)
    assert len(files.read_history(tmp_path / "stopped")) == 4
    masked = run.run(lm_test.make_trainer(method="rigl"), tmp_path / "masked")
    assert digest(masked.masks) == digest(straight.masks)
    np.testing.assert_allclose(masked.history[-1]["loss"], straight.history[-1]["loss"], rtol=1e-4)
    assert masked.history[-1]["live"] == straight.history[-1]["live"]


@pytest.mark.full
def test_slots_on_a_mesh_are_those_of_one_device(tmp_path):
    changes = {"method": "set", "compact": True, "bytes": 4 * 4 * 8}
    trainer = lm_test.make_trainer(mesh_of(2, 2, 1), **changes)
    state = trainer.init(0)
    for tree in (state.params, state.opt_state.inner[1][0].mu):
        slots = tree["blocks"]["query"]["kernel"]  # of two layers, one on each of the two
        assert slots.addressable_shards[0].data.shape == (1, slots.shape[1])
    on_mesh = run.run(trainer, tmp_path / "mesh")
    on_one = run.run(lm_test.make_trainer(**changes), tmp_path / "one")
    assert digest(on_mesh.masks) == digest(on_one.masks)
    np.testing.assert_allclose(on_mesh.history[-1]["loss"], on_one.history[-1]["loss"], rtol=1e-4)
    assert plan.plan(trainer).memory["arguments"] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "snfs"}, "--compact: snfs needs dense gradients at every step"),
        ({"method": "dst"}, "--compact: dst trains dense weights"),
        ({"method": "snip"}, "--compact: snip looks at data before"),
        ({"method": "ac_dc"}, "--compact: ac_dc grows back to dense"),
        (
            {"structure": "block:2x2", "block_kernel": True, "method": "granet_uniform"},
            "two ways to do the same",
        ),
    ],
)
def test_what_does_not_go_with_it(change, message):
    config = own_settings(compact=True, **{"method": "rigl", **change})
    with pytest.raises(ValueError, match=message):
        images.make_trainer(config, own_data(), OwnNet(8))


def test_dense_gradients_are_those_of_dense_parameters():
    """Through products in both directions, a stack, another use, and what is no product."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "bias": jnp.ones(6),
        "kernel": jax.random.normal(keys[0], (5, 6)),
        "number": jnp.int32(2),
        "stack": jax.random.normal(keys[1], (3, 6, 6)),
    }
    rules = [("^stack", gj.Stacked(1))]
    masks = gj.random_masks(keys[2], params, 0.5, prunable=rules)
    values, layouts = gj.compact.pack(params, masks, rules)

    def loss_fn(params, x):
        y = jax.lax.scan(
            lambda y, w: (jnp.tanh(y @ w), None), x @ params["kernel"], params["stack"]
        )[0]
        y = (y + params["bias"][None]) @ params["kernel"].T * params["number"]
        return jnp.sum(y**2) + jnp.sum(params["stack"] ** 2), y

    x = jax.random.normal(keys[3], (7, 5))
    given = gj.apply_masks(params, masks)
    wanted = jax.value_and_grad(loss_fn, has_aux=True, allow_int=True)(given, x)
    value, grads = jax.jit(gj.compact.value_and_dense_grad(loss_fn, has_aux=True))(
        values, layouts, x
    )
    chex.assert_trees_all_close(value, wanted[0], rtol=1e-5)
    for name in ("bias", "kernel", "stack"):
        np.testing.assert_allclose(grads[name], wanted[1][name], rtol=1e-4, atol=1e-4)
    assert int(grads["number"]) == 0


def test_events_of_a_chunk():
    family = weights.live(
        gj.rigl(sparsity=0.5, update_every=3, total_steps=8, key=jax.random.key(0))
    )
    assert weights.events(family, 2, 5) == [True, False, False, True, False]
    never = weights.live(gj.static(sparsity=0.5, key=jax.random.key(0)))
    assert weights.events(never, 0, 2) == [False, False]
