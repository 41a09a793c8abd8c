"""One-shot pruning: against plain numpy, layer by layer, and what cannot be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import granet_jax as gj
from granet_jax import one_shot
from tests import one_shot_reference as reference
from tests import tables

GROUPS = [("", gj.structures.n_of_m(4))]


def layer(n=512, inputs=64, outputs=48, seed=0):
    """Weights ``(outputs, inputs)`` and inputs that go together, of unequal size; float64."""
    draw = np.random.default_rng(seed)
    mix = np.eye(inputs) + 0.5 * draw.standard_normal((inputs, inputs)) / np.sqrt(inputs)
    x = draw.standard_normal((n, inputs)) @ mix + draw.standard_normal((n, 1))
    x *= np.exp(0.5 * draw.standard_normal(inputs))
    return draw.standard_normal((outputs, inputs)), x


def product(params, x):
    return x @ params["kernel"]


def pruned(method, w, x, sparsity=0.5, **options):
    """Weights and mask, ``(outputs, inputs)``."""
    params, batches = {"kernel": jnp.asarray(w.T, jnp.float32)}, [jnp.asarray(x, jnp.float32)]
    found = one_shot.prune(method, product, params, batches, sparsity=sparsity, **options)
    kernel, mask = (np.asarray(tree["kernel"]).T for tree in found)
    assert not kernel[~mask].any()
    return kernel, mask


def test_masks_of_scores_are_those_of_numpy():
    w, x = layer()
    for found, wanted in (
        (pruned(one_shot.wanda(), w, x), reference.wanda(w, x, 32)),
        (pruned(one_shot.wanda(), w, x, 0.75), reference.wanda(w, x, 16)),
        (pruned(one_shot.wanda(), w, x, prunable=GROUPS), reference.wanda_n_of_m(w, x, 2, 4)),
        (pruned(one_shot.ria(), w, x), reference.ria(w, x, 32 * 48)),
        (pruned(one_shot.magnitude(), w, x, 0.9), reference.magnitude(w, 307)),
    ):
        np.testing.assert_array_equal(found[1], wanted)
        np.testing.assert_array_equal(found[0], np.where(wanted, np.float32(w), 0))


@pytest.mark.parametrize(("block", "keep"), [(128, 0.5), (24, 0.25), (16, (2, 4))])
def test_repaired_weights_are_those_of_numpy(block, keep):
    w, x = layer()
    x[:, [5, 33]] = 0.0  # inputs that are never seen
    mask, wanted, _ = reference.sparsegpt(w, x, keep, block=block)
    sparsity = 0.5 if isinstance(keep, tuple) else 1 - keep
    rules = GROUPS if isinstance(keep, tuple) else ()
    found, found_mask = pruned(one_shot.sparsegpt(block=block), w, x, sparsity, prunable=rules)
    np.testing.assert_array_equal(found_mask, mask)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert not found[:, [5, 33]].any()


def test_alternating_directions_find_those_of_numpy():
    w, x = layer()
    mask, wanted = reference.alps(w, x, 32 * 48)
    found, found_mask = pruned(one_shot.alps(), w, x)
    assert found_mask.sum() == 32 * 48
    assert (found_mask != mask).mean() < 0.01
    errors = [reference.output_error(w, each, x) for each in (found, wanted)]
    np.testing.assert_allclose(*errors, rtol=0.02)


@pytest.mark.parametrize("rules", [(), GROUPS], ids=["unstructured", "2:4"])
def test_the_more_a_method_knows_the_smaller_the_error(rules):
    for seed in range(3):
        w, x = layer(seed=seed)
        methods = (one_shot.alps(), one_shot.sparsegpt(), one_shot.wanda(), one_shot.magnitude())
        errors = [
            reference.output_error(w, pruned(each, w, x, prunable=rules)[0], x) for each in methods
        ]
        assert errors == sorted(errors), seed


def test_layers_see_what_those_before_them_leave():
    """Two layers by hand: the second is calibrated through the first as it was pruned."""
    w, x = layer(inputs=32, outputs=32)
    v, _ = layer(inputs=32, outputs=32, seed=1)
    params = {"w": jnp.asarray(np.stack([w.T, v.T]), jnp.float32)}
    batch = jnp.asarray(x, jnp.float32)

    def apply_fn(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

    rules = [("w", gj.Stacked(1))]
    given = one_shot.sparsegpt(), apply_fn, params, [batch[:100], batch[100:]]
    found = one_shot.prune(*given, sparsity=0.5, prunable=rules)
    _, first, _ = reference.sparsegpt(w, x, 0.5)
    np.testing.assert_allclose(found.params["w"][0].T, first, atol=1e-5)
    mask, second, _ = reference.sparsegpt(v, np.tanh(x @ first.T), 0.5)
    np.testing.assert_array_equal(found.masks["w"][1].T, mask)
    np.testing.assert_allclose(found.params["w"][1].T, second, atol=1e-4)
    at_once = one_shot.prune(*given, sparsity=0.5, prunable=rules, sequential=False)
    mask, second, _ = reference.sparsegpt(v, np.tanh(x @ w.T), 0.5)
    np.testing.assert_allclose(at_once.params["w"][1].T, second, atol=1e-4)


@jax.custom_jvp
def with_own_derivative(x, w):
    return x @ w


with_own_derivative.defjvp(lambda given, ways: jax.jvp(jnp.matmul, given, ways))


WAYS = {  # params, apply_fn, rules; each multiplies x by a matrix (12, 6), somehow
    "transposed": (lambda w: w.T, lambda w, x: x @ w.T, ()),
    "heads": (lambda w: w.reshape(12, 2, 3), lambda w, x: jnp.einsum("bi,ihd->bhd", x, w), ()),
    "split": (lambda w: w, lambda w, x: jnp.einsum("bhd,hdo->bo", x.reshape(-1, 3, 4),
                                                   w.reshape(3, 4, 6)), ()),
    "image": (
        lambda w: w.reshape(2, 2, 3, 6),
        lambda w, x: jax.lax.conv_general_dilated(
            x.reshape(-1, 2, 2, 3), w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        (),
    ),
    "sliced": (
        lambda w: jnp.stack([0 * w, w, 0 * w]), lambda w, x: x @ w[1] + x @ w[0] + x @ w[2],
        [("", gj.Stacked(1))],
    ),
    "experts": (
        lambda w: jnp.stack([w, w]), lambda w, x: jnp.einsum("bi,eio->ebo", x, w),
        [("", gj.Stacked(1))],
    ),
    "half": (lambda w: w, lambda w, x: x @ w.astype(jnp.bfloat16).astype(jnp.float32), ()),
    "branch": (
        lambda w: w,
        lambda w, x: jax.lax.cond(x[0, 0] < 9, lambda: x @ w, lambda: x @ -w),
        (),
    ),
    "loop": (
        lambda w: w,
        lambda w, x: jax.lax.fori_loop(0, jnp.int32(2), lambda i, y: y + x @ w, jnp.zeros((90, 6))),
        (),
    ),
    "own derivative": (lambda w: w, lambda w, x: with_own_derivative(x, w), ()),
}  # fmt: skip


@pytest.mark.parametrize("name", WAYS)
def test_whatever_way_a_matrix_is_multiplied(name):
    make, apply_fn, rules = WAYS[name]
    w, x = layer(90, 12, 6)
    params, batch = {"w": make(jnp.asarray(w.T, jnp.float32))}, jnp.asarray(x, jnp.float32)

    def apply(params, x):
        return apply_fn(params["w"], x)

    (found,) = one_shot.calibrate(apply, params, [batch], one_shot.gram, prunable=rules).values()
    times = 2 if name == "loop" else 1
    for values, rows in zip(found.values, found.rows, strict=True):
        np.testing.assert_allclose(values, times * x.T @ x, rtol=1e-4, atol=1e-4)
        assert rows == 90 * times
    if name == "half":
        return
    new = one_shot.prune(one_shot.sparsegpt(), apply, params, [batch], sparsity=0.5, prunable=rules)
    _, wanted, _ = reference.sparsegpt(w, x, 0.5)
    last = np.asarray(new.params["w"] if name != "sliced" else new.params["w"][1])
    if name == "experts":
        np.testing.assert_array_equal(*last)
        last = last[0]
    last = last if name == "transposed" else last.reshape(12, 6).T
    np.testing.assert_allclose(last, wanted, atol=1e-5)


def test_a_leaf_that_is_read_twice_has_the_sum():
    w, x = layer(90, 12, 12)
    params = {"kernel": jnp.asarray(w.T, jnp.float32)}

    def twice(params, x):
        return (x @ params["kernel"]) @ params["kernel"]

    found = one_shot.calibrate(twice, params, [jnp.asarray(x, jnp.float32)])
    squares = (x**2).sum(0) + ((x @ w.T) ** 2).sum(0)
    np.testing.assert_allclose(found["kernel"].values[0], squares, rtol=1e-4)
    with pytest.raises(ValueError, match=r"kernel is summed over axes \(0,\) in one .* \(1,\)"):
        one_shot.calibrate(
            lambda p, x: (x @ p["kernel"]) @ p["kernel"].T, params, [jnp.ones((3, 12))]
        )
    with pytest.warns(
        UserWarning, match=r"read by what is no product, too: kernel \(unpacked: mul"
    ):
        one_shot.calibrate(
            lambda p, x: x @ p["kernel"] + (p["kernel"] * p["kernel"]).sum(),
            params,
            [jnp.ones((3, 12))],
        )


@pytest.mark.parametrize("method", [one_shot.sparsegpt(), one_shot.wanda(), one_shot.alps()])
def test_half_weights_one_batch_and_a_singular_matrix(method):
    """Three rows for 32 inputs, four of which are the same and four dead; bfloat16."""
    w, x = layer(3, 32, 16)
    x[:, 4:8], x[:, 8:12] = x[:, :1], 0.0
    params = {"kernel": jnp.asarray(w.T, jnp.bfloat16)}
    found = one_shot.prune(method, product, params, [jnp.asarray(x, jnp.float32)], sparsity=0.5)
    assert found.params["kernel"].dtype == jnp.bfloat16
    assert bool(jnp.isfinite(found.params["kernel"]).all())
    assert int(found.masks["kernel"].sum()) == 256
    assert not found.masks["kernel"][8:12].any()


REFUSED = [
    (lambda p, x: x @ (p["kernel"] * p["kernel"]), {}, "reads kernel .*unpacked: mul"),
    (lambda p, x: x, {}, r"reads kernel \(not read\)"),
    (lambda p, x: x @ p["kernel"][:, :4], {}, "cuts a layer"),
    (lambda p, x: x.reshape(-1, 16) @ p["kernel"][:16], {}, "cuts a layer"),
    (product, {"sparsity": 1.5}, r"sparsity must be in \[0, 1\)"),
    (product, {"scope": gj.global_ranking}, "global_ranking gives one count for all"),
    (product, {"prunable": [("", gj.structures.block((2, 2)))]}, "has no groups of inputs"),
    (product, {"prunable": [("", gj.structures.n_of_m(4, axis=-1))]}, "sum over axes"),
    (product, {"prunable": GROUPS, "sparsity": 0.6}, "which have no sparsity of 0.6"),
    (lambda p, x: product(p, x * jnp.nan), {}, "kernel cannot be pruned"),
    (lambda p, x: product(p, x[:0]), {}, "No row reached kernel"),
]


@pytest.mark.parametrize(("apply_fn", "options", "message"), REFUSED)
@pytest.mark.parametrize("sequential", [True, False])
def test_what_cannot_be_is_told(apply_fn, options, message, sequential):
    params, batch = {"kernel": jnp.ones((32, 8))}, jnp.ones((5, 32))
    options = {"sparsity": 0.5, "sequential": sequential} | options
    with pytest.raises(ValueError, match=message):
        one_shot.prune(one_shot.wanda(), apply_fn, params, [batch], **options)


def test_what_else_cannot_be():
    params = {"kernel": jnp.ones((32, 8))}
    with pytest.raises(ValueError, match="a batch at least; got none"):
        one_shot.prune(one_shot.wanda(), product, params, [], sparsity=0.5)
    with pytest.raises(ValueError, match="kernel has no statistic"):
        one_shot.prune_from(one_shot.wanda(), params, {}, sparsity=0.5)
    with pytest.raises(ValueError, match="block is at least 1"):
        one_shot.sparsegpt(block=0)
    with pytest.raises(ValueError, match="has to be a multiple of M, 4"):
        pruned(one_shot.sparsegpt(block=6), *layer(), prunable=GROUPS)
    with pytest.raises(ValueError, match="Numbers above 0"):
        one_shot.alps(rho=0.0)
    stacked = {"w": jnp.ones((2, 32, 32))}
    with pytest.raises(ValueError, match=r"reads w \(unpacked: scan, cuts a layer\).*Stacked"):
        one_shot.calibrate(
            lambda p, x: jax.lax.scan(lambda x, w: (x @ w, None), x, p["w"])[0],
            stacked,
            [jnp.ones((5, 32))],
        )


def test_pruned_models_train_on():
    """Masks go on under any method; zeros stay zeros."""
    w, x = layer()
    _, mask = pruned(one_shot.wanda(), w, x)
    masks = {"kernel": jnp.asarray(mask.T)}
    params = gj.apply_masks({"kernel": jnp.asarray(w.T, jnp.float32)}, masks)
    chosen = gj.masks_from_zeros(params)
    np.testing.assert_array_equal(chosen["kernel"], masks["kernel"])
    state = gj.static(masks=chosen).init(params)
    np.testing.assert_array_equal(state.masks["kernel"], masks["kernel"])


@pytest.mark.parametrize("method", [one_shot.wanda(), one_shot.sparsegpt()])
def test_outputs_over_eight_devices(method):
    """The masks of one device; no Gram matrix and no kernel crosses devices."""
    w, x = layer()
    mesh = Mesh(np.array(jax.devices()[:8]), ("model",))
    batch = jnp.asarray(x, jnp.float32)
    kernel = jnp.asarray(w.T, jnp.float32)
    shared = {"kernel": jax.device_put(kernel, NamedSharding(mesh, PartitionSpec(None, "model")))}
    data = jax.device_put(batch, NamedSharding(mesh, PartitionSpec()))
    one = one_shot.prune(method, product, {"kernel": kernel}, [batch], sparsity=0.5)
    many = one_shot.prune(method, product, shared, [data], sparsity=0.5)
    np.testing.assert_array_equal(one.masks["kernel"], many.masks["kernel"])
    np.testing.assert_allclose(one.params["kernel"], many.params["kernel"], atol=1e-5)
    assert many.params["kernel"].sharding.is_equivalent_to(shared["kernel"].sharding, 2)


def test_layers_are_pruned_in_the_order_in_which_data_reach_them():
    """Two scans, the second from its last layer to its first, as the same network without scans."""
    draws = jax.random.normal(tables.KEY, (2, 2, 16, 16)) / 4
    params, x = {"enc": draws[0], "dec": draws[1]}, jax.random.normal(jax.random.key(1), (300, 16))
    alone = {f"{name}{i}": w[i] for name, w in params.items() for i in range(2)}

    def scanned(params, x):
        def step(x, w):
            return jnp.tanh(x @ w), None

        x, _ = jax.lax.scan(step, x, params["enc"])
        return jax.lax.scan(step, x, params["dec"], reverse=True)[0]

    def unrolled(params, x):
        for name in ("enc0", "enc1", "dec1", "dec0"):
            x = jnp.tanh(x @ params[name])
        return x

    method, rules = one_shot.sparsegpt(), [("", gj.Stacked(1))]
    found = one_shot.prune(method, scanned, params, [x], sparsity=0.7, prunable=rules)
    wanted = one_shot.prune(method, unrolled, alone, [x], sparsity=0.7)
    for name, w in wanted.params.items():
        np.testing.assert_allclose(found.params[name[:3]][int(name[3])], w, atol=1e-5)


@pytest.mark.parametrize("count", [1, 25, 101, 203])
def test_every_output_keeps_as_many_in_all_blocks_together(count):
    w, x = layer(64, 256, 6)
    rules = [("", gj.structures.fan_in())]
    _, mask = pruned(one_shot.sparsegpt(), w, x, 1 - count / 256, prunable=rules)
    assert mask.sum(1).tolist() == [count] * 6


def test_outputs_may_come_first():
    params, batch = {"weight": jax.random.normal(tables.KEY, (6, 8))}, jnp.ones((3, 8))
    given = lambda p, x: x @ p["weight"].T, params, [batch]
    rules = [("", gj.structures.n_of_m(4, axis=-1))]
    for method in (one_shot.magnitude(), one_shot.wanda(), one_shot.sparsegpt()):
        masks = one_shot.prune(method, *given, sparsity=0.5, prunable=rules).masks
        np.testing.assert_array_equal(masks["weight"].reshape(6, 2, 4).sum(-1), 2)
    masks = one_shot.prune(one_shot.magnitude(by_output=True), *given, sparsity=0.5).masks
    assert masks["weight"].sum(1).tolist() == [4] * 6


def test_stacks_of_stacks_some_of_them_batched():
    w, x = jnp.ones((2, 3, 4, 5, 6)), jax.random.normal(tables.KEY, (3, 7, 5))
    found = one_shot.calibrate(
        lambda p, x: jnp.einsum("gbi,agcio->agcbo", x, p["w"]),
        {"w": w},
        [x],
        prunable=[("", gj.Stacked(3))],
    )
    wanted = np.broadcast_to(np.square(x).sum(1)[None, :, None], (2, 3, 4, 5)).reshape(24, 5)
    np.testing.assert_allclose(found["w"].values, wanted, rtol=1e-5)


def test_arrays_of_numpy_and_numbers_that_are_complex():
    params, batch = {"kernel": np.ones((8, 4), np.float32)}, np.ones((3, 8), np.float32)
    found = one_shot.prune(one_shot.wanda(), product, params, [batch], sparsity=0.5)
    assert int(found.masks["kernel"].sum()) == 16
    with pytest.raises(ValueError, match="dot_general, complex inputs"):
        one_shot.calibrate(product, {"kernel": jnp.ones((8, 4))}, [jnp.full((3, 8), 1j)])


def test_layers_merged_with_outputs():
    """Where all layers of a leaf have the same inputs they may be; beside batched ones not."""
    w, x = jax.random.normal(tables.KEY, (2, 3, 4, 5)), jax.random.normal(tables.KEY, (2, 6, 4))
    rules, x = [("", gj.Stacked(2))], x.at[1, :, 1].mul(100.0)

    def merged(params, x):
        return x[0] @ params["w"].transpose(2, 0, 1, 3).reshape(4, -1)

    def half_merged(params, x):
        return jnp.einsum("ebd,edk->ebk", x, params["w"].transpose(0, 2, 1, 3).reshape(2, 4, 15))

    given = {"w": w}, [x]
    at_once, one_by_one = (
        one_shot.prune(one_shot.wanda(), merged, *given, sparsity=0.75, prunable=rules, **how)
        for how in ({"sequential": False}, {"sequential": True})
    )
    alone = [
        one_shot.prune(one_shot.wanda(), product, {"kernel": k}, [x[0]], sparsity=0.75)
        for k in w.reshape(6, 4, 5)
    ]
    wanted = np.stack([one.masks["kernel"] for one in alone]).reshape(w.shape)
    np.testing.assert_array_equal(at_once.masks["w"], wanted)
    np.testing.assert_array_equal(one_by_one.masks["w"], wanted)
    for sequential in (True, False):
        with pytest.raises(ValueError, match="batched, and others merged with outputs"):
            one_shot.prune(
                *(one_shot.wanda(), half_merged, *given),
                sparsity=0.75,
                prunable=rules,
                sequential=sequential,
            )


@pytest.mark.parametrize(
    "method", [one_shot.magnitude(), one_shot.wanda(), one_shot.sparsegpt(), one_shot.alps()]
)
def test_layers_that_stay_dense(method):
    w, x = layer(64, 16, 12)
    found, mask = pruned(method, w, x, 0.0)
    assert mask.all()
    np.testing.assert_allclose(found, np.float32(w), rtol=1e-3, atol=1e-3)


def test_half_weights_that_a_repair_makes_too_large():
    x = jax.random.normal(tables.KEY, (64, 2)) @ jnp.array([[1.0, 1.0], [0.0, 0.01]])
    params = {"kernel": jnp.array([[4e4], [5e4]], jnp.float16)}
    with pytest.raises(ValueError, match="not finite"):
        one_shot.prune(one_shot.sparsegpt(), product, params, [x], sparsity=0.5)
