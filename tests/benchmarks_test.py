import json
import math
import pathlib
import re
import subprocess
import sys
import time

import pytest

from experiments.benchmarks import __main__ as benchmarks
from experiments.benchmarks import accelerator, inference, kernels, timing
from experiments.benchmarks.tables import Table
from experiments.data import images
from experiments.tasks.images import Settings
from tests.images import train


def tables(text):
    """Title -> rows, from Markdown."""
    found = {}
    for part in text.split("\n## ")[1:]:
        lines = [line for line in part.splitlines() if line.startswith("| ")]
        head, _, *rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
        names = [cell.strip() for cell in head]
        found[part.splitlines()[0]] = [
            dict(zip(names, (cell.strip() for cell in row), strict=True)) for row in rows
        ]
    return found


def test_quick_benchmarks_write_one_file(tmp_path):
    out = tmp_path / "benchmarks.md"
    benchmarks.run(["selection", "step"], quick=True, out=out)
    text = out.read_text()
    assert "say nothing" in text
    assert "](selection.png)" in text
    assert (tmp_path / "selection.png").read_bytes().startswith(b"\x89PNG")
    found = tables(text)
    assert list(found) == [
        "Exact top-k mask, 10,000 weights",
        "Exact top-k masks by size",
        "Optimizer steps without mask update, donated",
    ]
    sorting, scaling, steps = found.values()
    assert [row["same mask"] for row in sorting] == ["", "True", "True", "", "True"]
    assert [row["weights"] for row in scaling] == ["100", "1,000", "10,000", "100,000"]
    assert [row["optimizer"] for row in steps] == ["SGD, momentum", "AdamW"]
    for row in (*sorting, *scaling, *steps):
        for column, cell in list(row.items())[1:]:
            if column == "same mask" or (cell == "" and column == "argsort (ms)"):
                continue
            for number in cell.split(" to "):
                assert math.isfinite(float(number.replace(",", ""))), (column, cell)
                assert float(number.replace(",", "")) >= 0, (column, cell)
    assert all(float(row["more at the peak"]) >= 1 for row in steps)  # a mask has a byte a weight


