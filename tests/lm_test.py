"""The language model: network, text, runs that go on, meshes."""

import dataclasses
import doctest
import json
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import granet_jax as gj
from experiments.data import text
from experiments.engine import checkpoints, files, optimizers, plan, run, training
from experiments.engine.files import digest
from experiments.engine.records import Diverged
from experiments.models import transformer
from experiments.tasks import text as text_task

TINY = transformer.Size(width=8, depth=2, heads=2)
CONFIG = text_task.Settings(
    method="granet",
    size="tiny",
    context=8,
    batch_size=4,
    bytes=8 * 4 * 8,
    learning_rate=1e-2,
    sparsity=0.75,
    structure="none",
    block_kernel=False,
    update_every=2,
    prune_until=0.5,
    eval_every=2,
    precision="f32",
    remat=False,
    seed=0,
)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setitem(transformer.SIZES, "tiny", TINY)
    monkeypatch.setattr(text_task, "VALIDATION_WINDOWS", 4)


def mesh_of(data, fsdp, tensor):
    devices = jax.devices()[: data * fsdp * tensor]
    names = ("data", "fsdp", "tensor")
    types = (AxisType.Auto,) * 3
    return jax.make_mesh((data, fsdp, tensor), names, axis_types=types, devices=devices)


DATA = text.Text(*np.random.default_rng(0).integers(97, 105, (2, 3000), dtype=np.uint8))


def make_trainer(devices=None, data=DATA, **changes):
    devices = devices or mesh_of(1, 1, 1)
    config = dataclasses.replace(CONFIG, **changes)
    return training.make_trainer(config, text_task.task(config, devices, data), devices)


class Stop(Exception):
    pass


def run_until(epoch, trainer, out_dir):
    """Ends as a killed run does, with a checkpoint of the epoch before."""

    def stop(record):
        if record["epoch"] == epoch:
            raise Stop

    with pytest.raises(Stop):
        run.run(trainer, out_dir, checkpoint_seconds=0, show=stop)


def test_network_is_causal():
    model = transformer.Transformer(TINY)
    tokens = jax.random.randint(jax.random.key(0), (2, 6), 0, 256)
    params = jax.jit(model.init)(jax.random.key(1), tokens)["params"]
    apply = jax.jit(lambda tokens: model.apply({"params": params}, tokens))
    logits = apply(tokens)
    assert logits.shape == (2, 6, 256)
    assert logits.dtype == jnp.float32
    assert params["blocks"]["query"]["kernel"].shape == (2, 8, 8)
    other = apply(tokens.at[0, 3].add(1))
    changed = np.asarray((logits != other).any(-1))
    np.testing.assert_array_equal(changed[0], [False] * 3 + [True] * 3)
    assert not changed[1].any()


def test_rotated_products_depend_on_the_distance_alone():
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 6))
    rotated = (transformer.rotate(jnp.broadcast_to(x, (1, 7, 1, 6))) for x in (query, key))
    products = np.asarray(jnp.einsum("btnh,bsnh->ts", *rotated))
    for distance in range(-6, 7):
        diagonal = np.diagonal(products, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-5)
    assert np.ptp(products) > 0.1
    np.testing.assert_allclose(products[0, 0], np.dot(query.ravel(), key.ravel()), rtol=1e-5)


def test_attention_of_one_head_against_numpy():
    block = transformer.Block(heads=1, depth=1, time=5, dtype=jnp.float32, sharding=None)
    x = jax.random.normal(jax.random.key(0), (5, 4))
    params = jax.jit(block.init)(jax.random.key(1), x, None)["params"]
    params = params | {"down": jax.tree.map(jnp.zeros_like, params["down"])}  # attention alone
    got, _ = jax.jit(block.apply)({"params": params}, x, None)

    kernel = {name: np.asarray(params[name]["kernel"]) for name in ("query", "key", "value", "out")}
    y = np.asarray(x) / np.sqrt(np.mean(np.square(x), axis=1, keepdims=True) + 1e-6)

    def turned(v):
        angles = np.outer(np.arange(5), [1.0, 0.01])
        z = (v[:, :2] + 1j * v[:, 2:]) * np.exp(1j * angles)
        return np.concatenate([z.real, z.imag], 1)

    scores = turned(y @ kernel["query"]) @ turned(y @ kernel["key"]).T / 2
    weights = np.exp(scores) * np.tri(5)
    weights /= weights.sum(1, keepdims=True)
    expected = np.asarray(x) + weights @ (y @ kernel["value"]) @ kernel["out"]
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_layers_of_a_stack_count_one_by_one():
    trainer = make_trainer()
    params, rules = trainer.setup.abstract_params, trainer.setup.rules
    leaves = gj.trees.describe(params, rules)
    assert {x.path.split("/")[0] for x in leaves if x.prunable} == {"blocks"}
    single = {x.path: [jnp.zeros(x.layer_shape)] * 2 for x in leaves if x.prunable}

    def counted(params, rules):
        masks = gj.random_masks(jax.random.key(0), params, 0.75, prunable=rules)
        return gj.metrics.num_live(masks, params, rules)

    counts = jax.jit(counted, static_argnums=1)(jax.tree.map(jnp.zeros_like, params), rules)
    alone = jax.jit(counted, static_argnums=1)(single, ())
    np.testing.assert_array_equal(counts, alone)
    assert len(set(counts.tolist())) > 1  # ERK's, not uniform
    macs = {cost.path: cost.macs for cost in trainer.setup.costs.leaves}
    for leaf in leaves:
        assert not leaf.prunable or macs[leaf.path] == CONFIG.context * leaf.size


