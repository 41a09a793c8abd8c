"""States of ``compact.sparsify``: donated, wrapped, exported, read by a new process, in float64."""

import functools
import os
import pathlib
import pickle
import subprocess
import sys

import chex
import jax
import jax.export
import jax.numpy as jnp
import optax
import pytest

import granet_jax as gj
from granet_jax import compact
from granet_jax.compact import native, packing

ROOT = pathlib.Path(__file__).parents[1]
KEY = jax.random.key(7)
RULES = [("^stack/", gj.Stacked(1))]


def params_of(dtype=jnp.float32):
    keys = jax.random.split(KEY, 3)
    return {
        "fc": {"kernel": jax.random.normal(keys[0], (12, 8), dtype), "bias": jnp.ones(8, dtype)},
        "stack": {"kernel": jax.random.normal(keys[1], (3, 6, 8), dtype)},
    }


def gradients(params, step):
    return jax.tree.map(lambda p: jnp.sin(40 * (p + 0.1 * step)).astype(p.dtype), params)


def rigl(**changes):
    settings = {"sparsity": 0.7, "update_every": 2, "total_steps": 12, "key": KEY}
    return gj.rigl(**settings | changes, prunable=RULES)


def started(tx, dtype=jnp.float32):
    params = params_of(dtype)
    state = tx.init(params)
    layouts = compact.get_layouts(state)
    return compact.to_slots(params, layouts), compact.to_slots(state, layouts, params)


@functools.partial(jax.jit, static_argnums=0)
def step(tx, grads, state, values, of_event=None):
    slots = compact.to_slots(grads, compact.get_layouts(state))
    of_event = grads if of_event is None else of_event
    updates, state = tx.update(slots, state, values, dense_grads=lambda: of_event)
    return optax.apply_updates(values, updates), state


@functools.partial(jax.jit, static_argnums=0)
def masked_step(tx, grads, state, params):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def side_by_side(request, wrap, inner, dtype=jnp.float32, micro=1, spoil=None, **tolerances):
    """Trains slots and masks; both must have the same masks and weights."""
    method = rigl()
    masked, slots = wrap(gj.sparsify(inner, method)), wrap(compact.sparsify(inner, method, RULES))
    state = masked.init(params_of(dtype))
    params = gj.apply_masks(params_of(dtype), gj.get_masks(state))
    values, other = started(slots, dtype)
    request.getfixturevalue("compiled_well")  # not before: init is many small programs
    total = None
    for i in range(1, 7 * micro):
        grads = gradients(params_of(dtype), i)
        if spoil == i:
            grads = jax.tree.map(lambda x: x * jnp.nan, grads)
        total = grads if i % micro == 1 or micro == 1 else jax.tree.map(jnp.add, total, grads)
        mean = jax.tree.map(lambda x: x / micro, total)
        params, state = masked_step(masked, grads, state, params)
        values, other = step(slots, grads, other, values, mean)
        layouts = compact.get_layouts(other)
        chex.assert_trees_all_equal(compact.masks(values, layouts), gj.get_masks(state))
        found = compact.unpack(values, layouts)
        if tolerances:
            chex.assert_trees_all_close(found, params, **tolerances)
        else:
            chex.assert_trees_all_equal(found, params)
    compact.check(other)
    return other


def multi_steps(tx):
    steps = optax.MultiSteps(tx, every_k_schedule=2)
    return optax.GradientTransformationExtraArgs(steps.init, steps.update)


def test_gradients_of_two_batches(request):
    side_by_side(request, multi_steps, optax.sgd(0.1, momentum=0.9), micro=2)


def test_a_step_that_is_skipped(request):
    wrap = functools.partial(optax.apply_if_finite, max_consecutive_errors=3)
    state = side_by_side(request, wrap, optax.sgd(0.1, momentum=0.9), spoil=2)
    assert compact.get_state(state).mask_step == 5


def test_norms_are_those_of_live_weights(request):
    inner = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.inject_hyperparams(optax.lamb)(optax.linear_schedule(0.1, 0.01, 6)),
    )
    side_by_side(request, lambda tx: tx, inner, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.full)])
def test_half_precision(dtype, request):
    side_by_side(request, lambda tx: tx, optax.sgd(0.1, momentum=0.9), dtype)


