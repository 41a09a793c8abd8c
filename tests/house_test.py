"""The house itself: imports run one way, examples run, the public names are documented."""

import ast
import doctest
import importlib
import inspect
import pathlib
import pkgutil

import pytest

import granet_jax as gj

ROOT = pathlib.Path(gj.__file__).parent
MODULES = sorted(m.name for m in pkgutil.walk_packages([str(ROOT)], "granet_jax."))
ORDER = [
    *("types", "trees", "jaxprs", "scores", "distributions", "schedules"),
    *("sortable", "blocks", "selection", "structures", "masks", "composition"),
    *("methods", "moments", "transform", "metrics", "report", "products", "flops", "sharding"),
    "checkpoint",
    *("kernels", "compact", "export"),
    *("reparam", "testing"),
]
# Never import methods.
SERVICES = ("metrics", "products", "flops", "report", "sharding", "checkpoint", "export", "testing")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(name):
    return name.split(".")[1]


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for name in imports(path):
        top = name.split(".")[0]
        allowed = {"jax", "numpy", "optax", "granet_jax"} | set(
            __import__("sys").stdlib_module_names
        )
        if own == "export":
            allowed |= {"safetensors"}  # imported where a file is written or read
        if own == "kernels":
            allowed |= {"flax"}  # by the function for Flax's layers
        assert top in allowed, f"{path.name} imports {name}: the library needs jax and optax alone"
        if top == "granet_jax" and own != "__init__":
            other = room(name)
            earlier = ORDER.index(other) < ORDER.index(own)
            same = own == other in ("methods", "reparam", "export", "compact")
            assert earlier or same, f"{own} must not import {other}"
            assert not (own in SERVICES and other == "methods"), f"{own} must not import methods"


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


def test_files_stay_small():
    for path in ROOT.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 500, f"{path} is over 500 lines"