def test_held_out_files_and_windows(tmp_path):
    names = [f"{folder}/{i}.txt" for folder in "ab" for i in range(30)]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"<{name}>")
    (tmp_path / "binary").write_bytes(b"<\0>")
    read = text.read(tmp_path)
    train, held_out = (bytes(split).decode().split("\0") for split in read)
    assert sorted(train + held_out) == sorted(f"<{name}>" for name in names)
    assert train == sorted(train)
    assert [x[1:-1] for x in held_out] == sorted(filter(text.is_held_out, names))
    assert 0 < len(held_out) < 10

    draw = jax.jit(lambda key: text_task.draw_windows(key, jnp.asarray(read.train), 500, 9))
    windows = np.asarray(draw(jax.random.key(0)))
    assert all(bytes(window) in bytes(read.train) for window in windows)
    starts = {bytes(read.train).find(bytes(window)) for window in windows}
    assert len(starts) > 100
    assert not np.array_equal(windows, draw(jax.random.key(1)))
    fixed = text.held_out_windows(read, 4, 9)
    whole = bytes(read.validation)
    assert [bytes(fixed[0]), bytes(fixed[-1])] == [whole[:9], whole[-9:]]
    with pytest.raises(ValueError, match="Lower --context"):
        text.check_length(read, 10_000)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="more files"):
        text.read(tmp_path / "empty")
    with pytest.raises(ValueError, match="is no folder"):
        text.read(tmp_path / "nowhere")


def numbers(history):
    return [{k: v for k, v in record.items() if k != "bytes_per_second"} for record in history]


def test_a_stopped_run_ends_with_the_same_bits(tmp_path):
    trainer = make_trainer()
    straight = run.run(trainer, tmp_path / "straight")
    run_until(3, trainer, tmp_path / "stopped")
    files.append_record(tmp_path / "stopped", {"step": 6, "loss": 0.0})  # of work that was lost
    path = tmp_path / "stopped" / "settings.json"  # as if these settings had come later
    before = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("remat", "seed")}
    path.write_text(json.dumps(before))
    shown = []
    resumed = run.run(trainer, tmp_path / "stopped", show=shown.append)
    assert [record["step"] for record in shown] == [6, 8]
    assert digest(resumed.masks) == digest(straight.masks)
    assert digest(resumed.state.params) == digest(straight.state.params)
    assert numbers(resumed.history) == numbers(straight.history)
    assert numbers(files.read_history(tmp_path / "stopped")) == numbers(straight.history)

    last = straight.history[-1]
    assert last["sparsity"] == 0.75
    assert last["live"] == 6656 // 4
    assert last["bytes"] == 8 * 4 * 8
    kernels = 8 * (6656 * 0.25) / (8 * 6656 + 8 * 8 * 256 + 2 * 2 * 8 * 8 * 8)
    assert 0 < kernels < last["inference_flops"] < last["training_flops"] < 1
    assert last["churn"] > 0
    masks = files.read_masks(tmp_path / "straight", trainer.setup.abstract_params)
    assert digest(masks) == digest(straight.masks)
    assert files.agreement(masks, straight.masks, trainer.setup.rules)[0] == 1.0
    with pytest.raises(ValueError, match="another network"):
        files.read_masks(tmp_path / "straight", {"blocks": jnp.zeros((2, 3))})
    page = (tmp_path / "straight" / "report.html").read_text()
    for words in ("validation bits per byte", "training loss (bits per byte)", "bytes/s"):
        assert words in page
    other = make_trainer(data=DATA._replace(train=DATA.train[::-1].copy()))
    with pytest.raises(ValueError, match="other data"):
        run.run(other, tmp_path / "straight")


def test_what_goes_wrong_stops_a_run_at_its_last_good_checkpoint(tmp_path):
    trainer = make_trainer()

    def poisoned(state, stream, num_steps):
        state, losses = trainer.run(state, stream, num_steps)
        return state, losses.at[1].add(jnp.where(state.step > 4, jnp.nan, 0.0))

    broken = trainer._replace(run=poisoned)
    with pytest.raises(Diverged, match=r"loss is nan at step 6 .* of step 4\. "):
        run.run(broken, tmp_path / "broken", checkpoint_seconds=0)
    with checkpoints.open_manager(tmp_path / "broken" / "checkpoints") as manager:
        assert manager.latest_step() == 4
    assert [r["step"] for r in files.read_history(tmp_path / "broken")] == [2, 4]

    def dense(state, stream, num_steps):
        state, losses = trainer.run(state, stream, num_steps)
        odd = jax.tree.map(lambda p: p + 1e-3 * (state.step > 4), state.params)
        return state._replace(params=odd), losses

    with pytest.raises(Diverged, match=r"at step 6: The last good .* of step 4\. \d+ weights of"):
        run.run(trainer._replace(run=dense), tmp_path / "dense", checkpoint_seconds=0)


