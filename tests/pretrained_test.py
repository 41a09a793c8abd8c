"""What comes after one-shot pruning: files of others, low-rank updates, norms; its programs."""

import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors

import granet_jax as gj
from experiments import pretrained
from experiments.models import transformer
from experiments.studies import one_shot as studies
from granet_jax import one_shot
from tests import tables

PARAMS = {
    "fc": {"kernel": jax.random.normal(tables.KEY, (4, 3)), "bias": jnp.zeros(3)},
    "half": {"kernel": jax.random.normal(tables.KEY, (4, 4)).astype(jnp.bfloat16)},
}
NAMES = {
    "fc/kernel": ("fc.weight", True),
    "fc/bias": ("fc.bias", False),
    "half/kernel": ("half.weight", False),
}


def test_calibration_of_a_transformer_equals_hooks_by_hand():
    """Layers in a scan, with remat; each statistic against the inputs of each dense layer."""
    size = transformer.Size(width=32, depth=3, heads=2)
    model = transformer.Transformer(size, remat=True)
    tokens = [jax.random.randint(jax.random.key(i), (2, 8), 0, 256) for i in range(2)]
    params = model.init(tables.KEY, tokens[0])["params"]
    rules = [("embedding|norm", False), ("blocks", gj.Stacked(1))]

    def apply_fn(params, tokens):
        return model.apply({"params": params}, tokens)

    found = gj.one_shot.calibrate(apply_fn, params, tokens, gj.one_shot.gram, prunable=rules)
    seen = {}

    def hook(call, args, kwargs, context):
        if isinstance(context.module, nn.Dense):
            x = np.asarray(args[0], np.float64)
            path = f"blocks/{context.module.name}/kernel"
            gram = seen.setdefault(path, np.zeros((3, x.shape[1], x.shape[1])))
            gram[i] += x.T @ x
        return call(*args, **kwargs)

    block = transformer.Block(2, 3, 8, jnp.float32, None)
    for batch in tokens:
        x = params["embedding"][batch.reshape(-1)] * np.sqrt(32)
        for i in range(3):
            one = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
            with nn.intercept_methods(hook):
                x, _ = block.apply({"params": one}, x, None)
    assert found.keys() == seen.keys()
    for path, wanted in seen.items():
        np.testing.assert_allclose(found[path].values, wanted, rtol=1e-4, atol=1e-4)
        assert found[path].rows.tolist() == [32.0] * 3
        assert found[path].inputs == (0,)


def test_a_checkpoint_of_others_goes_in_and_comes_out(tmp_path):
    masks = gj.at_init.magnitude(PARAMS, sparsity=0.5)
    size = gj.export.save_dense(tmp_path / "a", PARAMS, masks, NAMES)
    assert size == (tmp_path / "a").stat().st_size
    saved = gj.export.load_dense(tmp_path / "a", PARAMS, NAMES)
    pruned = gj.apply_masks(PARAMS, masks)
    np.testing.assert_array_equal(saved.params["fc"]["kernel"], pruned["fc"]["kernel"])
    for path, mask in gj.trees.paths(masks).items():
        np.testing.assert_array_equal(gj.trees.paths(saved.masks)[path], mask)
    assert saved.params["half"]["kernel"].dtype == jnp.bfloat16
    gj.export.save_dense(tmp_path / "b", saved.params, names=NAMES)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    plain = {"fc": PARAMS["fc"]}
    gj.export.save_dense(tmp_path / "c", plain)
    found = safetensors.load_file(tmp_path / "c")
    assert found["fc.kernel"].shape == (4, 3)
    gj.export.save_dense(tmp_path / "c", plain, names=NAMES)
    np.testing.assert_array_equal(
        safetensors.load_file(tmp_path / "c")["fc.weight"], PARAMS["fc"]["kernel"].T
    )


def test_masks_of_torch_and_of_jaxpruner(tmp_path):
    weight = np.arange(1, 13, dtype=np.float32).reshape(3, 4)
    mask = (weight % 2).astype(np.float32)
    tensors = {"fc.weight_orig": weight, "fc.weight_mask": mask, "fc.bias": np.zeros(3, np.float32)}
    safetensors.save_file(tensors, tmp_path / "pruned")
    like = {"fc": PARAMS["fc"]}
    saved = gj.export.load_dense(tmp_path / "pruned", like, NAMES)
    np.testing.assert_array_equal(saved.params["fc"]["kernel"], (weight * mask).T)
    np.testing.assert_array_equal(saved.masks["fc"]["kernel"], mask.T.astype(bool))
    assert saved.masks["fc"]["bias"].all()
    state = {"fc": {"kernel": jnp.asarray(mask.T, jnp.uint8), "bias": None}}
    total = gj.export.masks_from(state, like)
    np.testing.assert_array_equal(total["fc"]["kernel"], mask.T.astype(bool))
    assert total["fc"]["bias"].all()
    gj.static(masks=total).init(like)


