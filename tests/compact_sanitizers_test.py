"""The native kernels under sanitizers: no access out of bounds, no undefined behaviour."""

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
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=0",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    "NPROC": "3",  # of XLA's threads
    "JAX_NUM_CPU_DEVICES": "1",
    "JAX_ENABLE_COMPILATION_CACHE": "0",
}


def sanitized(folder, *options):
    """The kernels, compiled for the oldest instructions, with checks."""
    library = folder / "native.kernels"
    headers = ["-isystem", jax.ffi.include_dir()]
    sources = sorted(pathlib.Path(native.__file__).parent.glob("*.cc"))
    flags = ["-std=c++17", "-O1", "-g", "-Wno-psabi", "-DONE_TARGET", "-shared", "-fPIC", *options]
    subprocess.run([COMPILER, *flags, *headers, "-o", library, *sources], check=True)
    return library


def runtime(name):
    """The path of a sanitizer's library; None = this compiler has none."""
    command = [COMPILER, f"-print-file-name={name}"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return found if os.path.isabs(found) else None


@pytest.mark.full
@pytest.mark.skipif(not COMPILER or sys.platform != "linux", reason="needs g++ on Linux")
def test_addresses_and_undefined_behaviour(tmp_path):
    preloaded = [runtime("libasan.so"), runtime("libubsan.so"), runtime("libstdc++.so.6")]
    if None in preloaded:
        pytest.skip("g++ has no sanitizers here")
    library = sanitized(tmp_path, "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    done = subprocess.run(
        [sys.executable, "-m", "tests.compact_worker", str(library)],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT | {"LD_PRELOAD": " ".join(preloaded)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    assert "ERROR" not in done.stderr
    assert "runtime error" not in done.stderr
