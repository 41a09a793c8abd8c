"""States in files: whatever writes and reads them, training goes on with the same bits."""

import collections
import copy
import functools
import pickle
from typing import NamedTuple

import chex
import cloudpickle
import equinox as eqx
import flax.serialization
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy

import granet_jax as gj

KEY = jax.random.key(5)
STEPS, SAVED_AT = 6, 3
DYNAMIC = {"sparsity": 0.5, "update_every": 2, "total_steps": STEPS, "key": KEY}
METHODS = {
    "granet": lambda: gj.granet(
        initial_sparsity=0.25,
        final_sparsity=0.5,
        end_step=4,
        update_every=2,
        total_steps=STEPS,
        key=KEY,
    ),
    "set": lambda: gj.set_(**DYNAMIC),
    "snfs": lambda: gj.snfs(**DYNAMIC),
    "rigl_itop": lambda: gj.rigl_itop(**DYNAMIC),
}
OPTIMIZERS = {
    "adam": lambda: optax.adam(optax.linear_schedule(1e-2, 0.0, STEPS)),
    "sgd": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9)),
}


class Layer(NamedTuple):
    kernel: jax.Array
    bias: jax.Array


TRACED = collections.Counter()  # how often the step of a case was


class Case(NamedTuple):
    tx: optax.GradientTransformationExtraArgs
    step: object  # jitted: state -> state
    saved: object  # the state in mid-training
    final: object  # straight through


@pytest.fixture(autouse=True, scope="module")
def _compile_quickly():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def initial():
    """Eleven layers in a list: in the order of their names "10" comes before "2"."""
    weights = jax.random.normal(KEY, (12, 4, 4))
    return {"layers": list(weights[:11]), "head": (Layer(weights[11], jnp.ones(4)),)}


@functools.cache
def case(method, optimizer):
    tx = gj.sparsify(OPTIMIZERS[optimizer](), METHODS[method]())

    def start():
        params = initial()
        opt_state = tx.init(params)
        return gj.apply_masks(params, gj.get_masks(opt_state)), opt_state

    def step(state):
        TRACED[method, optimizer] += 1
        params, opt_state = state
        grads = jax.tree.map(lambda p: p - jnp.cos(3 * p), params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    jitted = jax.jit(step)
    states = [jax.jit(start)()]
    for _ in range(STEPS):
        states.append(jitted(states[-1]))
    return Case(tx, jitted, states[SAVED_AT], states[-1])


def flat(state):
    return {path: np.asarray(x) for path, x in gj.trees.paths(state).items()}


def through_pickle(state, example, path):
    return pickle.loads(pickle.dumps(state))


def through_cloudpickle(state, example, path):
    return cloudpickle.loads(cloudpickle.dumps(state))


def through_deepcopy(state, example, path):
    return copy.deepcopy(state)


def through_msgpack(state, example, path):
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), example)
    return flax.serialization.from_bytes(zeros, flax.serialization.to_bytes(state))


def through_msgpack_alone(state, example, path):
    return flax.serialization.msgpack_restore(flax.serialization.to_bytes(state))


def through_state_dict(state, example, path):
    return flax.serialization.to_state_dict(state)


def through_npz(state, example, path):
    np.savez(path / "state.npz", **flat(state))
    with np.load(path / "state.npz") as file:
        return dict(file)


def through_safetensors(state, example, path):
    safetensors.numpy.save_file(flat(state), path / "state.safetensors")
    return safetensors.numpy.load_file(path / "state.safetensors")


def through_orbax(state, example, path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "state", example)


def through_orbax_alone(state, example, path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "state")


def through_equinox(state, example, path):
    eqx.tree_serialise_leaves(path / "state.eqx", state)
    return eqx.tree_deserialise_leaves(path / "state.eqx", example)


WAYS = [
    through_pickle,
    through_cloudpickle,
    through_deepcopy,
    through_msgpack,
    through_msgpack_alone,
    through_state_dict,
    through_npz,
    through_safetensors,
    through_orbax,
    through_orbax_alone,
    through_equinox,
]


