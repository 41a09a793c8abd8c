"""Strict mode for all tests: 8 virtual devices, no rank promotion, warnings are errors."""

import chex
import jax
import pytest
from hypothesis import settings

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

settings.register_profile("default", deadline=None, derandomize=True, max_examples=100)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _fresh_trace_counter():
    chex.clear_trace_counter()
