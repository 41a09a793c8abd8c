"""A setting made ready for training: compiled steps on all devices."""

import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

import granet_jax as gj
from experiments import augment, data, methods, models, optimizers, streams, weights
from experiments.models import layers
from experiments.settings import Settings
from experiments.streams import Batch, Stream

AT_INIT_IMAGES = 10  # for each class, shown to methods that prune before training


class Effort(NamedTuple):
    """Forward FLOPs so far, in units of those of the dense network."""

    ratio: jax.Array  # float32, of a step under the present masks
    since: jax.Array  # int32, the step after which they were last measured
    total: jax.Array  # float32, of all steps up to that


class State(NamedTuple):
    """All that training changes, and the key from which it draws."""

    step: jax.Array  # int32, updates done
    params: Any  # with a reparameterisation the pair of weights and extra parameters
    model_state: Any  # batch statistics
    opt_state: Any
    effort: Effort
    key: jax.Array  # typed; what is drawn follows from it and the step


class Trainer(NamedTuple):
    """Data on the devices and compiled functions; states are copied to all devices.

    Nothing but ``settings`` knows of a seed: one trainer serves all, compiled once.
    """

    settings: Settings
    data_facts: dict[str, Any]  # JSON, by which other data are noticed
    steps_per_epoch: int
    costs: gj.flops.Costs  # of the dense network, for one image
    abstract_state: State  # ShapeDtypeStructs with shardings
    family: weights.Family  # what state.params are, and where the masks
    init: Callable[[int], State]  # seed -> state
    open_stream: Callable[[int], Any]  # seed -> an iterator of batches; None for data in memory
    run: Callable[[State, Any, int], tuple[State, jax.Array]]  # (.., stream, steps) -> .., losses
    evaluate: Callable[[State], dict[str, float]]  # accuracy in percent on each held-out split
    step: Callable[[State, Batch], tuple[State, jax.Array]]  # pure, for jit, scan and vmap
    loss_and_grads: Callable[[State, Batch], Any]


