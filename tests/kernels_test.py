"""The block-sparse product against the dense one, in JAX's interpreters of its kernels."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import granet_jax as gj
from granet_jax import kernels, structures
from granet_jax.kernels import packed
from granet_jax.kernels.lists import lists

block_matmul = functools.partial(kernels.block_matmul, interpret=True)
has_mosaic = pytest.mark.skipif(
    jax.__version_info__ < (0, 11, 2), reason="Mosaic GPU's products need jax 0.11.2"
)


def blocks(key, shape, block, density):
    """A mask of blocks, smaller ones at the edges."""
    num = [-(-n // b) for n, b in zip(shape, block, strict=True)]
    live = jax.random.bernoulli(key, density, num)
    return spread(live, shape, block)


def spread(live, shape, block):
    return jnp.repeat(jnp.repeat(live, block[0], 0), block[1], 1)[: shape[0], : shape[1]]


def compared(backend, sizes, block, mask, dtype, dense_gradient, tolerance):
    """The product and its gradients beside those of dense ones, relative to the largest entry."""
    num, inputs, outputs = sizes
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (num, inputs), dtype)
    kernel = jax.random.normal(keys[1], (inputs, outputs), dtype)
    dy = jax.random.normal(keys[2], (num, outputs), dtype)

    def sparse(x, kernel):
        return block_matmul(x, kernel, mask, block, dense_gradient=dense_gradient, backend=backend)

    y, pull = jax.vjp(sparse, x, kernel)
    got = y, *pull(dy)
    assert all(value.dtype == dtype for value in got)
    x, kernel, dy = (value.astype(jnp.float32) for value in (x, kernel, dy))
    wanted, pull = jax.vjp(lambda x, kernel: x @ jnp.where(mask, kernel, 0), x, kernel)
    dx, d_kernel = pull(dy)
    d_kernel = x.T @ dy if dense_gradient else d_kernel
    for a, b in zip(got, (wanted, dx, d_kernel), strict=True):
        size = max(float(jnp.abs(b).max(initial=0)), 1)
        np.testing.assert_allclose(np.asarray(a, np.float32) / size, b / size, atol=tolerance)


@pytest.mark.parametrize(
    ("sizes", "block", "density", "dense_gradient"),
    [
        ((1, 1, 1), (3, 2), 1.0, False),
        ((70, 33, 50), (16, 16), 0.5, False),
        ((65, 20, 7), (8, 3), 0.3, True),
        ((5, 64, 32), (16, 8), 0.0, True),
        ((64, 32, 32), (16, 16), 1.0, False),
        ((300, 256, 256), (128, 128), 0.5, False),
    ],
)
def test_tpus_equal_the_dense_product_and_its_gradients(sizes, block, density, dense_gradient):
    mask = blocks(jax.random.key(1), sizes[1:], block, density)
    compared(kernels.tpu, sizes, block, mask, jnp.float32, dense_gradient, 1e-5)


HOPPER = {  # sizes, block, which blocks are on, dtype, dense gradient
    "odd sizes, bfloat16": ((70, 100, 90), (32, 16), 0.5, jnp.bfloat16, False),
    "odd sizes, float32": ((130, 150, 200), (16, 32), 0.5, jnp.float32, False),
    "blocks of several tiles": ((64, 256, 512), (128, 256), 0.5, jnp.float16, True),
    "none live": ((5, 64, 64), (32, 32), 0.0, jnp.bfloat16, False),
    "all live": ((130, 128, 192), (64, 64), 1.0, jnp.bfloat16, False),
    "none live, gradient of all": ((5, 64, 64), (16, 16), 0.0, jnp.float32, True),
}


@has_mosaic
@pytest.mark.parametrize("case", HOPPER)
def test_hopper_equals_the_dense_product_and_its_gradients(case):
    sizes, block, density, dtype, dense_gradient = HOPPER[case]
    mask = blocks(jax.random.key(1), sizes[1:], block, density)
    tolerance = {2: 4e-3, 4: 1e-5}[dtype.dtype.itemsize]
    compared(kernels.hopper, sizes, block, mask, dtype, dense_gradient, tolerance)


@pytest.mark.parametrize("backend", [kernels.tpu, pytest.param(kernels.hopper, marks=has_mosaic)])
def test_empty_rows_and_columns(backend):
    live = jnp.array([[1, 0, 1], [0, 0, 0], [1, 0, 0], [1, 0, 1], [0, 0, 1]], bool)
    mask = spread(live, (160, 96), (32, 32))
    compared(backend, (40, 160, 96), (32, 32), mask, jnp.bfloat16, False, 4e-3)


def test_on_a_cpu_it_is_the_masked_product():
    mask = blocks(jax.random.key(1), (6, 4), (4, 3), 0.5)
    x = jax.random.normal(jax.random.key(0), (2, 6))
    y = kernels.block_matmul(x, jnp.ones((6, 4)), mask, (4, 3))
    np.testing.assert_array_equal(y, x @ mask.astype(jnp.float32))


@pytest.mark.parametrize("block", [(32, 16), (64, 128)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("backend", [kernels.tpu, pytest.param(kernels.hopper, marks=has_mosaic)])
def test_packed_blocks_equal_the_dense_product(backend, dtype, block):
    """Slots in any order, two of them dead, one column and one row empty."""
    grid = 3, 4
    index = jnp.array([7, 12, 2, 0, 3, 12, 4], jnp.int32)
    keys = jax.random.split(jax.random.key(0), 3)
    values = jax.random.normal(keys[0], (len(index), *block), dtype)
    x = jax.random.normal(keys[1], (40, grid[0] * block[0]), dtype)
    y = jax.random.normal(keys[2], (40, grid[1] * block[1]), dtype)
    whole = jnp.zeros((12, *block), dtype).at[index].set(values, mode="drop")
    w = whole.reshape(*grid, *block).swapaxes(1, 2).reshape(x.shape[1], y.shape[1])
    flat = values.reshape(-1)
    given = {"interpret": True}
    got = (
        packed.multiply(backend, flat, index, grid, block, x, **given),
        packed.multiply(backend, flat, index, grid, block, y, transposed=True, **given),
        packed.sample(backend, index, grid, block, x, y, **given),
    )
    x, y, w = (z.astype(jnp.float32) for z in (x, y, w))
    blocks_of = (x.T @ y).reshape(grid[0], block[0], grid[1], block[1]).swapaxes(1, 2)
    sampled = blocks_of.reshape(12, -1).at[index].get(mode="fill", fill_value=0).reshape(-1)
    tolerance = {2: 4e-3, 4: 1e-5}[dtype.dtype.itemsize]
    for a, b in zip(got, (x @ w, y @ w.T, sampled), strict=True):
        assert a.dtype == dtype
        size = jnp.abs(b).max()
        np.testing.assert_allclose(np.asarray(a, np.float32) / size, b / size, atol=tolerance)


@pytest.mark.parametrize("backend", [kernels.tpu, pytest.param(kernels.hopper, marks=has_mosaic)])
def test_batched_by_vmap(backend):
    """Over x alone, over kernels alone, over all; gradients, too."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (3, 20, 48))
    kernel = jax.random.normal(keys[1], (3, 48, 32))
    masks = [blocks(key, (48, 32), (16, 16), 0.5) for key in jax.random.split(keys[2], 3)]

    def total(x, kernel, mask):
        return jnp.sum(block_matmul(x, kernel, mask, (16, 16), backend=backend) ** 2)

    def dense(x, kernel, mask):
        return jnp.sum((x @ jnp.where(mask, kernel, 0)) ** 2)

    stacked = x, kernel, jnp.stack(masks)
    for axes in ((0, None, None), (None, 0, None), (0, 0, 0)):
        given = [z if axis == 0 else z[0] for z, axis in zip(stacked, axes, strict=True)]
        got, wanted = (jax.vmap(jax.grad(f, (0, 1)), axes)(*given) for f in (total, dense))
        chex.assert_trees_all_close(got, wanted, rtol=1e-4, atol=1e-3)


