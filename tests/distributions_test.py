"""ERK against published layer densities, exact totals, infeasible targets."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import granet_jax as gj
from granet_jax.distributions import check_sparsity
from granet_jax.types import LayerShape

LENET_300_100 = [(784, 300), (300, 100), (100, 10)]
LENET_5 = [(5, 5, 1, 20), (5, 5, 20, 50), (800, 500), (500, 10)]


def resnet50():
    """The 54 weight shapes of ResNet-50, kernels as (height, width, in, out)."""
    shapes = [(7, 7, 3, 64)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(1, 1, channels, width), (3, 3, width, width), (1, 1, width, 4 * width)]
            if block == 0:
                shapes.append((1, 1, channels, 4 * width))
            channels = 4 * width
    return [*shapes, (2048, 1000)]


@pytest.mark.parametrize(
    ("sparsity", "dense_layers", "densities"),
    [  # of conv1, layer1.0.conv1 and conv2, layer4.0.conv2, fc (computed from the formula, checked
        # against the budgets that the STR authors published)
        (0.5, 32, (1.0, 1.0, 1.0, 0.1327, 0.4524)),
        (0.8, 8, (0.8572, 1.0, 0.3619, 0.0435, 0.1482)),
        (0.9, 1, (0.4200, 1.0, 0.1773, 0.0213, 0.0726)),
        (0.95, 0, (0.2098, 0.7735, 0.0886, 0.0106, 0.0363)),
        (0.98, 0, (0.0839, 0.3094, 0.0354, 0.0043, 0.0145)),
    ],
)
def test_erk_densities_of_resnet50(sparsity, dense_layers, densities):
    shapes = resnet50()
    assert len(shapes) == 54
    assert sum(map(math.prod, shapes)) == 25_502_912
    counts = gj.erk(shapes, sparsity)
    got = [c / math.prod(s) for c, s in zip(counts, shapes, strict=True)]
    # layer4.0.conv2 is the 44th: 1 + (3*3+1) + (4*3+1) + (6*3+1) before layer 4, then the second.
    np.testing.assert_allclose([got[i] for i in (0, 1, 2, 44, 53)], densities, atol=1e-4)
    assert sum(d == 1.0 for d in got) == dense_layers


@pytest.mark.parametrize(
    ("shapes", "sparsity", "densities"),
    [
        (LENET_300_100, 0.8, (0.1622, 0.4694, 1.0)),
        (LENET_300_100, 0.9, (0.0796, 0.2302, 1.0)),
        (LENET_300_100, 0.95, (0.0385, 0.1113, 0.9185)),
        (LENET_300_100, 0.98, (0.0154, 0.0445, 0.3674)),
        (LENET_5, 0.9, (1.0, 0.0871, 0.0884, 1.0)),
        (LENET_5, 0.98, (0.2779, 0.0143, 0.0146, 0.4572)),
    ],
)
def test_erk_densities_of_lenets(shapes, sparsity, densities):
    counts = gj.erk(shapes, sparsity)
    got = [c / math.prod(s) for c, s in zip(counts, shapes, strict=True)]
    np.testing.assert_allclose(got, densities, atol=1.1e-3)


def test_erk_does_not_mind_the_layout():
    hwio, oihw = [(3, 3, 16, 32), (32, 10)], [(32, 16, 3, 3), (10, 32)]
    assert gj.erk(hwio, 0.7) == gj.erk(oihw, 0.7)


shape_lists = st.lists(
    st.lists(st.integers(2, 12), min_size=2, max_size=4).map(tuple), min_size=1, max_size=6
)


@given(shape_lists, st.floats(0.0, 0.8))
def test_totals_are_exact(shapes, sparsity):
    sizes = [math.prod(s) for s in shapes]
    total = round(sum(sizes) * (1 - sparsity))
    assert gj.global_ranking(shapes, sparsity) == total
    for distribution in (gj.uniform, gj.erk):
        if total < len(shapes):
            with pytest.raises(ValueError, match="The maximum"):
                distribution(shapes, sparsity)
            continue
        try:
            counts = distribution(shapes, sparsity)
        except ValueError:  # a small layer would be emptied
            continue
        assert sum(counts) == total
        assert all(0 < c <= n for c, n in zip(counts, sizes, strict=True))


def test_totals_are_exact_for_billions():
    shapes = [(40_000, 50_000)] * 3 + [(7, 3)]
    for sparsity in (0.0, 0.25, 0.9):
        total = round((6 * 10**9 + 21) * (1 - sparsity))
        assert sum(gj.uniform(shapes, sparsity)) == sum(gj.erk(shapes, sparsity)) == total
    with pytest.raises(ValueError, match="does not fit int32 counts"):
        gj.global_ranking(shapes, 0.5)


@given(shape_lists)
def test_zero_sparsity_is_dense(shapes):
    dense = tuple(math.prod(s) for s in shapes)
    assert gj.uniform(shapes, 0.0) == gj.erk(shapes, 0.0) == dense


@given(shape_lists, st.floats(0.0, 0.9))
def test_uniform_is_uniform(shapes, sparsity):
    try:
        counts = gj.uniform(shapes, sparsity)
    except ValueError:
        return
    for count, shape in zip(counts, shapes, strict=True):
        assert abs(count - (1 - sparsity) * math.prod(shape)) < 1.5


@pytest.mark.parametrize("distribution", [gj.uniform, gj.erk])
def test_the_maximum_in_the_message_is_true(distribution):
    with pytest.raises(ValueError, match=r"cannot meet sparsity 0\.999995") as error:
        distribution(LENET_300_100, 0.999995)
    maximum = float(str(error.value).rsplit(" ", 1)[1].rstrip("."))
    assert min(distribution(LENET_300_100, maximum)) >= 1
    with pytest.raises(ValueError, match="The maximum"):
        distribution(LENET_300_100, maximum + 2 / 266_200)


def test_traced_sparsity():
    def total(distribution, sparsity):
        return jnp.sum(jnp.asarray(distribution(LENET_300_100, sparsity)))

    sparsities = jnp.array([0.0, 0.5, 0.98])
    expected = [266_200, 133_100, 5_324]
    for distribution in (gj.uniform, gj.global_ranking):
        got = jax.vmap(lambda s, d=distribution: total(d, s))(sparsities)
        np.testing.assert_array_equal(got, expected)
    with pytest.raises(ValueError, match="erk needs a number"):
        jax.jit(lambda s: total(gj.erk, s))(0.5)


@pytest.mark.parametrize("bad", [-0.1, 1.0, 90, float("nan")])
def test_sparsity_out_of_range(bad):
    with pytest.raises(ValueError, match=r"must be in \[0, 1\)"):
        check_sparsity("sparsity", bad)


LAYERS = [LayerShape((20, 30), f"block{i}/{name}") for i in range(2) for name in ("attn", "mlp")]


@pytest.mark.parametrize(
    ("rules", "sparsity", "expected"),
    [
        ([("block0/attn", 0.5), ("attn", 0.75)], 0.75, (300, 75, 150, 75)),
        ([("attn", 0.9), ("mlp", 0.7)], 0.8, (60, 180, 60, 180)),
        ([("attn", 0.9)], 0.0, (600, 600, 600, 600)),
    ],
)
def test_a_sparsity_by_path(rules, sparsity, expected):
    """The first rule that matches decides; the rest makes up for the total."""
    assert gj.by_path(rules, gj.uniform)(LAYERS, sparsity) == expected


@pytest.mark.parametrize(
    ("rules", "sparsity", "message"),
    [
        (
            [("attn", 0.5), ("head", 0.5)],
            0.8,
            "'head' matches no prunable layer. There are: block0",
        ),
        ([("attn", 0.1)], 0.9, r"leaves -840 of 1200 weights to block0/mlp and the other"),
        ([("", 0.5)], 0.9, r"names every layer, and its sparsities make 0.500000 in all; 0.9 was"),
        ([("attn", 0.5)], 1.0, r"sparsity must be in \[0, 1\)"),
    ],
)
def test_what_by_path_cannot_give_is_told(rules, sparsity, message):
    with pytest.raises(ValueError, match=message):
        gj.by_path(rules)(LAYERS, sparsity)
    with pytest.raises(ValueError, match="The sparsity of 'a' must be in"):
        gj.by_path([("a", 50)])
    with pytest.raises(ValueError, match="Take otherwise="):
        gj.by_path([("attn", 0.5)], gj.global_ranking)(LAYERS, 0.6)


def test_methods_take_a_sparsity_by_path():
    """As a start, and as the scope of gradual pruning; layers of a stack share the path."""
    params = {"attn": jnp.ones((2, 10, 10)), "mlp": jnp.ones((20, 10))}
    spread = gj.by_path([("attn", 0.5)], gj.uniform)
    rules = [("attn", gj.Stacked(1))]
    start = gj.rigl(
        sparsity=0.7,
        update_every=2,
        total_steps=9,
        start=spread,
        prunable=rules,
        key=jax.random.key(0),
    )
    masks = start.init(params).masks
    assert [int(m.sum()) for m in (masks["attn"][0], masks["attn"][1], masks["mlp"])] == [
        50,
        50,
        20,
    ]
    pruning = gj.gmp(final_sparsity=0.7, end_step=2, update_every=1, scope=spread, prunable=rules)
    state, _ = pruning.update(pruning.init(params), gj.Event(params, params, step=jnp.int32(2)))
    assert int(state.masks["attn"][1].sum()) == 50
    assert int(state.masks["mlp"].sum()) == 20
