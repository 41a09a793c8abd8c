"""Strict mode for all tests: 8 virtual devices, no rank promotion, warnings are errors.

Compiling is most of the time here. So programs are compiled quickly rather than well, and kept in
pytest's cache, which workers share with the programs that tests start, and with later tests.
"""

import gc
import os
import platform
import shutil

import chex
import jax
import pytest
from hypothesis import settings

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

settings.register_profile("default", deadline=None, derandomize=True, max_examples=100)
settings.load_profile("default")


def for_all_programs(**flags):
    """Sets flags of JAX, here and in the programs that tests start."""
    for name, value in flags.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(int(value) if isinstance(value, bool) else value)


for_all_programs(
    jax_disable_most_optimizations=True,
    jax_persistent_cache_min_compile_time_secs=0,
    jax_persistent_cache_min_entry_size_bytes=-1,
)
if jax.__version_info__ < (0, 11):  # newer ones do not know the flags
    xla_flags = ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
    if jax.__version_info__ >= (0, 10):  # eight devices may wait long for a busy machine
        xla_flags.append("--xla_cpu_collective_call_terminate_timeout_seconds=300")
    os.environ["XLA_FLAGS"] = " ".join(xla_flags)


def pytest_configure(config):
    # What JAX 0.6 reads from its cache computes other numbers.
    if jax.__version_info__ < (0, 10) or not hasattr(config, "cache"):
        return
    folder = config.cache.mkdir(f"compiled-{platform.node()}")  # machines differ in instructions
    if not hasattr(config, "workerinput") and sum(1 for _ in folder.iterdir()) > 30_000:
        shutil.rmtree(folder)
    for_all_programs(jax_compilation_cache_dir=str(folder))


def pytest_collection_finish():
    gc.freeze()  # the modules are not searched for garbage again and again


@pytest.fixture
def compiled_well():
    """With all optimizations, as users compile."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(autouse=True)
def _fresh_trace_counter():
    chex.clear_trace_counter()
