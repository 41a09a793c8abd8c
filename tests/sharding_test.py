"""Sharded parameters: the same masks on any number of devices, and nothing gathered for them."""

import functools
import itertools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import granet_jax as gj

KEY = jax.random.key(7)
RULES = [("^blocks/", gj.Stacked(1))]
NUM_LAYERS = 5  # four stacked ones and one more
# So large that a shard of one layer holds more weights than may leave a device.
SHAPES = {
    "blocks": {"kernel": (4, 64, 64), "bias": (4, 64)},
    "head": {"kernel": (128, 128), "bias": (128,)},
}
SPECS = {
    "blocks": {"kernel": PartitionSpec("x", None, "y"), "bias": PartitionSpec("x")},
    "head": {"kernel": PartitionSpec("x", "y"), "bias": PartitionSpec("y")},
}
AXIS_TYPES = [AxisType.Auto, AxisType.Explicit]
STEPS = 2  # each an event


def is_shape(x):
    return isinstance(x, tuple)


START = {
    layer: {
        "kernel": np.random.default_rng(0).random(shapes["kernel"]) < 0.4,
        "bias": np.ones(shapes["bias"], bool),
    }
    for layer, shapes in SHAPES.items()
}
_every_step = {"update_every": 1, "prunable": RULES}
_gradual = {**_every_step, "final_sparsity": 0.9, "end_step": STEPS}
_sparse = {**_every_step, "sparsity": 0.6, "masks": START, "total_steps": 2 * STEPS, "key": KEY}


def structured(structure):
    return {"prunable": [("^blocks/", gj.Stacked(1, structure)), ("", structure)]}


METHODS = {  # of each kind the one that does most
    "granet": lambda: gj.granet(masks=START, total_steps=STEPS, **_gradual),
    "granet_by_layer": lambda: gj.granet(total_steps=STEPS, scope=gj.erk, **_gradual),
    "rigl_itop": lambda: gj.rigl_itop(**_sparse),
    "set_by_sign": lambda: gj.set_(by_sign=True, **_sparse),
    "set_itop_unexplored": lambda: gj.set_itop(unexplored_first=True, **_sparse),
    "snfs": lambda: gj.snfs(**_sparse),
}
REST = {
    "rigl": lambda: gj.rigl(**_sparse),
    "set": lambda: gj.set_(**_sparse),
    "set_itop": lambda: gj.set_itop(**_sparse),
    "gmp": lambda: gj.gmp(**_gradual),
    "granet_uniform": lambda: gj.granet(total_steps=STEPS, scope=gj.uniform, **_gradual),
    "magnitude": lambda: gj.magnitude(sparsity=0.8, at=1, prunable=RULES),
}
_half = {"final_sparsity": 0.5, "end_step": 1, "update_every": 1, "scope": gj.uniform}
STRUCTURED = {  # explicit axes do not let all of them be reshaped
    name: functools.partial(gj.granet, total_steps=STEPS, **_half, **structured(structure))
    for name, structure in {
        "2:4": gj.structures.n_of_m(4),
        "fan-in": gj.structures.fan_in(ablation=0.3),
        "block": gj.structures.block((8, 4)),
        "channel": gj.structures.channel(),
    }.items()
}
ALL = METHODS | REST | STRUCTURED
ROWS = [
    *itertools.product(AXIS_TYPES, METHODS | REST),
    *((AxisType.Auto, name) for name in STRUCTURED),
]
IN_CI = [
    *((AxisType.Explicit, name) for name in ("granet", "rigl_itop", "set_itop_unexplored")),
    *((AxisType.Auto, name) for name in ("granet", "set_by_sign", "snfs", "2:4")),
]


ABSTRACT = jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), SHAPES, is_leaf=is_shape
)


