"""The networks are those of the papers: counts of weights and multiply-adds, taken from traces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models import MODELS
from granet_jax import flops, trees


def abstract(name, num_classes, shape, **kwargs):
    model = MODELS[name](num_classes=num_classes, **kwargs)
    image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    return model, image, jax.eval_shape(model.init, jax.random.key(0), image)


@pytest.mark.parametrize(
    ("name", "num_classes", "shape", "weights", "macs"),
    [
        ("lenet_300_100", 10, (28, 28, 1), 266_200, 266_200),
        ("lenet5", 10, (28, 28, 1), 430_500, 2_293_000),
        ("vgg16", 10, (32, 32, 3), 14_715_584, 313_201_664),
        ("vgg19", 10, (32, 32, 3), 20_024_000, 398_136_320),
        ("resnet20", 10, (32, 32, 3), 270_896, 40_813_184),
        ("wrn_22_2", 10, (32, 32, 3), 1_076_912, 157_730_048),
        ("resnet50_cifar", 10, (32, 32, 3), 23_467_712, 1_297_829_888),
        ("resnet50_cifar", 100, (32, 32, 3), 23_652_032, 1_298_014_208),
        ("resnet50", 1000, (224, 224, 3), 25_502_912, 4_089_184_256),
        ("vit_small", 10, (32, 32, 3), 2_665_344, 179_898_240),
    ],
)
def test_prunable_weights_and_multiply_adds(name, num_classes, shape, weights, macs):
    model, image, variables = abstract(name, num_classes, shape)
    params, rest = variables["params"], {k: v for k, v in variables.items() if k != "params"}
    leaves = trees.describe(params, ())
    assert trees.num_prunable(leaves) == weights
    costs = flops.count(lambda p, r, x: model.apply({"params": p, **r}, x), params, rest, image)
    assert sum(leaf.macs for leaf in costs.leaves) + costs.other == macs
    # All products are those of prunable kernels, and all of these have one, but for attention.
    assert [leaf.macs > 0 for leaf in costs.leaves] == [leaf.prunable for leaf in leaves]
    tokens, width, depth = 64, 192, 6
    assert costs.other == (depth * 2 * tokens**2 * width if name == "vit_small" else 0)


def test_resnet50_has_the_published_number_of_parameters():
    _, _, variables = abstract("resnet50", 1000, (224, 224, 3))
    assert sum(x.size for x in jax.tree.leaves(variables["params"])) == 25_557_032


@pytest.mark.parametrize("name", sorted(MODELS))
def test_parameters_and_logits_stay_float32_under_bf16(name):
    shape = (28, 28, 1) if name.startswith("lenet") else (32, 32, 3)
    model, image, variables = abstract(name, 7, shape, dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {np.dtype("float32")}
    logits, state = jax.eval_shape(
        lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]), variables, image
    )
    assert (logits.shape, logits.dtype) == ((1, 7), jnp.float32)
    assert jax.tree.map(jnp.shape, state.get("batch_stats", {})) == jax.tree.map(
        jnp.shape, variables.get("batch_stats", {})
    )


@pytest.mark.parametrize(("name", "message"), [("lenet5", "8x8"), ("vgg19", "8x8")])
def test_images_that_are_too_small(name, message):
    with pytest.raises(ValueError, match=message):
        abstract(name, 10, (8, 8, 3))
