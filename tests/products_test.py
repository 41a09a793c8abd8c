"""Rules from the trace: kernels are what products contract, whatever they are called."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import granet_jax as gj


def abstract(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


X, TOKENS, W = abstract(2, 4), abstract(2, dtype=jnp.int32), abstract(4, 4)


def decided(apply_fn, params, *args):
    """Stack axes of each leaf that is prunable, by path; that describe reads the rules."""
    rules = gj.prunable_from(apply_fn, params, *args)
    leaves = gj.trees.describe(params, rules)
    assert len(rules) == len(leaves)
    return {leaf.path: leaf.stack_axes for leaf in leaves if leaf.prunable}


def layers(p, x):
    """A stack: norm, kernel and bias of each."""

    def layer(x, p):
        x = x * p["scale"][None] @ p["kernel"] + p["bias"][None]
        return jnp.tanh(x), None

    return lax.scan(layer, x, p)[0]


STACK = {"bias": abstract(3, 4), "kernel": abstract(3, 4, 4), "scale": abstract(3, 4)}


def attention(p, x):
    """Heads, relative positions, a product of data with data."""
    q, k, v = (jnp.einsum("btd,dhe->bthe", x + p["pos"], p[name]) for name in "qkv")
    scores = jnp.einsum("bqhe,bkhe->bhqk", q, k) + p["relative"]
    return jnp.einsum("bhqk,bkhe,hed->bqd", jax.nn.softmax(scores), v, p["o"])


def experts(p, x):
    """Each token goes through all, as capacity-one mixtures do."""
    gates = jax.nn.softmax(x @ p["router"])
    hidden = jax.nn.relu(jnp.einsum("bd,edf->ebf", x, p["in"]))
    return jnp.einsum("ebd,be->bd", jnp.einsum("ebf,efd->ebd", hidden, p["out"]), gates)


def depthwise(p, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    for name, pad in (("wide", "SAME"), ("one", "VALID")):
        x = lax.conv_general_dilated(
            x, p[name], (1, 1), pad, dimension_numbers=numbers, feature_group_count=4
        )
    return x


def indexed(p, x):
    return lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p["w"][i]), x)


def looped(p, x):
    return lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ p["w"], x)


MODELS = {
    "names tell nothing": (
        lambda p, x: x @ p["embed"] * p["kernel"],
        {"embed": W, "kernel": abstract(1, 4)},
        [X],
        {"embed": 0},
    ),
    "one output": (lambda p, x: x @ p["w"], {"w": abstract(4, 1)}, [X], {"w": 0}),
    "vector": (lambda p, x: x @ p["w"], {"w": abstract(4)}, [X], {"w": 0}),
    "scale by a product": (
        lambda p, x: jnp.einsum("bd,d->bd", x, p["s"]) @ p["w"],
        {"s": abstract(4), "w": W},
        [X],
        {"w": 0},
    ),
    "scale of the kernel": (
        lambda p, x: x @ (p["s"] * p["w"]),
        {"s": abstract(1, 4), "w": W},
        [X],
        {"w": 0},
    ),
    "stack": (layers, STACK, [X], {"kernel": 1}),
    "stack of stacks": (
        lambda p, x: lax.scan(lambda x, p: (layers(p, x), None), x, p)[0],
        jax.tree.map(lambda a: abstract(5, *a.shape), STACK),
        [X],
        {"kernel": 2},
    ),
    "stack, remat": (jax.checkpoint(layers), STACK, [X], {"kernel": 1}),
    "stack of vectors": (
        lambda p, x: lax.scan(lambda x, w: (x * (x @ w)[:, None], None), x, p["w"])[0],
        {"w": abstract(3, 4)},
        [X],
        {"w": 1},
    ),
    "stack by index": (indexed, {"w": abstract(3, 4, 4)}, [X], {"w": 1}),
    "stack by slices": (
        lambda p, x: x @ p["w"][0] @ p["w"][1],
        {"w": abstract(2, 4, 4)},
        [X],
        {"w": 1},
    ),
    "stacked along another axis": (
        lambda p, x: lax.scan(lambda x, w: (x @ w, None), x, p["w"].swapaxes(0, 1))[0],
        {"w": abstract(4, 4, 4)},
        [X],
        {"w": 0},
    ),
    "one leaf cut into layers": (
        lambda p, x: lax.scan(lambda x, w: (x @ w, None), x, p["w"].reshape(3, 4, 4))[0],
        {"w": abstract(12, 4)},
        [X],
        {"w": 0},
    ),
    "members": (
        lambda p, x: jax.vmap(lambda w: x @ w)(p["w"]),
        {"w": abstract(5, 4, 4)},
        [X],
        {"w": 1},
    ),
    "experts": (
        experts,
        {"in": abstract(3, 4, 6), "out": abstract(3, 6, 4), "router": abstract(4, 3)},
        [X],
        {"in": 1, "out": 1, "router": 0},
    ),
    "attention": (
        attention,
        {
            **{name: abstract(4, 2, 3) for name in "qkv"},
            "o": abstract(2, 3, 4),
            "pos": abstract(1, 5, 4),
            "relative": abstract(1, 2, 5, 5),
        },
        [abstract(2, 5, 4)],
        {"q": 0, "k": 0, "v": 0, "o": 0},
    ),
    "table": (
        lambda p, t: p["table"][t] @ p["w"],
        {"table": abstract(9, 4), "w": W},
        [TOKENS],
        {"w": 0},
    ),
    "tied table": (
        lambda p, t: p["table"][t] @ p["w"] @ p["table"].T,
        {"table": abstract(9, 4), "w": W},
        [TOKENS],
        {"w": 0},
    ),
    "table of one token": (
        lambda p, t: p["table"][t][None] @ p["w"],
        {"table": abstract(9, 4), "w": W},
        [abstract(dtype=jnp.int32)],
        {"w": 0},
    ),
    "class token": (
        lambda p, x: jnp.concatenate([jnp.broadcast_to(p["c"], (2, 4)), x]) @ p["w"],
        {"c": abstract(1, 4), "w": W},
        [X],
        {"w": 0},
    ),
    "depthwise": (
        depthwise,
        {"wide": abstract(3, 3, 1, 4), "one": abstract(1, 1, 1, 4)},
        [abstract(1, 5, 5, 4)],
        {"wide": 0},
    ),
    "masks and thresholds": (
        lambda p, m, x: x @ jnp.where(jnp.abs(p["w"]) > p["t"], p["w"], 0) * m.sum(),
        {"t": abstract(4, 1), "w": W},
        [abstract(4, 4, dtype=bool), X],
        {"w": 0},
    ),
    "concatenated": (
        lambda p, x: x @ jnp.concatenate([p["a"], p["b"]], axis=1),
        {"a": W, "b": abstract(4, 3)},
        [X],
        {"a": 0, "b": 0},
    ),
    "cheaper branch": (
        lambda p, x: lax.cond(x[0, 0] > 0, lambda: x @ p["a"] @ p["a"], lambda: x @ p["b"]),
        {"a": W, "b": W},
        [X],
        {"a": 0, "b": 0},
    ),
    "while": (looped, {"w": W}, [X], {"w": 0}),
    "penalty": (
        lambda p, x: (x @ p["w"], (p["v"] @ jnp.ones((4, 4))).sum()),
        {"v": W, "w": W},
        [X],
        {"w": 0},
    ),
    "not read, no floats": (
        lambda p, x: x @ p["w"] @ p["i"],
        {"i": abstract(4, 4, dtype=jnp.int32), "unused": W, "w": W},
        [X],
        {"w": 0},
    ),
    "odd names": (lambda p, x: x @ p["a.b"], {"a.b": W, "acb": W}, [X], {"a.b": 0}),
    "one leaf": (lambda w, x: x @ w, W, [X], {"": 0}),
}


@pytest.mark.parametrize("name", MODELS)
def test_kernels_are_what_products_contract(name):
    apply_fn, params, args, expected = MODELS[name]
    assert decided(apply_fn, params, *args) == expected


LOST = {
    "low rank": (lambda p, x: x @ (p["w"] + p["a"] @ p["b"]), ["a", "b", "w"]),
    "made of data": (lambda p, x: x @ (p["w"] * x.sum(0)[:, None]) @ p["a"], ["w"]),
    "a mask of floats": (lambda p, x: x @ (p["w"] * jnp.cos(x[:1])) @ p["a"], ["w"]),
    "two parameters": (lambda p, x: p["a"] @ p["w"] @ x.T @ (x @ p["b"]), ["a", "w"]),
}


@pytest.mark.parametrize("name", LOST)
def test_what_the_trace_lost_is_named(name):
    apply_fn, lost = LOST[name]
    params = {"a": W, "b": W, "w": W}
    with pytest.warns(UserWarning, match="The trace lost") as warned:
        rules = gj.prunable_from(apply_fn, params, X)
    (message,) = [str(w.message) for w in warned]
    assert [path for path in params if f"{path} (4, 4)" in message] == lost
    assert not any(decision for pattern, decision in rules if pattern.strip("^$") in lost)


def test_hidden_products_are_refused():
    mesh = jax.sharding.Mesh(jax.devices()[:2], ("data",))

    def apply_fn(p, x):
        spec = jax.sharding.PartitionSpec
        split = jax.shard_map(
            lambda x: x @ p["w"], mesh=mesh, in_specs=spec("data"), out_specs=spec("data")
        )
        return split(x)

    if hasattr(jax, "shard_map"):
        with pytest.raises(ValueError, match="inside shard_map"):
            gj.prunable_from(apply_fn, {"w": W}, X)


def test_flax_linen():
    nn = pytest.importorskip("flax.linen")

    class Net(nn.Module):
        @nn.compact
        def __call__(self, image, tokens):
            x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(4, (3, 3))(image)))
            x = nn.Conv(4, (3, 3), feature_group_count=4, name="Depthwise")(x).mean((1, 2))
            table = nn.Embed(9, 4, name="Table")
            y = nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(table(tokens)))
            y = nn.RNN(nn.GRUCell(4))(y).mean(1)
            return table.attend(nn.Dense(4)(x + y))

    image, tokens = abstract(2, 5, 5, 3), abstract(2, 6, dtype=jnp.int32)
    variables = jax.eval_shape(Net().init, jax.random.key(0), image, tokens)
    rest = jax.tree.map(lambda a: jnp.zeros(a.shape), variables["batch_stats"])

    def apply_fn(p, *inputs):
        return Net().apply({"params": p, "batch_stats": rest}, *inputs)

    found = decided(apply_fn, variables["params"], image, tokens)
    kernels = {
        "/".join(words) for words in gj.trees.by_path(variables["params"]) if words[-1] == "kernel"
    }
    assert found == dict.fromkeys(kernels, 0)
    assert {"Depthwise/kernel", "GRUCell_0/hn/kernel"} <= kernels


def test_flax_nnx_with_layers_in_a_scan():
    nnx = pytest.importorskip("flax.nnx")

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.LayerNorm(4, rngs=rngs)
            self.linear = nnx.Linear(4, 4, rngs=rngs)

    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def blocks(rngs):
        return Block(rngs)

    graph, params = nnx.split(nnx.eval_shape(lambda: blocks(nnx.Rngs(0))))

    def apply_fn(p, x):
        def layer(x, p):
            block = nnx.merge(graph, p)
            return x + block.linear(block.norm(x)), None

        return lax.scan(layer, x, p)[0]

    assert decided(apply_fn, params, X) == {"linear/kernel": 1}


def test_equinox():
    eqx = pytest.importorskip("equinox")
    key = jax.random.key(0)
    model = eqx.filter_eval_shape(
        lambda: eqx.nn.Sequential(
            [eqx.nn.Embedding(9, 4, key=key), eqx.nn.LayerNorm(4), eqx.nn.MLP(4, 3, 5, 1, key=key)]
        )
    )
    params, static = eqx.partition(model, lambda x: isinstance(x, jax.ShapeDtypeStruct))
    found = decided(lambda p, x: jax.vmap(eqx.combine(p, static))(x), params, TOKENS)
    assert found == {"layers/2/layers/0/weight": 0, "layers/2/layers/1/weight": 0}


def test_each_layer_of_a_stack_counts_by_itself():
    rules = gj.prunable_from(layers, STACK, X)
    assert gj.trees.layer_shapes(gj.trees.describe(STACK, rules)) == [(4, 4)] * 3