def draws(seed):
    """Multiples of 1/8, so that there are ties and no sum is rounded."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: rng.integers(-40, 40, shape).astype(np.float32) / 8, SHAPES, is_leaf=is_shape
    )


def shardings_on(mesh):
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)


def mesh_of(axis_type, x=2, y=4):
    return jax.make_mesh((x, y), ("x", "y"), axis_types=(axis_type,) * 2)


def masks_of_events(method, shardings):
    """The masks after each step, found with parameters that lie as told."""
    state_shardings = gj.sharding.like_params(
        jax.eval_shape(method.init, ABSTRACT), ABSTRACT, shardings
    )
    state = jax.device_put(method.init(jax.device_put(draws(0), shardings)), state_shardings)

    @jax.jit
    def update(state, params, grads, step):
        if method.observe is not None:
            state = method.observe(state, grads)
        return method.update(state, gj.Event(gj.apply_masks(params, state.masks), grads, step=step))

    masks = [jax.tree.map(np.asarray, state.masks)]
    for t in range(1, STEPS + 1):
        params, grads = jax.device_put((draws(t), draws(99 - t)), (shardings, shardings))
        state, _ = update(state, params, grads, jnp.int32(t))
        for mask, sharding in zip(
            jax.tree.leaves(state.masks), jax.tree.leaves(shardings), strict=True
        ):
            assert mask.sharding.is_equivalent_to(sharding, mask.ndim)
        masks.append(jax.tree.map(np.asarray, state.masks))
    return masks


@functools.cache
def masks_on_one_device(name):
    return masks_of_events(ALL[name](), shardings_on(mesh_of(AxisType.Auto, 1, 1)))


@pytest.mark.parametrize(
    ("axis_type", "name"),
    [pytest.param(*row, marks=() if row in IN_CI else pytest.mark.full) for row in ROWS],
)
def test_masks_are_those_of_one_device_and_lie_like_their_parameters(axis_type, name):
    mesh = mesh_of(axis_type)
    with jax.set_mesh(mesh):
        masks = masks_of_events(ALL[name](), shardings_on(mesh))
    expected = masks_on_one_device(name)
    chex.assert_trees_all_equal(masks, expected)
    for path, name in (("blocks", "kernel"), ("head", "kernel")):
        assert not np.array_equal(expected[0][path][name], expected[-1][path][name])


_COLLECTIVE = re.compile(
    r" = (.+?) (?:all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    r"|collective-broadcast|ragged-all-to-all)(?:-start)?\("
)


def communicated(compiled):
    """The bytes that each collective of a compiled function gives to a device."""
    found = []
    for result in _COLLECTIVE.findall(compiled.as_text()):
        arrays = re.findall(r"\b(pred|[a-z]+?(\d+))\[([\d,]*)\]", result)
        assert arrays, result
        found.append(
            sum(
                math.prod(int(n) for n in dims.split(",") if n) * max(1, int(bits or 8) // 8)
                for _, bits, dims in arrays
            )
        )
    return found


FEW_COUNTS = 64 * 4 * NUM_LAYERS  # bytes: 64 int32 for each layer


@pytest.mark.usefixtures("compiled_well")
@pytest.mark.parametrize("axis_type", AXIS_TYPES)
def test_an_update_communicates_counts_only(axis_type):
    mesh = mesh_of(axis_type)
    shardings = shardings_on(mesh)
    tx = gj.sparsify(optax.adam(1e-3), METHODS["granet"]())
    abstract = jax.eval_shape(tx.init, ABSTRACT)
    state, params = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        (abstract, ABSTRACT),
        (gj.sharding.like_params(abstract, ABSTRACT, shardings), shardings),
    )
    with jax.set_mesh(mesh):
        compiled = jax.jit(tx.update).lower(params, state, params).compile()
    sizes = communicated(compiled)
    assert sizes, "devices have to add up their counts"
    assert max(sizes) <= FEW_COUNTS


@pytest.mark.usefixtures("compiled_well")
def test_what_gathers_weights_is_noticed():
    shardings = shardings_on(mesh_of(AxisType.Auto))
    for layer in SHAPES:  # masks, the smallest that could be gathered
        shape, sharding = SHAPES[layer]["kernel"], shardings[layer]["kernel"]
        masks = jax.ShapeDtypeStruct(shape, jnp.bool_, sharding=sharding)
        compiled = jax.jit(lambda x: jnp.sort(x, axis=-1)).lower(masks).compile()
        assert max(communicated(compiled)) > FEW_COUNTS


def on_devices(num_devices):
    mesh = jax.make_mesh((num_devices,), ("x",), axis_types=(AxisType.Explicit,))
    return jax.set_mesh(mesh), NamedSharding(mesh, PartitionSpec("x"))


@pytest.mark.parametrize("num_devices", [2, 4, 8])
def test_draws_and_ties_do_not_know_of_devices(num_devices):
    def random(params):
        return gj.random_masks(KEY, params, 0.7)

    weights, tied = {"kernel": np.zeros((16, 6), np.float32)}, np.arange(96).reshape(16, 6) % 3.0
    expected = jax.tree.map(np.asarray, random(weights))
    context, sharding = on_devices(num_devices)
    with context:
        weights, scores = jax.device_put((weights, tied), sharding)
        for wrap in (jax.jit, lambda f: f) if num_devices == 8 else (jax.jit,):
            chex.assert_trees_all_equal(wrap(random)(weights), expected)
            best = np.asarray(wrap(gj.top_k_mask)(scores, 40))
            in_order = np.lexsort((np.arange(96), -tied.ravel()))[:40]
            np.testing.assert_array_equal(np.flatnonzero(best), np.sort(in_order))


OPTIMIZERS = {
    "adam": optax.adam,
    "chain": lambda rate: optax.chain(optax.clip(1.0), optax.trace(0.9), optax.scale(-rate)),
    "inject_hyperparams": lambda rate: optax.inject_hyperparams(optax.adam)(learning_rate=rate),
    "adafactor": lambda rate: optax.adafactor(rate, min_dim_size_to_factor=64, momentum=0.9),
}


@pytest.mark.parametrize("multi_steps", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_lies_like_its_parameters(name, multi_steps):
    tx = gj.sparsify(OPTIMIZERS[name](1e-3), METHODS["snfs"]())
    if multi_steps:
        tx = optax.MultiSteps(tx, 2)
    state = jax.eval_shape(tx.init, ABSTRACT)
    specs = gj.sharding.like_params(state, ABSTRACT, SPECS)
    assert jax.tree.structure(specs) == jax.tree.structure(state)
    # Each shape is that of one parameter alone, so it tells where a leaf should lie.
    lies = dict(
        zip(
            map(str, jax.tree.leaves(SHAPES, is_leaf=is_shape)), jax.tree.leaves(SPECS), strict=True
        )
    )
    for (path, leaf), spec in zip(
        jax.tree.leaves_with_path(state), jax.tree.leaves(specs), strict=True
    ):
        factored = name == "adafactor" and ".v_" in jax.tree_util.keystr(path)
        assert spec == (PartitionSpec() if factored else lies.get(str(leaf.shape), PartitionSpec()))
    mesh = mesh_of(AxisType.Auto)
    named = gj.sharding.like_params(state, ABSTRACT, shardings_on(mesh))
    assert named == jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def test_specs_of_flax_nnx_and_of_a_lone_array():
    state = nnx.state(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), nnx.Param)
    specs = {"kernel": PartitionSpec("x"), "bias": PartitionSpec()}
    tx = gj.sparsify(optax.adam(1e-3), gj.gmp(final_sparsity=0.5, end_step=1, update_every=1))
    for params in (state, nnx.to_pure_dict(state)):
        got = gj.sharding.like_params(jax.eval_shape(tx.init, params), params, specs)
        by_path = gj.trees.by_path(gj.get_masks(got))
        assert by_path == {("kernel",): specs["kernel"], ("bias",): specs["bias"]}
    lone = jnp.zeros((8, 4))
    got = gj.sharding.like_params(jax.eval_shape(tx.init, lone), lone, PartitionSpec("x"))
    assert gj.get_masks(got) == PartitionSpec("x")
    assert got.mask_step == PartitionSpec()


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ({"w": PartitionSpec()}, "1 leaves, but params have 2; only one of the two has b"),
        (
            {"w": PartitionSpec(), "b": "x"},
            "The spec of b is 'x'; expected a PartitionSpec for each",
        ),
        (
            {"w": PartitionSpec(), "b": NamedSharding(mesh_of(AxisType.Auto), PartitionSpec())},
            r"The spec of w is P.*; expected .* or a NamedSharding",
        ),
    ],
)
def test_wrong_specs(specs, message):
    params = {"w": jnp.zeros((2, 2)), "b": jnp.zeros(2)}
    with pytest.raises(ValueError, match=message):
        gj.sharding.like_params(params, params, specs)
