"""Every recipe parses, says what it claims, builds its model and takes a step."""

import dataclasses
import pathlib
import re

import jax
import numpy as np
import pytest
from absl import flags

from experiments.data import images
from experiments.data.streams import Batch
from experiments.engine import settings
from experiments.tasks.images import Settings
from tests.images import make_trainer

ROOT = pathlib.Path(__file__).parents[1]
RECIPES = sorted((ROOT / "experiments" / "recipes").glob("*.flags"))
REST = (
    "cifar100",
    "cifar10-resnet50",
    *(f"cifar10-resnet20-{method}" for method in ("static", "set", "rigl", "gmp")),
    *(f"cifar10-vgg19-{method}" for method in ("granet_st", "rigl_itop", "gmp", "dense")),
    *(f"cifar10-wrn_22_2-{method}" for method in ("static", "gmp_uniform", "dense")),
    *(f"imagenet-resnet50-{method}" for method in ("granet_st", "str", "dense")),
)
CLASSES = {"cifar100": 100, "imagenet2012": 1000}


def read(path, monkeypatch):
    monkeypatch.chdir(ROOT)  # recipes name what they share from here
    values = flags.FlagValues()
    settings.define_flags(Settings, flag_values=values)
    values(["train", f"--flagfile={path}"])
    return settings.from_flags(Settings, values)


def trainer_of(path, monkeypatch, **changes):
    """The recipe on 8 random images, but for the size of its batches and the length of training."""
    config = read(path, monkeypatch)
    shape = (28, 28, 1) if config.dataset == "mnist" else (32, 32, 3)
    pixels = np.random.default_rng(0).integers(0, 256, (8, *shape), np.uint8)
    classes = CLASSES.get(config.dataset, 10)
    batch = Batch(pixels, np.linspace(0, classes - 1, 8).astype(int))
    assert config.epochs > 8
    config = dataclasses.replace(config, batch_size=8, update_every=1, **changes)
    return make_trainer(config, images.from_arrays(batch, batch))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_parses_and_says_what_it_claims(path, monkeypatch):
    head, _, _ = path.read_text().partition("\n--")
    for word in ("# Claim: ", "# Source: ", "# Expected ", "# Hours a run: "):
        assert f"\n{word}" in f"\n{head}", word
    assert f"--flagfile=experiments/recipes/{path.name}" in head
    expected = re.search(r"# Expected.*?# Hours", head, re.S)[0]
    assert re.search(r"read|remembered|measured|no published", expected)
    config = read(path, monkeypatch)
    assert path.stem.split("-")[0] in config.dataset
    assert path.stem.split("-")[1] in config.model
    assert path.stem.split("-")[2] == config.method


@pytest.mark.parametrize(
    "path",
    [  # the rest are the same networks with other classes and methods
        pytest.param(p, marks=pytest.mark.full if p.stem.startswith(REST) else ()) for p in RECIPES
    ],
    ids=lambda path: path.stem,
)
def test_a_step_of_a_recipe_can_be_traced(path, monkeypatch):
    trainer = trainer_of(path, monkeypatch, compact=False)  # whose events are not traced
    state, losses = jax.eval_shape(lambda s: trainer.run(s, None, 1), trainer.abstract_state)
    assert losses.shape == (1,)
    assert jax.tree.map(np.shape, state) == jax.tree.map(np.shape, trainer.abstract_state)


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(p, marks=() if p.stem.endswith("100-granet") else pytest.mark.full)
        for p in RECIPES
    ],
    ids=lambda path: path.stem,
)
def test_recipe_takes_a_step(path, monkeypatch):
    trainer = trainer_of(path, monkeypatch)
    state, losses = trainer.run(trainer.init(0), None, 1)
    assert int(state.step) == 1
    assert np.isfinite(losses).all()


def test_shared_flags_are_all_used():
    used = "".join(path.read_text() for path in RECIPES)
    for path in (ROOT / "experiments" / "recipes" / "shared").iterdir():
        assert f"--flagfile=experiments/recipes/shared/{path.name}" in used
