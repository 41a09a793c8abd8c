"""The engine's own: parameters shared over a mesh, variables of any form, places of records."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

import granet_jax as gj
from experiments.engine import batches, optimizers, page, run, settings, training
from experiments.engine import mesh as meshes
from experiments.engine.task import ACCURACY, Memory, Told
from experiments.tasks import images
from tests import images as runs
from tests.images import make_trainer
from tests.run_test import OwnNet, own_data, own_settings


def mesh_of(fsdp):
    devices = np.array(jax.devices()[:fsdp]).reshape(1, fsdp, 1)
    return jax.sharding.Mesh(devices, ("data", "fsdp", "tensor"))


def shapes(x):
    return [shard.data.shape for shard in x.addressable_shards]


@pytest.mark.parametrize("method", ["rigl", "snip"])
def test_images_on_a_mesh_that_shares_parameters(method):
    config = own_settings(method=method, update_every=1)
    states, found = [], []
    for fsdp in (1, 2):
        trainer = make_trainer(config, own_data(), OwnNet(8), mesh_of(fsdp))
        state, losses = trainer.run(trainer.init(0), None, 2)
        states.append(state)
        found.append((np.asarray(losses), *trainer.evaluate(state).values()))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-5)
    assert found[0][1:] == found[1][1:]
    masks = [jax.tree.map(np.asarray, gj.get_masks(state.opt_state)) for state in states]
    assert 0 < masks[0]["hidden"]["kernel"].sum() < masks[0]["hidden"]["kernel"].size
    jax.tree.map(np.testing.assert_array_equal, *masks)
    # On the axis that is largest, of weights, masks and moments; what has none, everywhere.
    state = states[1]
    for tree in (state.params, gj.get_masks(state.opt_state), state.opt_state.inner[1][0].trace):
        assert shapes(tree["hidden"]["kernel"]) == [(96, 8)] * 2
        assert shapes(tree["head"]["kernel"]) == [(4, 3)] * 2
    assert shapes(state.params["head"]["bias"]) == [(3,)] * 2
    assert shapes(state.step) == [()] * 2
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(
        lambda x: x.sharding, trainer.abstract_state
    )


def test_a_mesh_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="--data=8 --fsdp=3 --tensor=1 make 24 devices, but"):
        meshes.make(8, 3)
    over_tensor = meshes.make(4, 1, 2)
    with pytest.raises(ValueError, match="--tensor: no parameter of this task is laid over it"):
        make_trainer(own_settings(), own_data(), OwnNet(8), over_tensor)


def test_variables_of_any_form():
    config = own_settings()
    task = images.task(config, own_data(), OwnNet(8))
    counting = task._replace(
        init=lambda key: (task.init(key)[0], (jnp.zeros([]),)),
        loss=lambda params, variables, batch, key: (
            task.loss(params, {}, batch, key)[0],
            (variables[0] + 1,),
        ),
        evaluate=lambda params, variables, batch: task.evaluate(params, {}, batch),
        forward=lambda params, variables, x: task.forward(params, {}, x),
    )
    trainer = training.make_trainer(config, counting)
    state, _ = trainer.run(trainer.init(0), None, 3)
    assert float(state.model_state[0]) == 3


def test_variables_may_come_back_with_the_masks_of_a_kernel():
    config = own_settings(method="rigl", structure="block:4x4", block_kernel=True)
    task = images.task(config, own_data(), OwnNet(8))
    returning = task._replace(
        loss=lambda params, variables, *rest: (task.loss(params, variables, *rest)[0], variables)
    )
    trainer = training.make_trainer(config, returning)
    state, _ = jax.eval_shape(trainer.step, trainer.abstract_state, task.train.arrays)
    assert state.model_state == {}


def test_settings_without_default_have_to_be_given():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Own(images.Settings):
        dataset: str = "own"
        model: str = "own"

    values = flags.FlagValues()
    settings.define_flags(Own, flag_values=values)
    values(["train", "--epochs=2"])
    with pytest.raises(ValueError, match="--batch_size, --update_every: to be given, for there is"):
        settings.from_flags(Own, values)


def test_a_record_without_the_metric_has_the_last_place():
    told = Told("t", (ACCURACY,), ("test",), "training loss", "images", False)
    values = {"a": (90.0, np.nan), "b": (80.0, 80.0), "c": (80.0, 70.0)}
    histories = {
        name: [[{"epoch": 1, "live": 8, "test_accuracy": x}] for x in each]
        for name, each in values.items()
    }
    del histories["a"][1][0]["test_accuracy"]
    rows = page.summary(histories, told)
    assert [row["rank"] for row in rows] == ["2.0 (1-3)", "1.5 (1-2)", "2.0 (2-2)"]
    assert rows[0]["test accuracy, last epoch (%)"] == "-"


def test_first_batches_have_no_padding():
    source = Memory(np.arange(10.0))
    assert [x.tolist() for x in batches.first(source, 9, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(ValueError, match="--batch_size=11 is more than the 10 examples"):
        batches.first(source, 1, 11)


@pytest.mark.parametrize("method", ["ste", "dst"])
def test_flops_of_masks_that_change_at_every_step_are_those_of_the_masks(method, tmp_path):
    """However seldom the masks of other methods change."""
    found = []
    for every in (1000, 3):
        config = own_settings(
            method=method, sparsity=0.75, epochs=6, update_every=every, prune_until=0.5
        )
        result = runs.train(tmp_path / str(every), config, own_data(80), OwnNet(8))
        densities = gj.metrics.densities(result.masks, result.weights)
        costs = make_trainer(config, own_data(80), OwnNet(8)).setup.costs
        record = result.history[-1]
        assert record["inference_flops"] == pytest.approx(float(gj.flops.ratio(costs, densities)))
        found.append((record["inference_flops"], record["training_flops"]))
    assert found[0] == found[1]
    assert found[0][1] > 1 / 3  # the gradients of the weights are dense


def test_a_reader_of_checkpoints_removes_none_that_is_being_written(tmp_path):
    config = own_settings(method="static", epochs=1)
    trainer = make_trainer(config, own_data(), OwnNet(8))
    result = run.run(trainer, tmp_path)
    unfinished = tmp_path / "checkpoints/999.orbax-checkpoint-tmp"
    unfinished.mkdir()
    state = run.newest(trainer, tmp_path)
    chex.assert_trees_all_equal(state.params, result.state.params)
    assert unfinished.exists()
    with pytest.raises(ValueError, match="has no checkpoint"):
        run.newest(trainer, tmp_path / "nowhere")


def test_dense_layers_of_a_run_stay_dense_under_any_structure():
    config = own_settings(dense_layers=("^first/",))
    trainer = make_trainer(own_settings(), own_data(), OwnNet(8))
    rules = training.rules_of(config, trainer.setup.task, gj.structures.n_of_m(4))
    assert rules[0] == ("^first/", False)


def test_learning_rates_of_odd_flags():
    length = optimizers.Length(1, 100)
    config = own_settings(schedule="steps", drop_at=(0.5, 0.5), warmup_epochs=0.0)
    rate = optimizers.learning_rate(config, length)
    assert float(rate(60)) == pytest.approx(config.learning_rate * config.drop_factor**2)
    with pytest.raises(ValueError, match=r"--warmup_epochs=-0\.5: at least 0, or -1"):
        optimizers.learning_rate(dataclasses.replace(config, warmup_epochs=-0.5), length)
    with pytest.raises(ValueError, match=r"--penalty=-0\.3: at least 0, or -1"):
        optimizers.coefficient(dataclasses.replace(config, penalty=-0.3), length)