def test_donated_buffers_and_loops_of_scan():
    params = params_of()
    tx = compact.sparsify(optax.adam(0.1), rigl(), RULES)
    values, state = start = started(tx)

    def once(carry, i):
        values, state = carry
        return step(tx, gradients(params_of(), i), state, values), None

    scanned, _ = jax.jit(lambda carry: jax.lax.scan(once, carry, jnp.arange(5)))(start)
    given = tx.init(params)  # holds what nobody else holds
    donated = jax.jit(lambda v, s, i: once((v, s), i)[0], donate_argnums=(0, 1))
    values, state = compact.to_slots(params, given.layouts), given
    for i in range(5):
        values, state = donated(values, state, i)
    chex.assert_trees_all_close((values, state), scanned, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_equal(state.layouts, scanned[1].layouts)
    chex.assert_trees_all_equal(params, params_of())
    assert jax.random.uniform(KEY) < 1  # as alive as the parameters


def test_each_prunable_leaf_needs_a_capacity():
    tx = compact.sparsify(optax.sgd(0.1), rigl(), RULES, capacity={"fc/kernel": 96})
    with pytest.raises(ValueError, match="Give the capacity of stack/kernel, too"):
        tx.init(params_of())
    assert tx.init({}).layouts == {}  # as optax probes


def test_norms_over_axes_are_refused():
    inner = optax.chain(optax.adaptive_grad_clip(0.1), optax.sgd(0.1))
    with pytest.raises(ValueError, match="reduce_sum over some axes"):
        compact.sparsify(inner, rigl(), RULES).init(params_of())


def test_what_a_method_keeps_is_dense_and_stays_so():
    """Though its leaves may have the shape of slots, as in vectors that start dense."""
    rules = [("^scale", gj.Stacked(1, prunable=True))]
    params = {"scale": jax.random.normal(KEY, (3, 40)), "kernel": jax.random.normal(KEY, (4, 4))}
    method = gj.track_exploration(
        gj.gmp(final_sparsity=0.9, end_step=2, update_every=1, prunable=rules)
    )
    tx = compact.sparsify(optax.adam(0.1), method, rules)
    state = tx.init(params)
    values = compact.to_slots(params, state.layouts)
    for i in range(3):
        values, state = step(tx, gradients(params, i), state, values)
    fewer, smaller = compact.shrink((values, state), state, values)
    assert fewer["scale"].shape < values["scale"].shape
    chex.assert_trees_all_equal(smaller.method, state.method)
    whole = compact.unpack(smaller, smaller.layouts, fewer)
    chex.assert_trees_all_equal(whole.method, state.method)
    chex.assert_trees_all_equal(compact.to_slots(whole, smaller.layouts, params), smaller)
    grads = gradients(params, 4)
    chex.assert_trees_all_equal(
        compact.unpack(step(tx, grads, smaller, fewer)[0], smaller.layouts),
        compact.unpack(step(tx, grads, state, values)[0], state.layouts),
    )


@pytest.mark.parametrize("kernels", [False, None])
def test_exported_steps(kernels):
    pytest.importorskip("flatbuffers")
    tx = compact.sparsify(optax.adam(0.1), rigl(), RULES, kernels=kernels)
    values, state = started(tx)
    gj.register_for_jax_export(state)
    args = gradients(params_of(), 1), state, values
    trusted = [
        jax.export.DisabledSafetyCheck.custom_call(native.target(name))
        for name in ("lists", "reslot")
    ]
    exported = jax.export.export(
        jax.jit(functools.partial(step, tx)), disabled_checks=() if kernels is False else trusted
    )(*args)
    read = jax.export.deserialize(exported.serialize())
    chex.assert_trees_all_equal(read.call(*args), step(tx, *args))


READER = """
import pickle, sys
import jax, jax.numpy as jnp
with open(sys.argv[1], "rb") as file:
    values, layouts, x = pickle.load(file)
from granet_jax import compact
grads = jax.grad(compact.sparse(lambda p, x: jnp.sum(jnp.sin(x @ p["fc"]["kernel"])), native=True))
with open(sys.argv[1], "wb") as file:
    pickle.dump(jax.device_get(grads(values, layouts, x)), file)
"""


def test_a_new_process_knows_the_kernels(tmp_path):
    """Though it makes no layouts, but reads them."""
    if not native.available():
        pytest.skip("native.cc is not built here")
    values, state = started(compact.sparsify(optax.sgd(0.1), rigl(), RULES))
    path, x = tmp_path / "state.pkl", jnp.ones((4, 12))
    path.write_bytes(pickle.dumps(jax.device_get((values, state.layouts, x))))
    done = subprocess.run(
        [sys.executable, "-c", READER, str(path)],
        cwd=ROOT,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    loss = compact.sparse(lambda p, x: jnp.sum(jnp.sin(x @ p["fc"]["kernel"])))
    wanted = jax.grad(loss)(values, state.layouts, x)
    chex.assert_trees_all_close(pickle.loads(path.read_bytes()), wanted, rtol=1e-5, atol=1e-6)


def test_layouts_of_a_machine_with_kernels_on_one_without(monkeypatch):
    if not native.available():
        pytest.skip("native.cc is not built here")
    tx = compact.sparsify(optax.sgd(0.1), rigl(), RULES)
    values, state = started(tx)
    monkeypatch.setattr(native, "available", lambda: False)
    packing.reslot.clear_cache()  # as another process has no traces
    grads = jax.tree.map(jnp.ones_like, values)
    with pytest.raises(RuntimeError, match=r"_replace\(by_output=None, by_input=None\)"):
        tx.update(grads, state, values, dense_grads=params_of, event=True)
    layouts = {k: x._replace(by_output=None, by_input=None) for k, x in state.layouts.items()}
    without = state._replace(layouts=layouts)
    _, without = tx.update(grads, without, values, dense_grads=params_of, event=True)
    monkeypatch.undo()
    _, state = tx.update(grads, state, values, dense_grads=params_of, event=True)
    for path, layout in state.layouts.items():
        chex.assert_trees_all_equal(layout.index, without.layouts[path].index)


@pytest.fixture
def x64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_x64(dtype):
    """Weights in float64 are multiplied by dense products; all integers stay as they are."""
    tx = compact.sparsify(optax.adam(0.1), rigl(), RULES)
    values, state = start = started(tx, dtype)
    x = jax.random.normal(KEY, (5, 12), dtype)

    def loss(params, x):
        return jnp.sum(jnp.sin(x @ params["fc"]["kernel"] + params["fc"]["bias"][None]))

    for _ in range(4):
        grads = jax.grad(compact.sparse(loss, native=True))(values, state.layouts, x)
        wanted = jax.grad(loss)(compact.unpack(values, state.layouts), x)
        close = {"rtol": 1e-5, "atol": 1e-5} if dtype == jnp.float32 else {"rtol": 1e-12}
        slots = compact.to_slots(wanted, state.layouts)
        chex.assert_trees_all_close(grads, slots, **close)
        values, state = step(tx, wanted, state, values)
    compact.check(state)
    chex.assert_trees_all_equal_shapes_and_dtypes((values, state), start)
    smaller = compact.shrink((values, state), state, values)
    chex.assert_trees_all_equal_dtypes(smaller, start)
