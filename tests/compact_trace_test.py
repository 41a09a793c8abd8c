"""Functions of live weights: outputs and gradients of the dense ones, and what is unpacked."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import granet_jax as gj
from granet_jax import compact, trees
from granet_jax.compact import layouts, native
from granet_jax.compact.layouts import Layout, Lists
from granet_jax.compact.trace import sparse, table


def random(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed + sum(shape)), shape)


def lists(places, keys, num_lists, capacity):
    """Lists of one tile: in order of key, then place."""
    order = np.lexsort((places, keys))
    slots = np.zeros((2, capacity), np.int32)
    slots[:, : len(order)] = places[order], order
    ends = np.cumsum(np.bincount(keys, minlength=num_lists))
    return Lists(np.concatenate([[0], ends]).astype(np.int32), *slots)


def layout_of(mask, stack, cut, dead=2, seed=0, with_lists=False):
    """A layout with its slots shuffled, a few of them dead."""
    rng = np.random.default_rng(seed)
    sizes = mask.shape[:stack], mask.shape[stack : stack + cut], mask.shape[stack + cut :]
    num_inputs, num_outputs = (int(np.prod(n)) for n in sizes[1:])
    layers = mask.reshape(-1, num_inputs * num_outputs)
    capacity = int(layers.sum(1).max()) + dead
    index = np.full((len(layers), capacity), layers.shape[1], np.int32)
    found = []
    for row, layer in zip(index, layers, strict=True):
        live = rng.permutation(np.flatnonzero(layer))
        row[: len(live)] = live
        i, j = np.divmod(live, num_outputs)
        found.append((lists(i, j, num_outputs, capacity), lists(j, i, num_inputs, capacity)))

    def whole(*arrays):
        return jnp.asarray(np.stack(arrays).reshape(*sizes[0], -1))

    made = (jax.tree.map(whole, *each) for each in zip(*found, strict=True))
    by_output, by_input = made if with_lists else (None, None)
    return Layout(whole(*index), by_output, by_input, layouts.written(*sizes))


def packed(params, how=None, density=0.5, with_lists=False):
    """Masked params, their slots and layouts; ``how``: (stack axes, axes of inputs) by path."""
    how = {path: (0, 1) for path in trees.paths(params)} if how is None else how
    rng = np.random.default_rng(0)
    found, dense, values = {}, [], []
    for path, leaf in trees.paths(params).items():
        if path in how:
            mask = rng.random(leaf.shape) < density
            found[path] = layout_of(mask, *how[path], with_lists=with_lists)
            leaf = jnp.where(mask, leaf, 0)
            dense, values = [*dense, leaf], [*values, layouts.slots(leaf, found[path])]
        else:
            dense, values = [*dense, leaf], [*values, leaf]
    tree = jax.tree.structure(params)
    return jax.tree.unflatten(tree, dense), jax.tree.unflatten(tree, values), found


def number(tree):
    """Anything as a number that its entries have unequal shares in."""
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(tree)]
    floats = [x for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]
    return sum(jnp.sum(x * jnp.cos(jnp.arange(x.size)).reshape(x.shape)) for x in floats)


def told(fn, values, found, *args, **kwargs):
    """The ways of all uses."""
    header, *lines = table(fn, values, found, *args, **kwargs).splitlines()
    start, stop = header.index("way"), header.index("why")
    return [line[start:stop].strip() for line in lines]


def check(fn, params, *args, how=None, ways=("dense",), rtol=1e-6, **kwargs):
    """That outputs and gradients are those of the dense function, compiled and not."""
    dense, values, found = packed(params, how, **kwargs)
    expected = jax.tree.map(jnp.asarray, fn(dense, *args))
    on_slots = sparse(fn)
    close = functools.partial(chex.assert_trees_all_close, rtol=rtol, atol=rtol)
    close(on_slots(values, found, *args), expected)
    close(jax.jit(on_slots)(values, found, *args), expected)
    chex.assert_trees_all_equal_dtypes(on_slots(values, found, *args), expected)
    of_dense = jax.grad(lambda p: number(fn(p, *args)))(dense)
    of_slots = jax.jit(jax.grad(lambda v: number(on_slots(v, found, *args))))(values)
    for (path, slots), leaf in zip(
        trees.paths(of_slots).items(), jax.tree.leaves(of_dense), strict=True
    ):
        close(slots, layouts.slots(leaf, found[path]) if path in found else leaf)
    assert told(fn, values, found, *args) == list(ways)
    return dense, values, found


X, W = random(5, 4), {"w": random(4, 6)}


def cast(p, x):
    w = -p["w"].astype(jnp.float16).astype(jnp.float32)
    return x @ lax.stop_gradient(2.0 * w / 3.0) + x @ (lax.optimization_barrier(w) * x[0, 0])


def merged_and_split(p, x):
    w = p["w"].reshape(2, 2, 6).transpose(2, 1, 0).reshape(3, 2, 4)  # inputs in another order
    return jnp.einsum("abc,nc->nba", w, x)


def wide(p, x):
    return x @ p["w"][None, :, :, None].reshape(4, 2, 3).reshape(4, 6)


def heads(p, x):
    q = jnp.einsum("nd,dhe->nhe", x, p["q"])
    k = jnp.einsum("dhe,nd->ehn", p["q"], x)  # the view first, its axes apart
    out = jnp.einsum("nhe,heo->no", q, p["o"])
    return out, jnp.einsum("heo,neh->on", p["o"], q.swapaxes(1, 2)), k


HEADS = {"o": random(2, 3, 4), "q": random(4, 2, 3)}


def tied(p, x):
    return (x @ p["w"]) @ p["w"].T, p["w"] @ (x @ p["w"])[0], p["w"].T @ x[0]


def aux(p, x, i):
    y = x @ p["w"]
    return jnp.sum(y), {"y": y, "i": i + 1, "none": None, "sum": [jnp.sum(p["b"])]}


@pytest.mark.parametrize(
    ("fn", "params", "args", "how", "ways"),
    [
        (lambda p, x: x @ p["w"], W, (X,), None, ["dense"]),
        (lambda p, x: p["w"].T @ x.T, W, (X,), None, ["dense"]),
        (lambda p, x: x[0] @ p["w"], W, (X,), None, ["dense"]),
        (lambda p, x: x @ p["w"], W, (X[:0],), None, ["dense"]),
        (lambda p, x: x @ p["w"], W, (X[:1],), None, ["dense"]),
        (lambda p, x: x @ p["w"].T, {"w": random(1, 4)}, (X,), None, ["dense"]),
        (lambda p, x: x @ p["w"], {"w": random(4, 1)}, (X,), None, ["dense"]),
        (lambda p, x: jax.jit(jnp.dot)(x, p["w"]), W, (X,), None, ["dense"]),
        (cast, W, (X,), None, ["dense"] * 2),
        (merged_and_split, W, (X,), None, ["dense"]),
        (lambda p, x: x[:, :2] @ p["w"].reshape(2, 12), W, (X,), None, ["unpacked: dot_general"]),
        (lambda p, x: x @ p["w"].reshape(3, 4, 2), W, (X,), None, ["unpacked: reshape"]),
        (wide, W, (X,), None, ["dense"]),
        (heads, HEADS, (X,), {"q": (0, 1), "o": (0, 2)}, ["dense"] * 4),
        (tied, W, (X,), None, ["dense"] * 5),
        (aux, {"w": W["w"], "b": random(3, 2)}, (X, 3), {"w": (0, 1)}, ["dense"]),
        (lambda p, x: p["w"] @ p["v"], W | {"v": random(6, 2)}, (X,), None, None),
        (lambda p, x: x @ p["w"] + jnp.sum(p["w"] ** 2), W, (X,), None, None),
        (lambda p, x: (x @ p["w"], p["w"].T), W, (X,), None, ["dense", "unpacked: output"]),
        (lambda p, x: x + p["w"][1, 2], {"w": random(4, 6)}, (X,), None, ["unpacked: slice"]),
        (lambda p, x: x, W, (X,), None, ["not read"]),
    ],
)
def test_products(fn, params, args, how, ways):
    if ways is None:
        other = "unpacked: dot_general" if "v" in params else "unpacked: "
        _, values, found = packed(params, how)
        assert sum(way.startswith(other) for way in told(fn, values, found, *args)) == 1
        ways = told(fn, values, found, *args)
        assert sum(way == "dense" for way in ways) == 1
    check(fn, params, *args, how=how, ways=ways)


STACK = {"b": random(3, 4), "w": random(3, 4, 4)}
STACKED = {"w": (1, 1)}


def by_index(p, x):
    for i in range(3):
        x = jnp.tanh(x @ p["w"][i])
    return x


def by_traced_index(p, x):
    return lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p["w"][i]), x)


def by_iteration(p, x):
    for w in p["w"]:
        x = jnp.tanh(x @ w)
    return x


def by_scan(p, x, step=lambda f: f, **kwargs):
    @step
    def layer(x, p):
        x = jnp.tanh(x @ p["w"] + p["b"][None])
        return x, jnp.sum(x)

    return lax.scan(layer, x, p, **kwargs)


def by_part(p, x):
    some = p["w"][1:]
    return lax.scan(lambda x, w: (x @ w, None), x, some)[0] @ lax.slice_in_dim(p["w"], 0, 3, 2)[1]


def in_blocks(p, x):
    """A scan of blocks of two layers, each of which is recomputed."""

    @jax.checkpoint
    def block(x, ws):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0], None

    return lax.scan(block, x, p["w"])[0]


def shared_in_scan(p, x):
    return lax.scan(lambda x, _: (jnp.tanh(x @ p["w"][0]), None), x, None, length=3)[0]


def carried(p, x):
    return lax.scan(lambda c, _: ((c[0] @ c[1], 2 * c[1]), None), (x, p["w"][0]), None, length=2)[
        0
    ][0]


@pytest.mark.parametrize(
    ("fn", "ways"),
    [
        (by_index, ["dense"] * 3),
        (by_traced_index, ["dense"]),
        (by_iteration, ["dense"] * 3),
        (by_scan, ["dense"]),
        (functools.partial(by_scan, step=jax.checkpoint), ["dense"]),
        (functools.partial(by_scan, reverse=True, unroll=2), ["dense"]),
        (by_part, ["dense"] * 2),
        (shared_in_scan, ["dense"]),
        (carried, ["unpacked: scan"]),
        (lambda p, x: jnp.sum(p["w"][jnp.array([1, 2])]), ["unpacked: gather"]),
        (lambda p, x: jnp.sum(lax.scan(lambda c, w: (c, w.T), 0, p["w"])[1]), ["unpacked: scan"]),
        (lambda p, x: x @ p["w"].swapaxes(0, 2).sum(2), ["unpacked: reduce_sum"]),
        (lambda p, x: jnp.einsum("bi,lio->bo", x, p["w"]), None),
        (lambda p, x: jnp.einsum("li,lio->o", x[:3], p["w"]), ["unpacked: dot_general"]),
        (lambda p, x: x @ p["w"].reshape(12, 4)[:4], ["unpacked: slice"]),
    ],
)
def test_stacks(fn, ways):
    if ways is None:
        _, values, found = packed(STACK, STACKED)
        ways = told(fn, values, found, X)
    check(fn, STACK, X, how=STACKED, ways=ways)


def test_stacks_of_stacks():
    params = {"w": random(2, 3, 4, 4)}
    check(in_blocks, params, X, how={"w": (2, 1)})
    turned = lambda p, x: lax.scan(lambda x, w: (x @ w[1], None), x, p["w"].swapaxes(0, 1))[0]  # noqa: E731
    check(turned, params, X, how={"w": (2, 1)})
    check(by_scan, {"w": random(1, 4, 4), "b": random(1, 4)}, X, how=STACKED)


def test_an_index_out_of_bounds_is_clamped_as_in_dense_stacks():
    for i in (-5, -1, 0, 2, 7):
        check(lambda p, x, i: x @ p["w"][i], STACK, X, jnp.int32(i), how=STACKED)


@pytest.mark.parametrize("experts", [1, 3])
def test_experts(experts):
    params, how = {"w": random(experts, 4, 6)}, {"w": (1, 1)}
    x = random(experts, 5, 4)
    check(lambda p, x: jnp.einsum("ebi,eio->ebo", x, p["w"]), params, x, how=how)
    check(lambda p, x: jnp.einsum("eio,bei->boe", p["w"], x), params, x.swapaxes(0, 1), how=how)
    check(
        lambda p, x: jnp.einsum("eio,ebo->ebi", p["w"], x), params, random(experts, 5, 6), how=how
    )
    check(lambda p, x: jnp.einsum("bi,eio->ebo", x, p["w"]), params, x[0], how=how)
    check(lambda p, x: jnp.einsum("eio,bi->eob", p["w"], x), params, x[0], how=how)
    check(lambda p, x: jax.vmap(lambda w: x @ w, 0, 1)(p["w"]), params, x[0], how=how)
    two = {"w": random(experts, 2, 4, 6)}
    check(
        lambda p, x: jnp.einsum("febi,efio->febo", x, p["w"]),
        two,
        random(2, experts, 5, 4),
        how={"w": (2, 1)},
    )


def test_calls():
    check(lambda p, x: jax.jit(jax.jit(jnp.dot))(x, p["w"]), W, X)
    check(
        lambda p, x: lax.cond(x[0, 0] > 0, lambda w: x @ w, lambda w: -x @ w, p["w"]),
        W,
        X,
        ways=["dense"] * 2,
    )
    check(
        lambda p, x: lax.switch(1, [lambda: x @ p["w"], lambda: jnp.cos(x) @ p["w"]]),
        W,
        X,
        ways=["dense"] * 2,
    )
    identity = lambda p, x: lax.cond(x[0, 0] > 0, lambda w: w, lambda w: 2 * w, p["w"])  # noqa: E731
    check(identity, W, X, ways=["unpacked: cond"] * 2)


def test_while():
    def fn(p, x):
        return lax.while_loop(
            lambda x: jnp.sum(x @ p["w"][0]) < 9.0, lambda x: x + (x @ p["w"][1]) ** 2, x
        )

    dense, values, found = packed(STACK, STACKED)
    assert told(fn, values, found, X) == ["dense"] * 2
    chex.assert_trees_all_close(sparse(fn)(values, found, X), fn(dense, X), rtol=1e-5)
    carried = lambda p, x: lax.while_loop(lambda w: w[0, 0] < 9, lambda w: w + 9, p["w"][0])  # noqa: E731
    assert told(carried, values, found, X) == ["unpacked: while"]
    chex.assert_trees_all_close(sparse(carried)(values, found, X), carried(dense, X))


def test_remat_keeps_as_little_as_before():
    def fn(p, x, step):
        return jnp.sum(by_scan(p, x, step)[0])

    _, values, found = packed(STACK, STACKED)

    def saved(step):
        f = sparse(functools.partial(fn, step=step))
        jaxpr = str(jax.make_jaxpr(jax.grad(lambda v, x: f(v, found, x)))(values, X))
        return len(re.findall("tanh", jaxpr))

    policy = jax.checkpoint_policies.everything_saveable
    again, once = jax.checkpoint, functools.partial(jax.checkpoint, policy=policy)
    assert (saved(again), saved(once), saved(lambda f: f)) == (2, 1, 1)


@pytest.mark.parametrize("kind", ["jvp", "vjp"])
def test_own_derivatives_stay_in_force(kind):
    if kind == "vjp":
        own = jax.custom_vjp(lambda x, w: x @ w)
        own.defvjp(
            lambda x, w: (x @ w, (x, w)), lambda saved, g: (7 * g @ saved[1].T, saved[1] * 3)
        )
    else:
        own = jax.custom_jvp(lambda x, w: x @ w)
        own.defjvp(lambda xs, ts: (xs[0] @ xs[1], 3 * xs[0] @ ts[1] + 7 * ts[0] @ xs[1]))
    name = f"unpacked: custom_{kind}_call"
    check(lambda p, x: own(x, p["w"]), W, X, ways=[name])
    check(lambda p, x: own(x @ p["w"], jnp.ones((6, 2))), W, X)  # elsewhere, with no leaf in it
    check(lambda p, x: jax.checkpoint(own)(x, p["w"].T), {"w": random(6, 4)}, X, ways=[name])


def test_batched():
    dense, values, found = packed(W)
    xs = random(3, 5, 4)
    fn = lambda p, x: jnp.tanh(x @ p["w"])  # noqa: E731
    on_slots, expected = sparse(fn), jax.vmap(fn, (None, 0))(dense, xs)
    close = functools.partial(chex.assert_trees_all_close, rtol=1e-5)
    close(jax.vmap(on_slots, (None, None, 0))(values, found, xs), expected)
    many, all_dense = (
        jax.tree.map(lambda v: jnp.stack([v, 2 * v, -v]), p) for p in (values, dense)
    )
    close(jax.vmap(on_slots, (0, None, 0))(many, found, xs), jax.vmap(fn)(all_dense, xs))
    grads = jax.vmap(jax.grad(lambda v, x: number(on_slots(v, found, x))))(many, xs)
    of_dense = jax.vmap(jax.grad(lambda p, x: number(fn(p, x))))(all_dense, xs)
    close(grads["w"], jax.vmap(lambda g: layouts.slots(g, found["w"]))(of_dense["w"]))
    each = jax.tree.map(lambda a: jnp.stack([a] * 3), found)  # a layout of its own for each
    close(jax.vmap(on_slots)(many, each, xs), jax.vmap(fn)(all_dense, xs))
    inside = lambda p, xs: jax.vmap(lambda x: fn(p, x))(xs)  # noqa: E731
    check(inside, W, xs)


def test_activations_of_other_types():
    x = X.astype(jnp.bfloat16)
    check(lambda p, x: x @ p["w"].astype(x.dtype), W, x, rtol=2e-2)
    check(lambda p, x: jnp.dot(x, p["w"], preferred_element_type=jnp.float32), W, x, rtol=2e-2)
    check(lambda p, x: jnp.dot(p["w"].T, x.T, precision=("highest", "default")), W, X)
    _, values, found = packed(W)
    counts = lambda p, x: jnp.arange(4) @ p["w"].astype(int)  # noqa: E731
    assert told(counts, values, found, X) == ["unpacked: dot_general"]
    assert sparse(counts)(values, found, X).dtype == jnp.int32


def test_second_derivatives():
    def net(p, x):
        return jnp.sum(jnp.tanh(x @ p["w"]) @ p["w"].T)

    dense, values, found = packed(W)

    def penalty(f, p):
        norm = lambda tree: sum(jnp.sum(g**2) for g in jax.tree.leaves(tree))  # noqa: E731
        return norm(jax.grad(f)(p))

    mask = layouts.dense(jnp.ones_like(values["w"]), found["w"])  # gradients of dead weights aside
    of_dense = jax.grad(lambda p: penalty(lambda p: net({"w": p["w"] * mask}, X), p))(dense)
    of_slots = jax.grad(lambda v: penalty(lambda v: sparse(net)(v, found, X), v))(values)
    expected = layouts.slots(of_dense["w"], found["w"])
    chex.assert_trees_all_close(of_slots["w"], expected, rtol=1e-4, atol=1e-4)

    def slope(p, x):  # a gradient inside, of a net that is computed again
        return jax.grad(lambda x: jnp.sum(jax.checkpoint(lambda x: jnp.tanh(x @ p["w"]))(x)))(x)

    check(slope, W, X, ways=["dense"] * 2)


def test_arguments_of_all_kinds():
    def fn(p, x, n, f, *, scale, train=False, key=None):
        assert (n, train) == (2, True)
        y = f(x @ p["w"]).reshape(n, -1) * scale
        return y + jax.random.normal(key, y.shape)

    dense, values, found = packed(W)
    kwargs = {"scale": jnp.float32(3.0), "train": True, "key": jax.random.key(0)}
    args = (random(4, 4), 2, jnp.tanh)
    expected = fn(dense, *args, **kwargs)
    chex.assert_trees_all_close(sparse(fn)(values, found, *args, **kwargs), expected, rtol=1e-5)
    assert told(fn, values, found, *args, **kwargs) == ["dense"]
    value, (y, n) = jax.value_and_grad(
        sparse(lambda p, x: (jnp.sum(x @ p["w"]), (x, 3))), has_aux=True
    )(values, found, X)[0]
    assert (value.shape, y.shape, n) == ((), X.shape, 3)


def test_constants_and_effects(capsys):
    big = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)

    def fn(p, x):
        jax.debug.print("once")
        x = jax.jit(lambda x: x @ big)(x) + jnp.asarray(big)[:1]
        return lax.scan(lambda x, _: (x @ p["w"] @ p["w"].T @ big, None), x, None, length=2)[0]

    _, values, found = packed(W)
    sparse(fn)(values, found, X).block_until_ready()
    jax.effects_barrier()
    assert capsys.readouterr().out == "once\n"
    check(fn, W, X, ways=["dense"] * 2)
    check(lambda p, x: (jnp.ones(3), x @ p["w"], 1.0), W, X)


def reference(lists, num_outputs, x, values):
    """What the native kernel does, from the same lists."""
    entry = jnp.arange(len(lists.slots))
    output = jnp.searchsorted(lists.ends, entry, side="right") - 1
    weights = jnp.where(entry < lists.ends[-1], values[lists.slots], 0)
    terms = x[:, lists.places] * weights[None]
    return jnp.zeros((len(x), num_outputs)).at[:, output].add(terms, mode="drop")


def reference_sample(lists, capacity, x, y):
    entry = jnp.arange(capacity)
    output = jnp.searchsorted(lists.ends, entry, side="right") - 1
    terms = jnp.sum(x[:, lists.places] * y.at[:, output].get(mode="fill", fill_value=0), 0)
    slots = jnp.where(entry < lists.ends[-1], lists.slots, capacity)
    return jnp.zeros(capacity).at[slots].set(terms, mode="drop")


def test_kernels_get_what_they_need(monkeypatch):
    monkeypatch.setattr(native, "multiply", reference)
    monkeypatch.setattr(native, "sample", reference_sample)
    check_native = functools.partial(check, density=0.1, with_lists=True)
    check_native(tied, {"w": random(12, 9)}, random(5, 12), ways=["native"] * 5)
    big = {"o": random(3, 4, 12), "q": random(12, 3, 4)}
    check_native(heads, big, random(5, 12), how={"q": (0, 1), "o": (0, 2)}, ways=["native"] * 4)
    stack = {"w": random(3, 12, 12), "b": random(3, 12)}
    for fn in (by_scan, by_index, by_part, by_traced_index):
        _, values, found = packed(stack, STACKED, 0.1, with_lists=True)
        ways = ["native"] * len(told(fn, values, found, random(5, 12)))
        check_native(fn, stack, random(5, 12), how=STACKED, ways=ways)
    experts = lambda p, x: jnp.einsum("ebi,eio->ebo", x, p["w"])  # noqa: E731
    check_native(experts, {"w": stack["w"]}, random(3, 5, 12), how=STACKED, ways=["native"])
    half = lambda p, x: x @ p["w"].astype(x.dtype)  # noqa: E731
    x = random(5, 12).astype(jnp.bfloat16)
    check_native(half, {"w": random(12, 9)}, x, ways=["native"], rtol=2e-2)


def test_table():
    params = {
        "dense": random(8, 4),
        "few": random(8, 4),
        "own": random(4, 8),
        "stack": random(2, 4, 4),
        "unread": random(4, 4),
    }
    how = {"few": (0, 1), "own": (0, 1), "stack": (1, 1), "unread": (0, 1)}
    rng = np.random.default_rng(0)
    found = {
        path: layout_of(rng.permutation(np.arange(x.size) % 8 == 0).reshape(x.shape), *how[path], 0)
        for path, x in params.items()
        if path in how
    }
    found["few"] = layout_of(np.arange(32).reshape(8, 4) % 8 == 0, 0, 1, 0, with_lists=True)
    found["own"] = layout_of(np.arange(32).reshape(4, 8) % 2 == 0, 0, 1, 0, with_lists=True)
    values = {p: layouts.slots(x, found[p]) if p in found else x for p, x in params.items()}

    def fn(p, x):
        x = x @ p["few"] + x @ p["dense"]
        x = lax.scan(lambda x, w: (x @ w, None), x, p["stack"])[0]
        return x @ p["own"] @ p["own"].T + jnp.sum(p["own"] ** 2)

    text = table(fn, values, found, jax.ShapeDtypeStruct((7, 8), jnp.float32))
    capacity = found["stack"].capacity / 16
    assert text.splitlines() == [
        "leaf    product          density  way                    why",
        "few     (7, 8) x (8, 4)   0.1250  native",
        "own     (7, 4) x (4, 8)   0.5000  dense                  density",
        "own     (7, 8) x (8, 4)   0.5000  dense                  density",
        f"own                       0.5000  {told_square():21}  no product",
        f"stack   (7, 4) x (4, 4)   {capacity:.4f}  dense                  no kernel",
        f"unread                    {found['unread'].capacity / 16:.4f}  not read",
    ]
    assert told(fn, values, found, jnp.ones((7, 8)), native=False)[0] == "dense"
    assert told(fn, values, found, jnp.ones((7, 8)), native=True)[1] == "native"


def told_square():
    name = jax.make_jaxpr(lambda x: x**2)(1.0).eqns[-1].primitive.name
    return f"unpacked: {name}"


def test_refuses_what_does_not_belong_together():
    dense, values, found = packed(W)
    with pytest.raises(ValueError, match=r"A layout for 'w', which is no leaf .*: v\."):
        sparse(jnp.sum)({"v": values["w"]}, found)
    with pytest.raises(ValueError, match=r"w has shape \(4, 6\); expected the slots"):
        sparse(jnp.sum)(dense, found)


def test_cost_of_walking_is_linear():
    def fn(p, x, n):
        for _ in range(n):
            x = jnp.tanh(x) + 1.0
        return x @ p["w"]

    _, values, found = packed(W)
    jaxpr = jax.make_jaxpr(functools.partial(sparse(fn), n=300))(values, found, X)
    assert len(jaxpr.eqns) < 650


def flax_how(params):
    """Kernels, also of heads: (in, heads, dim) and (heads, dim, out)."""
    kernels = [path for path in trees.paths(params) if path.endswith("kernel")]
    return {path: (0, 2 if "/out/" in path else 1) for path in kernels}


def test_linen():
    nn = pytest.importorskip("flax.linen")

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(6, dtype=jnp.float32)(x))
            x = x + nn.MultiHeadDotProductAttention(2, qkv_features=4)(x)
            return nn.LayerNorm()(nn.Dense(3)(x))

    x = random(2, 5, 4)
    params = Net().init(jax.random.key(0), x)
    check(Net().apply, params, x, how=flax_how(params), ways=["dense"] * 6, rtol=1e-4)


def test_linen_scan_of_remat():
    nn = pytest.importorskip("flax.linen")

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.Dense(4)(nn.tanh(nn.Dense(8)(x))), None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            layers = nn.scan(
                nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            return layers()(x, None)[0]

    params = Net().init(jax.random.key(0), X)
    how = {path: (1, 1) for path in flax_how(params)}
    check(Net().apply, params, X, how=how, ways=["dense"] * 2)


def test_nnx():
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(4, 6, rngs=rngs)
            self.norm = nnx.BatchNorm(6, rngs=rngs)
            self.second = nnx.Linear(6, 3, rngs=rngs)

        def __call__(self, x):
            return self.second(nnx.relu(self.norm(self.first(x))))

    graphdef, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)

    def apply_fn(params, rest, x):
        model = nnx.merge(graphdef, params, rest, copy=True)
        y = model(x)
        return y, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    check(apply_fn, params, rest, X, how=flax_how(params), ways=["dense"] * 2, rtol=1e-4)
    pure = nnx.to_pure_dict(params)

    def of_pure(pure, rest, x):
        state = jax.tree.map(lambda x: x, params)
        nnx.replace_by_pure_dict(state, pure)
        return nnx.merge(graphdef, state, rest, copy=True)(x)

    check(of_pure, pure, rest, X, how=flax_how(pure), ways=["dense"] * 2, rtol=1e-4)


def test_equinox():
    eqx = pytest.importorskip("equinox")
    net = eqx.nn.MLP(4, 3, 6, 2, key=jax.random.key(0))
    params, static = eqx.partition(net, eqx.is_array)
    how = {path: (0, 1) for path in trees.paths(params) if path.endswith("weight")}

    def apply_fn(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    check(apply_fn, params, X, how=how, ways=["dense"] * 3)
    dense, values, found = packed(params, how)
    whole = eqx.combine(values, static)  # with functions among its leaves
    y = sparse(lambda net, x: jax.vmap(net)(x))(whole, found, X)
    chex.assert_trees_all_close(y, apply_fn(dense, X), rtol=1e-5)


@pytest.mark.parametrize("kernels", [True, False], ids=["native", "dense"])
def test_reshapes_in_the_order_of_fortran(kernels):
    draw = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(draw.normal(size=(2, 6, 4)), jnp.float32)}
    x = jnp.asarray(draw.normal(size=(3, 12)), jnp.float32)
    masks = jax.tree.map(lambda x: x > 0, params)
    values, where = compact.pack(gj.apply_masks(params, masks), masks)

    def flat(params, x):
        return x @ jnp.reshape(params["kernel"], (12, 4), order="F")

    def turned(params, x):
        return x[:, :4] @ jax.lax.reshape(params["kernel"], (4, 12), dimensions=(2, 0, 1))

    for function in (flat, turned):
        got = compact.sparse(function, native=kernels)(values, where, x)
        wanted = function(gj.apply_masks(params, masks), x)
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