def make_trainer(
    config: Settings, dataset: data.Dataset, model: nn.Module | None = None
) -> Trainer:
    """Builds model, optimizer and compiled steps.

    Args:
      config: the settings.
      dataset: what to train and test on.
      model: a Flax module from float images ``(batch, height, width, channels)`` to logits; None =
        the one that ``config.model`` names, in ``config.precision``. One of your own is told
        ``train`` if it takes such an argument, may keep batch statistics and use dropout, and
        sets its own precision.

    Raises:
      ValueError: the settings do not fit the data, the model, the method or the devices.
    """
    if model is None:
        if config.model not in models.MODELS:
            raise ValueError(
                f"model {config.model!r} is none of {', '.join(models.MODELS)}; "
                "pass a module of your own as model=."
            )
        dtype = jnp.bfloat16 if config.precision == "bf16" else jnp.float32
        model = models.MODELS[config.model](num_classes=dataset.num_classes, dtype=dtype)
    num_images = data.size(dataset.train)
    steps_per_epoch = num_images // config.batch_size
    if steps_per_epoch == 0:
        raise ValueError(
            f"--batch_size={config.batch_size} is more than the {num_images} images of "
            f"{config.dataset}."
        )
    if config.batch_size % jax.device_count():
        raise ValueError(
            f"--batch_size={config.batch_size} is no multiple of the {jax.device_count()} devices "
            "that share a batch."
        )
    methods.check_block_kernel(config)
    image = jax.ShapeDtypeStruct((1, *data.image_shape(dataset.train)), jnp.float32)
    make_method = functools.partial(optimizers.make_method, config, steps_per_epoch)
    # The methods' keys are in the state; the one given here is not used again.
    method = make_method(jax.random.key(0))

    def apply(params: Any, model_state: Any, x: jax.Array, train: bool, **rest: Any) -> Any:
        return model.apply({"params": params, **model_state}, x, **_told(model, train), **rest)

    def forward(params: Any, model_state: Any, images: jax.Array, train: bool, **rest: Any) -> Any:
        x = images.astype(jnp.float32) / 255
        if config.normalise:
            x = (x - dataset.mean.reshape(1, 1, 1, -1)) / dataset.std.reshape(1, 1, 1, -1)
        return apply(params, model_state, x, train, **rest)

    def init_model(key: jax.Array) -> tuple[Any, dict[str, Any]]:
        x = jnp.zeros(image.shape)
        variables = dict(model.init(key, x, **_told(model, False)))
        params = variables.pop("params")
        if config.init == "uniform":
            params = layers.uniform_init(jax.random.fold_in(key, 0), params)
        return params, variables

    abstract_params, abstract_rest = jax.eval_shape(init_model, jax.random.key(0))
    slots = weights.slots(config, method, abstract_params, config.prunable, jax.device_count())
    update = optimizers.make_optimizer(config, steps_per_epoch, method, slots).update
    family = optimizers.family_of(method, config, slots)
    costs = gj.flops.count(
        lambda params, rest, x: apply(params, rest, x, False),
        abstract_params,
        abstract_rest,
        image,
    )

    def forward_ratio(params: Any, opt_state: Any) -> jax.Array:
        masks = family.masks(params, opt_state)
        densities = gj.metrics.densities(masks, abstract_params, config.prunable)
        return jnp.asarray(gj.flops.ratio(costs, densities), jnp.float32)

    def init(seed: Any) -> State:
        key = jax.random.key(seed)
        params, model_state = init_model(jax.random.fold_in(key, 0))
        method = make_method(jax.random.fold_in(key, 1))
        tx = optimizers.make_optimizer(config, steps_per_epoch, method, slots)
        params, opt_state = optimizers.family_of(method, config, slots).start(params, tx)
        step = jnp.zeros([], jnp.int32)
        effort = Effort(forward_ratio(params, opt_state), step, jnp.zeros([]))
        return State(step, params, model_state, opt_state, effort, jax.random.fold_in(key, 2))

    def loss_fn(params: Any, state: State, batch: Batch) -> tuple[jax.Array, Any]:
        dropout = {"dropout": jax.random.fold_in(_key_of_step(state), 0)}
        collected = list(state.model_state)
        is_update_step = family.is_update_step(state.step + 1)
        with methods.products(config, state.opt_state, is_update_step) as masks:
            logits, model_state = forward(
                params,
                {**state.model_state, **masks},
                batch.images,
                True,
                rngs=dropout,
                mutable=collected,
            )
        labels = jax.nn.one_hot(batch.labels, dataset.num_classes)
        labels = optax.smooth_labels(labels, config.label_smoothing)
        losses = optax.softmax_cross_entropy(logits.astype(jnp.float32), labels)
        return jnp.mean(losses), model_state

    def gradients(state: State, batch: Batch, event: bool | None) -> Any:
        held = state.params, state.opt_state
        without = state._replace(params=None)  # nothing but the weights is differentiated
        return family.gradients(loss_fn, event, *held, without, batch)

    def step(state: State, batch: Batch, event: bool | None = None) -> tuple[State, jax.Array]:
        key = jax.random.fold_in(_key_of_step(state), 1)
        images = augment.AUGMENTATIONS[config.augment](key, batch.images)
        (loss, model_state), grads, told = gradients(state, Batch(images, batch.labels), event)
        updates, opt_state = update(grads, state.opt_state, state.params, **told)
        params = optax.apply_updates(state.params, updates)
        t = state.step + 1

        def measured() -> Effort:
            return Effort(forward_ratio(params, opt_state), t, _spent(state.effort, t))

        effort = state.effort
        if event is None:
            effort = jax.lax.cond(family.is_update_step(t), measured, lambda: state.effort)
        elif event:
            effort = measured()
        return State(t, params, model_state, opt_state, effort, state.key), loss

    def num_correct_of(params: Any, state: State, batch: Batch) -> jax.Array:
        logits = forward(params, state.model_state, batch.images, False)
        return jnp.sum(jnp.argmax(logits, axis=-1) == batch.labels)

    @jax.jit
    def num_correct(state: State, batch: Batch) -> jax.Array:
        count = family.through(num_correct_of)
        return count(state.params, state.opt_state, state._replace(params=None), batch)

    def accuracy(state: State, split: Batch | Stream) -> float:
        batches = data.host_batches(split, config.batch_size)
        correct = sum(int(num_correct(state, _place(batch))) for batch in batches)
        return 100 * correct / data.size(split)

    jitted_init = jax.jit(init, out_shardings=_sharding())

    def start(seed: int) -> State:
        state = jitted_init(seed)
        find = methods.METHODS[config.method].at_init
        if find is None:
            return state

        def loss(params: Any, batch: Batch, temperature: float = 1.0) -> jax.Array:
            logits = forward(params, state.model_state, batch.images, False) / temperature
            labels = jax.nn.one_hot(batch.labels, dataset.num_classes)
            return jnp.mean(optax.softmax_cross_entropy(logits, labels))

        batches = data.sample(dataset.train, AT_INIT_IMAGES * dataset.num_classes, seed)
        masks = find(
            methods.AtInit(
                state.params,
                loss,
                lambda params, x: apply(params, state.model_state, x, False),
                [batches],
                image,
                config.sparsity,
                config.prunable,
            )
        )
        params = gj.apply_masks(state.params, masks)
        opt_state = gj.set_masks(state.opt_state, masks, config.prunable)
        effort = state.effort._replace(ratio=forward_ratio(params, opt_state))
        state = state._replace(params=params, opt_state=opt_state, effort=effort)
        return jax.device_put(state, _sharding())

    abstract_state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_sharding()),
        jax.eval_shape(init, 0),
    )
    open_stream: Callable[[int], Any] = lambda seed: None  # noqa: E731
    if isinstance(dataset.train, Stream):
        open_stream = functools.partial(streams.shuffled, dataset.train, config.batch_size)
        run = _run_stream(step, family)
    else:
        example = Batch(*(array[: config.batch_size] for array in dataset.train))
        scan = scan_is_fast(loss_fn, abstract_params, abstract_state, example)
        run = _run_memory(step, family, placed(dataset.train), config.batch_size, scan)
    return Trainer(
        config,
        data.facts(dataset),
        steps_per_epoch,
        costs,
        abstract_state,
        family,
        start,
        open_stream,
        run,
        lambda state: {k: accuracy(state, split) for k, split in dataset.held_out.items()},
        step,
        lambda state, batch: gradients(state, batch, None)[:2],
    )