def test_lists_of_live_blocks():
    found = lists(jnp.array([[1, 0, 1], [0, 0, 1], [1, 0, 1]], bool))
    assert found.order.tolist() == [[0, 2, 0], [0, 0, 0], [0, 1, 2]]
    assert found.num_live.tolist() == [2, 0, 3]


def test_leading_axes_dtypes_and_empty_inputs():
    kernel = jnp.ones((6, 4), jnp.bfloat16)
    mask = blocks(jax.random.key(0), kernel.shape, (2, 2), 0.5)
    y = block_matmul(jnp.ones((2, 3, 6), jnp.bfloat16), kernel, mask, (2, 2))
    chex.assert_shape(y, (2, 3, 4))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(y[0, 0], np.float32), np.asarray(mask).sum(0))
    assert block_matmul(jnp.ones((0, 6), jnp.bfloat16), kernel, mask, (2, 2)).shape == (0, 4)


def test_masks_are_data():
    traces = []

    @jax.jit
    def product(x, kernel, mask):
        traces.append(None)
        return block_matmul(x, kernel, mask, (4, 4))

    x, kernel = jnp.ones((3, 8)), jnp.ones((8, 8))
    block_matmul(x, kernel, kernel > 0, (4, 4))  # the first of all loads a part of JAX: a new trace
    for density in (0.0, 0.5, 1.0):
        mask = blocks(jax.random.key(1), (8, 8), (4, 4), density)
        np.testing.assert_array_equal(product(x, kernel, mask), x @ mask.astype(jnp.float32))
    assert len(traces) == 1


