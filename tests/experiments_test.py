"""The programs as a person runs them, on the data that ships with a dependency."""

import json
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import granet_jax as gj
from experiments import data, settings, training
from experiments.benchmarks import mask_update

DATA_DIR = pathlib.Path(__file__).parents[2] / "shared" / "data" / "tfds"


def run(program, *flags, ok=True):
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{program}", *flags], capture_output=True, text=True
    )
    output = done.stdout + done.stderr
    assert (done.returncode == 0) == ok, output
    assert "Traceback" not in output
    return output


def config(**changes):
    fields = {
        "dataset": "digits",
        "epochs": 4,
        "batch_size": 32,
        "update_every": 10,
        "sparsity": 0.9,
        **changes,
    }
    return settings.Settings(**fields)


def test_train_leaves_its_files_and_guards_them(tmp_path):
    flags = ["--epochs=2", "--method=granet", "--sparsity=0.9", f"--out_dir={tmp_path}"]
    output = run("train", *flags)
    assert re.search(r"prunable +50,200 +5,020 +0.9000", output)
    assert "\r" not in output  # no bar where there is no terminal
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in records] == [1, 2]
    assert records[-1]["sparsity"] == pytest.approx(0.9)
    assert records[-1]["density/fc1/kernel"] > 0
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert run("train", *flags)  # again, the same settings
    output = run("train", *flags, "--epochs=3", ok=False)
    assert "holds a run of other settings (epochs 2 -> 3)" in output
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_compare_prints_a_row_for_each_method(tmp_path):
    output = run(
        "compare",
        "--methods=static,granet_st",
        "--seeds=2",
        "--epochs=2",
        "--sparsity=0.9",
        f"--out_dir={tmp_path}",
    )
    row = r"{} +│ +5,020 │ 0.900000 │ +\d+.\d+ ± +\d+.\d+ │"
    for method in ("static", "granet_st"):
        assert re.search(row.format(method), output), output
        assert re.search(row.format(method), (tmp_path / "table.txt").read_text())
    assert (tmp_path / "comparison.png").exists()
    assert (tmp_path / "granet_st-1" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("program", "flags", "message"),
    [
        ("train", ["--method=magic"], "should be one of <dense|static|set|"),
        ("train", ["--sparsity=98"], "error: final_sparsity must be in [0, 1), the fraction of"),
        ("train", ["--epochs=0"], "--epochs=0"),
        ("train", ["granet"], "error: 'granet' is no flag"),
        ("train", ["--dataset=mnist"], "error: mnist is read from disk: pass --data_dir=FOLDER"),
        ("train", ["--dataset=mnist", "--data_dir=no/where"], "error: no/where holds no mnist."),
        ("train", ["--model=lenet5"], "error: lenet5 needs images of 16x16 or more, got 8x8."),
        ("train", ["--batch_size=5000"], "is more than the 1437 images of digits"),
        ("train", ["--epochs=1", "--update_every=99"], "Lower update_every"),
        ("train", ["--learning_rate=1e9", "--out_dir={}"], "error: the loss is "),
        ("train", ["--out_dir=/dev/null/x"], "error: "),
        ("compare", ["--methods=gmp,gpm"], "error: --methods=gmp,gpm: name each of these once"),
        ("compare", ["--sparsity=0.99999"], "error: erk cannot meet sparsity 0.99999"),
    ],
)
def test_wrong_flags_end_in_one_line(program, flags, message, tmp_path):
    output = run(program, *[f.format(tmp_path) for f in flags], ok=False)
    assert message in output
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) <= 1


def test_same_seed_same_bits_and_scan_equals_loop(monkeypatch):
    dataset = data.load("digits")

    def final(seed, scan):
        monkeypatch.setattr(training, "scan_is_fast", lambda *args: scan)
        trainer = training.make_trainer(config(epochs=2), dataset)
        return training.train(trainer, seed, lambda record: None).state

    first, again, looped, other = (final(s, scan) for s, scan in ((0, 1), (0, 1), (0, 0), (1, 1)))
    same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), first.params, again.params)
    assert all(jax.tree.leaves(same))
    masks, looped_masks, other_masks = (
        np.asarray(gj.get_masks(s.opt_state)["fc2"]["kernel"]) for s in (first, looped, other)
    )
    assert (masks == looped_masks).mean() > 0.99  # last bits differ between the two programs
    assert (masks != other_masks).any()


def test_one_function_decides_on_scan():
    def dense(w, x):
        return jnp.sum(x @ w)

    def conv(w, x):
        return jnp.sum(jax.lax.conv(x, w, (1, 1), "SAME"))

    assert training.scan_is_fast(dense, jnp.ones((3, 3)), jnp.ones((3, 3)))
    on_cpu = jax.default_backend() == "cpu"
    image, kernel = jnp.ones((1, 1, 8, 8)), jnp.ones((1, 1, 3, 3))
    assert training.scan_is_fast(conv, kernel, image) != on_cpu


def test_lenet5_trains_on_random_images():
    rng = np.random.default_rng(0)
    split = data.Split(
        rng.integers(0, 255, (64, 28, 28, 1), np.uint8), rng.integers(0, 10, 64).astype(np.int32)
    )
    dataset = data.Dataset(split, split, 10, np.array([0.5]), np.array([0.3]))
    trainer = training.make_trainer(
        config(model="lenet5", epochs=3, batch_size=16, update_every=2), dataset
    )
    result = training.train(trainer, 0, lambda record: None)
    kept = gj.metrics.num_live(gj.get_masks(result.state.opt_state), result.state.params)
    assert kept.sum() == 43_050  # a tenth of 430,500


@pytest.mark.skipif(not (DATA_DIR / "mnist").is_dir(), reason="MNIST is not on this disk")
def test_mnist_is_read_whole():
    mnist = data.load("mnist", str(DATA_DIR))
    assert mnist.train.images.shape == (60_000, 28, 28, 1)
    assert mnist.test.labels.shape == (10_000,)
    assert mnist.num_classes == 10
    np.testing.assert_allclose([mnist.mean[0], mnist.std[0]], [0.1307, 0.3081], atol=1e-4)


def test_benchmark_compares_equal_updates(monkeypatch):
    monkeypatch.setattr(mask_update, "resnet50_shapes", lambda: [(3, 3, 4, 8), (40, 30), (30, 5)])
    rows = mask_update.compare_updates(repeats=1, sparsity=0.8)
    assert [row[-1] for row in rows[1:]] == ["True"] * 3
    assert len(mask_update.compare_steps(steps=3, sparsity=0.8)) == 2