PAIRS = [
    *[("granet", "adam"), ("set", "sgd"), ("snfs", "adam"), ("rigl_itop", "sgd")],
    *[
        pytest.param(*pair, marks=pytest.mark.full)
        for pair in (("granet", "sgd"), ("set", "adam"), ("snfs", "sgd"), ("rigl_itop", "adam"))
    ],
]


@pytest.mark.parametrize(("method", "optimizer"), PAIRS)
def test_the_same_bits_whatever_writes_and_reads(method, optimizer, tmp_path):
    _, step, saved, final = case(method, optimizer)
    example, traced = jax.eval_shape(lambda: saved), TRACED[method, optimizer]
    for way in WAYS:
        folder = tmp_path / way.__name__
        folder.mkdir()
        restored = gj.check_restored(way(saved, example, folder), example)
        chex.assert_trees_all_equal(restored, saved)
        # As new arrays, for those that were read lie elsewhere, and the step is compiled once.
        state = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), restored)
        for _ in range(SAVED_AT, STEPS):
            state = step(state)
        chex.assert_trees_all_equal(state, final)
    assert TRACED[method, optimizer] == traced  # restored states are like those before


def test_the_state_is_plain_arrays():
    for method, optimizer in (("set", "sgd"), ("snfs", "adam")):
        state = case(method, optimizer).saved
        kinds = {np.asarray(x).dtype.name for x in jax.tree.leaves(state)}
        assert kinds <= {"float32", "bool", "int32", "uint32"}


def test_a_state_of_before_is_brought_up_to_date():
    tx, step, saved, final = case("set", "sgd")
    params, new = saved
    key = jax.random.wrap_key_data(new.method.key)
    old = gj.SparseState(*new._replace(method=new.method._replace(key=key))[:4])
    old = pickle.loads(pickle.dumps(old))
    with pytest.raises(ValueError, match=r"of an earlier version.*check_restored\(state, jax.eval"):
        tx.update(params, old, params)
    state = params, gj.check_restored(old, jax.eval_shape(tx.init, params))
    for _ in range(SAVED_AT, STEPS):
        state = step(state)
    chex.assert_trees_all_equal(state, final)


def test_typed_keys_and_raw_ones_stand_for_each_other():
    saved = case("set", "sgd").saved[1]
    typed = saved._replace(
        method=saved.method._replace(key=jax.random.wrap_key_data(saved.method.key))
    )
    chex.assert_trees_all_equal(gj.check_restored(typed, saved), saved)
    assert gj.check_restored(saved, typed).method.key == typed.method.key
    other = saved._replace(method=saved.method._replace(key=jax.random.key(0, impl="rbg")))
    with pytest.raises(ValueError, match=r"method/key is uint32 \(4,\), expected uint32 \(2,\)"):
        gj.check_restored(other, saved)
    raw = jax.random.key_data(other.method.key)
    again = gj.check_restored(other._replace(method=other.method._replace(key=raw)), other)
    assert again.method.key == other.method.key


def test_what_does_not_fit_is_refused():
    saved = case("set", "sgd").saved
    example = jax.eval_shape(lambda: saved)
    for change, message in (
        (lambda x: x.pop("1/keep/layers/10"), "1/keep/layers/10 is missing, expected bool"),
        (lambda x: x.update(more=np.ones(2)), "more is float64 .2,., expected nothing"),
        (lambda x: x.update({"1/mask_step": None}), "1/mask_step is missing, expected int32"),
        (lambda x: x.update({"1/mask_step": 3}), "1/mask_step is int, expected int32"),
    ):
        read = flat(saved)
        change(read)
        with pytest.raises(ValueError, match=message):
            gj.check_restored(read, example)
    other = saved[0], saved[1]._replace(written_by={"rigl": None})
    for read in (other, flax.serialization.to_state_dict(other)):
        with pytest.raises(ValueError, match="written by the method rigl, expected set"):
            gj.check_restored(read, example)
    twice = {"a/b": jnp.ones(2), "a": {"b": jnp.zeros(2)}}
    chex.assert_trees_all_equal(gj.check_restored(gj.trees.paths(twice), twice), twice)
    with pytest.raises(ValueError, match=r"'a/b' is float32 \(2,\), expected nothing"):
        gj.check_restored(twice, {"a": {"b": jnp.zeros(2)}})
    layers = {str(i): {"kernel": jnp.ones(2)} for i in range(9)}
    deeper = {name: {"kernel": {"value": x["kernel"]}} for name, x in layers.items()}
    names = "0/kernel/value is .* expected nothing; .*; 0/kernel is missing, .* and 13 more"
    with pytest.raises(ValueError, match=names):
        gj.check_restored(deeper, layers)


