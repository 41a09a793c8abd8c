"""Docstrings: every public name has one, with an example, and the examples run."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import granet_jax as gj

MODULES = sorted(m.name for m in pkgutil.walk_packages(gj.__path__, "granet_jax."))


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    module = importlib.import_module(name)
    results = doctest.testmod(module)
    assert results.failed == 0


def test_public_names_have_docstrings_and_functions_have_examples():
    for name, value in vars(gj).items():
        if name.startswith("_"):
            continue
        assert inspect.getdoc(value), f"granet_jax.{name} has no docstring"
        if inspect.isfunction(value) and name not in (
            "ones",
            "start_from",
            "get_masks",
            "get_method_state",
        ):
            assert ">>> " in value.__doc__, f"granet_jax.{name} has no example"
