"""The block-sparse product against the dense one, in Pallas' interpret mode."""

import functools
import sys

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import granet_jax as gj
from granet_jax import kernels, structures

block_matmul = functools.partial(kernels.block_matmul, interpret=True)


def blocks(key, shape, block, density):
    """A mask of blocks, smaller ones at the edges."""
    num = [-(-n // b) for n, b in zip(shape, block, strict=True)]
    live = jax.random.bernoulli(key, density, num)
    return jnp.repeat(jnp.repeat(live, block[0], 0), block[1], 1)[: shape[0], : shape[1]]


@pytest.mark.parametrize(
    ("sizes", "block", "density", "dense_gradient"),
    [
        ((1, 1, 1), (3, 2), 1.0, False),
        ((70, 33, 50), (16, 16), 0.5, False),
        ((65, 20, 7), (8, 3), 0.3, True),
        ((5, 64, 32), (16, 8), 0.0, True),
        ((64, 32, 32), (16, 16), 1.0, False),
    ],
)
def test_equals_the_dense_product_and_its_gradients(sizes, block, density, dense_gradient):
    num, inputs, outputs = sizes
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (num, inputs))
    kernel = jax.random.normal(keys[1], (inputs, outputs))
    mask = blocks(keys[2], kernel.shape, block, density)
    dy = jax.random.normal(keys[3], (num, outputs))

    def sparse(x, kernel):
        return block_matmul(x, kernel, mask, block, dense_gradient=dense_gradient)

    y, pull = jax.vjp(sparse, x, kernel)
    wanted, dense_pull = jax.vjp(lambda x, kernel: x @ jnp.where(mask, kernel, 0), x, kernel)
    dx, d_kernel = dense_pull(dy)
    if dense_gradient:
        d_kernel = x.T @ dy
    chex.assert_trees_all_close((y, *pull(dy)), (wanted, dx, d_kernel), rtol=1e-4, atol=1e-4)


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


def test_interpreted_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    ones = jnp.ones((4, 4))
    np.testing.assert_array_equal(block_matmul(ones, ones, ones > 0, (2, 2)), 4 * ones)


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


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_can_be_compiled_for_a_gpu(dtype):
    """As far as one can tell without one: all three products are lowered to Triton."""

    def gradients(x, kernel, mask):
        def total(x, kernel):
            return jnp.sum(kernels.block_matmul(x, kernel, mask, (32, 64)).astype(jnp.float32))

        return jax.value_and_grad(total, (0, 1))(x, kernel)

    x, kernel, mask = (
        jax.ShapeDtypeStruct(shape, kind)
        for shape, kind in (((100, 7 * 32), dtype), ((7 * 32, 100), dtype), ((7 * 32, 100), bool))
    )
    gpu = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=gpu)):
        lowered = jax.jit(gradients).trace(x, kernel, mask).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("__gpu$xla.gpu.triton") == 3


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="block_matmul takes x"):
        block_matmul(jnp.ones((2, 3)), jnp.ones((4, 5)), jnp.ones((4, 5), bool), (2, 2))
    with pytest.raises(ValueError, match="at least one row"):
        block_matmul(jnp.ones((2, 4)), jnp.ones((4, 5)), jnp.ones((4, 5), bool), (0, 2))
