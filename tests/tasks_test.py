"""A task of one's own, as the site has it: report, resume, comparison."""

import json
import pathlib
import re

import jax
import numpy as np
import pytest

from experiments import compare, tasks, train
from experiments.engine import files, page, training
from experiments.engine.task import ACCURACY, Memory, Metric, Task, Told, tell, told_from_json
from tests.experiments_test import run, told_here
from tests.images import jpeg_records

ROOT = pathlib.Path(train.__file__).parents[1]


def block_with(words, page="experiments/tasks.md"):
    page = (ROOT / "docs" / page).read_text()
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", page, re.S) if words in b]
    return block


def regression(folder):
    """Flags of the task of the page."""
    block = block_with("squared_error")
    assert len([line for line in block.splitlines() if line]) < 30
    (folder / "mine.py").write_text(block)
    flags = [f"--task={folder}/mine.py", "--sparsity=0.8", "--learning_rate=0.02"]
    return [*flags, "--update_every=20", "--epochs=4"]


def test_the_page_trains_a_task_of_ones_own(tmp_path):
    flags = regression(tmp_path)
    folder = f"--out_dir={tmp_path}/run"
    output = run("train", *flags, "--method=rigl", folder)
    (error,) = re.findall(r"test squared error (\d\.\d+) after the last epoch", output)
    assert float(error) < 0.45  # the mean of y^2
    history = files.read_history(tmp_path / "run")
    assert [r["epoch"] for r in history] == [1, 2, 3, 4]
    assert history[-1]["live"] == (20 * 256 + 256) // 5
    assert history[-1]["inference_flops"] == pytest.approx(0.2, abs=0.01)
    digest = re.search("sha256: .*", output)[0]
    assert digest in run("train", *flags, "--method=rigl", folder)  # finished: shown again
    assert "test squared error" in (tmp_path / "run" / "report.html").read_text()
    for change, message in [
        ("--epochs=5", "other settings (epochs 4 -> 5)"),
        ("--noresume", "would overwrite"),
    ]:
        output = run("train", *flags, "--method=rigl", folder, change, ok=False)
        assert message in output


@pytest.mark.full
def test_the_page_compares_methods_on_it(tmp_path):
    flags = regression(tmp_path)
    output = run(
        "compare", *flags, "--methods=dense,snip,set", "--seeds=2", f"--out_dir={tmp_path}/compared"
    )
    for method in ("dense", "snip", "set"):
        row = rf"{method} +│ +4 │ .* │ 0\.\d+ ± 0\.\d+ │ +\d\.\d \(\d-\d\) │"
        assert re.search(row, output), output
    assert "rank" in (tmp_path / "compared" / "report.html").read_text()


@pytest.mark.full
def test_the_readme_trains_own_images(tmp_path):
    block = block_with("MyNet").replace("int = 20", "int = 2")
    (tmp_path / "pets.py").write_text(block)
    for split, n in (("train", 32), ("test", 8)):
        for label in ("cat", "dog"):
            folder = tmp_path / split / label
            folder.mkdir(parents=True)
            for i, record in enumerate(jpeg_records(n)):
                (folder / f"{i}.jpg").write_bytes(record["image"])
    given = ["--sparsity=0.8", f"--out_dir={tmp_path}/run", "--augment=reflect"]
    output = run("train", f"--task={tmp_path}/pets.py", f"--data_dir={tmp_path}", *given)
    assert "test accuracy (%)" in output
    assert "cats and dogs, MyNet" in (tmp_path / "run" / "report.html").read_text()