def test_training_through_it_is_training_under_the_masks():
    """RigL with blocks: dense gradients at events, the gradients of live blocks between them."""
    block = (4, 4)
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"kernel": jax.random.normal(keys[0], (16, 12))}
    x, y = jax.random.normal(keys[1], (8, 16)), jax.random.normal(keys[2], (8, 12))
    method = gj.rigl(
        sparsity=0.5,
        update_every=3,
        total_steps=12,
        key=jax.random.key(1),
        prunable=[("", structures.block(block))],
    )
    tx = gj.sparsify(optax.sgd(0.1, momentum=0.9), method)

    def loss(params, masks, is_event):
        kernel, mask = params["kernel"], masks["kernel"]
        product = block_matmul(x, kernel, mask, block, dense_gradient=is_event)
        return jnp.mean((product - y) ** 2)

    @jax.jit
    def sparse_step(params, state):
        is_event = method.is_update_step(state.mask_step + 1)
        grads = jax.grad(loss)(params, gj.get_masks(state), is_event)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def dense_step(params, state):
        grads = jax.grad(lambda p: jnp.mean((x @ p["kernel"] - y) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    params = gj.apply_masks(params, gj.get_masks(state))
    sparse = dense = (params, state)
    for _ in range(12):
        sparse, dense = sparse_step(*sparse), dense_step(*dense)
        chex.assert_trees_all_equal(gj.get_masks(sparse[1]), gj.get_masks(dense[1]))
        chex.assert_trees_all_close(sparse[0], dense[0], rtol=1e-5, atol=1e-6)


def test_dense_layers_of_flax_with_masks_and_without():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(12, dtype=jnp.bfloat16, name="a")(x))
            x = nn.Dense(8, use_bias=False, name="b")(inputs=x.astype(jnp.float32))
            return nn.Dense(3, name="head")(x)

    x = jax.random.normal(jax.random.key(0), (2, 5, 16))
    with kernels.dense_in_blocks((4, 4), interpret=True):
        params = Net().init(jax.random.key(1), x)["params"]
    rules = [("head", False), ("", structures.block((4, 4)))]
    masks = gj.random_masks(jax.random.key(2), params, 0.5, gj.uniform, rules)
    variables = {"params": params, "masks": {name: masks[name] for name in "ab"}}
    with kernels.dense_in_blocks((4, 4), interpret=True):
        trace = str(jax.make_jaxpr(Net().apply)(variables, x))
        y = Net().apply(variables, x)
    assert trace.count(" = pallas_call") == 2
    wanted = Net().apply({"params": gj.apply_masks(params, masks)}, x)
    chex.assert_trees_all_close(y, wanted, rtol=1e-2, atol=1e-2)  # bfloat16
    assert "pallas_call" not in str(jax.make_jaxpr(Net().apply)(variables, x))


def test_layers_of_another_kind_are_left_alone():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(nn.initializers.ones, (None, None))
            x = nn.Dense(4, kernel_init=init, name="boxed")(x)
            return nn.Dense(4, dot_general=lambda *args, **kwargs: args[0] * 0, name="own")(x)

    x = jnp.ones((2, 4))
    variables = Net().init(jax.random.key(0), x)
    masks = jax.tree.map(lambda p: jnp.ones(p.shape, bool), variables["params"])
    with kernels.dense_in_blocks((2, 2), interpret=True):
        trace = str(jax.make_jaxpr(Net().apply)({**variables, "masks": masks}, x))
        y, made = Net().apply(
            {"masks": masks}, x, rngs={"params": jax.random.key(0)}, mutable=["params"]
        )
    assert trace.count(" = pallas_call") == 1
    np.testing.assert_array_equal(y, jnp.zeros((2, 4)))
    chex.assert_trees_all_equal_shapes(made["params"], variables["params"])


class Device(jax.sharding.AbstractDevice):
    """One that is not there, and what it can do."""

    compute_capability = ""


DEVICES = {
    "sm_90": (kernels.hopper, "cuda", "9.0", jnp.float32),
    "sm_90, bfloat16": (kernels.hopper, "cuda", "9.0", jnp.bfloat16),
    "sm_80, bfloat16": (kernels.ampere, "cuda", "8.0", jnp.bfloat16),
    "TPU": (kernels.tpu, "tpu", "", jnp.float32),
    "TPU, bfloat16": (kernels.tpu, "tpu", "", jnp.bfloat16),
}


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("name", DEVICES)
def test_can_be_lowered_for_a_device_that_is_not_there(name, x64, monkeypatch):
    """All three products become kernels."""
    backend, platform, capability, dtype = DEVICES[name]
    if platform == "cuda" and jax.__version_info__ < (0, 11, 2):
        pytest.skip("Mosaic GPU's products need jax 0.11.2")

    def gradients(x, kernel, mask):
        def total(x, kernel):
            y = kernels.block_matmul(x, kernel, mask, (128, 128), backend=backend)
            return jnp.sum(y.astype(jnp.float32))

        return jax.value_and_grad(total, (0, 1))(x, kernel)

    x, kernel, mask = (
        jax.ShapeDtypeStruct(shape, kind)
        for shape, kind in (((100, 300), dtype), ((300, 200), dtype), ((300, 200), bool))
    )
    monkeypatch.setattr(Device, "compute_capability", capability)
    device = Device(name, num_cores=1, platform=platform)
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.enable_x64(x64), jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(gradients).trace(x, kernel, mask).lower(lowering_platforms=(platform,))
    assert lowered.as_text().count("stablehlo.custom_call") == 3


def test_layers_of_nnx_with_masks():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(16, 12, rngs=rngs), nnx.Linear(12, 8, rngs=rngs)])
            self.head = nnx.Linear(8, 3, use_bias=False, rngs=rngs)

        def __call__(self, x):
            for layer in self.layers:
                x = nnx.relu(layer(x))
            return self.head(x)

    model, x = Net(nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (2, 5, 16))
    params = nnx.state(model, nnx.Param)
    rules = [("head", False), ("", structures.block((4, 4)))]
    masks = gj.random_masks(jax.random.key(2), params, 0.5, gj.uniform, rules)

    def loss(model, masks, x):
        with kernels.linear_in_blocks(model, masks, (4, 4), interpret=True):
            return jnp.sum(model(x) ** 2)

    wanted = jnp.sum(nnx.merge(nnx.graphdef(model), gj.apply_masks(params, masks))(x) ** 2)
    np.testing.assert_allclose(nnx.jit(loss)(model, masks, x), wanted, rtol=1e-5)
    graph = nnx.graphdef(model)
    trace = jax.make_jaxpr(lambda p, m: loss(nnx.merge(graph, p), m, x))(params, masks)
    assert str(trace).count("pallas_call[") == 3
    assert all(layer.dot_general is jax.lax.dot_general for layer in model.layers)
    model.layers[0].precision = jax.lax.Precision.HIGHEST  # which blocks would not keep to
    with kernels.linear_in_blocks(model, masks, (4, 4), interpret=True):
        assert str(jax.make_jaxpr(model)(x)).count("pallas_call[") == 2


