"""The programs as a person runs them, on the data that ships with a dependency."""

import dataclasses
import importlib
import json
import re
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

import granet_jax as gj
from experiments.data import images
from experiments.engine import batches, methods, optimizers
from experiments.engine.optimizers import Length
from experiments.tasks.images import Settings
from tests.images import make_trainer, train


def run(program, *flags, ok=True):
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{program}", *flags], capture_output=True, text=True
    )
    output = done.stdout + done.stderr
    assert (done.returncode == 0) == ok, output
    assert "Traceback" not in output
    return output


def main_of(module, argv):
    module.define_flags(argv)
    module.main(flags.FLAGS(argv))


def told_here(program, given, capsys):
    """What a program that ends early tells, in this process, where all has been imported."""
    known = set(flags.FLAGS)
    try:
        module = importlib.import_module(f"experiments.{program}")
        with pytest.raises((SystemExit, flags.Error)) as ended:
            main_of(module, [program, *given])
    finally:
        for name in set(flags.FLAGS) - known:
            delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()
    assert str(ended.value) not in ("", "0", "None")
    return "\n".join([*capsys.readouterr(), str(ended.value)])


def config(**changes):
    fields = {
        "dataset": "digits",
        "model": "lenet_300_100",
        "epochs": 4,
        "batch_size": 32,
        "update_every": 10,
        "sparsity": 0.9,
        **changes,
    }
    return Settings(**fields)


def test_train_leaves_its_files_and_guards_them(tmp_path):
    flags = ["--epochs=2", "--method=granet", "--sparsity=0.9", f"--out_dir={tmp_path}"]
    output = run("train", *flags)
    assert re.search(r"prunable +50,200 +5,020 +0.9000", output)
    assert "\r" not in output  # no bar where there is no terminal
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in records] == [1, 2]
    assert records[-1]["sparsity"] == pytest.approx(0.9)
    assert records[-1]["density/fc1/kernel"] > 0
    page = (tmp_path / "report.html").read_text()
    for text in ("fc1/kernel", "19,200", "experiments.train --epochs=2", "test set itself", "<svg"):
        assert text in page
    assert run("train", *flags)  # finished: shown again
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
    row = r"{} +│ +2 │ +5,020 │ 0.900000 │ +\d+.\d+ ± +\d+.\d+ │"
    for method in ("static", "granet_st"):
        assert re.search(row.format(method), output), output
        assert re.search(row.format(method), (tmp_path / "table.txt").read_text())
    page = (tmp_path / "report.html").read_text()
    assert "granet_st: kept (%)" in page
    assert page.count("experiments.compare") == 4  # a command for each run


@pytest.mark.parametrize(
    ("program", "given", "message"),
    [
        ("train", ["--epochs=0"], "--epochs=0"),
        pytest.param("train", ["granet"], "error: 'granet' is no flag", marks=pytest.mark.full),
        ("compare", ["--methods=gmp,gpm"], "error: --methods=gmp,gpm: name each of these once"),
    ],
)
def test_wrong_flags_end_in_one_line(program, given, message):
    output = run(program, *given, ok=False)
    assert message in output
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) <= 1


@pytest.mark.parametrize(
    ("program", "given", "message"),
    [
        ("train", ["--method=magic"], "should be one of <dense|static|snip|grasp|"),
        ("train", ["--sparsity=98"], "error: final_sparsity must be in [0, 1), the fraction of"),
        (
            "train",
            ["--dataset=mnist", "--data_dir=no/where"],
            "error: no/where holds no mnist. Pass --data_dir",
        ),
        ("train", ["--dataset=imagenet2012", "--data_dir=no/where"], "holds no imagenet2012."),
        ("train", ["--structure=2:4"], "2:4 is a sparsity of 0.5, not 0.98"),
        ("train", ["--structure=2:4", "--sparsity=0.5", "--out_dir={}"], "pass scope=granet_jax"),
        ("train", ["--drop_at=a"], "--drop_at takes numbers"),
        ("train", ["--drop_at=2"], "--drop_at: fractions between 0 and 1"),
        ("train", ["--warmup_epochs=99"], "--warmup_epochs=99 leaves nothing of 60 epochs"),
        ("train", ["--validation=5000"], "fewer than the 1437 training images"),
        ("train", ["--flagfile=no/where"], "no/where"),
        ("train", ["--model=lenet5"], "error: lenet5 needs images of 16x16 or more, got 8x8."),
        ("train", ["--batch_size=5000"], "is more than the 1437 examples"),
        ("train", ["--epochs=1", "--update_every=99"], "Lower update_every"),
        ("train", ["--learning_rate=1e9", "--out_dir={}"], "error: the loss is "),
        ("train", ["--young_ramp=10"], "--young_ramp is for --optimizer=adamw"),
        ("train", ["--method=rigl_fisher", "--out_dir={}"], "needs one nu in"),
        ("train", ["--out_dir=/dev/null/x"], "error: "),
        ("compare", ["--sparsity=0.99999"], "error: erk cannot meet sparsity 0.99999"),
    ],
)
def test_wrong_flags_are_told_in_one_line(program, given, message, tmp_path, capsys):
    output = told_here(program, [f.format(tmp_path) for f in given], capsys)
    assert message in output
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) <= 1


