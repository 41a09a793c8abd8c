"""The training loop: compiled once for a setting, run for any number of seeds."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import granet_jax as gj
from experiments import data, methods, models, settings


class State(NamedTuple):
    """All that changes in training."""

    params: Any
    opt_state: Any


class Trainer(NamedTuple):
    """A setting made ready: data on the device and compiled functions."""

    settings: settings.Settings
    steps_per_epoch: int
    init: Callable[[jax.Array], State]  # key -> state
    run_epoch: Callable[[State, jax.Array], tuple[State, jax.Array]]  # key -> state, losses
    evaluate: Callable[[Any], jax.Array]  # params -> test accuracy in percent


class Result(NamedTuple):
    """What a run leaves behind."""

    state: State
    history: list[dict[str, float]]  # one record for each epoch


class Diverged(ArithmeticError):
    """The loss is NaN or infinite."""


def make_trainer(config: settings.Settings, dataset: data.Dataset) -> Trainer:
    """Builds model, optimizer and compiled steps.

    Raises:
      ValueError: the settings do not fit the data, the model or the method.
    """
    model = models.MODELS[config.model](num_classes=dataset.num_classes)
    train, test = jax.tree.map(jnp.asarray, (dataset.train, dataset.test))
    steps_per_epoch = len(train.labels) // config.batch_size
    if steps_per_epoch == 0:
        raise ValueError(
            f"--batch_size={config.batch_size} is more than the {len(train.labels)} images of "
            f"{config.dataset}."
        )
    total_steps = steps_per_epoch * config.epochs
    make_optimizer = functools.partial(_optimizer, config, total_steps)
    make_optimizer(jax.random.key(0))  # wrong settings are told here

    def logits(params: Any, images: jax.Array) -> jax.Array:
        x = (images.astype(jnp.float32) / 255 - dataset.mean[None, None, None]) / dataset.std[
            None, None, None
        ]
        return jnp.asarray(model.apply({"params": params}, x))

    def loss_fn(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits(params, images), labels)
        return jnp.mean(losses)

    def init(key: jax.Array) -> State:
        params = model.init(jax.random.fold_in(key, 0), train.images[:1].astype(jnp.float32))
        params = params["params"]
        opt_state = make_optimizer(jax.random.fold_in(key, 1)).init(params)
        return State(gj.apply_masks(params, gj.get_masks(opt_state)), opt_state)

    # The methods' keys are in the state; the one given here is not used again.
    update = make_optimizer(jax.random.key(0)).update

    def step(state: State, split: data.Split, batch: jax.Array) -> tuple[State, jax.Array]:
        loss, grads = jax.value_and_grad(loss_fn)(
            state.params, split.images[batch], split.labels[batch]
        )
        updates, opt_state = update(grads, state.opt_state, state.params)
        return State(optax.apply_updates(state.params, updates), opt_state), loss

    @jax.jit
    def batches(key: jax.Array) -> jax.Array:
        order = jax.random.permutation(key, len(train.labels))
        return order[: steps_per_epoch * config.batch_size].reshape(steps_per_epoch, -1)

    example = jax.eval_shape(init, jax.random.key(0)).params
    one_batch = train.images[: config.batch_size], train.labels[: config.batch_size]
    run_steps = _scanned(step) if scan_is_fast(loss_fn, example, *one_batch) else _looped(step)

    @jax.jit
    def evaluate(params: Any) -> jax.Array:
        return 100 * jnp.mean(jnp.argmax(logits(params, test.images), axis=-1) == test.labels)

    return Trainer(
        config,
        steps_per_epoch,
        jax.jit(init),
        lambda state, key: run_steps(state, train, batches(key)),
        evaluate,
    )


def scan_is_fast(loss_fn: Callable[..., jax.Array], *args: Any) -> bool:
    """Whether many steps should run as one ``lax.scan``.

    Yes on accelerators, and on CPU for models of matrix products; XLA:CPU compiles the gradients
    of convolutions inside loops to naive code, dozens of times slower than outside.
    """
    on_cpu = jax.default_backend() == "cpu"
    return not on_cpu or "conv_general_dilated" not in str(jax.make_jaxpr(loss_fn)(*args))


def _scanned(step: Callable[..., Any]) -> Callable[..., Any]:
    """Runs all steps in one compiled call."""

    @functools.partial(jax.jit, donate_argnums=0)
    def run(state: State, split: data.Split, indices: jax.Array) -> tuple[State, jax.Array]:
        return jax.lax.scan(lambda s, batch: step(s, split, batch), state, indices)

    return run


def _looped(step: Callable[..., Any]) -> Callable[..., Any]:
    """Runs one compiled call for each step."""
    compiled = jax.jit(step, donate_argnums=0)

    def run(state: State, split: data.Split, indices: jax.Array) -> tuple[State, jax.Array]:
        losses = []
        for batch in indices:
            state, loss = compiled(state, split, batch)
            losses.append(loss)
        return state, jnp.stack(losses)

    return run


def _optimizer(
    config: settings.Settings, total_steps: int, key: jax.Array
) -> optax.GradientTransformation:
    schedule = optax.piecewise_constant_schedule(
        config.learning_rate, {total_steps // 2: 0.1, total_steps * 3 // 4: 0.1}
    )
    plan = methods.Plan(
        sparsity=config.sparsity,
        update_every=config.update_every,
        prune_end_step=max(1, round(config.prune_until * total_steps)),
        total_steps=total_steps,
        key=key,
    )
    inner = optax.chain(
        optax.add_decayed_weights(config.weight_decay),
        optax.sgd(schedule, momentum=config.momentum, nesterov=True),
    )
    return gj.sparsify(inner, methods.METHODS[config.method](plan))


def train(trainer: Trainer, seed: int, on_epoch: Callable[[dict[str, float]], None]) -> Result:
    """Trains from scratch and calls ``on_epoch`` with a record after each epoch.

    Raises:
      Diverged: the loss became NaN or infinite; the message says in which steps.
    """
    key = jax.random.key(seed)
    state = trainer.init(key)
    history: list[dict[str, float]] = []
    masks = jax.tree.map(jnp.copy, gj.get_masks(state.opt_state))
    for epoch in range(1, trainer.settings.epochs + 1):
        started = time.perf_counter()
        epoch_key = jax.random.fold_in(jax.random.fold_in(key, 2), epoch)
        state, device_losses = trainer.run_epoch(state, epoch_key)
        losses = np.asarray(device_losses)
        seconds = time.perf_counter() - started
        if not np.all(np.isfinite(losses)):
            first = (epoch - 1) * trainer.steps_per_epoch + int(np.argmin(np.isfinite(losses))) + 1
            raise Diverged(
                f"the loss is {losses[~np.isfinite(losses)][0]} at step {first} (epoch {epoch}). "
                "Lower --learning_rate."
            )
        old, masks = masks, jax.tree.map(jnp.copy, gj.get_masks(state.opt_state))
        record = {
            "epoch": epoch,
            "step": epoch * trainer.steps_per_epoch,
            "loss": float(losses.mean()),
            "test_accuracy": float(trainer.evaluate(state.params)),
            "images_per_second": trainer.settings.batch_size * len(losses) / seconds,
            **{k: float(v) for k, v in _mask_metrics(old, masks, state.params).items()},
        }
        history.append(record)
        on_epoch(record)
    return Result(state, history)


@jax.jit
def _mask_metrics(old: Any, new: Any, params: Any) -> dict[str, jax.Array]:
    densities = gj.metrics.densities(new, params)
    return {
        "sparsity": gj.metrics.sparsity(new, params),
        "grown": gj.metrics.num_grown(old, new),
        "nonfinite": gj.metrics.num_nonfinite(params),
        **{f"density/{path}": density for path, density in densities.items()},
    }
