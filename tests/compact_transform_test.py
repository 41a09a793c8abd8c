"""``compact.sparsify`` against ``sparsify``: the same masks, the same live weights."""

import functools
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import granet_jax as gj
from granet_jax import compact

KEY = jax.random.key(7)
RULES = (("^stack/", gj.Stacked(1)),)


def params_of(seed=0):
    shapes = {
        "fc": {"bias": (16,), "kernel": (24, 16)},
        "heads": {"kernel": (8, 4, 8)},
        "stack": {"kernel": (3, 16, 12)},
    }
    leaves, tree = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(tree, map(jax.random.normal, keys, leaves))


def methods(steps):
    dynamic = {"update_every": 5, "total_steps": steps, "key": KEY}
    grouped = (("^stack/", gj.Stacked(1, gj.structures.n_of_m(4))), ("", gj.structures.n_of_m(4)))
    blocks = (
        ("^stack/", gj.Stacked(1, gj.structures.block((4, 4)))),
        ("", gj.structures.block((4, 4))),
    )
    gradual = {"end_step": steps // 2, "update_every": 5}
    layers = {"scope": gj.uniform}
    return {
        "static": (gj.static(sparsity=0.9, key=KEY, prunable=RULES), RULES),
        "set": (gj.set_(sparsity=0.9, prunable=RULES, **dynamic), RULES),
        "rigl": (gj.rigl(sparsity=0.9, prunable=RULES, **dynamic), RULES),
        "granet": (gj.granet(final_sparsity=0.9, prunable=RULES, **gradual | dynamic), RULES),
        "granet_st": (
            gj.granet(
                initial_sparsity=0.5, final_sparsity=0.9, prunable=RULES, **gradual | dynamic
            ),
            RULES,
        ),
        "gmp": (gj.gmp(final_sparsity=0.9, prunable=RULES, **gradual), RULES),
        "magnitude": (gj.magnitude(sparsity=0.9, at=7, prunable=RULES), RULES),
        "rigl_itop": (
            gj.track_exploration(gj.rigl_itop(sparsity=0.9, prunable=RULES, **dynamic)),
            RULES,
        ),
        "n_of_m_rigl": (
            gj.rigl(sparsity=0.75, start=gj.uniform, prunable=grouped, **dynamic),
            grouped,
        ),
        "n_of_m_gmp": (gj.gmp(final_sparsity=0.75, prunable=grouped, **gradual, **layers), grouped),
        "n_of_m_static": (
            gj.static(sparsity=0.5, start=gj.uniform, key=KEY, prunable=grouped),
            grouped,
        ),
        "block_set": (gj.set_(sparsity=0.75, prunable=blocks, **dynamic), blocks),
        "block_granet": (
            gj.granet(final_sparsity=0.75, prunable=blocks, **gradual | dynamic, **layers),
            blocks,
        ),
    }


INNERS = {
    "sgd": lambda: optax.sgd(0.1, momentum=0.9),
    "lion": lambda: optax.lion(1e-2),
    "rmsprop": lambda: optax.rmsprop(1e-2),
    "adamw": lambda: optax.adamw(1e-2, weight_decay=1e-2),
}
IN_CI = {
    ("granet_st", "adamw"),
    ("block_granet", "sgd"),
}
CASES = [
    pytest.param(m, i, marks=() if (m, i) in IN_CI else pytest.mark.full)
    for m in methods(200)
    for i in INNERS
]


def draw_gradients(params, step):
    keys = jax.random.split(jax.random.fold_in(KEY, step), len(jax.tree.leaves(params)))
    draws = map(lambda k, p: jax.random.normal(k, p.shape), keys, jax.tree.leaves(params))
    return jax.tree.unflatten(jax.tree.structure(params), list(draws))


@functools.partial(jax.jit, static_argnums=(0, 5))
def masked_step(tx, grads, state, params, _, __):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


@functools.partial(jax.jit, static_argnums=(0, 4))
def compact_step(tx, grads, state, values, event=None):
    slots = compact.to_slots(grads, compact.get_layouts(state))
    updates, state = tx.update(slots, state, values, dense_grads=lambda: grads, event=event)
    return optax.apply_updates(values, updates), state


@pytest.mark.parametrize(("method", "inner"), CASES)
def test_masks_and_weights_are_those_of_sparsify(method, inner, request):
    """Bit for bit, where XLA contracts arithmetic alike: all but AdamW, on the pinned JAX."""
    made, rules = methods(200)[method]
    inner_tx = INNERS[inner]()
    dense, slots = gj.sparsify(inner_tx, made), compact.sparsify(inner_tx, made, rules)
    params = params_of()
    state, other = dense.init(params), slots.init(params)
    params = gj.apply_masks(params, gj.get_masks(state))
    values = compact.to_slots(params, compact.get_layouts(other))
    request.getfixturevalue("compiled_well")  # not before: init is many small programs
    twin, twin_state = jax.tree.map(jnp.copy, (values, other))  # told what is an event
    num_regrown = 0
    draw = jax.jit(draw_gradients)
    for step in range(1, 201):
        grads = draw(params, step)
        before = gj.get_masks(state)
        params, state = masked_step(dense, grads, state, params, None, None)
        values, other = compact_step(slots, grads, other, values)
        event = bool(made.is_update_step(jnp.int32(step)))
        twin, twin_state = compact_step(slots, grads, twin_state, twin, event)
        layouts = compact.get_layouts(other)
        chex.assert_trees_all_equal(compact.masks(values, layouts), gj.get_masks(state))
        for slots_of in (values, twin):
            found = compact.unpack(slots_of, layouts)
            if jax.__version_info__ >= (0, 11):  # which rounds one kernel's momentum otherwise
                chex.assert_trees_all_close(found, params, rtol=1e-6, atol=2e-5)
            elif inner == "adamw":
                chex.assert_trees_all_close(found, params, rtol=1e-6, atol=1e-6)
            else:
                chex.assert_trees_all_equal(found, params)
        chex.assert_trees_all_equal(compact.get_layouts(twin_state), layouts)
        masks = gj.get_masks(state)
        regrown = jax.tree.map(lambda b, k, m: b & ~k & m, before, state.keep, masks)
        num_regrown += sum(int(x.sum()) for x in jax.tree.leaves(regrown))
    compact.check(other)
    compact.check(twin_state)
    if method.startswith("granet"):
        assert num_regrown > 0  # pruned and regrown in one event: they begin again at 0
    if made.name.startswith("track"):
        chex.assert_trees_all_equal(other.method.explored, state.method.explored)


def started(tx, params=None):
    params = params_of() if params is None else params
    state = tx.init(params)
    return compact.to_slots(params, compact.get_layouts(state)), state


def rigl(**changes):
    settings = {"sparsity": 0.9, "update_every": 2, "total_steps": 8, "key": KEY}
    return gj.rigl(**settings | changes, prunable=RULES)


def _matrices(params):
    return jax.tree.map(lambda x: x.ndim > 1, params)


SNFS = gj.snfs(sparsity=0.9, update_every=2, total_steps=8, key=KEY)
AT_ONCE = gj.magnitude(sparsity=0.9, at=2, prunable=RULES)
MEANS = optax.chain(optax.clip_by_block_rms(0.1), optax.sgd(0.1))
TOO_SMALL = {"fc/kernel": 3, "heads/kernel": 300, "stack/kernel": 300}
REFUSED = [
    (lambda: compact.sparsify(optax.sgd(0.1), SNFS), "snfs keeps an average of dense gradients"),
    (lambda: compact.sparsify(optax.contrib.muon(0.1), rigl(), RULES), "looks at their shapes"),
    (
        lambda: compact.sparsify(optax.adamw(0.1, mask=_matrices), rigl(), RULES),
        "looks at their shapes",
    ),
    (lambda: compact.sparsify(optax.adafactor(0.1), rigl(), RULES), "looks at their shapes"),
    # Slots of a dense start are as many as the weights, until they are shrunk.
    (lambda: compact.sparsify(optax.adafactor(0.1), AT_ONCE, RULES), "looks at their shapes"),
    (lambda: compact.sparsify(MEANS, AT_ONCE, RULES), "div 384.0"),
    (
        lambda: compact.sparsify(optax.sgd(0.1), rigl(), RULES, capacity=TOO_SMALL),
        "The capacity of fc/kernel is 3, but",
    ),
    (
        lambda: compact.sparsify(optax.set_to_zero(), rigl(), RULES),
        "which the optimizer never updates",
    ),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_refused_in_init(make, message):
    with pytest.raises(ValueError, match=message):
        make().init(params_of())


def test_a_decay_by_path_is_taken():
    def mask(params):
        return {k: k != "fc" for k in params}

    started(compact.sparsify(optax.adamw(0.1, mask=mask), rigl(), RULES))


def test_refused_in_update():
    tx = compact.sparsify(optax.adam(0.1), rigl(), RULES)
    values, state = started(tx)
    with pytest.raises(ValueError, match="needs the slots"):
        tx.update(values, state)
    with pytest.raises(ValueError, match="takes dense parameters; update takes slots"):
        tx.update(values, state, params_of())
    with pytest.raises(ValueError, match="The gradient of heads/kernel has shape none"):
        tx.update({k: v for k, v in values.items() if k != "heads"}, state, values)
    with pytest.raises(ValueError, match=r"The gradient of fc/kernel has shape \(24, 16\)"):
        tx.update(params_of(), state, values)
    with pytest.raises(ValueError, match="written by another optimizer"):
        compact.sparsify(optax.sgd(0.1, momentum=0.9), rigl(), RULES).update(values, state, values)
    with pytest.raises(ValueError, match="expects its own state, got a SparseState"):
        tx.update(values, gj.sparsify(optax.adam(0.1), rigl()).init(params_of()), values)
    static = gj.static(sparsity=0.9, key=KEY, prunable=RULES)
    other = compact.sparsify(optax.adam(0.1), static, RULES)
    with pytest.raises(ValueError, match="The state was written by the method rigl"):
        other.update(values, state, values)
    with pytest.raises(ValueError, match="rigl grows weights by gradients, which slots have not"):
        tx.update(values, state, values)
    set_ = gj.set_(sparsity=0.9, update_every=2, total_steps=8, key=KEY, prunable=RULES)
    tx = compact.sparsify(optax.adam(0.1), set_, RULES)
    values, state = started(tx)
    tx.update(values, state, values)  # by chance: nothing is missing
    with pytest.raises(ValueError, match="found 0 in a tuple"):
        compact.get_layouts(())


def test_init_under_jit_needs_the_capacity():
    tx = compact.sparsify(optax.adam(0.1), rigl(), RULES)
    with pytest.raises(ValueError, match="which are traced here"):
        jax.jit(tx.init)(params_of())
    masks = rigl().init(params_of())[0]
    capacity = compact.capacities(masks, gj.trees.describe(params_of(), RULES))
    told = compact.sparsify(optax.adam(0.1), rigl(), RULES, capacity=capacity)
    chex.assert_trees_all_equal(jax.jit(told.init)(params_of()), tx.init(params_of()))
    shapes = jax.eval_shape(told.init, params_of())
    assert shapes.layouts["stack/kernel"].index.shape == (3, capacity["stack/kernel"])


def test_what_went_wrong_is_told():
    """A method that outgrows its layers, and a loop that is wrong about events."""

    def grow(masks, keep, event):
        return jax.tree.map(jnp.ones_like, masks), keep

    start = gj.start_from(None, 0.9, gj.erk, RULES, KEY)
    method = gj.compose(start, grow, is_update_step=gj.every(2), key=KEY, name="grows")
    tx = compact.sparsify(optax.sgd(0.1), method, RULES)
    values, state = started(tx)
    values, state = compact_step(tx, params_of(), state, values)
    compact.check(state)
    values, state = compact_step(tx, params_of(), state, values)
    with pytest.raises(ValueError, match="weights that were to grow found no slot"):
        compact.check(state)
    assert state.layouts["fc/kernel"].capacity == int(compact.num_live(state.layouts["fc/kernel"]))
    tx = compact.sparsify(optax.sgd(0.1), rigl(), RULES)
    values, state = started(tx)
    _, state = compact_step(tx, params_of(), state, values, True)
    with pytest.raises(ValueError, match="told event= at 1 steps"):
        compact.check(state)


def test_rules_that_only_the_method_has_are_told():
    params = {"kernel": jnp.ones((4, 4)), "embed": jnp.arange(1.0, 17).reshape(4, 4)}
    method = gj.magnitude(sparsity=0.75, at=1, prunable=[("embed", True)])
    for rules, told in ((), True), ([("embed", True)], False):
        tx = compact.sparsify(optax.sgd(0.1), method, rules)
        values, state = started(tx, params)
        values, state = compact_step(tx, params, state, values)
        if told:
            with pytest.raises(ValueError, match="pruned in leaves that have no slots"):
                compact.check(state)
        else:
            compact.check(state)
            masks = compact.masks(values, compact.get_layouts(state))
            assert sum(int(x.sum()) for x in masks.values()) == 8


def test_shrinking_changes_nothing_but_memory():
    made, rules = methods(20)["granet"]
    tx = compact.sparsify(optax.adam(0.1), made, rules)
    values, state = started(tx)
    small, small_state = values, state
    for step in range(1, 15):
        grads = draw_gradients(params_of(), step)
        values, state = compact_step(tx, grads, state, values)
        small, small_state = compact_step(tx, grads, small_state, small)
        if step % 4 == 0:
            small, small_state = compact.shrink((small, small_state), small_state, small)
    layouts, fewer = compact.get_layouts(state), compact.get_layouts(small_state)
    for path, layout in fewer.items():
        assert layout.capacity < layouts[path].capacity
    chex.assert_trees_all_equal(compact.unpack(small, fewer), compact.unpack(values, layouts))
    chex.assert_trees_all_equal(compact.masks(small, fewer), compact.masks(values, layouts))
    moments = (x.inner[0].nu for x in (state, small_state))
    chex.assert_trees_all_equal(*map(compact.unpack, moments, (layouts, fewer)))


def test_shrinking_loses_no_weight():
    params = {"kernel": jnp.arange(1.0, 9.0).reshape(2, 4), "other": jnp.ones((2, 2))}
    tx = compact.sparsify(optax.sgd(0.1), gj.static(sparsity=0.5, start=gj.uniform, key=KEY))
    values, state = started(tx, params)
    with pytest.raises(ValueError, match=r"3 slots for a layer of kernel, in which 4 weights"):
        compact.shrink((values, state), state, values, {"kernel": 3})
    with pytest.raises(ValueError, match=r"'typo', which is no leaf with slots.*kernel, other"):
        compact.shrink((values, state), state, values, {"typo": 9})
    small, _ = compact.shrink((values, state), state, values, {"kernel": 4})
    chex.assert_trees_all_equal(small, values)


@pytest.mark.parametrize("kernels", [None, False], ids=str)
def test_shrinking_seeds_side_by_side(kernels):
    masks = gj.ones(params_of())
    capacity = compact.capacities(masks, gj.trees.describe(params_of(), RULES))
    tx = compact.sparsify(optax.adam(0.1), AT_ONCE, RULES, kernels=kernels, capacity=capacity)
    trees = [params_of(seed) for seed in range(2)]

    def train(params):
        values, state = started(tx, params)
        for _ in range(2):
            updates, state = tx.update(jax.tree.map(jnp.cos, values), state, values)
            values = optax.apply_updates(values, updates)
        return values, state

    together = jax.jit(jax.vmap(train))(jax.tree.map(lambda *x: jnp.stack(x), *trees))
    before = together[0]["fc"]["kernel"].shape
    together = compact.shrink(together, together[1], together[0])
    assert together[0]["fc"]["kernel"].shape < before
    for i, params in enumerate(trees):
        mine = jax.tree.map(lambda x, i=i: x[i], together)
        alone = jax.jit(train)(params)
        for leaves in ("values", "nu"):
            got, wanted = (
                compact.unpack(v if leaves == "values" else s.inner[0].nu, s.layouts)
                for v, s in (mine, alone)
            )
            chex.assert_trees_all_close(got, wanted, rtol=1e-6, atol=1e-7)
        x = jnp.ones((3, 24))
        product = compact.sparse(lambda values, x: x @ values["fc"]["kernel"])
        got, wanted = (product(v, s.layouts, x) for v, s in (mine, alone))
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.MultiSteps(tx, 2),
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: optax.chain(optax.identity(), tx),
    ],
)
def test_wrappers_outside(wrap):
    method = gj.set_(sparsity=0.9, update_every=2, total_steps=8, key=KEY, prunable=RULES)
    inner = optax.inject_hyperparams(optax.adam)(learning_rate=0.1)
    tx = wrap(compact.sparsify(optax.chain(optax.clip_by_global_norm(1.0), inner), method, RULES))
    params = params_of()
    state = tx.init(params)
    layouts = compact.get_layouts(state)
    state = compact.to_slots(state, layouts, params)
    values = compact.to_slots(params, layouts)

    @jax.jit
    def train(values, state):
        def step(carry, _):
            values, state = carry
            updates, state = tx.update(jax.tree.map(jnp.sin, values), state, values)
            return (optax.apply_updates(values, updates), state), None

        return jax.lax.scan(step, (values, state), length=6)[0]

    values, state = train(values, state)
    compact.check(state)
    masks = compact.masks(values, compact.get_layouts(state))
    assert gj.metrics.num_grown(gj.masks_from_zeros(params_of(), RULES), masks) == 0
    chex.assert_tree_all_finite(values)