@pytest.mark.full
def test_an_hour_on_an_accelerator_goes_on_where_it_was_killed(tmp_path):
    """The small version of the whole; the first run is killed when some pieces are there."""
    out, store = tmp_path / "hour.md", tmp_path / "hour.json"
    command = [sys.executable, "-m", "experiments.benchmarks", "--only=accelerator", "--quick"]
    command.append(f"--out={out}")
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and (not store.exists() or "update" not in store.read_text()):
            time.sleep(0.2)
        process.kill()
    assert not out.exists()
    before = json.loads(store.read_text())["pieces"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    done = json.loads(store.read_text())["pieces"]
    names = list(accelerator.pieces(True, tmp_path, None, 0))
    assert list(done) == names
    printed = re.findall("^piece (.*)$", output, re.MULTILINE)
    assert printed == [name for name in names if name not in before]
    assert {name: done[name] for name in before} == before
    found = tables(out.read_text())
    assert [row["piece"] for row in found["What the pieces took"]] == names
    assert len(found["Trainings, digits, lenet_300_100"]) == 4
    assert {row["blocks"] for row in found["Block-sparse product"]} == {"4 x 4"}
    selections = found["The largest tenth of all weights"]
    assert {row["weights in the mask"] for row in selections} == {"", "163"}
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "piece" not in output  # nothing is left to do
    with pytest.raises(ValueError, match="holds figures of epochs 0"):
        benchmarks.run(["accelerator"], quick=True, out=out, epochs=3)


def test_a_piece_that_fails_is_told_and_left_for_the_next_time(tmp_path, monkeypatch, capsys):
    def fails():
        raise RuntimeError("out of memory")

    pieces = {"a": fails, "b": lambda: [Table("B", [{"x": "1"}], "of b")]}
    monkeypatch.setattr(accelerator, "pieces", lambda *_: pieces)
    benchmarks.run(["accelerator"], quick=True, out=tmp_path / "hour.md")
    assert "not measured: RuntimeError: out of memory" in capsys.readouterr().out
    assert list(json.loads((tmp_path / "hour.json").read_text())["pieces"]) == ["b"]
    assert list(tables((tmp_path / "hour.md").read_text())) == ["B", "What the pieces took"]


@pytest.mark.full
def test_exported_models_give_the_outputs_of_dense_ones():
    perceptrons, even, training = inference.tables_of(quick=True)
    (blocks,) = kernels.tables(quick=True)
    assert all(float(row["largest error"]) < 0.02 for row in blocks.rows)  # of bfloat16
    assert len(perceptrons.rows) == 2 * 2 * 2
    assert all(float(row["largest error"]) < 1e-5 for row in perceptrons.rows)
    assert len(even.rows) == 2 * 2
    assert all(float(row["error of dx"]) < 1e-5 for row in training.rows)


@pytest.mark.full
@pytest.mark.parametrize("compact", [False, True])
def test_a_trained_run_is_exported_with_the_same_guesses(compact, tmp_path):
    config = Settings(
        dataset="digits",
        model="lenet_300_100",
        method="gmp",
        sparsity=0.9,
        epochs=1,
        batch_size=128,
        update_every=2,
        compact=compact,
    )
    result = train(tmp_path, config, images.load("digits"))
    (row,) = inference.trained(tmp_path, None, [100]).rows
    right = round(result.history[-1]["test_accuracy"] / 100 * 360)
    assert row["images"] == "360"
    assert row["right, dense"] == row["right, exported"] == str(right)
    assert row["labelled otherwise"] == "0"
    with pytest.raises(ValueError, match=r"holds no run: there is no settings\.json"):
        inference.trained(tmp_path / "checkpoints", None, [1])


def test_break_even_is_where_a_ratio_passes_one_for_good():
    assert inference.break_even([(0.8, 0.5), (0.9, 1.5)]) == "0.85"
    assert inference.break_even([(0.8, 2.0), (0.9, 0.5), (0.95, 1.5)]) == "0.93"
    assert inference.break_even([(0.8, 1.2), (0.9, 1.5)]) == "0.80 or less"
    assert inference.break_even([(0.8, 0.2), (0.9, 0.5)]) == "none of these"


def test_calls_take_turns():
    calls = []
    measured = timing.in_turns(
        {name: lambda name=name: calls.append(name) or name for name in ("a", "b")}, rounds=3
    )
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert [len(measured[name].seconds) for name in ("a", "b")] == [3, 3]
    assert measured["b"].result == "b"


def test_ratios_and_quartiles_are_of_rounds():
    ratios = timing.ratios(
        timing.Measured(None, [2.0, 9.0, 8.0]), timing.Measured(None, [1.0, 3.0, 2.0])
    )
    assert ratios == [2, 3, 4]
    assert timing.quartiles(ratios) == "2.50 to 3.50"
    assert timing.quartiles([5.0]) == "5.00 to 5.00"
    assert timing.ms(0.0123) == "12.3"


@pytest.mark.parametrize(
    ("names", "out", "message"),
    [
        (["step", "sort"], "new.md", "--only=step,sort: name some of bandwidth, selection, update"),
        (["accelerator", "step"], "new.md", "accelerator writes a file of its own"),
        (["step"], "no/such/new.md", "there is no folder no/such; make it first"),
    ],
)
def test_wrong_flags_are_refused_at_once(names, out, message, capsys):
    with pytest.raises(ValueError, match=message):
        benchmarks.run(names, quick=True, out=pathlib.Path(out))
    assert capsys.readouterr().out == ""


def test_wrong_flags_end_in_one_line():
    command = [sys.executable, "-m", "experiments.benchmarks", "--only=sort"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.startswith("error: --only=sort: name some of ")
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
