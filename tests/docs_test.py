"""The site: every public name has an entry, links lead somewhere, cells fit; README's code runs."""

import inspect
import pathlib
import re

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import granet_jax as gj

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)
WIDTH = 88  # what a page shows of a line
ENTRY = re.compile(r"^\.\. (?:auto)?(?:function|class|data):: granet_jax\.(\S+)", re.MULTILINE)


def public_names():
    """Of the package, and of its modules: those that are defined there, or belong to a package."""
    for name, value in vars(gj).items():
        if name.startswith("_"):
            continue
        if not inspect.ismodule(value):
            yield name
            continue
        if name not in exported_modules():
            continue
        is_package = hasattr(value, "__path__")
        for inner, x in vars(value).items():
            home = getattr(x, "__module__", None) or type(x).__module__
            if inner.startswith("_") or inspect.ismodule(x) or not home.startswith("granet_jax"):
                continue
            if is_package or (
                home == value.__name__ and (inspect.isclass(x) or inspect.isfunction(x))
            ):
                yield f"{name}.{inner}"


def exported_modules():
    """What ``__init__`` imports by name, as users write it."""
    source = pathlib.Path(gj.__file__).read_text()
    return set(re.findall(r"^from granet_jax(?:\.methods)? import (\w+) as", source, re.MULTILINE))


def test_every_public_name_is_in_the_reference():
    text = "\n".join(path.read_text() for path in (DOCS / "reference").glob("*.md"))
    listed = ENTRY.findall(text)
    names = set(public_names())
    assert {"granet", "sparsify", "compact.pack", "at_init.snip", "kernels.hopper"} <= names
    assert sorted(names - set(listed)) == []
    assert sorted(set(listed) - names) == []
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *PAGES], ids=lambda path: str(path.relative_to(ROOT))
)
def test_links_lead_somewhere_and_cells_fit_the_page(path):
    text = path.read_text()
    words = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", words):
        assert "://" in link or (path.parent / link).exists(), f"{path}: {link}"
    for cell in re.findall(r"```{code-cell}\n(.*?)```", text, re.DOTALL):
        too_wide = [line for line in cell.splitlines() if len(line) > WIDTH]
        assert not too_wide, f"{path}: {too_wide[0]}"


def test_every_page_is_in_a_table_of_contents():
    listed = {DOCS / "index.md"}
    for path in PAGES:
        for block in re.findall(r"```{toctree}(.*?)```", path.read_text(), re.DOTALL):
            lines = [x.strip() for x in block.splitlines() if x.strip() and x[0] != ":"]
            entries = [re.sub(r".*<(.*)>", r"\1", line) for line in lines]
            listed |= {(path.parent / f"{entry}.md").resolve() for entry in entries}
    assert {path.resolve() for path in PAGES} == {path.resolve() for path in listed}


def test_the_code_of_the_readme_runs():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 180
    ten_lines, with_nnx, one_shot = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    x = jax.random.normal(jax.random.key(0), (8, 20))

    def apply_fn(params, x):
        return x @ params["kernel"] + params["bias"][None]

    params = {"kernel": jax.random.normal(jax.random.key(1), (20, 30)), "bias": jnp.ones(30)}
    grads = jax.grad(lambda p: jnp.sum(apply_fn(p, x) ** 2))(params)
    names = {"params": params, "grads": grads, "apply_fn": apply_fn, "batches": [x]}
    exec(ten_lines, names)
    assert [int((names["params"][k] != 0).sum()) for k in ("kernel", "bias")] == [300, 30]

    model = nnx.Linear(20, 30, use_bias=False, rngs=nnx.Rngs(0))
    model_grads = nnx.grad(lambda model: jnp.sum(model(x) ** 2))(model)
    exec(with_nnx, {**names, "nnx": nnx, "model": model, "grads": model_grads})
    assert int((model.kernel[...] != 0).sum()) == 300

    names["params"] = params
    exec(one_shot, names)
    chex.assert_trees_all_equal(gj.masks_from_zeros(names["pruned"].params), names["pruned"].masks)
    assert int(names["pruned"].masks["kernel"].sum()) == 300
