"""A language model made ready for sparse training: compiled steps on a mesh of devices."""

import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import granet_jax as gj
from experiments import methods, weights
from experiments.models import transformer

PRUNABLE: gj.trees.Rules = (("^blocks/", gj.Stacked(1)),)  # each layer of a stack is a layer
METHODS = tuple(
    name
    for name, entry in methods.METHODS.items()
    if entry.at_init is None and name not in ("dst", "str")
)
VALIDATION_WINDOWS = 128  # at least; as many whole batches as hold them

_BATCH = ("data", "fsdp")  # the mesh axes that share a batch
# Where parameters lie, the first pattern found in the path decides. A kernel's input side is split
# over "fsdp" and gathered where it is used, its output side over "tensor"; of the second matrix of
# a pair the other way round, so that between the two nothing has to move.
_SPECS = (
    ("embedding", PartitionSpec(None, ("fsdp", "tensor"))),
    ("/(query|key|value|gate|up)/kernel", PartitionSpec(None, "fsdp", "tensor")),
    ("/(out|down)/kernel", PartitionSpec(None, "tensor", "fsdp")),
    ("", PartitionSpec()),
)


class Config(NamedTuple):
    """All that a run depends on but for the text and the devices."""

    method: str = "granet"
    size: str = "10m"
    context: int = 256
    batch_size: int = 16
    bytes: int = 2_500_000
    learning_rate: float = 2e-3
    sparsity: float = 0.8
    structure: str = "none"
    block_kernel: bool = False
    compact: bool = False
    update_every: int = 20
    prune_until: float = 0.5
    eval_every: int = 50
    precision: str = "f32"
    remat: bool = False
    seed: int = 0

    @property
    def total_steps(self) -> int:
        """Updates in all, whole evaluations of them."""
        steps = self.bytes // (self.batch_size * self.context)
        return steps // self.eval_every * self.eval_every


class State(NamedTuple):
    """All that training changes, and the key from which it draws."""

    step: jax.Array  # int32, updates done
    params: Any
    opt_state: Any
    forward: jax.Array  # float32, FLOPs of a forward pass under the masks over the dense one's
    key: jax.Array  # typed


class Log(NamedTuple):
    """A number for each step of a chunk, float32 ``(steps,)``."""

    loss: jax.Array  # nats
    forward: jax.Array  # as in State, of the masks that the step began with


class Trainer(NamedTuple):
    """Compiled functions. Nothing that they make is ever whole on one device of a mesh."""

    config: Config
    mesh: Mesh
    abstract_state: State  # ShapeDtypeStructs with shardings
    abstract_params: Any  # the dense weights
    family: weights.Family  # what state.params are, and where the masks
    costs: gj.flops.Costs  # of the dense network, for one window
    init: Callable[[], State]
    chunk: Any  # (state, text) -> (state, Log); eval_every steps, the state is donated
    step: Any  # jitted: (state, text, event) -> (state, Log), one step, the state is donated
    loss: Callable[[Any, jax.Array], jax.Array]  # (dense weights, windows) -> nats
    evaluate: Callable[[State, jax.Array], float]  # (state, windows) -> bits per byte
    place: Callable[[np.ndarray], jax.Array]  # a copy on each device


