"""Runs survive: killed with -9 they end with the same bits; bad input loses nothing."""

import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds

import granet_jax as gj
from experiments.data import images
from experiments.data.streams import Batch
from experiments.engine import checkpoints, files, run, settings
from experiments.engine.files import digest
from experiments.engine.records import Diverged
from experiments.engine.task import ACCURACY, Metric
from experiments.tasks.images import Settings
from tests.images import jpeg_records, make_trainer, random_images, train

COMMAND = [sys.executable, "-m", "experiments.train"]


def start(out_dir, flags, devices):
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices)}
    return subprocess.Popen(
        [*COMMAND, f"--out_dir={out_dir}", *flags],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(out_dir, flags, devices):
    process = start(out_dir, flags, devices)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return re.search("sha256: .*", output)[0]


def kill_after(out_dir, flags, devices, step):
    process = start(out_dir, flags, devices)
    while process.poll() is None:
        steps = [int(p.name) for p in (out_dir / "checkpoints").glob("*") if p.name.isdigit()]
        if max(steps, default=0) >= step:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output  # it had not ended before


def assert_same_after_kills(tmp_path, flags, devices, steps):
    expected = finish(tmp_path / "straight", flags, devices)
    killed = tmp_path / "killed"
    for step in steps:
        kill_after(killed, flags, devices, step)
    assert finish(killed, flags, devices) == expected
    straight, resumed = (files.read_history(tmp_path / name) for name in ("straight", "killed"))
    for record in straight + resumed:
        del record["images_per_second"]
    assert straight == resumed
    assert len(files.read_json(killed, "about.json")["sessions"]) == len(steps) + 1


@pytest.mark.full
@pytest.mark.parametrize("devices", [1, 4])
def test_killed_twice_the_same_bits(tmp_path, devices):
    flags = ["--epochs=8", "--chunk_steps=25", "--checkpoint_seconds=0", "--sparsity=0.95"]
    assert_same_after_kills(tmp_path, flags, devices, steps=(50, 150))  # of 352


def write_tiny_imagenet(data_dir):
    class Imagenet2012(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("5.1.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(encoding_format="jpeg"),
                "label": tfds.features.ClassLabel(num_classes=1000),
                "file_name": tfds.features.Text(),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(12), "validation": self._generate_examples(5)}

        def _generate_examples(self, n):
            for i, record in enumerate(jpeg_records(n, size=(70 + 10 * n, 100))):
                yield i, {**record, "file_name": f"{i}.jpeg"}

    Imagenet2012(data_dir=data_dir, file_format="array_record").download_and_prepare()


@pytest.mark.full
@pytest.mark.filterwarnings("default")  # what TFDS warns of while it writes is not ours
def test_imagenet_from_encoded_images_killed_and_resumed(tmp_path):
    write_tiny_imagenet(tmp_path / "tfds")
    flags = [
        "--dataset=imagenet2012",
        f"--data_dir={tmp_path}/tfds",
        "--model=resnet20",
        "--method=granet_st",
        "--sparsity=0.8",
        "--epochs=2",
        "--batch_size=4",
        "--update_every=1",
        "--chunk_steps=1",
        "--checkpoint_seconds=0",
    ]
    assert_same_after_kills(tmp_path, flags, devices=1, steps=(3,))


class OwnNet(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(self.width, name="hidden")(x.reshape(len(x), -1)))
        return nn.Dense(3, name="head")(x)


def own_data(n=64, **kwargs):
    return images.from_arrays(random_images(n), random_images(16, seed=1), **kwargs)


def own_settings(**changes):
    fields = {"dataset": "own", "model": "own", "epochs": 2, "batch_size": 16, "update_every": 2}
    return Settings(**{**fields, "sparsity": 0.5, **changes})


def test_own_data_and_own_module(tmp_path):
    shown = []
    result = train(tmp_path, own_settings(), own_data(), OwnNet(8), show=shown.append)
    assert shown == result.history == files.read_history(tmp_path)
    assert [r["step"] for r in shown] == [4, 8]
    assert shown[-1]["live"] == (8 * 8 * 3 * 8 + 8 * 3) // 2
    # A finished run is not trained again; its report is made anew.
    (tmp_path / "report.html").unlink()
    again = train(tmp_path, own_settings(), own_data(), OwnNet(8), show=shown.append)
    assert len(shown) == 2
    assert digest(again.state.params) == digest(result.state.params)
    assert "<svg" in (tmp_path / "report.html").read_text()
    assert list((tmp_path / "tensorboard").iterdir())


class DropoutNormNet(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(not train)(nn.Dense(8)(x.reshape(len(x), -1)))
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(x))


def test_dropout_and_batch_norm_resume_within_an_epoch(tmp_path):
    config = own_settings(chunk_steps=3, epochs=3)
    dataset = own_data(80)  # 5 steps an epoch
    straight = train(tmp_path / "a", config, dataset, DropoutNormNet(), checkpoint_seconds=0)

    class Stop(Exception):
        pass

    def stop(record):
        if record["epoch"] == 2:
            raise Stop

    with pytest.raises(Stop):
        train(tmp_path / "b", config, dataset, DropoutNormNet(), checkpoint_seconds=0, show=stop)
    resumed = train(tmp_path / "b", config, dataset, DropoutNormNet(), checkpoint_seconds=0)
    for tree in ("params", "model_state"):
        assert digest(getattr(resumed.state, tree)) == digest(getattr(straight.state, tree))
    assert [r["loss"] for r in resumed.history] == [r["loss"] for r in straight.history]
    assert [r["churn"] for r in resumed.history] == [r["churn"] for r in straight.history]
    assert straight.state.model_state["batch_stats"]["BatchNorm_0"]["mean"].any()


@pytest.mark.parametrize("metric", [ACCURACY, Metric("accuracy", higher_is_better=False)])
def test_best_epoch_is_kept_at_final_sparsity_by_validation_images(tmp_path, metric):
    class Stop(Exception):
        pass

    def stop(record):
        if record["epoch"] == 5:
            raise Stop

    config, dataset = own_settings(epochs=6, prune_until=0.3), own_data(validation=16)
    trainer = make_trainer(config, dataset, OwnNet(8))
    trainer = trainer._replace(told=trainer.told._replace(metrics=(metric,)))

    def go(scores, **kwargs):
        values = iter(metric.sign * np.array(scores))
        found = trainer._replace(
            evaluate=lambda s: {"test_accuracy": 50.0, "validation_accuracy": next(values)}
        )
        return run.run(found, tmp_path, checkpoint_seconds=0, **kwargs)

    with pytest.raises(Stop):
        go([99.0, 60.0, 70.0, 50.0, 40.0, 30.0], show=stop)  # 99 before the final sparsity
    result = go([40.0, 30.0])
    assert result.history[0]["live"] > result.history[1]["live"] == result.history[-1]["live"]
    found = [metric.sign * r["validation_accuracy"] for r in result.history]
    assert found == [99, 60, 70, 50, 40, 30]
    assert files.best(result.history, trainer.told)["epoch"] == 3
    with checkpoints.open_manager(tmp_path / "checkpoints") as manager:
        assert sorted(manager.all_steps()) == [9, 15, 18]  # 48 images are left to train on
    assert "on validation data held out" in (tmp_path / "report.html").read_text()


def test_other_settings_are_refused_and_nothing_is_lost(tmp_path):
    train(tmp_path, own_settings(), own_data(), OwnNet(8))
    before = (tmp_path / "metrics.jsonl").read_text()
    for config, kwargs, message in [
        (own_settings(epochs=3), {}, r"other settings \(epochs 2 -> 3\)"),
        (own_settings(drop_at=(0.5,)), {}, r"drop_at \[0.5, 0.75\] -> \[0.5\]"),
        (own_settings(), {"resume": False}, "holds a run, which --noresume would overwrite"),
    ]:
        with pytest.raises(ValueError, match=message):
            train(tmp_path, config, own_data(), OwnNet(8), **kwargs)
    with pytest.raises(ValueError, match=r"run on other data .train_images 64 -> 80"):
        train(tmp_path, own_settings(), own_data(80), OwnNet(8))
    with pytest.raises(ValueError, match=r"params/head/kernel is float32 \(8, 3\), expected"):
        train(tmp_path, own_settings(), own_data(), OwnNet(9))
    config = own_settings()
    with (
        files.opened(tmp_path, dataclasses.asdict(config), resume=True),
        pytest.raises(ValueError, match="another process is training in"),
    ):
        train(tmp_path, config, own_data(), OwnNet(8))
    assert (tmp_path / "metrics.jsonl").read_text() == before
    assert len(train(tmp_path, own_settings(), own_data(), OwnNet(8)).history) == 2


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    bad = own_data()
    bad = bad._replace(mean=np.array([0.5, np.nan, 0.5], np.float32))
    with pytest.raises(Diverged, match=r"the loss is nan at step 1 \(epoch 1\). No checkpoint"):
        train(tmp_path / "early", own_settings(), bad, OwnNet(8))
    config = own_settings(learning_rate=1e12, warmup_epochs=1.5, epochs=2, chunk_steps=1)
    with pytest.raises(Diverged, match=r"at step \d+ .*last good checkpoint is of step \d"):
        train(tmp_path / "late", config, own_data(), OwnNet(8), checkpoint_seconds=0)
    trainer = make_trainer(config, own_data(), OwnNet(8))
    with checkpoints.open_manager(tmp_path / "late" / "checkpoints") as manager:
        state, _ = checkpoints.restore(manager, manager.latest_step(), trainer.abstract_state)
        assert int(state.step) == manager.latest_step() > 0
    assert gj.metrics.num_nonfinite((state.params, gj.get_masks(state.opt_state))) == 0


def test_a_cut_off_line_is_dropped_and_written_again(tmp_path):
    config, dataset = own_settings(epochs=3), own_data()
    train(tmp_path, config, dataset, OwnNet(8), checkpoint_seconds=0)
    whole = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(whole + '{"epoch": 4, "st')
    train(tmp_path, config, dataset, OwnNet(8))
    assert (tmp_path / "metrics.jsonl").read_text() == whole
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match="holds 0 of the 3 epochs before the last checkpoint"):
        train(tmp_path, config, dataset, OwnNet(8))


def test_restored_masks_are_checked():
    params = {"kernel": jnp.ones((2, 3))}
    state = {"masks": jax.tree.map(lambda p: p > 0, params), "params": params}
    assert gj.check_restored(state, jax.eval_shape(lambda: state)) is state
    for restored, message in [
        ({**state, "masks": {"kernel": None}}, "masks/kernel is missing, expected bool"),
        ({**state, "masks": params}, "masks/kernel is float32 .* expected bool"),
        ({"params": params}, "masks/kernel is missing"),
        ({**state, "more": jnp.ones(1)}, "more is float32 .* expected nothing"),
    ]:
        with pytest.raises(ValueError, match=message):
            gj.check_restored(restored, state)


def test_orbax_gives_none_and_it_is_noticed(tmp_path):
    with checkpoints.open_manager(tmp_path) as manager:
        checkpoints.save(manager, 1, {"masks": None, "w": jnp.ones(2)}, {}, None)
    example = jax.eval_shape(lambda: {"masks": jnp.ones(2, bool), "w": jnp.ones(2)})
    manager = checkpoints.open_manager(tmp_path)
    with pytest.raises(ValueError, match="masks is missing, expected bool"):
        checkpoints.restore(manager, 1, example)
    manager.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "magic"}, r"method must be one of dense, static, .*; got 'magic'"),
        ({"epochs": 0}, r"epochs must be in \[1, inf\]; got 0"),
        ({"prune_until": 1.5}, r"prune_until must be in \[0, 1\]; got 1.5"),
        ({"structure": "2:0"}, "structure '2:0': division by zero"),
        ({"structure": "lines"}, "structure 'lines': expected none, 2:4 and the like, block:16x16"),
        ({"augment": "mirror"}, "augment must be one of none, reflect, zero; got 'mirror'"),
    ],
)
def test_wrong_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        own_settings(**changes)