def test_same_seed_same_bits_and_scan_equals_loop(monkeypatch):
    dataset = images.load("digits")

    def final(seed, scan):
        monkeypatch.setattr(batches, "scan_is_fast", lambda *args: scan)
        trainer = make_trainer(config(), dataset)
        return trainer.run(trainer.init(seed), None, 60)[0]

    first, again, looped, other = (final(s, scan) for s, scan in ((0, 1), (0, 1), (0, 0), (1, 1)))
    chex.assert_trees_all_equal(first.params, again.params)
    masks, looped_masks, other_masks = (
        np.asarray(gj.get_masks(s.opt_state)["fc2"]["kernel"]) for s in (first, looped, other)
    )
    assert (masks == looped_masks).mean() > 0.99  # last bits differ between the two programs
    assert (masks != other_masks).any()


def test_chunks_go_through_an_epoch_in_one_order():
    trainer = make_trainer(config(), images.load("digits"))
    whole, _ = trainer.run(trainer.init(0), None, 30)
    parts, _ = trainer.run(trainer.run(trainer.init(0), None, 10)[0], None, 20)
    chex.assert_trees_all_close(whole.params, parts.params, atol=1e-5)


def test_one_function_decides_on_scan():
    def dense(w, x):
        return jnp.sum(x @ w)

    def conv(w, x):
        return jnp.sum(jax.lax.conv(x, w, (1, 1), "SAME"))

    assert batches.scan_is_fast(dense, jnp.ones((3, 3)), jnp.ones((3, 3)))
    on_cpu = jax.default_backend() == "cpu"
    image, kernel = jnp.ones((1, 1, 8, 8)), jnp.ones((1, 1, 3, 3))
    assert batches.scan_is_fast(conv, kernel, image) != on_cpu


@pytest.mark.parametrize(
    ("changes", "steps", "expected"),
    [
        ({}, (0, 87, 88, 132), (0.1, 0.1, 0.01, 0.001)),
        ({"drop_at": (0.25,), "drop_factor": 0.2}, (43, 44, 175), (0.1, 0.02, 0.02)),
        ({"warmup_epochs": 1.0}, (0, 22, 44, 87, 88), (0.0, 0.05, 0.1, 0.1, 0.01)),
        ({"schedule": "cosine"}, (0, 88, 176), (0.1, 0.05, 0.0)),
        ({"schedule": "cosine", "warmup_epochs": 2.0}, (44, 132, 176), (0.05, 0.05, 0.0)),
    ],
)
def test_learning_rates(changes, steps, expected):
    schedule = optimizers.learning_rate(config(**changes), Length(4, 44))
    np.testing.assert_allclose([schedule(t) for t in steps], expected, atol=1e-7)


@pytest.mark.parametrize(
    "changes", [{"optimizer": "sgd", "weight_decay": 0.5}, {"optimizer": "adamw"}]
)
def test_decay_leaves_biases_alone_where_told(changes):
    trainer = make_trainer(config(decay_all=False, **changes), images.load("digits"))
    settled, length = trainer.settings, Length(4, 44)
    method = optimizers.make_method(settled, length, (), jax.random.key(0))
    optimizer = optimizers.make_optimizer(settled, length, method)
    params = {"fc": {"kernel": jnp.ones((20, 20)), "bias": jnp.ones(20)}}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    assert updates["fc"]["kernel"].all()
    assert not updates["fc"]["bias"].any()


def test_regeneration_fractions_are_those_of_the_methods():
    rows = {
        "granet": (0.5, 0.2525, 0.005),
        "rigl_itop": (0.5, 0.2525, 0.005),
        "rigl": (0.3, 0.075, 0.0),
        "gmp": (0.0, 0.0, 0.0),
    }
    for method, expected in rows.items():
        regeneration = methods.METHODS[method].regeneration
        np.testing.assert_allclose(
            [regeneration.at(t, 1000) for t in (0, 500, 1000)], expected, atol=1e-6
        )


