"""The native kernels compiled in other ways: with sanitizers, and as an older compiler does it."""

import os
import pathlib
import shutil
import subprocess
import sys

import jax
import pytest

from granet_jax.compact import native

ROOT = pathlib.Path(__file__).parents[1]
COMPILER = shutil.which("g++")
SOURCES = sorted(pathlib.Path(native.__file__).parent.glob("*.cc"))
OLD = ["-U__GNUC__", "-D__GNUC__=11"]
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=0",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    "NPROC": "3",  # of XLA's threads
    "JAX_NUM_CPU_DEVICES": "1",
    "JAX_ENABLE_COMPILATION_CACHE": "0",
}


def compiled(folder, *options):
    """The kernels, compiled for the oldest instructions."""
    library = folder / "native.kernels"
    headers = ["-isystem", jax.ffi.include_dir()]
    flags = ["-std=c++17", "-O1", "-g", "-Wno-psabi", "-DONE_TARGET", "-shared", "-fPIC", *options]
    subprocess.run([COMPILER, *flags, *headers, "-o", library, *SOURCES], check=True)
    return library


def runtime(name):
    """The path of a sanitizer's library; None = this compiler has none."""
    command = [COMPILER, f"-print-file-name={name}"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return found if os.path.isabs(found) else None


def worker(library, **environment):
    """What the tests of the kernels run, with these; its last line is a digest."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.compact_worker", str(library)],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return done


@pytest.mark.full
@pytest.mark.skipif(not COMPILER or sys.platform != "linux", reason="needs g++ on Linux")
def test_addresses_and_undefined_behaviour(tmp_path):
    preloaded = [runtime("libasan.so"), runtime("libubsan.so"), runtime("libstdc++.so.6")]
    if None in preloaded:
        pytest.skip("g++ has no sanitizers here")
    library = compiled(tmp_path, "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    done = worker(library, LD_PRELOAD=" ".join(preloaded))
    assert "ERROR" not in done.stderr
    assert "runtime error" not in done.stderr


@pytest.mark.full
@pytest.mark.skipif(not COMPILER or sys.platform != "linux", reason="needs g++ on Linux")
def test_as_gcc_11_does_it(tmp_path):
    """It shuffles vectors by another builtin, and has other names for the instructions of CPUs."""
    digests = []
    for old in ([], OLD):
        folder = tmp_path / str(len(old))
        folder.mkdir()
        digests.append(worker(compiled(folder, *old)).stdout)
    assert digests[0] == digests[1]
    for source in SOURCES:
        flags = [
            "-std=c++17",
            "-Wno-psabi",
            "-fsyntax-only",
            *OLD,
            "-isystem",
            jax.ffi.include_dir(),
        ]
        subprocess.run([COMPILER, *flags, source], check=True)