def test_files_that_do_not_fit_are_told(tmp_path):
    file = tmp_path / "a"
    with pytest.raises(FileNotFoundError):
        gj.export.load_dense(file, PARAMS)
    file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is no safetensors file"):
        gj.export.load_dense(file, PARAMS)
    gj.export.save_dense(file, PARAMS)
    with pytest.raises(ValueError, match=r"holds no 'fc\.weight'"):
        gj.export.load_dense(file, PARAMS, NAMES)
    with pytest.raises(ValueError, match=r"'fc\.kernel' in shape \(4, 3\).*has \(3, 4\)"):
        gj.export.load_dense(file, {"fc": {"kernel": jnp.ones((3, 4))}})
    with pytest.raises(ValueError, match="lacks fc/bias"):
        gj.export.save_dense(file, PARAMS, names={"fc/kernel": ("x", False)})
    with pytest.raises(ValueError, match=r"k \(3, 5, 2, 4\) cannot be transposed"):
        gj.export.save_dense(file, {"k": jnp.ones((3, 5, 2, 4))}, names={"k": ("w", True)})
    with pytest.raises(ValueError, match="Two leaves are called 'x'"):
        gj.export.save_dense(file, PARAMS, names=dict.fromkeys(NAMES, ("x", False)))
    with pytest.raises(ValueError, match="other numbers than 0 and 1"):
        gj.export.masks_from({"fc": {"bias": jnp.full(3, 2.0)}}, PARAMS)
    with pytest.raises(ValueError, match=r"fc/bias has shape \(2,\), its parameter \(3,\)"):
        gj.export.masks_from({"fc": {"bias": jnp.ones(2)}}, PARAMS)


def test_low_rank_updates_wake_no_pruned_weight():
    params = {"kernel": jax.random.normal(tables.KEY, (2, 8, 6)), "bias": jnp.ones(6)}
    rules = [("kernel", gj.Stacked(1))]
    masks = gj.at_init.magnitude(params, sparsity=0.5, prunable=rules)
    params = gj.apply_masks(params, masks)
    a, b = gj.lora.init(tables.KEY, params, 2, rules)
    same = gj.lora.merge(params, a, b, masks)
    np.testing.assert_array_equal(same["kernel"], params["kernel"])
    x = jax.random.normal(jax.random.key(1), (5, 8))

    def loss(factors):
        merged = gj.lora.merge(params, *factors, masks, 0.5)
        return jnp.sum(jnp.square(x @ merged["kernel"][1] + merged["bias"][None]))

    grads = jax.grad(loss)((a, b))
    a, b = jax.tree.map(lambda p, g: p - 0.01 * g, (a, b), grads)
    assert loss((a, b)) < loss(gj.lora.init(tables.KEY, params, 2, rules))
    merged = gj.lora.merge(params, a, b, masks, 0.5)["kernel"]
    update = 0.5 * jnp.matmul(a["kernel"], b["kernel"])
    wanted = np.where(masks["kernel"], params["kernel"] + update, 0)
    np.testing.assert_allclose(merged, wanted, rtol=1e-5)
    with pytest.raises(ValueError, match="make no"):
        gj.lora.merge(params, {"kernel": a["kernel"][0]}, b, masks)
    with pytest.raises(ValueError, match="of no parameter: other"):
        gj.lora.merge(params, {"other": a["kernel"]}, {"other": b["kernel"]}, masks)
    with pytest.raises(ValueError, match="a rank of at least 1"):
        gj.lora.init(tables.KEY, params, 0, rules)
    with pytest.raises(ValueError, match="is no matrix"):
        gj.lora.init(tables.KEY, params, 2)