def test_seeds_side_by_side():
    params = params_of()
    masks = rigl().init(params)[0]
    capacity = compact.capacities(masks, gj.trees.describe(params, RULES))

    def train(seed, event):
        method = rigl(key=jax.random.key(seed))
        tx = compact.sparsify(optax.adam(0.1), method, RULES, capacity=capacity)
        values, state = started(tx, params)
        for i in range(1, 4):
            slots = jax.tree.map(jnp.cos, values)
            updates, state = tx.update(
                slots, state, values, dense_grads=lambda: params, event=event and i == 2
            )
            values = optax.apply_updates(values, updates)
        return compact.unpack(values, state.layouts)

    together = jax.jit(jax.vmap(lambda seed: train(seed, True)))(jnp.arange(2))
    each = [jax.jit(lambda seed: train(seed, True))(seed) for seed in range(2)]
    alone = jax.tree.map(lambda *x: jnp.stack(x), *each)
    chex.assert_trees_all_close(together, alone, rtol=1e-6)


def test_slots_of_whole_states_and_back():
    tx = compact.sparsify(optax.adam(0.1), rigl(), RULES)
    values, state = started(tx)
    values, state = compact_step(tx, params_of(1), state, values)
    layouts = state.layouts
    dense = compact.unpack(state, layouts, values)
    assert dense.inner[0].mu["stack"]["kernel"].shape == (3, 16, 12)
    params = compact.abstract_params(values, layouts)
    chex.assert_trees_all_equal(compact.to_slots(dense, layouts, params), state)
    chex.assert_trees_all_equal(dense.layouts, layouts)
    with pytest.raises(ValueError, match="of another tree"):
        compact.unpack({"fc": values["fc"]}, layouts)