def make_mesh(data: int | None = None, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh over all devices of all processes.

    Args:
      data: size of the axis along which parameters are copied; None = what the others leave.
      fsdp: size of the axis that shares parameters and the batch.
      tensor: size of the axis that shares the work on each window.

    Raises:
      ValueError: the product is not the number of devices.
    """
    count = jax.device_count()
    data = data or max(1, count // (fsdp * tensor))
    if data * fsdp * tensor != count:
        raise ValueError(
            f"--data={data} --fsdp={fsdp} --tensor={tensor} make {data * fsdp * tensor} devices, "
            f"but there are {count}. The product must be their number."
        )
    return jax.make_mesh(
        (data, fsdp, tensor), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3
    )


def make_trainer(config: Config, mesh: Mesh) -> Trainer:
    """Builds network, optimizer and compiled steps; allocates nothing.

    Raises:
      ValueError: the settings do not fit each other or the mesh.
    """
    _check(config, mesh)
    methods.check_block_kernel(config)
    size = transformer.SIZES[config.size]
    model = transformer.Transformer(
        size,
        jnp.bfloat16 if config.precision == "bf16" else jnp.float32,
        config.remat,
        NamedSharding(mesh, PartitionSpec(_BATCH)) if mesh.size > 1 else None,
    )
    counted = transformer.Transformer(size)  # one window, which no mesh divides
    window = jax.ShapeDtypeStruct((1, config.context), jnp.int32)

    def init_params(key: jax.Array) -> Any:
        return counted.init(key, jnp.zeros(window.shape, window.dtype))["params"]

    abstract_params = jax.eval_shape(init_params, jax.random.key(0))
    costs = gj.flops.count(lambda p, x: counted.apply({"params": p}, x), abstract_params, window)
    # The methods' keys are in the state; the one given here is not used again.
    method = _make_method(config, jax.random.key(0))
    slots = weights.slots(config, method, abstract_params, _rules(config), mesh.size)
    update = _make_optimizer(config, method, slots).update
    family = weights.masked(method) if slots is None else weights.live(method)

    def forward_ratio(params: Any, opt_state: Any) -> jax.Array:
        masks = family.masks(params, opt_state)
        densities = gj.metrics.densities(masks, abstract_params, PRUNABLE)
        return jnp.asarray(gj.flops.ratio(costs, densities), jnp.float32)

    def init() -> State:
        key = jax.random.key(config.seed)
        params = init_params(jax.random.fold_in(key, 0))
        method = _make_method(config, jax.random.fold_in(key, 1))
        family = weights.masked(method) if slots is None else weights.live(method)
        params, opt_state = family.start(params, _make_optimizer(config, method, slots))
        step = jnp.zeros([], jnp.int32)
        forward = forward_ratio(params, opt_state)
        return State(step, params, opt_state, forward, jax.random.fold_in(key, 2))

    def loss_fn(params: Any, windows: jax.Array, masks: Any) -> tuple[jax.Array, None]:
        windows = jax.lax.with_sharding_constraint(
            windows.astype(jnp.int32), NamedSharding(mesh, PartitionSpec(_BATCH))
        )
        logits = model.apply({"params": params, **masks}, windows[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])
        return jnp.mean(losses), None

    def one_step(state: State, text: jax.Array, event: bool | None) -> tuple[State, Log]:
        key = jax.random.fold_in(state.key, state.step)
        windows = draw_windows(key, text, config.batch_size, config.context + 1)
        step = state.step + 1
        is_update_step = method.is_update_step(step)
        held = state.params, state.opt_state
        with methods.products(config, state.opt_state, is_update_step) as masks:
            (loss, _), grads, told = family.gradients(loss_fn, event, *held, windows, masks)
        updates, opt_state = update(grads, state.opt_state, state.params, **told)
        params = optax.apply_updates(state.params, updates)
        forward = state.forward
        if event is None:
            forward = jax.lax.cond(
                is_update_step, lambda: forward_ratio(params, opt_state), lambda: state.forward
            )
        elif event:
            forward = forward_ratio(params, opt_state)
        return State(step, params, opt_state, forward, state.key), Log(loss, state.forward)

    abstract_state = jax.eval_shape(init)
    of_params = jax.tree_util.tree_map_with_path(
        lambda path, x: _sharding_of(mesh, "/".join(gj.trees.names(path)), x), abstract_params
    )
    if slots is None:
        shardings = gj.sharding.like_params(abstract_state, abstract_params, of_params)
    else:
        of_slots = _shardings_of_slots(mesh, abstract_state, of_params)
        shardings = gj.sharding.like_params(abstract_state, abstract_state.params, of_slots)
    everywhere = NamedSharding(mesh, PartitionSpec())

    def scanned(state: State, text: jax.Array) -> tuple[State, Log]:
        return jax.lax.scan(lambda s, _: one_step(s, text, None), state, length=config.eval_every)

    compiled = functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, everywhere))
    step = compiled(one_step, static_argnums=2)

    def looped(state: State, text: jax.Array) -> tuple[State, Log]:
        logs = []
        for event in weights.events(family, int(state.step), config.eval_every):
            state, log = step(state, text, event)
            logs.append(log)
        return state, jax.tree.map(lambda *x: jnp.stack(x), *logs)

    @jax.jit
    def losses_of(params: Any, opt_state: Any, windows: jax.Array) -> jax.Array:
        loss = family.through(lambda params, batch: loss_fn(params, batch, {})[0])
        return jax.lax.map(lambda batch: loss(params, opt_state, batch), windows)

    def evaluate(state: State, windows: jax.Array) -> float:
        batches = windows.reshape(-1, config.batch_size, config.context + 1)
        losses = np.asarray(losses_of(state.params, state.opt_state, batches))
        return float(losses.mean(dtype=np.float64)) / math.log(2)

    return Trainer(
        config,
        mesh,
        jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            abstract_state,
            shardings,
        ),
        abstract_params,
        family,
        costs,
        jax.jit(init, out_shardings=shardings),
        looped if family.two_programs else compiled(scanned),
        step,
        lambda params, windows: loss_fn(params, windows, {})[0],
        evaluate,
        lambda x: jax.make_array_from_process_local_data(everywhere, x, x.shape),
    )


def draw_windows(key: jax.Array, text: jax.Array, num: int, length: int) -> jax.Array:
    """``num`` pieces of a text ``(n,)`` from random places, uint8 ``(num, length)``."""
    offsets = jax.random.randint(key, (num, 1), 0, len(text) - length + 1)
    return text[offsets + jnp.arange(length)[None, :]]


def num_validation_windows(config: Config) -> int:
    """As many whole batches as hold :data:`VALIDATION_WINDOWS`."""
    return -(-VALIDATION_WINDOWS // config.batch_size) * config.batch_size


def learning_rate(config: Config) -> optax.Schedule:
    """A linear rise over the first 5 % of training, then a cosine to a tenth."""
    peak, steps = config.learning_rate, config.total_steps
    warmup_steps = math.ceil(steps / 20)
    return optax.warmup_cosine_decay_schedule(
        0.0, peak, warmup_steps, max(steps, warmup_steps + 1), peak / 10
    )


def _make_method(config: Config, key: jax.Array) -> gj.Method:
    structure = methods.parse_structure(config.structure, config.sparsity)
    plan = methods.Plan(
        sparsity=config.sparsity,
        update_every=config.update_every,
        prune_end_step=max(1, round(config.prune_until * config.total_steps)),
        total_steps=config.total_steps,
        initial_threshold=0.0,  # only of methods that are not in METHODS
        prunable=_rules(config),
        start=gj.erk if structure is None else gj.uniform,
        key=key,
    )
    method = methods.METHODS[config.method].make(plan)
    assert isinstance(method, gj.Method)
    return method


def inner_optimizer(config: Config) -> optax.GradientTransformation:
    """What trains dense weights, and live ones."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(learning_rate(config), b2=0.95, weight_decay=0.1, mask=_matrices),
    )