def test_norms_are_made_anew():
    batches = [jnp.array([1.0, 3.0]), jnp.array([5.0, 7.0])]

    def update(statistics, x):
        return {"mean": 0.9 * statistics["mean"] + 0.1 * x.mean()}

    moved = gj.one_shot.recalibrate(update, {"mean": jnp.ones(())}, batches)
    np.testing.assert_allclose(moved["mean"], 0.9 * (0.9 + 0.2) + 0.6, rtol=1e-6)
    with pytest.raises(ValueError, match="has to return statistics as it got"):
        gj.one_shot.recalibrate(lambda mean, x: x, jnp.ones(()), batches)
    with pytest.raises(ValueError, match="There are no batches"):
        gj.one_shot.recalibrate(update, {"mean": jnp.ones(())}, iter([]))


def test_nearest_neighbours_and_batches_of_like_length():
    dense = np.array([[1, 0], [0.96, 0.28], [0, 1], [0.28, 0.96]])
    assert pretrained.fidelity(dense, dense) == (1.0, 1.0)
    cosine, same = pretrained.fidelity(dense, dense[[0, 2, 1, 3]])
    np.testing.assert_allclose(cosine, (1 + 0.28 + 0.28 + 1) / 4)
    assert same < 1.0
    mask = np.arange(16) < np.array([[3], [9], [8], [16]])
    batches = pretrained.in_batches(np.cumsum(mask, 1).astype(np.int32), mask, 2)
    assert [ids.shape for ids, _ in batches] == [(2, 8), (2, 16)]
    assert [m.sum(1).tolist() for _, m in batches] == [[3, 8], [9, 16]]


@pytest.mark.full
def test_a_run_is_pruned_as_a_person_does_it(tmp_path):
    def run(*call):
        return subprocess.run(
            [sys.executable, "-m", *call], capture_output=True, text=True, check=False
        )

    first = ["--method=dense", "--sparsity=0", "--epochs=3", f"--out_dir={tmp_path}/run"]
    done = run("experiments.train", *first)
    assert done.returncode == 0, done.stderr
    flags = [f"--run_dir={tmp_path}/run", "--sparsities=0.8,1:4", "--steps=5", "--batches=4"]
    done = run("experiments.one_shot", *flags, "--methods=magnitude,wanda,sparsegpt")
    assert done.returncode == 0, done.stderr
    rows = [
        [cell.strip() for cell in line.strip("│").split("│")]
        for line in (tmp_path / "run/one_shot/table.txt").read_text().splitlines()
        if line.startswith("│")
    ]
    names = ("magnitude", "wanda", "sparsegpt")
    assert [row[:2] for row in rows] == [["0", "dense"]] + [
        [s, n] for s in ("0.8", "1:4") for n in names
    ]
    np.testing.assert_allclose([float(row[2]) for row in rows[1:4]], 0.8, atol=2e-3)
    np.testing.assert_allclose([float(row[2]) for row in rows[4:]], 0.75)
    accuracy = {(row[0], row[1]): float(row[3]) for row in rows}
    assert accuracy["0.8", "sparsegpt"] > accuracy["0.8", "magnitude"]
    for wrong, message in (
        ("--methods=obs", "--methods: some of"),
        ("--sparsities=2:", "fractions such as 0.5"),
        ("--sparsities=0.5,1.5", "fractions such as 0.5, or 2:4; got 1.5"),
        ("--sparsities=0.5,2:7", "n_of_m(7) needs an axis that 7 divides"),
        ("--batches=46", "--batches=46: the training data have"),
        (f"--run_dir={tmp_path}", "holds no run"),
    ):
        refused = run("experiments.one_shot", *flags, wrong)
        assert refused.returncode == 1
        assert message in refused.stderr
        assert "Traceback" not in refused.stderr
    about = tmp_path / "run/about.json"
    about.write_text(about.read_text().replace('"test_images": 360', '"test_images": 361'))
    refused = run("experiments.one_shot", *flags)
    assert "holds a run on other data (test_images 361 -> 360" in refused.stderr


def test_what_is_not_trained_follows_training_under_masks():
    """The statistics of batch norm are those of the network as trained."""

    def loss(params, variables, batch, key):
        return jnp.sum(params["kernel"] * batch), {"seen": variables["seen"] + batch}

    params = {"kernel": jnp.ones((2, 2))}
    masks = {"kernel": jnp.array([[True, False]] * 2)}
    train = studies.train_under_masks(loss, 3, 0.1)
    pruned = one_shot.Pruned(gj.apply_masks(params, masks), masks)
    trained, variables = train(pruned, {"seen": jnp.float32(0)}, jnp.arange(1.0, 4.0))
    assert variables["seen"] == 6
    assert (trained["kernel"] != 0).tolist() == masks["kernel"].tolist()