def test_a_task_brings_a_method_of_its_own(tmp_path):
    (tmp_path / "mine.py").write_text(block_with("def mine", "howto/comparison.md"))
    flags = [f"--task={tmp_path}/mine.py", "--epochs=2", "--update_every=20"]
    output = run("train", *flags, "--method=mine", f"--out_dir={tmp_path}/run")
    assert "test accuracy (%)" in output
    assert files.read_history(tmp_path / "run")[-1]["live"] == 1_004  # of 50,200, at 98 %
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["method"] == "mine"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "error: --task={}: give one of images, text, or a file FILE.py."),
        ("x = 1", "error: --task={}: the file has no make(settings, mesh, data_dir)."),
        (
            "import tests.tasks_test\n"
            "def make(*_): return tests.tasks_test.tiny()._replace(held_out={})",
            "error: Task.held_out is empty",
        ),
        (
            "import tests.tasks_test\n"
            "def make(*_): return tests.tasks_test.tiny()._replace(evaluate=lambda *_: {})",
            "error: Task.evaluate has to give a number for each example, of shape (3,) for 3",
        ),
    ],
)
def test_what_is_no_task_is_told_in_one_line(content, message, tmp_path, capsys):
    path = tmp_path / "odd.py"
    if content:
        path.write_text(content)
    assert message.format(path) in told_here("train", [f"--task={path}"], capsys)


def tiny(metric="error", **changes):
    """Four numbers to add up."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 4, 4)).astype(np.float32)

    def errors(params, batch):
        return ((batch * params["kernel"][None]).sum((1, 2)) - 1.0) ** 2

    task = Task(
        init=lambda key: ({"kernel": jax.random.normal(key, (4, 4))}, {}),
        loss=lambda params, variables, batch, key: (errors(params, batch).mean(), variables),
        evaluate=lambda params, variables, batch: {metric: errors(params, batch)},
        train=Memory(x[:32]),
        held_out={"test": Memory(x[32:])},
        metrics=(Metric(metric, higher_is_better=False, grain=0.1),),
        epochs=3,
    )
    return task._replace(**changes)


def test_other_data_in_memory_are_noticed():
    settings = tasks.EpochSettings(task="tiny", batch_size=8, update_every=2, sparsity=0.5)
    facts = [
        training.make_trainer(settings, tiny(train=Memory(x))).facts
        for x in (np.zeros((8, 4, 4)), np.zeros((8, 4, 4)), np.ones((8, 4, 4)))
    ]
    assert facts[0] == facts[1] != facts[2]
    assert facts[0]["test"] == facts[2]["test"]


def test_what_about_json_tells_of_a_task():
    told = tell("mine", tiny())
    assert told_from_json(json.loads(json.dumps({"task": told._asdict()})), {}) == told
    assert told.metrics[0].label("test", ", last epoch") == "test error, last epoch"
    before = told_from_json({"data": {"test_images": 9}}, {"dataset": "d", "model": "m"})
    assert before == Told("d, m", (ACCURACY,), ("test",), "training loss", "images", False)


def test_places_among_methods():
    """Lower is better; equals share a place; three seeds."""
    told = tell("mine", tiny())
    values = {"a": (0.3, 0.2, 0.1), "b": (0.2, 0.2, 0.3), "c": (0.1, 0.3, 0.2)}
    histories = {
        name: [[{"epoch": 1, "live": 8, "test_error": x}] for x in each]
        for name, each in values.items()
    }
    rows = page.summary(histories, told)
    assert [row["rank"] for row in rows] == ["1.7 (1-3)", "2.0 (1-3)", "2.0 (1-3)"]
    assert files.best([{"test_error": 0.2}, {"test_error": 0.1}, {"test_error": 0.3}], told) == {
        "test_error": 0.1
    }
    (alone,) = page.summary({"a": histories["a"]}, told)
    assert "rank" not in alone
    assert alone["test error, last epoch"] == "0.2000 ± 0.1000"


def test_programs_of_text_are_those_of_any_task(tmp_path, capsys):
    assert "--size" in told_here("train", ["--task=text", "--size=2m"], capsys)
    output = told_here("lm", ["--size=1m", "--methods=rigl,magic"], capsys)
    assert "--methods=rigl,magic: name each of these once" in output
    assert compare.METHODS[0] == "dense"
