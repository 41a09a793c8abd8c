"""What folders of runs hold: those of before are read or refused; nothing that is not sparse."""

import contextlib
import dataclasses
import json
import re
import shutil
import types

import chex
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

import granet_jax as gj
from experiments import lottery, plasticity
from experiments.engine import checkpoints, files, page, records, run, settings
from experiments.engine.files import digest
from experiments.engine.records import Diverged
from experiments.engine.task import Metric, Told
from experiments.studies import lottery as lottery_study
from experiments.studies import plasticity as plasticity_study
from experiments.tasks import images, text
from tests.images import make_trainer, train
from tests.run_test import OwnNet, own_data, own_settings

# As if they had come later.
ADDED = ("task", "structure", "block_kernel", "drop_at", "seed", "final_rate", "b2", "clip_norm")


@pytest.fixture(autouse=True, scope="module")
def _compile_quickly():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def trainer():
    config = own_settings(method="set", epochs=3, chunk_steps=2, batch_size=16)
    return make_trainer(config, own_data(), OwnNet(8))


def go(trainer, folder, show=lambda record: None):
    return run.run(trainer, folder, checkpoint_seconds=0, show=show)


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def straight(trainer, tmp_path_factory):
    return go(trainer, tmp_path_factory.mktemp("straight"))


@pytest.fixture(scope="module")
def killed(trainer, tmp_path_factory):
    """The folder of a run that stopped within its third epoch."""

    def stop(record):
        if record["epoch"] == 3:
            raise Stop

    folder = tmp_path_factory.mktemp("killed")
    with pytest.raises(Stop):
        go(trainer, folder, stop)
    return folder


@pytest.fixture
def stopped(killed, tmp_path):
    return shutil.copytree(killed, tmp_path / "run")


def not_sparse_after(trainer, step):
    """A trainer under which, from a step on, pruned weights are not 0."""

    def run(state, stream, num_steps):
        state, losses = trainer.run(state, stream, num_steps)
        odd = jax.tree.map(lambda p: p + 1e-3 * (state.step > step), state.params)
        return state._replace(params=odd), losses

    return trainer._replace(run=run)


def test_a_run_that_is_not_sparse_stops_and_keeps_the_last_good_checkpoint(trainer, tmp_path):
    with pytest.raises(
        Diverged, match=r"step 10: The last good checkpoint is of step 8\. .* of "
    ) as told:
        go(not_sparse_after(trainer, 8), tmp_path)
    assert re.search(
        r"\d+ weights of hidden/kernel are not 0 though they are pruned", str(told.value)
    )
    assert "\n" not in str(told.value)
    with checkpoints.open_manager(tmp_path / "checkpoints") as manager:
        assert manager.latest_step() == 8
        state, _ = checkpoints.restore(manager, 8, trainer.abstract_state)
    assert gj.check_sparse(state.params, state.opt_state) == 0
    with pytest.raises(Diverged, match=r"step 2: No checkpoint had been written\."):
        go(not_sparse_after(trainer, 0), tmp_path / "early")


def test_a_sparsity_asked_for_and_not_got_is_told(tmp_path):
    config = own_settings(method="str", epochs=6, weight_decay=0.0, batch_size=16)
    result = train(tmp_path, config, own_data(), OwnNet(8))
    assert re.match(r"Sparsity 0\.\d+ was reached, 0\.5 was asked for\. Let", result.shortfall)
    assert result.shortfall in (tmp_path / "report.html").read_text()

    state = result.state._replace(opt_state=())  # of methods with masks
    trainer = types.SimpleNamespace(settings=own_settings(structure="block:4x4"))
    told = records.shortfall(trainer, state, {"sparsity": 0.75})
    assert told.startswith("Sparsity 0.7500 was reached, 0.5 was asked for. With --structure=block")
    assert records.shortfall(trainer, state, {"sparsity": 0.505}) == ""
    trainer.settings = own_settings(method="dense")
    assert records.shortfall(trainer, state, {"sparsity": 0.0}) == ""


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def without(*names):
    def drop(content):
        for name in names:
            del content[name]

    return drop


def write_again(folder, trainer, change=lambda state: state, notes=lambda notes: notes):
    """Writes the newest checkpoint as an earlier version would have."""
    with checkpoints.open_manager(folder / "checkpoints") as manager:
        step = manager.latest_step()
        state, held = checkpoints.restore(manager, step, trainer.abstract_state)
        manager.delete(step)
        checkpoints.save(manager, step, change(state), notes(held), None)
    return step