def mean_forward_ratio(state: State) -> float:
    """Forward FLOPs over those of the dense network, as a mean over the steps so far."""
    return float(_spent(state.effort, state.step)) / max(int(state.step), 1)


def recalibrate(trainer: Trainer, state: State, batches: Iterable[Batch]) -> State:
    """Renews the statistics of batch norm, which pruning in one shot leaves wrong.

    Each batch passes through the network in training mode and moves the running statistics as in
    training; no parameter changes. With the usual momentum of .9, 100 batches leave a share of
    .9^100 = 3e-5 of the old statistics. A model without batch norm returns as it is.
    """
    for batch in batches:
        state = _collect(trainer.loss_and_grads, state, _place(batch))
    return state


@functools.partial(jax.jit, static_argnums=0)
def _collect(loss_and_grads: Callable[..., Any], state: State, batch: Batch) -> State:
    (_, model_state), _ = loss_and_grads(state, batch)  # the gradients are compiled away
    return state._replace(model_state=model_state)


def placed(train: Batch | Stream) -> Any:
    """Puts training data that fit into memory on every device, once for several trainers."""
    return train if isinstance(train, Stream) else jax.device_put(train, _sharding())


def scan_is_fast(loss_fn: Callable[..., Any], *args: Any) -> bool:
    """Whether many steps should run as one ``lax.scan``.

    Yes on accelerators, and on CPU for models of matrix products; XLA:CPU compiles the gradients
    of convolutions inside loops to naive code, dozens of times slower than outside.
    """
    on_cpu = jax.default_backend() == "cpu"
    return not on_cpu or "conv_general_dilated" not in str(jax.make_jaxpr(loss_fn)(*args))


