"""The plasticity study: exact prunes and regrowth, branches that go on as they should, kills."""

import functools
import json
import re
import subprocess
import sys

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import flags

import granet_jax as gj
from experiments import plasticity as program
from experiments.data import images as data
from experiments.engine import batches, files
from experiments.engine.task import ACCURACY, Streamed
from experiments.models import transformer
from experiments.studies import plasticity
from experiments.studies.plasticity import Branch, Outcome, Plan
from experiments.tasks import images, text
from tests import lm_test
from tests.images import make_trainer as trainer_of
from tests.images import random_images


@pytest.mark.parametrize(
    ("num_live", "rate", "scope", "expected"),
    [
        ([10, 1000], 0.3, "global", 707),
        ([10, 1000], 0.3, "uniform", [7, 700]),  # in floats .3 * 10 is above 3
        ([11, 1001], 0.5, "global", 506),
        ([11, 1001], 0.5, "uniform", [5, 500]),
        ([3, 2], 0.98, "uniform", [0, 0]),
        ([20_000_000, 7], 0.2, "global", 16_000_005),
    ],
)
def test_a_prune_removes_the_ceil_of_its_share(num_live, rate, scope, expected):
    counts = plasticity.num_kept(jnp.array(num_live), rate, scope)
    np.testing.assert_array_equal(counts, expected)
    assert counts.dtype == np.int32


PARAMS = {
    "a": {"kernel": jnp.array([[5.0, -4.0, 0.3], [0.2, 0.0, 0.0]]), "bias": jnp.zeros(3)},
    "b": {"kernel": jnp.array([[-3.0, 2.0], [0.1, 0.0]]), "bias": jnp.zeros(2)},
}
MASKS = {
    "a": {"kernel": jnp.array([[1, 1, 1], [1, 0, 0]], bool), "bias": jnp.ones(3, bool)},
    "b": {"kernel": jnp.array([[1, 1], [1, 0]], bool), "bias": jnp.ones(2, bool)},
}
GRADS = {
    "a": {"kernel": jnp.array([[9.0, 9.0, 0.1], [-0.5, 0.2, -0.4]]), "bias": jnp.ones(3)},
    "b": {"kernel": jnp.array([[9.0, 9.0], [0.1, 0.2]]), "bias": jnp.ones(2)},
}


def test_pruning_all_layers_together_by_hand():
    new, kept = plasticity.pruned_masks(MASKS, PARAMS, 3)
    assert kept["a"]["kernel"].tolist() == [[True, True, False], [False, False, False]]
    assert kept["b"]["kernel"].tolist() == [[True, False], [False, False]]
    assert kept["a"]["bias"].all()
    chex.assert_trees_all_equal(new, kept)


def test_each_layer_regrows_what_it_lost_where_gradients_are_largest():
    new, kept = plasticity.pruned_masks(MASKS, PARAMS, 3, gj.scores.gradient, GRADS)
    # a lost two: the one just pruned of gradient -.5 comes back, and a new one; b lost two.
    assert new["a"]["kernel"].tolist() == [[True, True, False], [True, False, True]]
    assert new["b"]["kernel"].tolist() == [[True, True], [False, True]]
    assert kept["a"]["kernel"].tolist() == [[True, True, False], [False, False, False]]
    assert kept["b"]["kernel"].tolist() == [[True, False], [False, False]]


def test_each_layer_by_its_own_count():
    new, kept = plasticity.pruned_masks(
        MASKS, PARAMS, np.array([1, 2], np.int32), gj.scores.random, key=jax.random.key(0)
    )
    assert kept["a"]["kernel"].tolist() == [[True, False, False], [False, False, False]]
    assert kept["b"]["kernel"].tolist() == [[True, True], [False, False]]
    np.testing.assert_array_equal(gj.metrics.num_live(new, PARAMS), [4, 3])
    assert new["a"]["kernel"][0, 0]
    assert new["b"]["kernel"][0].all()


def test_random_and_gradient_regrow_all_of_a_dense_network():
    for grow in (gj.scores.random, gj.scores.gradient):
        new, _ = plasticity.pruned_masks(gj.ones(PARAMS), PARAMS, 2, grow, GRADS, jax.random.key(0))
        chex.assert_trees_all_equal(new, gj.ones(PARAMS))
    assert plasticity.rules_for(0.0, plan()) == ("none", "gradient")
    assert plasticity.rules_for(0.5, plan()) == ("none", "random", "gradient")