def test_states_in_files(tmp_path):
    tx = compact.sparsify(optax.adam(0.1), rigl(), RULES)
    values, state = started(tx)
    values, state = compact_step(tx, params_of(1), state, values)
    on = compact_step(tx, params_of(2), state, values)
    read = [pickle.loads(pickle.dumps(jax.device_get((values, state))))]
    example = jax.eval_shape(lambda: (values, state))
    flax = pytest.importorskip("flax.serialization")
    ocp = pytest.importorskip("orbax.checkpoint")
    read.append(flax.from_bytes((values, state), flax.to_bytes((values, state))))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", (values, state))
        checkpointer.wait_until_finished()
        read.append(checkpointer.restore(tmp_path / "state"))
    for back in read:
        values, state = gj.check_restored(back, example)
        again = compact_step(tx, params_of(2), *jax.tree.map(jnp.asarray, (state, values)))
        chex.assert_trees_all_equal(again, on)


def test_shardings_of_slots():
    devices = np.array(jax.devices()[:3])
    mesh = jax.sharding.Mesh(devices, ("layers",))
    tx = compact.sparsify(optax.adam(0.1), rigl(), RULES, kernels=False)
    values, state = started(tx)

    def sharding(path):
        names = ("layers",) if path.startswith("stack") else ()
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*names))

    specs = jax.tree.unflatten(
        jax.tree.structure(values), [sharding(path) for path in gj.trees.paths(values)]
    )
    of_state = gj.sharding.like_params(state, values, specs)
    assert of_state.inner[0].mu["stack"]["kernel"].spec == specs["stack"]["kernel"].spec
    on = compact_step(tx, params_of(2), *compact_step(tx, params_of(1), state, values)[::-1])
    state, values = jax.device_put((state, values), (of_state, specs))
    spread = compact_step(tx, params_of(2), *compact_step(tx, params_of(1), state, values)[::-1])
    chex.assert_trees_all_equal(spread[1].layouts, on[1].layouts)
    chex.assert_trees_all_close(spread[0], on[0], rtol=1e-6)