def test_a_model_without_name_must_be_passed(tmp_path):
    with pytest.raises(ValueError, match=r"model 'own' is none of lenet_300_100, .* pass a module"):
        train(tmp_path, own_settings(), own_data())


def test_batches_must_divide_over_devices():
    with pytest.raises(ValueError, match="--batch_size=12 is no multiple of the 8 devices"):
        train(pathlib.Path("unused"), own_settings(batch_size=12), own_data(), OwnNet(8))


@pytest.mark.full
def test_bf16_keeps_parameters_moments_and_updates_in_float32(tmp_path):
    data = Batch(random_images(32, (28, 28, 1)).images, np.arange(32) % 10)
    config = own_settings(model="lenet_300_100", precision="bf16", sparsity=0.9)
    result = train(tmp_path, config, images.from_arrays(data, data))
    dtypes = {x.dtype.name for x in jax.tree.leaves(result.state.opt_state)}
    assert "bfloat16" not in dtypes
    assert {x.dtype.name for x in jax.tree.leaves(result.state.params)} == {"float32"}
    assert result.history[-1]["live"] == 26_620


def test_settings_are_read_back_as_written(tmp_path):
    train(tmp_path, own_settings(), own_data(), OwnNet(8))
    saved = json.loads((tmp_path / "settings.json").read_text())
    assert settings.from_json(Settings, saved) == own_settings()
