"""Several processes on one machine: the same masks on all, and checkpoints that one can read."""

import os
import re
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from absl import flags

from experiments.engine import checkpoints, distributed, files, run
from experiments.engine.files import digest
from tests import processes_worker as worker

TIMEOUT = 600  # seconds, after which something hangs


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def finish(processes, outputs):
    """Waits and returns what they printed; should one fail, the others are killed."""
    deadline = time.monotonic() + TIMEOUT
    try:
        while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
            if any(p.poll() for p in processes):
                break
            time.sleep(0.05)
        codes = [p.poll() for p in processes]
    finally:
        for p in processes:
            p.kill()
            p.wait()
    texts = [output.read_text() for output in outputs]
    assert codes == [0] * len(codes), "\n".join(texts)
    return texts


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    port = free_port()
    outputs = [folder / f"output-{i}" for i in range(2)]
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": str(worker.DEVICES)}
    command = [sys.executable, "-m", "tests.processes_worker", str(folder)]
    command += [f"--coordinator=localhost:{port}", "--num_processes=2"]
    processes = []
    for i, output in enumerate(outputs):
        with output.open("w") as file:
            processes.append(
                subprocess.Popen(
                    [*command, f"--process_id={i}"],
                    env=env,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            )
    return folder, finish(processes, outputs)


def told(text, name):
    return re.findall(rf"^{name} (\S+) (\w+)$", text, re.MULTILINE)


def mesh_of(num_devices, *axes):
    """A mesh with one axis of devices, and maybe others."""
    devices = np.array(jax.devices()[:num_devices])
    names = axes or ("data",)
    return jax.sharding.Mesh(devices.reshape(-1, *[1] * (len(names) - 1)), names)


@pytest.mark.parametrize("name", worker.METHODS)
def test_same_masks_on_two_processes_as_on_one(two_processes, name):
    _, (first, second) = two_processes
    assert told(first, name) == told(second, name)
    _, masks = worker.train(name, mesh_of(1))
    digests = [digest(after) for after in masks]
    assert [d for _, d in told(first, name)][:-1] == digests
    assert len(set(digests)) == worker.STEPS  # each event changed them


@pytest.mark.parametrize("num_devices", [1, 4])
@pytest.mark.parametrize("name", worker.METHODS)
def test_one_process_restores_what_two_saved(two_processes, name, num_devices):
    folder, (first, _) = two_processes
    example = worker.abstract_state(worker.optimizer(name), mesh_of(num_devices))
    with checkpoints.open_manager(folder / name) as manager:
        state, _ = checkpoints.restore(manager, worker.STEPS, example)
    assert dict(told(first, name))["state"] == digest(worker.without_keys(state))
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, example)


def test_a_run_is_told_and_written_by_one_process(two_processes, tmp_path):
    folder, (first, second) = two_processes
    first, second = dict(told(first, "run")), dict(told(second, "run"))
    assert first["masks"] == second["masks"]
    assert (first["shown"], second["shown"]) == ("1", "0")
    (record,) = files.read_history(folder / "run")
    assert record["live"] == (8 * 8 * 3 * 8 + 8 * 3) // 2
    assert len(files.read_json(folder / "run", "about.json")["sessions"]) == 1
    assert (folder / "run" / "report.html").exists()
    trainer = worker.trainer_of_experiments(mesh_of(worker.DEVICES * 2, "data", "fsdp", "tensor"))
    alone = run.run(trainer, tmp_path)
    assert digest(alone.masks) == first["masks"]
    assert record["test_accuracy"] == alone.history[0]["test_accuracy"]


def test_batches_are_laid_over_processes_as_the_mesh_says(two_processes):
    for text in two_processes[1]:
        sums = re.findall(r"^sum \S+ (\S+)$", text, re.MULTILINE)
        assert sums == ["28.0"] * 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coordinator": "localhost:1"}, "missing: --num_processes, --process_id"),
        ({"coordinator": "localhost:1", "num_processes": 2, "process_id": 2}, "must be below"),
    ],
)
def test_wrong_flags(given, message):
    values = flags.FlagValues()
    distributed.define_flags(values)
    values.mark_as_parsed()
    for name, value in given.items():
        values[name].value = value
    with pytest.raises(ValueError, match=message):
        distributed.start(values)