def _rules(config: Config) -> gj.trees.Rules:
    structure = methods.parse_structure(config.structure, config.sparsity)
    return (("^blocks/", gj.Stacked(1, structure)),)


def _make_optimizer(
    config: Config, method: gj.Method, slots: weights.Slots | None
) -> optax.GradientTransformation:
    inner = inner_optimizer(config)
    return slots.sparsify(inner, method) if slots else gj.sparsify(inner, method)


def _matrices(params: Any) -> Any:
    """Norm weights have two axes where layers are stacked, so they are told by name."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: gj.trees.names(path)[-1] != "scale", params
    )


def _sharding_of(mesh: Mesh, path: str, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
    """Where a parameter lies, by its path."""
    spec = next(spec for pattern, spec in _SPECS if re.search(pattern, path))
    for axis, names in enumerate(spec):
        names = (names,) if isinstance(names, str) else names or ()
        parts = math.prod(mesh.shape[name] for name in names)
        if leaf.shape[axis] % parts:
            raise ValueError(
                f"{path} of shape {leaf.shape} cannot be cut into {parts} along axis {axis} "
                f"({' x '.join(names)}). Choose another mesh."
            )
    return NamedSharding(mesh, spec)


def _shardings_of_slots(mesh: Mesh, abstract_state: Any, of_params: Any) -> Any:
    """Where slots lie: shared like their leaf where the mesh divides the layers, else copied.

    Indices within a layer are numbers of the whole, so slots of one layer stay together.
    """
    layouts = gj.compact.get_layouts(abstract_state.opt_state)
    names = ("fsdp", "tensor")
    parts = math.prod(mesh.shape[name] for name in names)
    dense = gj.trees.paths(of_params)

    def sharding(path: str, leaf: Any) -> NamedSharding:
        if path not in layouts:
            return dense[path]
        spec = PartitionSpec(names) if leaf.shape[0] % parts == 0 else PartitionSpec()
        return NamedSharding(mesh, spec)

    held = gj.trees.paths(abstract_state.params)
    each = [sharding(path, leaf) for path, leaf in held.items()]
    return jax.tree.unflatten(jax.tree.structure(abstract_state.params), each)


def _check(config: Config, mesh: Mesh) -> None:
    if config.total_steps < 1:
        tokens = config.batch_size * config.context * config.eval_every
        raise ValueError(
            f"--bytes={config.bytes} ends before the first evaluation: --eval_every="
            f"{config.eval_every} steps take {tokens} bytes. Lower --eval_every, or raise --bytes."
        )
    if config.method not in METHODS:
        raise ValueError(f"--methods: {config.method!r} is none of {', '.join(METHODS)}.")
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.batch_size % shares:
        raise ValueError(
            f"--batch_size={config.batch_size} is no multiple of the {shares} devices (data x "
            "fsdp) that share a batch."
        )
    heads = transformer.SIZES[config.size].heads
    if heads % mesh.shape["tensor"]:
        raise ValueError(
            f"--tensor={mesh.shape['tensor']} does not divide the {heads} heads of {config.size}."
        )
