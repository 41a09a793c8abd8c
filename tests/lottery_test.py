"""Lottery tickets: what is pruned, where each rule starts, and that ladders survive kills."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from fractions import Fraction

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

import granet_jax as gj
from experiments import lottery as program
from experiments.data import images as data
from experiments.engine.records import Diverged
from experiments.models import transformer
from experiments.studies import lottery
from experiments.tasks import images, text
from granet_jax.methods.lottery import prune
from tests import lm_test
from tests.images import make_trainer, random_images

jitted = jax.jit(prune)


@given(st.integers(0, 99), st.integers(1, 3))
def test_a_level_removes_the_ceil_of_the_live_weights(percent, levels):
    params = {"a": {"kernel": jnp.arange(60.0).reshape(6, 10) % 7, "bias": jnp.zeros(10)}}
    masks, live = gj.ones(params), 60
    for _ in range(levels):
        new = jitted(params, masks, fraction=percent / 100)
        assert not (new["a"]["kernel"] & ~masks["a"]["kernel"]).any()
        assert new["a"]["bias"].all()
        masks, live = new, live - math.ceil(live * Fraction(percent, 100))
        assert masks["a"]["kernel"].sum() == live


def test_a_fifth_per_level_over_twelve_levels():
    """Density .8^12 = 6.87 % at the end, off by the twelve times that a fraction was rounded up."""
    params = {"kernel": jax.random.normal(jax.random.key(0), (500, 500))}
    masks = gj.ones(params)
    for level in range(1, 13):
        masks = jitted(params, masks)
        too_few = 250_000 * 0.8**level - int(masks["kernel"].sum())
        assert 0 <= too_few < 5


def test_pruning_by_hand():
    params = {
        "a": {"kernel": jnp.array([[9.0, -8.0, 7.0, 6.0]]), "bias": jnp.zeros(4)},
        "b": {"kernel": jnp.array([[-2.0, 1.0, 2.0, 0.0]]), "bias": jnp.zeros(4)},
    }
    masks = gj.ones(params)
    masks["b"]["kernel"] = jnp.array([[True, True, True, False]])

    def kernels(**how):
        new = prune(params, masks, **how)
        assert new["a"]["bias"].all()
        return ["".join(".#"[int(x)] for x in new[name]["kernel"][0]) for name in "ab"]

    # Seven are live. ceil(.2 * 7) = 2 of all go, 1 and one of the two 2s: the later.
    assert kernels() == ["####", "#..."]
    with pytest.warns(UserWarning, match="no weight is left in b/kernel"):
        assert kernels(fraction=0.5) == ["###.", "...."]  # ceil(.5 * 7) = 4
    assert kernels(by_layer=True) == ["###.", "#.#."]  # ceil(.2 * 4) and ceil(.2 * 3)
    assert kernels(prunable=[("b", False)]) == ["###.", "###."]

    def moved(event):
        return jax.tree.map(lambda p: jnp.abs(p - 8.0), event.params)

    assert kernels(score=moved) == [".#.#", "###."]


def test_wrong_fractions_and_masks_are_refused():
    params = {"kernel": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\)"):
        prune(params, gj.ones(params), fraction=1.0)
    with pytest.raises(ValueError, match="masks are of another tree"):
        prune(params, {"other": jnp.ones((2, 2), bool)})


STEPS, REWIND, LEVELS = 16, 9, 2  # of the dense run; 4 steps make an epoch


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(16)(x.reshape(len(x), -1))
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.5)(x))
        return nn.Dense(3)(x)


def make_study(out_dir, *, oneshot=False, trainer=None, **given):
    if trainer is None:
        config = images.Settings(
            dataset="toy",
            model="toy",
            method="dense",
            epochs=4,
            batch_size=16,
            update_every=1,
            nesterov=False,
            weight_decay=0.0,
            **given,
        )
        dataset = data.from_arrays(
            random_images(64, (4, 4, 1)), random_images(32, (4, 4, 1), seed=1)
        )
        trainer = make_trainer(config, dataset, Net())
    return lottery.make_study(
        trainer,
        out_dir,
        fraction=0.2,
        oneshot=oneshot,
        rewind_at=REWIND / STEPS,
        retrain=12 / STEPS,
        rules=list(lottery.RULES),
    )


def go(study):
    """One seed, all rules, all levels."""
    shown = []
    dense = lottery.train_dense(study, 0, shown.append)
    curves = {
        name: [[dense]]
        + [[lottery.train_level(study, 0, name, i + 1, shown.append)] for i in range(LEVELS)]
        for name in lottery.RULES
    }
    return curves, shown


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A study that nothing interrupted."""
    study = make_study(tmp_path_factory.mktemp("straight"))
    return study, *go(study)