def test_masks_are_the_same_on_a_mesh(tmp_path):
    changes = {"method": "static", "bytes": 2 * 4 * 8}
    plain = make_trainer(**changes)
    trainer = make_trainer(mesh_of(1, 2, 2), remat=True, **changes)
    state = trainer.init(0)
    for tree in (state.params, gj.get_masks(state.opt_state), state.opt_state.inner[1][0].mu):
        kernel = tree["blocks"]["query"]["kernel"]
        assert kernel.addressable_shards[0].data.shape == (2, 4, 4)
    expected = plain.init(0)
    (loss,), (other,) = (t.evaluate(s).values() for t, s in ((trainer, state), (plain, expected)))
    np.testing.assert_allclose(loss, other, rtol=1e-5)

    planned = plan.plan(trainer)
    assert {"all-reduce", "all-gather"} <= {c.kind for c in planned.collectives}
    assert min(c.bytes for c in planned.collectives) > 0
    assert planned.memory["arguments"] > 0
    result = run.run(trainer, tmp_path)
    assert digest(result.masks) == digest(gj.get_masks(expected.opt_state))
    assert np.isfinite(result.history[-1]["loss"])


@pytest.mark.full
def test_training_by_the_blocks_that_are_on_is_training_under_masks():
    """Also of stacked layers that are computed again in the backward pass."""
    losses, states = [], []
    for block_kernel in (False, True):
        trainer = make_trainer(
            method="rigl",
            structure="block:4x4",
            remat=True,
            bytes=6 * 4 * 8,
            block_kernel=block_kernel,
        )
        state, each = trainer.run(trainer.init(0), None, 6)
        losses.append(each)
        states.append(state)
    chex.assert_trees_all_close(*losses, rtol=1e-4)
    chex.assert_trees_all_close(*(state.effort for state in states), rtol=1e-4)
    masks = [gj.get_masks(state.opt_state) for state in states]
    chex.assert_trees_all_equal(*masks)
    for kernel in jax.tree.leaves(masks[0]["blocks"]):
        if kernel.ndim == 3:
            units = kernel.reshape(2, kernel.shape[1] // 4, 4, -1, 4).mean((2, 4))
            assert set(np.unique(units)) == {0.0, 1.0}


@pytest.mark.filterwarnings("ignore:Layer collapse")  # SynFlow's, of queries and keys: see below
@pytest.mark.parametrize(
    "method",
    ["dst"]
    + [
        pytest.param(x, marks=pytest.mark.full)
        for x in ("snip", "synflow", "ste", "grasp", "str", "snfs", "ac_dc")
    ],
)
def test_methods_that_look_at_data_or_train_thresholds(method, tmp_path):
    """Text, too, gives SNIP its windows and SynFlow its paths.

    In SynFlow's network of ones all values are equal, so that nothing flows through what chooses
    among them: queries and keys are the first to go.
    """
    trainer = make_trainer(method=method, sparsity=0.5, eval_every=12, bytes=24 * 4 * 8)
    last = run.run(trainer, tmp_path).history[-1]
    assert np.isfinite(last["validation_bits_per_byte"])
    if method in ("dst", "str"):  # steered over more steps than these
        assert 0 <= last["sparsity"] < 1
    else:
        np.testing.assert_allclose(last["sparsity"], 0.5, atol=1e-3)


def test_the_learning_rate_rises_over_a_twentieth_and_falls_to_a_tenth():
    trainer = make_trainer(eval_every=100, bytes=200 * 4 * 8)
    rate = optimizers.learning_rate(trainer.settings, trainer.length)
    np.testing.assert_allclose([rate(t) for t in (0, 5, 10, 200)], [0, 5e-3, 1e-2, 1e-3], rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "devices", "message"),
    [
        ({"bytes": 63}, (1, 1, 1), "before the first evaluation"),
        ({"method": "magic"}, (1, 1, 1), "method must be one of dense"),
        ({"batch_size": 3}, (2, 1, 1), "no multiple of the 2 devices"),
        ({}, (1, 1, 4), "does not divide the 2 heads"),
        ({"batch_size": 3}, (1, 3, 1), "cannot be cut into 3"),
        ({"structure": "fan_in", "block_kernel": True}, (1, 1, 1), "as block:64x64; got 'fan_in'"),
    ],
)
def test_what_does_not_fit_is_told(change, devices, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(mesh_of(*devices), **change)


def test_wrong_flags_end_in_one_line():
    command = [sys.executable, "-m", "experiments.lm", "--devices=2", "--fsdp=4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: --data=1 --fsdp=4 --tensor=1 make 4 devices, but there are 2. The product must be "
        "their number."
    ]


@pytest.mark.parametrize("module", [plan, files])
def test_examples(module):
    results = doctest.testmod(module)
    assert results.attempted > 0
    assert results.failed == 0
