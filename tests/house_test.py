"""The house itself: imports run one way, files and functions stay small, rooms are told."""

import ast
import pathlib
import re

import pytest

import experiments
import granet_jax as gj

ROOT = pathlib.Path(gj.__file__).parent
ORDER = [
    *("types", "trees", "jaxprs", "scores", "distributions", "schedules"),
    *("sortable", "blocks", "selection", "structures", "groups", "scoring", "masks", "composition"),
    *(
        "methods",
        "moments",
        "transform",
        "young",
        "init",
        "lora",
        "metrics",
        "report",
        "products",
        "flops",
        "sharding",
    ),
    "checkpoint",
    *("kernels", "compact", "export"),
    *("one_shot", "reparam", "scaling", "testing"),
]
# Never import methods.
SERVICES = ("metrics", "products", "flops", "report", "sharding", "checkpoint", "export", "testing")


EXPERIMENTS = pathlib.Path(experiments.__file__).parent
WINGS = ["data", "models", "engine", "tasks", "studies", "benchmarks"]  # then the programs
ENGINE = [
    *("task", "methods", "settings", "weights", "optimizers", "distributed", "memory", "mesh"),
    *("batches", "files", "checkpoints", "training", "records", "page", "output", "run", "plan"),
]
ROOMS = {  # that import each other within a wing, in this order
    "data": ["streams", "images", "text", "sentences", "augment"],
    "engine": ENGINE,
}


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
        if own == "scaling":
            allowed |= {"scipy"}  # imported where a law is fitted; jax needs it as well
        if own == "kernels":
            allowed |= {"flax"}  # by the function for Flax's layers
        assert top in allowed, f"{path.name} imports {name}: the library needs jax and optax alone"
        if top == "granet_jax" and own != "__init__":
            other = room(name)
            earlier = ORDER.index(other) < ORDER.index(own)
            packages = "methods", "reparam", "kernels", "export", "compact", "one_shot"
            same = own == other and own in packages
            assert earlier or same, f"{own} must not import {other}"
            assert not (own in SERVICES and other == "methods"), f"{own} must not import methods"


def test_files_stay_small():
    for root, most in ((ROOT, 500), (EXPERIMENTS, 400)):
        for path in root.rglob("*.py"):
            assert len(path.read_text().splitlines()) <= most, f"{path} is over {most} lines"


@pytest.mark.parametrize(
    "path", sorted(EXPERIMENTS.rglob("*.py")), ids=lambda p: str(p.relative_to(EXPERIMENTS))
)
def test_the_laboratory(path):
    """Programs import studies, tasks and the engine, and never the other way round."""
    text = path.read_text()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= 60, f"{node.name} has {lines} lines"
    wing, *rest = path.relative_to(EXPERIMENTS).with_suffix("").parts
    programs = sorted(p.stem for p in EXPERIMENTS.glob("*.py") if p.stem != "__init__")
    order = [*WINGS, *programs]
    for name in imports(path):
        top, *inner = name.split(".")
        if top != "experiments" or inner[0] not in order or wing == "__init__":
            continue
        if wing in programs:
            assert inner[0] in WINGS or (wing, inner[0]) == ("lm", "compare")
        elif inner[0] == wing:
            rooms = ROOMS.get(wing, [])
            if len(inner) > 1 and {inner[1], rest[0]} <= set(rooms):
                assert rooms.index(inner[1]) < rooms.index(rest[0]), f"{path} imports {name}"
        else:
            assert order.index(inner[0]) < order.index(wing), f"{path} imports {name}"
            assert {inner[0], wing} != {"engine", "data"} != {inner[0], "models"}


def test_contributing_lists_the_rooms_of_the_laboratory():
    told = (ROOT.parent / "CONTRIBUTING.md").read_text()
    rooms = re.findall(r"^- `([\w/.]+)`", told[told.index("## The laboratory") :], re.M)
    here = [p.relative_to(EXPERIMENTS) for p in EXPERIMENTS.rglob("*.py") if p.stem[0] != "_"]
    wanted = [str(p) for p in here if p.parts[0] not in ("models", "benchmarks")]
    assert sorted(rooms) == sorted([*wanted, "models/", "benchmarks/", "recipes/"])
    inner = [name.removeprefix("engine/")[:-3] for name in rooms if name.startswith("engine/")]
    assert inner == ENGINE