def level(study, rule, number):
    return lottery.read(study, lottery.level_file(study, 0, rule, number))


def dense(study, name):
    return lottery.read(study, lottery.dense_file(study, 0, name))


def start_of(study, rule, number=1):
    """The state in which a level began, made again."""
    before = dense(study, "final") if number == 1 else level(study, rule, number - 1)
    start = lottery.RULES[rule].start(lottery.Level(study, 0, number, before))
    return lottery.start_state(study.trainer, 0, start, level(study, rule, number).masks)


def learning_rate_of_next_step(study, state):
    """What plain SGD with momentum moved the weights by, over its momentum."""
    old = jax.tree.map(np.array, state.params)
    state, _ = study.trainer.run(state, None, 1)
    trace = np.array(optax.tree.get(state.opt_state, "trace")["Dense_0"]["kernel"])
    moved = old["Dense_0"]["kernel"] - np.array(state.params["Dense_0"]["kernel"])
    live = np.abs(trace) > 0.01
    rates = moved[live] / trace[live]
    chex.assert_trees_all_close(rates, np.full_like(rates, np.median(rates)), rtol=0.02)
    return np.median(rates), state


@pytest.mark.parametrize(
    ("rule", "step", "first", "last"),
    [  # the dense run falls from .1 to .01 after step 8 and to .001 after step 12
        ("weight_rewinding", 9, 0.01, 0.001),
        ("lr_rewinding", 4, 0.1, 0.001),
        ("fine_tuning", 4, 0.001, 0.001),
        ("reset", 0, 0.1, 0.001),
        ("reinit", 0, 0.1, 0.001),
    ],
)
def test_each_rule_starts_at_its_step_and_learning_rate(straight, rule, step, first, last):
    study, *_ = straight
    state = start_of(study, rule)
    assert int(state.step) == step
    assert not any(x.any() for x in jax.tree.leaves(optax.tree.get(state.opt_state, "trace")))
    rate, state = learning_rate_of_next_step(study, state)
    assert rate == pytest.approx(first, rel=0.02)
    while state.step < STEPS - 1:
        state, _ = study.trainer.run(state, None, 1)
    rate, state = learning_rate_of_next_step(study, state)
    assert rate == pytest.approx(last, rel=0.02)


def test_the_first_steps_momentum_is_its_gradient(straight):
    """So the learning rates above are those of a fresh optimizer."""
    study, *_ = straight
    state = start_of(study, "lr_rewinding", 2)
    before = jax.tree.map(np.array, state.params)
    state, _ = study.trainer.run(state, None, 1)
    trace = optax.tree.get(state.opt_state, "trace")
    expected = jax.tree.map(lambda p, t: p - np.float32(0.1) * t, before, trace)
    chex.assert_trees_all_close(state.params, expected, rtol=1e-5, atol=1e-7)


def test_adams_own_count_starts_at_zero(tmp_path):
    study = make_study(tmp_path, optimizer="adamw")
    state = study.trainer.init(0)
    start = lottery.Start(lottery.snapshot(state), 4, 12)
    opt_state = lottery.start_state(
        study.trainer, 0, start, gj.get_masks(state.opt_state)
    ).opt_state
    counts = optax.tree.get_all_with_path(opt_state, "count")
    found = {path[-1].tuple_name: int(count) for path, count in counts}
    assert found == {"ScaleByAdamState": 0, "ScaleByScheduleState": 12}