FAMILIES = [  # forward FLOPs, those of training, and whether exploration is tracked
    ("synflow", {}, (0.1, 0.1, False)),
    ("rigl", {}, (0.1, 0.1 + 0.9 / 3 / 11, True)),
    ("snfs", {}, (0.1, 0.1 + 0.9 / 3, True)),
    (
        "rigl_fisher",
        {"optimizer": "adamw", "learning_rate": 1e-3, "young_ramp": 10},
        (0.1, 0.1 + 0.9 / 3 / 11, True),
    ),
    ("ac_dc", {}, None),
    ("chts", {}, (0.1, 0.1, False)),
    ("chtss", {}, None),
    ("movement", {}, None),
    ("mask_decay", {}, None),
    ("structure_decay", {"structure": "2:4", "sparsity": 0.5}, None),
    ("ste", {}, None),
    ("sr_ste", {"structure": "2:4", "sparsity": 0.5}, None),
    ("gmp", {"dense_layers": ("fc3",)}, None),
    ("dst", {"penalty": 0.1, "init": "uniform", "normalise": False}, None),
    ("str", {"penalty": 0.05}, None),
]
IN_CI = ("rigl", "ac_dc", "gmp", "dst")


@pytest.mark.parametrize(
    ("method", "changes", "expected"),
    [
        pytest.param(*row, marks=() if row[0] in IN_CI else pytest.mark.full, id=row[0])
        for row in FAMILIES
    ],
)
def test_families_of_methods_through_a_run(method, changes, expected, tmp_path):
    settled = config(method=method, epochs=2, batch_size=128, **changes)
    result = train(tmp_path, settled, images.load("digits"))
    again = train(tmp_path, settled, images.load("digits"))  # from the checkpoint
    chex.assert_trees_all_equal(result.state.params, again.state.params)
    chex.assert_trees_all_equal(result.weights, gj.apply_masks(result.weights, result.masks))
    assert (tmp_path / "report.html").read_text().count("training FLOPs")
    record = result.history[-1]
    live = sum(m.sum() for m in jax.tree.leaves(result.masks) if m.ndim == 2)
    if expected is not None:
        forward, training_flops, tracked = expected
        assert live == round(50_200 * forward)
        np.testing.assert_allclose(record["inference_flops"], forward, rtol=1e-3)
        np.testing.assert_allclose(record["training_flops"], training_flops, rtol=1e-3)
        assert ("exploration" in record) == tracked
    elif method == "gmp":  # dense at first, and fc3 always
        assert result.masks["fc3"]["kernel"].all()
        assert live == 4_920 + 1_000
        assert "density/fc3/kernel" not in record
        steps = np.arange(22)  # an event every 10 steps; pruning ends after 11
        kept = np.where(steps < 10, 1.0, np.where(steps < 20, 0.1 + 0.9 / 11**3, 0.1))
        expected = np.mean(1_000 + 49_200 * kept) / 50_200
        np.testing.assert_allclose(record["training_flops"], expected, rtol=1e-3)
    else:
        assert 0.0 < record["sparsity"] < 1.0
        assert record["live"] == live


def test_block_kernel_by_flag():
    """As without it, but for the order of sums."""
    settled = config(method="granet_uniform", structure="block:16x16", sparsity=0.5, epochs=1)
    runs = []
    for block_kernel in (False, True):
        chosen = dataclasses.replace(settled, block_kernel=block_kernel, batch_size=128)
        trainer = make_trainer(chosen, images.load("digits"))
        runs.append(trainer.run(trainer.init(0), None, 11))
    (plain, losses), (by_blocks, same_losses) = runs
    chex.assert_trees_all_close(losses, same_losses, rtol=1e-4)
    chex.assert_trees_all_equal(*(gj.get_masks(s.opt_state) for s in (plain, by_blocks)))
    assert gj.get_masks(plain.opt_state)["fc1"]["kernel"].mean() < 0.9
    with pytest.raises(ValueError, match="--block_kernel needs a structure as block:64x64"):
        make_trainer(dataclasses.replace(chosen, structure="fan_in"), images.load("digits"))


@pytest.mark.parametrize("method", ["granet_uniform", "rigl"])
def test_structures_by_flag(method, tmp_path):
    settled = config(method=method, structure="2:4", sparsity=0.5, epochs=2, batch_size=128)
    result = train(tmp_path, settled, images.load("digits"))
    for layer in ("fc1", "fc2", "fc3"):
        mask = result.masks[layer]["kernel"]
        assert np.all(mask.reshape(len(mask) // 4, 4, -1).sum(1) == 2)
    assert result.history[-1]["live"] == 25_100