@pytest.mark.parametrize(
    ("method", "optimizer"),
    [("set", "sgd"), pytest.param("snfs", "adam", marks=pytest.mark.full)],
)
def test_an_exported_step_goes_on_with_the_same_bits(method, optimizer):
    pytest.importorskip("flatbuffers")
    _, step, saved, final = case(method, optimizer)
    gj.register_for_jax_export(saved)
    gj.register_for_jax_export(jax.eval_shape(lambda: saved))  # twice is as once
    content = jax.export.export(step)(saved).serialize()
    read = jax.export.deserialize(content)
    state = saved
    for _ in range(SAVED_AT, STEPS):
        state = read.call(state)
    chex.assert_trees_all_equal(state, final)


def test_states_of_the_library_are_registered_on_their_own():
    pytest.importorskip("flatbuffers")

    def exported(state):
        return jax.export.export(jax.jit(lambda state: state))(state).serialize()

    penalty = gj.reparam.PenaltyState(*jnp.zeros((3,)), {})
    for state in (case("set", "sgd").saved[1]._replace(inner={}), penalty):
        assert exported(state)

    class Unknown(NamedTuple):
        x: jax.Array

    unknown = {"inner": [Unknown(jnp.ones(2))]}
    with pytest.raises(ValueError, match="Unknown"):
        exported(unknown)
    gj.register_for_jax_export(unknown)
    assert exported(unknown)


def test_slots_of_layers_of_another_shape_are_told():
    """Nothing but the text in a layout tells them apart."""
    one, other = (_slots_of(shape) for shape in ((4, 8), (8, 4)))
    message = r"layouts/kernel is of layers \|4\|8 in single weights, expected layers \|8\|4"
    with pytest.raises(ValueError, match=message):
        gj.check_restored(one, other)
    chex.assert_trees_all_equal(gj.check_restored(one, one), one)


def _slots_of(shape, **settings):
    structure = [("", gj.structures.block((2, 2)))]
    method = gj.static(sparsity=0.5, start=gj.uniform, key=KEY, prunable=structure)
    tx = gj.compact.sparsify(optax.adam(0.1), method, structure, kernels=False, **settings)
    return tx.init({"kernel": jnp.ones(shape)})


def test_slots_that_another_machine_keeps_otherwise_are_told():
    """Blocks are kept whole on GPUs, and lists where there are native kernels."""
    plain, blocks = _slots_of((4, 8)), _slots_of((4, 8), block=(2, 2))
    with pytest.raises(ValueError, match=r"\|4\|8 in blocks 2x2, expected layers \|4\|8 in single"):
        gj.check_restored(blocks, plain)
    lists = gj.compact.Lists(*[jnp.zeros(3, jnp.int32)] * 3)
    layout = plain.layouts["kernel"]._replace(by_output=lists, by_input=lists)
    listed = plain._replace(layouts={"kernel": layout})
    for pair in ((listed, plain), (plain, listed)):
        with pytest.raises(ValueError, match="only one of the two has lists for the native kern"):
            gj.check_restored(*pair)
    chex.assert_trees_all_equal(gj.compact.relist(listed, kernels=False), plain)
