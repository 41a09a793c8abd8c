"""Docstrings: every public name has one, with an example, and the examples run."""

import doctest
import importlib
import inspect
import pkgutil
import re

import pytest

import granet_jax as gj

MODULES = sorted(m.name for m in pkgutil.walk_packages(gj.__path__, "granet_jax."))


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    module = importlib.import_module(name)
    results = doctest.testmod(module)
    assert results.failed == 0


def test_public_functions_have_docstrings_with_arguments_and_examples():
    for name, value in vars(gj).items():
        if name.startswith("_"):
            continue
        told = inspect.getdoc(value)
        assert told, f"granet_jax.{name} has no docstring"
        if inspect.isfunction(value):
            assert ">>> " in told, f"granet_jax.{name} has no example"
            for argument in inspect.signature(value).parameters:
                pattern = rf"^  \*{{0,2}}{argument}: "
                assert re.search(pattern, told, re.MULTILINE), f"{name} says nothing of {argument}"