@pytest.mark.parametrize("axis", ["rows of x", "outputs"])
def test_over_several_devices_by_shard_map(axis):
    """Each device multiplies its part; the gradients that are sums over devices are added up."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("d",))
    rows, columns = (P("d"), P()) if axis == "rows of x" else (P(), P(None, "d"))
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel = jax.random.normal(keys[0], (16, 8)), jax.random.normal(keys[1], (8, 32))
    mask = blocks(keys[2], kernel.shape, (4, 4), 0.5)

    def grads(multiply, x, kernel):
        return jax.value_and_grad(lambda x, k: jnp.sum(multiply(x, k) ** 2), (0, 1))(x, kernel)

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(rows, columns, columns),
        out_specs=(P(), (rows, columns)),
        check_vma=False,
    )
    def over_devices(x, kernel, mask):
        loss, (dx, dk) = grads(lambda x, k: block_matmul(x, k, mask, (4, 4)), x, kernel)
        if axis == "rows of x":
            dk = jax.lax.psum(dk, "d")
        else:
            dx = jax.lax.psum(dx, "d")
        return jax.lax.psum(loss, "d"), (dx, dk)

    got = jax.jit(over_devices)(x, kernel, mask)
    wanted = grads(lambda x, k: x @ jnp.where(mask, k, 0), x, kernel)
    chex.assert_trees_all_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="block_matmul takes x"):
        block_matmul(jnp.ones((2, 3)), jnp.ones((4, 5)), jnp.ones((4, 5), bool), (2, 2))
    for block in ((0, 2), (4,), (4.5, 2)):
        with pytest.raises(ValueError, match="A block has two sides, whole numbers from 1 on; got"):
            block_matmul(jnp.ones((2, 4)), jnp.ones((4, 5)), jnp.ones((4, 5), bool), block)
    ones, x = jnp.ones((4, 4)), jnp.ones((16, 16), jnp.bfloat16)
    with pytest.raises(ValueError, match="one float dtype; got float32, bfloat16"):
        block_matmul(ones, ones.astype(jnp.bfloat16), ones > 0, (2, 2))
    for backend, sides in ((kernels.hopper, "from 16"), (kernels.ampere, "from 32")):
        with pytest.raises(ValueError, match=f"powers of two {sides} on.*got \\(16, 8\\)"):
            block_matmul(x, x, x > 0, (16, 8), backend=backend)
    with pytest.raises(ValueError, match="multiples of 128"):
        kernels.block_matmul(x, x, x > 0, (16, 16), backend=kernels.tpu)