def _run_memory(
    step: Callable[..., Any], family: weights.Family, split: Batch, batch_size: int, scan: bool
) -> Callable[..., Any]:
    """Steps over data that lie on the devices, in a new order in each epoch."""
    steps_per_epoch = len(split.labels) // batch_size
    donated = functools.partial(jax.jit, donate_argnums=0, out_shardings=_sharding())

    @jax.jit
    def order_of_epoch(state: State) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(state.key, 0), state.step // steps_per_epoch)
        order = jax.random.permutation(key, len(split.labels))
        return order[: steps_per_epoch * batch_size].reshape(steps_per_epoch, -1)

    def one(
        state: State, split: Batch, order: jax.Array, event: bool | None = None
    ) -> tuple[State, jax.Array]:
        indices = order[state.step % steps_per_epoch]
        indices = jax.lax.with_sharding_constraint(indices, _sharding("data"))
        return step(state, Batch(split.images[indices], split.labels[indices]), event)

    @functools.partial(donated, static_argnums=3)
    def scanned(state: State, split: Batch, order: jax.Array, num_steps: int) -> Any:
        return jax.lax.scan(lambda s, _: one(s, split, order), state, length=num_steps)

    jitted = donated(one, static_argnums=3)

    def looped(state: State, split: Batch, order: jax.Array, num_steps: int) -> Any:
        events = _events(family, state, num_steps)
        return _loop(lambda s, event: jitted(s, split, order, event), state, events)

    steps = scanned if scan and not family.two_programs else looped
    return lambda state, _, num_steps: steps(state, split, order_of_epoch(state), num_steps)


def _run_stream(step: Callable[..., Any], family: weights.Family) -> Callable[..., Any]:
    """Steps over batches that come from the host."""
    jitted = jax.jit(step, donate_argnums=0, static_argnums=2, out_shardings=_sharding())

    def one(state: State, given: tuple[Batch, bool | None]) -> tuple[State, jax.Array]:
        batch, event = given
        return jitted(state, _place(batch), event)

    def steps(state: State, stream: Any, num_steps: int) -> tuple[State, jax.Array]:
        batches = itertools.islice(stream, num_steps)
        return _loop(one, state, zip(batches, _events(family, state, num_steps), strict=True))

    return steps


def _events(family: weights.Family, state: State, num_steps: int) -> Sequence[bool | None]:
    """What each of the next steps is told: whether it is an event, where programs differ by it."""
    if not family.two_programs:
        return [None] * num_steps
    return weights.events(family, int(state.step), num_steps)


def _loop(one: Callable[..., Any], state: State, inputs: Iterable[Any]) -> tuple[State, jax.Array]:
    """A compiled call for each step."""
    losses = []
    for x in inputs:
        state, loss = one(state, x)
        if jax.default_backend() == "cpu":  # steps in flight on several devices starve each other
            jax.block_until_ready(loss)
        losses.append(loss)
    return state, jnp.stack(losses)


def _sharding(*axes: str) -> NamedSharding:
    """Over all devices: a copy on each, or split along "data"."""
    return NamedSharding(
        jax.sharding.Mesh(np.array(jax.devices()), ("data",)), PartitionSpec(*axes)
    )


def _spent(effort: Effort, step: jax.Array) -> jax.Array:
    return effort.total + effort.ratio * (step - effort.since)


def _key_of_step(state: State) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(state.key, 1), state.step)


def _place(batch: Batch) -> Batch:
    """One array over all devices, from the share of each process."""
    sharding = _sharding("data")
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def _told(model: nn.Module, train: bool) -> dict[str, Any]:
    takes_train = "train" in inspect.signature(type(model).__call__).parameters
    return {"train": train} if takes_train else {}