def masked_bits(tree, masks):
    return jax.tree.map(lambda x, m: np.where(m, x, 0).view(np.uint32), tree, masks)


@pytest.mark.parametrize("number", [1, LEVELS])
def test_where_the_weights_come_from_bit_for_bit(straight, number):
    study, *_ = straight
    new = lottery._reinit(lottery.Level(study, 0, number, None)).weights
    sources = {
        "weight_rewinding": dense(study, "rewind"),
        "lr_rewinding": dense(study, "final") if number == 1 else level(study, "lr_rewinding", 1),
        "fine_tuning": dense(study, "final") if number == 1 else level(study, "fine_tuning", 1),
        "reset": dense(study, "init"),
        "reinit": new,
    }
    for rule, source in sources.items():
        state, masks = start_of(study, rule, number), level(study, rule, number).masks
        chex.assert_trees_all_equal(
            masked_bits(state.params, gj.ones(state.params)), masked_bits(source.params, masks)
        )
        chex.assert_trees_all_equal(state.model_state, source.model_state)
        chex.assert_trees_all_equal(gj.get_masks(state.opt_state), masks)


def test_the_dense_run_is_the_one_of_training(straight):
    """Its snapshots at step 0, k and the end are those of the trainer alone."""
    study, *_ = straight
    state = study.trainer.init(0)
    chex.assert_trees_all_equal(dense(study, "init").params, state.params)
    for name, steps in (("rewind", REWIND), ("final", STEPS - REWIND)):
        for _ in range(steps):
            state, _ = study.trainer.run(state, None, 1)
        chex.assert_trees_all_close(dense(study, name).params, state.params, atol=1e-6)


def test_ladders_are_pruned_from_what_the_level_before_ended_with(straight):
    study, curves, _ = straight
    sizes = (16 * 16, 16 * 3)
    live = [sum(sizes)]
    for _ in range(LEVELS):
        live.append(live[-1] - math.ceil(live[-1] / 5))
    for rule, levels in curves.items():
        assert [history[-1]["live"] for (history,) in levels] == live
        before = dense(study, "final")
        for number in range(1, LEVELS + 1):
            now = level(study, rule, number)
            if rule != "reinit":
                chex.assert_trees_all_equal(now.masks, jitted(before.params, before.masks))
            for p, m in zip(jax.tree.leaves(now.params), jax.tree.leaves(now.masks), strict=True):
                assert not p[~m].any()
            before = now
    assert len({level(study, rule, 2).masks["Dense_0"]["kernel"].tobytes() for rule in curves}) == 4


def test_reinit_has_the_masks_of_reset_and_other_weights(straight):
    study, *_ = straight
    kernels = []
    for number in range(1, LEVELS + 1):
        chex.assert_trees_all_equal(
            level(study, "reinit", number).masks, level(study, "reset", number).masks
        )
        kernels += [
            np.array(start_of(study, rule, number).params["Dense_0"]["kernel"])
            for rule in ("reset", "reinit")
        ]
    reset_1, reinit_1, _, reinit_2 = kernels
    both = (reset_1 != 0) & (reinit_2 != 0)
    assert (reset_1[both] != reinit_1[both]).all()
    assert (reinit_1[both] != reinit_2[both]).all()


class Killed(BaseException):
    pass