class Net(nn.Module):
    """Small, with batch norm."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(not train, name="norm")(nn.Dense(16, name="fc1")(x.reshape(len(x), -1)))
        return nn.Dense(3, name="fc2")(nn.relu(x))


def plan(**changes):
    fields = {
        "sparsities": (0.5,),
        "prune_epochs": (1, 3),
        "continue_epochs": 2,
        "rates": (0.3, 0.9),
        "rules": ("none", "random", "gradient"),
        "scope": "global",
        "gradient_batches": 2,
        "recalibrate": 0,
    }
    return Plan(**{**fields, **changes})


@functools.cache
def make_trainer(**changes):
    fields = {"dataset": "own", "model": "own", "method": "static", "sparsity": 0.5, "epochs": 6}
    fields |= {"batch_size": 16, "update_every": 1, "learning_rate": 0.02}  # drops after 3 epochs
    config = images.Settings(**{**fields, **changes})
    dataset = data.from_arrays(random_images(64), random_images(32, seed=1))
    trainer = trainer_of(config, dataset, Net())
    return trainer, batches.first(trainer.setup.task.train, 4, config.batch_size)


def trained(trainer, epochs):
    state = trainer.init(0)
    for _ in range(epochs):
        state, _ = trainer.run(state, None, trainer.length.epoch_steps)
    return state


def regrown(trainer, state):
    """The state with 100 weights kept and the rest regrown at random; and what was kept."""
    key = jax.random.key(0)
    masks = gj.get_masks(state.opt_state)
    new, kept = plasticity.pruned_masks(masks, state.params, 100, gj.scores.random, key=key)
    return plasticity.under_masks(trainer, state, new, kept), new, kept


@pytest.mark.parametrize(
    ("changes", "names"), [({}, ["trace"]), ({"optimizer": "adamw"}, ["mu", "nu"])]
)
def test_what_is_pruned_or_regrown_starts_at_zero(changes, names):
    trainer, _ = make_trainer(**changes)
    state = trainer.init(0)
    grads = jax.tree.map(jnp.ones_like, state.params)
    updates, opt_state = jax.jit(trainer.setup.update)(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    state = state._replace(params=params, opt_state=opt_state)
    start, new, kept = regrown(trainer, state)
    chex.assert_trees_all_equal(gj.get_masks(start.opt_state), new)
    masks = gj.get_masks(opt_state)["fc1"]["kernel"]
    back = new["fc1"]["kernel"] & masks & ~kept["fc1"]["kernel"]
    assert back.any()

    def trees(state):
        return [state.params, *(optax.tree.get(state.opt_state, name) for name in names)]

    for old, tree in zip(trees(state), trees(start), strict=True):
        expected = jax.tree.map(lambda k, x: jnp.where(k, x, 0), kept, old)
        chex.assert_trees_all_equal(tree, expected)
        assert tree["fc1"]["bias"].any()
        assert old["fc1"]["kernel"][back].all()
        assert not tree["fc1"]["kernel"][back].any()


def test_it_trains_on_under_its_masks_at_the_same_step():
    trainer, _ = make_trainer()
    start, new, kept = regrown(trainer, trained(trainer, 1))
    after, _ = trainer.run(jax.tree.map(jnp.copy, start), None, trainer.length.epoch_steps)
    chex.assert_trees_all_equal(gj.get_masks(after.opt_state), new)
    kernel = after.params["fc1"]["kernel"]
    assert not kernel[~new["fc1"]["kernel"]].any()
    assert kernel[new["fc1"]["kernel"] & ~kept["fc1"]["kernel"]].any()
    counts = optax.tree.get_all_with_path(after.opt_state, "count")
    assert {int(count) for _, count in counts} == {2 * trainer.length.epoch_steps}
    assert int(after.step) == 2 * trainer.length.epoch_steps


def spied(trainer):
    """A trainer that keeps what it is asked to evaluate."""
    seen = []

    def evaluate(state):
        seen.append(jax.tree.map(jnp.copy, state))
        return {trainer.told.key(trainer.told.shown): 0.0}

    return trainer._replace(evaluate=evaluate), seen


@pytest.mark.full
def test_networks_trained_together_are_as_one_after_another():
    trainer, some = make_trainer()
    trainer, seen = spied(trainer)
    state = trained(trainer, 2)  # the learning rate drops within the epochs that follow
    copies = [b._replace(epoch=2) for b in plasticity.branches(plan(), 0.5, 0) if b.epoch == 1]
    for together in (False, True):
        done = plasticity.prune_and_train_on(trainer, plan(), some, state, copies, together)
        outcomes = dict(done)
    n = len(copies)
    assert len(seen) == 4 * n
    chex.assert_trees_all_equal(
        [s.params for s in seen[:n]], [s.params for s in seen[2 * n : 3 * n]]
    )
    for one, other in zip(seen[n : 2 * n], seen[3 * n :], strict=True):
        for name in ("params", "model_state", "opt_state"):
            chex.assert_trees_all_close(getattr(one, name), getattr(other, name), atol=1e-4)
        assert int(one.step) == int(other.step) == 4 * trainer.length.epoch_steps
        assert one.key == other.key
    kernels = [s.params["fc1"]["kernel"] for s in seen[n : 2 * n]]
    assert all(not np.allclose(kernels[0], kernel, atol=1e-2) for kernel in kernels[1:])

    assert list(outcomes) == copies
    total = 8 * 8 * 3 * 16 + 16 * 3
    live = {(b.rate, b.rule): outcome.live for b, outcome in outcomes.items()}
    assert live[0.3, "random"] == live[0.9, "gradient"] == total // 2
    assert live[0.9, "none"] == total // 2 - -(-total // 2 * 9 // 10)
    assert int(gj.metrics.num_live(gj.get_masks(seen[-3].opt_state), state.params).sum()) == 156


def test_recalibration_renews_batch_norm_alone():
    trainer, some = make_trainer()
    state = trained(trainer, 1)
    copy = [Branch(0.5, 0, 1, 0.9, "none")]
    spy, seen = spied(trainer)
    for number in (0, 4):
        once = plan(recalibrate=number)
        list(plasticity.prune_and_train_on(spy, once, some, state, copy, False))
    stale, renewed = seen[0], seen[2]
    chex.assert_trees_all_equal(stale.params, renewed.params)
    chex.assert_trees_all_equal(stale.model_state, state.model_state)
    old, new = (s.model_state["batch_stats"]["norm"]["mean"] for s in (stale, renewed))
    assert not np.allclose(old, new, rtol=0.1)


class Stop(Exception):
    pass


def study(trainer, some, out_dir, results, show=lambda record: None):
    out_dir.mkdir(exist_ok=True)
    return plasticity.study(
        trainer, plan(), some, out_dir, results, resume=True, checkpoint_seconds=0, show=show
    )


@pytest.mark.full
def test_stopped_studies_go_on_and_repeat_nothing(tmp_path, monkeypatch):
    trainer, some = make_trainer()
    straight = {}
    history = study(trainer, some, tmp_path / "straight", straight)
    assert [record["epoch"] for record in history] == [1, 2, 3, 4, 5, 6]
    assert list(straight) == plasticity.branches(plan(), 0.5, 0)
    assert plasticity.read_results(tmp_path / "straight") == straight

    written = plasticity.write_results

    def stop_after(number):
        def write(out_dir, results):
            written(out_dir, results)
            if len(results) == number:
                raise Stop

        return write

    for number in (2, 8):  # within each of the two groups of six
        monkeypatch.setattr(plasticity, "write_results", stop_after(number))
        with pytest.raises(Stop):
            study(trainer, some, tmp_path / "a", plasticity.read_results(tmp_path / "a"))
        assert len(plasticity.read_results(tmp_path / "a")) == number
    monkeypatch.setattr(plasticity, "write_results", written)
    results = plasticity.read_results(tmp_path / "a")
    resumed = study(trainer, some, tmp_path / "a", results)
    assert results == straight
    accuracies = [[record["test_accuracy"] for record in h] for h in (history, resumed)]
    assert accuracies[0] == accuracies[1]

    monkeypatch.setattr(plasticity, "prune_and_train_on", None)  # nothing left to be done
    assert len(study(trainer, some, tmp_path / "a", results)) == 6
    with pytest.raises(ValueError, match="lacks 12 results"):
        study(trainer, some, tmp_path / "a", {})


def test_plasticity_is_against_the_unpruned_network_of_the_same_epoch():
    two = plan(sparsities=(0.0, 0.5), rates=(0.3,), rules=("none", "gradient"))
    unpruned = {0.0: np.array([[50.0, 60, 70, 80, 90]]), 0.5: np.array([[10.0, 20, 30, 40, 55]])}
    results = {
        Branch(s, 0, e, 0.3, rule): Outcome(100 * e, 5.0, 42.0)
        for s in two.sparsities
        for e in two.prune_epochs
        for rule in two.rules
    }
    found = plasticity.lines(two, results, unpruned, ACCURACY)
    assert [line[:3] for line in found] == [
        *((0.0, 0.3, "none"), (0.0, 0.3, "gradient")),
        *((0.5, 0.3, "none"), (0.5, 0.3, "gradient")),
    ]
    np.testing.assert_array_equal(found[0].damage, [[-45, -65]])
    np.testing.assert_array_equal(found[0].plasticity, [[42 - 70, 42 - 90]])
    np.testing.assert_array_equal(found[2].plasticity, [[42 - 30, 42 - 55]])
    table = program.rows(two, found, unpruned, ACCURACY)
    assert table[0]["epoch 1"] == "70.00"
    assert table[1] == {
        **{"sparsity": "", "rate": "0.3", "regrown": "just pruned", "weights": ""},
        **{"epoch 1": "-45.00", "epoch 3": "-65.00"},
    }
    assert table[2]["weights"] == "100-300"
    assert len(table) == 8


def test_the_figure_is_linear_below_a_point():
    trainer, _ = make_trainer()
    two = plan(rates=(0.3,), rules=("none", "gradient"))
    points = np.array([[-30.0, 0.5]])
    found = [plasticity.Line(0.5, 0.3, rule, points, points - 1, points) for rule in two.rules]
    figure = program.draw(trainer, two, found, "title")
    (axes,) = figure.axes
    assert axes.yaxis.get_transform().linthresh == 1.0
    assert {-100, -30, -0.5, 0, 1, 10} < set(axes.get_yticks())
    assert [line.get_ydata().tolist() for line in axes.lines[3:6]] == [
        [-31, -0.5],
        *[[-30, 0.5]] * 2,
    ]
    assert [line.get_xdata()[0] for line in axes.lines[1:3]] == [3.0, 4.5]  # drops
    label = "accuracy less that of the unpruned network (points)"
    assert figure._supylabel.get_text() == label
    assert program._above(trainer.told).startswith("Points of test accuracy above the unpruned")


@pytest.fixture
def of_text(monkeypatch):
    """A trainer of 4 epochs of 2 steps each, and batches."""
    monkeypatch.setitem(transformer.SIZES, "tiny", lm_test.TINY)
    monkeypatch.setattr(text, "VALIDATION_WINDOWS", 4)
    trainer = lm_test.make_trainer(
        lm_test.mesh_of(2, 2, 2), method="static", sparsity=0.5, update_every=1
    )
    return trainer, batches.first(trainer.setup.task.train, 2, trainer.settings.batch_size)


@pytest.mark.full
def test_text_by_bits_fewer_than_the_unpruned_network(of_text, tmp_path):
    trainer, some = of_text
    assert len(some) == 2
    short = plan(prune_epochs=(1, 2), rates=(0.9,))
    results = {}
    history = plasticity.study(
        trainer,
        short,
        some,
        tmp_path,
        results,
        resume=True,
        checkpoint_seconds=0,
        show=lambda record: None,
    )
    assert list(results) == plasticity.branches(short, 0.5, 0)
    metric = trainer.told.metrics[0]
    bits = np.array([[record["validation_bits_per_byte"] for record in history]])
    found = plasticity.lines(short, results, {0.5: bits}, metric)
    none = [outcome for branch, outcome in results.items() if branch.rule == "none"]
    np.testing.assert_allclose(found[0].damage[0], bits[0, :2] - [o.pruned for o in none])
    np.testing.assert_allclose(found[0].plasticity[0], bits[0, 2:] - [o.recovered for o in none])
    live = {branch.rule: outcome.live for branch, outcome in results.items()}
    assert live["random"] == live["gradient"] == history[-1]["live"]
    assert live["none"] == history[-1]["live"] - -(-history[-1]["live"] * 9 // 10)

    table = program.rows(short, found, {0.5: bits}, metric)
    assert table[0]["regrown"] == "unpruned (bits per byte)"
    assert table[0]["epoch 1"] == f"{bits[0, 2]:.4f}"
    assert re.fullmatch(r"[+-]\d\.\d{4}", table[2]["epoch 2"])
    figure = program.draw(trainer, short, found, "text")
    assert figure.axes[0].yaxis.get_transform().linthresh == 0.01
    assert {-1, -0.01, 0, 0.1} < {round(tick, 6) for tick in figure.axes[0].get_yticks()}
    label = "bits per byte below the unpruned network's; above 0 is better"
    assert figure._supylabel.get_text() == label
    assert program._above(trainer.told).startswith("Validation bits per byte below the unpruned")


@pytest.mark.full
def test_networks_of_text_trained_together(of_text):
    trainer, some = of_text
    state = trained(trainer, 2)
    copies = [Branch(0.5, 0, 2, 0.9, rule) for rule in ("none", "gradient")]
    alone, together = (
        [o for _, o in plasticity.prune_and_train_on(trainer, plan(), some, state, copies, how)]
        for how in (False, True)
    )
    assert [o[:2] for o in alone] == [o[:2] for o in together]
    np.testing.assert_allclose(
        [o.recovered for o in alone], [o.recovered for o in together], rtol=1e-4
    )


def test_streamed_images_are_refused():
    stream = Streamed(1, lambda *args: None, lambda *args: iter(()))
    with pytest.raises(ValueError, match="training data in memory are needed; these are streamed"):
        batches.first(stream, 1, 1)


def run(*given, ok=True):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.plasticity", *given], capture_output=True, text=True
    )
    output = done.stdout + done.stderr
    assert (done.returncode == 0) == ok, output
    assert "Traceback" not in output
    return output


@pytest.mark.full
def test_program_leaves_its_files_and_guards_them(tmp_path):
    given = ["--epochs=2", "--seeds=1", "--prune_epochs=1", "--continue_epochs=1"]
    given += ["--rates=0.98", "--sparsities=0.9", f"--out_dir={tmp_path}"]
    output = run(*given)
    number = r" +[+-]\d+.\d\d"
    for row in (
        r"0\.9 +│ +│ +unpruned \(%\) +│ +│ +\d\d.\d\d │",
        rf"0\.98 │ +just pruned │ +│{number} │",
        rf"none │ +100 │{number} │",
        rf"random │ +5,020 │{number} │",
        rf"gradient │ +5,020 │{number} │",
    ):
        assert re.search(row, output), row
        assert re.search(row, (tmp_path / "table.txt").read_text())
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert len(lines) == 3
    assert json.loads(lines[0])["rule"] == "none"
    assert (tmp_path / "plasticity.svg").read_text().count("<svg") == 1
    assert len(files.read_history(tmp_path / "unpruned-0.9-0")) == 2
    output = run(*given, "--rates=0.5", ok=False)
    assert output.splitlines()[-1].startswith(f"error: {tmp_path} holds a run of other settings (")


def parsed(*args):
    flag_values = flags.FlagValues()
    program.define_plan_flags(flag_values)
    flag_values(["plasticity", *args])
    return program.plan_from_flags(60, flag_values)


def test_plans_are_the_papers_scaled():
    default = parsed()
    assert default.prune_epochs == (8, 15, 22, 30, 38, 45)
    assert default.continue_epochs == 11
    given = parsed("--prune_epochs=50,3", "--continue_epochs=10", "--rules=random")
    assert given[1:5] == ((50, 3), 10, (0.2, 0.5, 0.9, 0.98), ("random",))


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--rates=98", "--rates=98: give numbers in (0, 1), each once at most."),
        ("--rates=a,b", "--rates=a,b: give numbers in (0, 1)"),
        ("--rates=", "--rates=: give numbers in (0, 1)"),
        ("--sparsities=0,0", "--sparsities=0,0: give numbers in [0, 1), each once"),
        ("--rules=none,best", "--rules=none,best: give some of none, random, gradient"),
        ("--prune_epochs=50", "--prune_epochs=50: give epochs in [1, 49]"),
        ("--continue_epochs=60", "--prune_epochs=: give epochs in [1, 0]"),
    ],
)
def test_wrong_flags_are_told(flag, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parsed(flag)