def with_typed_key(state):
    method = state.opt_state.method
    if not jax.dtypes.issubdtype(method.key.dtype, jax.dtypes.prng_key):
        method = method._replace(key=jax.random.wrap_key_data(method.key))
    return state._replace(opt_state=state.opt_state._replace(method=method))


def without_keep(state):
    opt_state = state.opt_state._asdict()
    del opt_state["keep"]
    return state._replace(opt_state=opt_state)


def test_a_run_of_before_goes_on_with_the_same_bits(trainer, straight, stopped):
    edit(stopped / "settings.json", without(*ADDED))
    edit(stopped / "about.json", without("sessions", "task"))
    edit(stopped / "about.json", lambda about: about["data"].pop("mean"))
    lines = [json.loads(x) for x in (stopped / "metrics.jsonl").read_text().splitlines()]
    for name in ("inference_flops", "exploration", "density/head/kernel"):
        del lines[0][name]
    (stopped / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert write_again(stopped, trainer, with_typed_key) == 10
    resumed = go(trainer, stopped)
    for tree in ("params", "opt_state"):
        assert digest(getattr(resumed.state, tree)) == digest(getattr(straight.state, tree))
    assert resumed.history[1:] == [
        record | {"images_per_second": mine["images_per_second"]}
        for record, mine in zip(straight.history[1:], resumed.history[1:], strict=True)
    ]
    # From now on the folder says all.
    config = files.read_json(stopped, "settings.json")
    assert config == json.loads(json.dumps(dataclasses.asdict(trainer.settings)))
    assert len(files.read_json(stopped, "about.json")["sessions"]) == 1
    assert "<svg" in (stopped / "report.html").read_text()


def test_other_settings_than_the_defaults_are_refused(trainer, stopped):
    changed = dataclasses.replace(trainer.settings, label_smoothing=0.1)
    edit(stopped / "settings.json", without("label_smoothing"))
    with pytest.raises(ValueError, match=r"other settings \(label_smoothing 0.0 -> 0.1\)"):
        go(trainer._replace(settings=changed), stopped)
    edit(stopped / "settings.json", without("epochs"))  # of data of one's own without a default
    with pytest.raises(ValueError, match=r"other settings \(epochs unknown -> 3\)"):
        go(trainer, stopped)
    edit(stopped / "settings.json", lambda x: x.update(epochs=3, magic=[7]))
    with pytest.raises(ValueError, match=r"settings that there are no more \(magic \[7\]\)"):
        go(trainer, stopped)
    (stopped / "settings.json").write_text('{"epochs": ')
    with pytest.raises(ValueError, match=r"settings.json is damaged: .* choose another --out_dir"):
        go(trainer, stopped)


def test_checkpoints_of_another_form_are_refused_by_path(trainer, stopped):
    step = write_again(stopped, trainer, notes=lambda notes: {"stream": None})
    wanted = rf"checkpoints/{step} notes .* as epoch, where steps, loss, grown, seconds is expected"
    with pytest.raises(ValueError, match=wanted):
        go(trainer, stopped)
    write_again(stopped, trainer, notes=lambda notes: {"epoch": {"steps": 2}})
    with pytest.raises(ValueError, match=r"notes {'steps': 2} as epoch"):
        go(trainer, stopped)
    write_again(stopped, trainer, without_keep)
    with pytest.raises(
        ValueError, match=r"checkpoints/10: .* opt_state/keep/.*--out_dir\.$"
    ) as told:
        go(trainer, stopped)
    assert "\n" not in str(told.value)


def test_between_epochs_nothing_is_noted_that_is_needed(trainer, straight, stopped):
    with checkpoints.open_manager(stopped / "checkpoints") as manager:
        manager.delete(10)
    assert write_again(stopped, trainer, notes=lambda notes: {}) == 8
    resumed = go(trainer, stopped)
    assert digest(resumed.state.params) == digest(straight.state.params)


def test_settings_of_before_are_read():
    written = dataclasses.asdict(images.Settings(dataset="digits", **digits()))
    for name in digits():
        assert settings.from_json(
            images.Settings, {k: v for k, v in written.items() if k != name}
        ) == settings.from_json(images.Settings, written)
    for change, message in (
        ({"magic": 3}, "magic is no setting"),
        ({"dataset": "own", "model": "own"}, "batch_size is missing, epochs is missing, update"),
    ):
        with pytest.raises(ValueError, match=message):
            settings.from_json(
                images.Settings, {k: v for k, v in written.items() if k not in digits()} | change
            )


def digits():
    return {"model": "lenet_300_100", "epochs": 60, "batch_size": 32, "update_every": 40}


def opened(folder, told, defaults):
    for name in told:
        (folder / "settings.json").unlink(missing_ok=True)
        with files.opened(folder, {k: v for k, v in told.items() if k != name}, True):
            pass
        expected = contextlib.nullcontext()
        if name not in defaults or json.dumps(defaults[name]) != json.dumps(told[name]):
            expected = pytest.raises(ValueError, match=f"other settings .{name} ")
        with expected, files.opened(folder, told, True, defaults):
            yield name


def test_all_programs_know_their_defaults(trainer, tmp_path):
    lm = dataclasses.asdict(text.Settings(bytes=1000))
    assert set(opened(tmp_path, lm, settings.defaults(text.Settings, lm))) == set(lm) - {"bytes"}

    config = own_settings(**plasticity._UNUSED, epochs=8)
    defaults = plasticity.defaults(config, config.epochs)
    told = dataclasses.asdict(config) | {k: defaults[k] for k in plasticity_study.Plan._fields}
    given = {"dataset", "model", "epochs", "batch_size"}
    assert set(opened(tmp_path, told | {"recalibrate": 2}, defaults)) == (
        set(told) - given - {"recalibrate"}
    )

    study = lottery_study.make_study(
        trainer, tmp_path, fraction=0.2, oneshot=True, rewind_at=0.05, retrain=1.0, rules=[]
    )
    flags = {"prune_fraction": 0.2, "oneshot": False, "rewind_at": 0.05, "retrain": 1.0}
    given_flags = {k: types.SimpleNamespace(default=v) for k, v in flags.items()}
    told = lottery.written(study)
    found = set(opened(tmp_path, told, lottery.defaults(study, given_flags)))
    assert set(told) - found == {*given, "oneshot"}


def test_the_best_checkpoint_of_before_is_kept(tmp_path):
    told = Told("t", (Metric("error", higher_is_better=False),), ("test",), "loss", "images", False)
    with checkpoints.open_manager(tmp_path) as manager:
        checkpoints.save(manager, 1, {"w": jnp.zeros(2)}, {}, None)
        before = ocp.args.Composite(
            state=ocp.args.StandardSave({"w": jnp.ones(2)}), notes=ocp.args.JsonSave({})
        )
        manager.save(2, args=before, metrics={"live": 4, "accuracy": -0.2})
        for step, error in ((3, 0.3), (4, 0.25), (5, 0.3)):
            record = {"live": 4, "test_error": error}
            checkpoints.save(manager, step, {"w": jnp.ones(2)}, {}, record, told)
        manager.wait_until_finished()
        assert sorted(manager.all_steps()) == [2, 4, 5]


def test_masks_are_read_back_or_refused(trainer, straight, tmp_path):
    files.write_masks(tmp_path, straight.masks)
    like = jax.eval_shape(lambda: straight.masks)
    chex.assert_trees_all_equal(files.read_masks(tmp_path, like), straight.masks)
    assert files.agreement(straight.masks, straight.masks, trainer.setup.rules)[0] == 1.0
    for other in ({"head": like["head"], "body": like["hidden"]}, {"head": {"kernel": like}}):
        with pytest.raises(ValueError, match=r"masks.npz holds the masks of another network\.$"):
            files.read_masks(tmp_path, other)
    with pytest.raises(ValueError, match=r"there is no .*none/masks.npz; name a run that has come"):
        files.read_masks(tmp_path / "none", like)


def test_results_of_before_are_refused_in_a_line(tmp_path):
    (tmp_path / "results.jsonl").write_text('{"sparsity": 0.5}\n')
    with pytest.raises(ValueError, match=r"results.jsonl holds a result .*'seed'.* --out_dir"):
        plasticity_study.read_results(tmp_path)


@pytest.mark.filterwarnings("error")
def test_a_report_of_records_that_lack_numbers(straight, tmp_path):
    folders = [tmp_path / name for name in ("some", "none")]
    first, *rest = straight.history
    dropped = {k: v for k, v in first.items() if k not in ("live", "loss", "churn")}
    bare = [{k: r[k] for k in ("epoch", "step", "test_accuracy")} for r in straight.history]
    for folder, lines in zip(folders, ([dropped, *rest], bare), strict=True):
        folder.mkdir()
        (folder / "settings.json").write_text('{"dataset": "d", "model": "m", "sparsity": 0.5}')
        (folder / "about.json").write_text('{"layers": [{"path": "a", "prunable": true}]}')
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    page.write(tmp_path / "report.html", {"one": folders, "other": [folders[1]]})
    written = (tmp_path / "report.html").read_text()
    assert "<td>-</td>" in written
    assert re.search(r"<td>a</td>\s+<td></td><td></td><td></td>", written)