def test_killed_at_any_write_the_same_bits(straight, tmp_path, monkeypatch):
    original, curves, _ = straight
    study = original._replace(out_dir=tmp_path)
    write = lottery._write

    def kill_after(num_writes):
        def dying(path, content):
            nonlocal num_writes
            if num_writes == 0:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.with_suffix(".new").write_bytes(content[: len(content) // 2])
                raise Killed
            num_writes -= 1
            write(path, content)

        return dying

    for num_writes in (0, 1, 3, 4, 1, 2, 5):
        monkeypatch.setattr(lottery, "_write", kill_after(num_writes))
        with pytest.raises(Killed):
            go(study)
    monkeypatch.setattr(lottery, "_write", write)
    resumed, _ = go(study)
    for rule in curves:
        for (history,), (expected,) in zip(resumed[rule], curves[rule], strict=True):
            for one, other in zip(history, expected, strict=True):
                assert one == other | {"images_per_second": one["images_per_second"]}
    names = [p.relative_to(original.out_dir) for p in original.out_dir.rglob("*.msgpack")]
    assert len(names) == 3 + LEVELS * len(curves)
    for name in names:
        assert (tmp_path / name).read_bytes() == (original.out_dir / name).read_bytes()


def test_what_is_there_returns_at_once(straight):
    study, curves, shown = straight
    assert len(shown) == 4 + LEVELS * (2 + 3 + 3 + 4 + 4)  # epochs that each rule trains

    def fail(*_):
        raise AssertionError("trained again")

    again, shown = go(study._replace(trainer=study.trainer._replace(run=fail)))
    assert again == json.loads(json.dumps(curves))
    assert not shown


def test_oneshot_prunes_the_dense_network(straight, tmp_path):
    original, *_ = straight
    study = make_study(tmp_path, oneshot=True, trainer=original.trainer)
    lottery.train_dense(study, 0, lambda record: None)
    lottery.train_level(study, 0, "lr_rewinding", 2, lambda record: None)
    final = dense(study, "final")
    masks = level(study, "lr_rewinding", 2).masks
    chex.assert_trees_all_equal(masks, jitted(final.params, jitted(final.params, final.masks)))
    assert sum(int(m.sum()) for m in jax.tree.leaves(masks)) - 16 - 16 - 16 - 3 == 194


def test_divergence_is_told(tmp_path):
    study = make_study(tmp_path, learning_rate=1e30)
    with pytest.raises(Diverged, match=r"the loss is nan at step 2 \(epoch 1\)\. Lower --learning"):
        lottery.train_dense(study, 0, lambda record: None)
    assert not lottery.done(lottery.dense_file(study, 0, "final"))


def test_levels_that_are_not_sparse_are_not_written(straight, tmp_path):
    original, *_ = straight
    trainer = original.trainer
    shutil.copytree(original.out_dir, tmp_path, dirs_exist_ok=True)

    def run_dense(state, stream, num_steps):
        state, losses = trainer.run(state, stream, num_steps)
        return state._replace(params=jax.tree.map(lambda p: p + 1e-3, state.params)), losses

    study = original._replace(out_dir=tmp_path, trainer=trainer._replace(run=run_dense))
    with pytest.raises(Diverged, match=r"at step 4: \d+ weights of Dense_0/kernel are not 0"):
        lottery.train_level(study, 0, "reset", LEVELS + 1, lambda record: None)
    assert not lottery.level_file(study, 0, "reset", LEVELS + 1).exists()


def test_settings_that_leave_nothing_to_train_are_refused(straight, tmp_path):
    study, *_ = straight
    told = {"fraction": 0.2, "oneshot": False, "rewind_at": 0.1, "retrain": 1.0, "rules": []}
    for change, message in (
        ({"fraction": 1.0}, "prune_fraction must be in"),
        ({"rewind_at": 1.0}, "leave a whole epoch"),
        ({"retrain": 0.1}, "leave a whole epoch"),
    ):
        with pytest.raises(ValueError, match=message):
            lottery.make_study(study.trainer, tmp_path, **(told | change))
    config = dataclasses.replace(study.trainer.settings, schedule="cosine")
    trainer = study.trainer._replace(settings=config)
    lottery.make_study(trainer, tmp_path, **told)
    with pytest.raises(ValueError, match="final learning rate, which --schedule=cosine"):
        lottery.make_study(trainer, tmp_path, **(told | {"rules": ["fine_tuning"]}))


def test_table_and_figure(straight):
    study, curves, _ = straight
    told = study.trainer.told
    first, *_, last = program.table(curves, told)
    assert first["weights kept"] == "100.00 %"
    assert list(last) == ["weights kept", *curves]
    accuracy = curves["reset"][LEVELS][0][-1]["test_accuracy"]
    assert last["reset"] == f"{accuracy:5.2f}"
    (axes,) = program.draw(curves, told, "toy").axes
    assert axes.get_ylabel() == "test accuracy after the last epoch (%)"
    line = axes.lines[1 + list(curves).index("reset")]
    assert line.get_ydata()[LEVELS] == accuracy
    np.testing.assert_allclose(line.get_xdata(), [100, 80, 64], atol=0.5)


@pytest.mark.full
def test_ladders_of_text_on_a_mesh(tmp_path, monkeypatch):
    monkeypatch.setitem(transformer.SIZES, "tiny", lm_test.TINY)
    monkeypatch.setattr(text, "VALIDATION_WINDOWS", 4)
    trainer = lm_test.make_trainer(
        lm_test.mesh_of(2, 2, 2), method="dense", sparsity=0.0, update_every=1
    )  # 4 epochs of 2 steps
    study = make_study(tmp_path, trainer=trainer)
    curves, shown = go(study)
    (dense_run,) = curves["reset"][0]
    assert [record["bytes"] for record in dense_run] == [64, 128, 192, 256]
    leaves = gj.trees.describe(trainer.setup.abstract_params, trainer.setup.rules)
    live = [sum(leaf.size for leaf in leaves if leaf.prunable)]
    for _ in range(LEVELS):
        live.append(live[-1] - math.ceil(live[-1] / 5))
    for levels in curves.values():
        assert [history[-1]["live"] for (history,) in levels] == live
    assert not {"bytes", "bytes_per_second", "validation_bits_per_byte"} - shown[-1].keys()
    (tuned,) = curves["fine_tuning"][1]
    assert [r["learning_rate"] for r in tuned] == pytest.approx([1e-3] * 3)  # a tenth of the peak
    masks = level(study, "reset", LEVELS).masks
    assert masks["embedding"].all()
    chex.assert_trees_all_equal(masks, level(study, "reinit", LEVELS).masks)
    state = start_of(study, "weight_rewinding")
    assert state.params["blocks"]["up"]["kernel"].sharding.spec == PartitionSpec(
        None, "fsdp", "tensor"
    )
    again, shown = go(study)
    assert again == json.loads(json.dumps(curves))
    assert not shown

    *_, last = program.table(curves, trainer.told)
    bits = curves["reset"][LEVELS][0][-1]["validation_bits_per_byte"]
    assert last["reset"] == f"{bits:.4f}"
    (axes,) = program.draw(curves, trainer.told, "text").axes
    assert axes.get_ylabel() == "validation bits per byte after the last epoch"


def test_rules_by_name():
    assert lottery.rules_named(None) == list(lottery.RULES)
    assert lottery.rules_named(["reinit"]) == ["reset", "reinit"]  # whose masks it takes
    with pytest.raises(ValueError, match=r"--rules=best: name some of weight_rewinding"):
        lottery.rules_named(["best"])


def test_the_program(tmp_path):
    command = [sys.executable, "-m", "experiments.lottery", f"--out_dir={tmp_path}"]
    flags = ["--rules=reinit", "--levels=2", "--seeds=2", "--epochs=1", "--rewind_at=0"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "table.txt").read_text()
    assert all(word in table for word in ("100.00 %", "80.00 %", "64.00 %", "reset", "reinit", "±"))
    assert "weight_rewinding" not in table
    assert (tmp_path / "lottery.png").stat().st_size > 10_000
    assert (tmp_path / "seed-1" / "reinit" / "level-02.msgpack").exists()


def test_levels_of_groups_remove_some_until_each_has_one():
    params = {"kernel": jax.random.normal(jax.random.key(0), (8, 4))}
    rules = [("", gj.structures.fan_in())]
    masks, counts = gj.ones(params), []
    for _ in range(5):
        masks = prune(params, masks, by_layer=True, prunable=rules)
        counts.append(int(masks["kernel"].sum()))
    assert counts == [24, 16, 12, 8, 4]
    with pytest.raises(ValueError, match=r"each group .* keeps one weight at least"):
        prune(params, masks, by_layer=True, prunable=rules)
