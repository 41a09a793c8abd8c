"""A setting and a task made ready for training: compiled steps on a mesh of devices."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

import granet_jax as gj
from experiments.engine import batches, files, methods, optimizers, weights
from experiments.engine import mesh as meshes
from experiments.engine.optimizers import Length
from experiments.engine.settings import Settings
from experiments.engine.task import Memory, Streamed, Task, Told, tell


class Effort(NamedTuple):
    """Forward FLOPs so far, in units of those of the dense network."""

    ratio: jax.Array  # float32, of a step under the present masks
    since: jax.Array  # int32, the step after which they were last measured
    total: jax.Array  # float32, of all steps up to that


class State(NamedTuple):
    """All that training changes, and the key from which it draws."""

    step: jax.Array  # int32, updates done
    params: Any  # with a reparameterisation the pair of weights and extra parameters
    model_state: Any  # variables of the task, such as batch statistics
    opt_state: Any
    effort: Effort
    key: jax.Array  # typed; what is drawn follows from it and the step


class Setup(NamedTuple):
    """What settings, task and mesh make together; nothing is allocated."""

    config: Settings
    task: Task
    mesh: Mesh
    length: Length
    rules: gj.trees.Rules
    abstract_params: Any  # the dense weights
    abstract_variables: Any
    costs: gj.flops.Costs  # of the dense network, for one example
    slots: weights.Slots | None
    family: weights.Family  # what state.params are, and where the masks
    update: Callable[..., Any]  # of the optimizer


class Trainer(NamedTuple):
    """Compiled functions. Nothing that they make is ever whole on one device of a mesh.

    Nothing but ``settings`` knows of a seed: one trainer serves all, compiled once.
    """

    settings: Settings
    setup: Setup
    told: Told  # what tables and pages need to know of the task
    facts: dict[str, Any]  # JSON, by which other data are noticed
    abstract_state: State  # ShapeDtypeStructs with shardings
    init: Callable[[int], State]  # seed -> state
    open_stream: Callable[[int], Any]  # seed -> an iterator of batches; None for data in memory
    run: Callable[[State, Any, int], tuple[State, jax.Array]]  # (.., stream, steps) -> .., losses
    evaluate: Callable[[State], dict[str, float]]  # metrics on each held-out split
    step: Callable[..., tuple[State, jax.Array]]  # (state, batch, event), pure: jit, scan and vmap
    loss_and_grads: Callable[[State, Any], Any]
    lower: Callable[[], Any]  # the program that runs most, for the mesh

    @property
    def length(self) -> Length:
        """Of a run."""
        return self.setup.length

    @property
    def family(self) -> weights.Family:
        """How the weights are held."""
        return self.setup.family


def make_trainer(config: Settings, task: Task, mesh: Mesh | None = None) -> Trainer:
    """Builds optimizer and compiled steps; allocates nothing.

    Args:
      config: the settings.
      task: what to train, made of the same settings but for method and seed.
      mesh: the devices; None = all of them share batches.

    Raises:
      ValueError: the settings do not fit the task, the method or the mesh.
    """
    setup = set_up(config, task, mesh or meshes.make())
    abstract_state = jax.eval_shape(functools.partial(init, setup), 0)
    shardings = meshes.of_state(setup.mesh, task.specs, abstract_state, setup.abstract_params)
    abstract_state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract_state, shardings
    )
    jitted_init = jax.jit(functools.partial(init, setup), out_shardings=shardings)
    one_step = functools.partial(step, setup)
    steps = batches.Steps(one_step, setup.family, setup.mesh, shardings)
    scan = not isinstance(task.train, Streamed) and batches.scan_is_fast(
        functools.partial(loss_fn, setup),
        setup.abstract_params,
        abstract_state,
        batches.abstract(task.train, config.batch_size),
    )
    runner = batches.runner(steps, task.train, config.batch_size, scan)
    open_stream: Callable[[int], Any] = lambda seed: None  # noqa: E731
    if isinstance(task.train, Streamed):
        open_stream = functools.partial(task.train.open, config.batch_size)
    return Trainer(
        config,
        setup,
        tell(config.title, task),
        _facts(task),
        abstract_state,
        lambda seed: started(setup, jitted_init(seed), seed),
        open_stream,
        runner.run,
        functools.partial(evaluate, setup, jax.jit(functools.partial(_sums, setup))),
        one_step,
        lambda state, batch: gradients(setup, state, batch)[:2],
        lambda: runner.lower(abstract_state),
    )


def set_up(config: Settings, task: Task, mesh: Mesh) -> Setup:
    """What is known before anything is compiled."""
    length = Length(task.epochs, batches.epoch_steps(task.train, config.batch_size))
    meshes.check_batch(mesh, config.batch_size)
    task.check_mesh(mesh)
    methods.check_block_kernel(config)
    optimizers.learning_rate(config, length)
    params, variables = jax.eval_shape(task.init, jax.random.key(0))
    _check_metrics(task, params, variables)
    _check_at_init(task, config.method)
    rules = rules_of(config, task, config.parsed_structure)
    forward, example = _counted(task)
    costs = gj.flops.count(forward, params, variables, example)
    # The methods' keys are in the state; the one given here is not used again.
    method = optimizers.make_method(config, length, rules, jax.random.key(0))
    slots = weights.slots(config, method, params, rules, mesh.size)
    family = optimizers.family_of(method, config, slots)
    update = optimizers.make_optimizer(config, length, method, slots).update
    return Setup(config, task, mesh, length, rules, params, variables, costs, slots, family, update)


def rules_of(config: Settings, task: Task, structure: gj.trees.Structure | None) -> gj.trees.Rules:
    """The path rules of a run whose layers are pruned in a structure."""
    dense = tuple((pattern, False) for pattern in config.dense_layers)
    return (*dense, *task.prunable(structure))


def init(setup: Setup, seed: Any) -> State:
    """The state before training, but for methods that look at data first."""
    key = jax.random.key(seed)
    params, variables = setup.task.init(jax.random.fold_in(key, 0))
    config, slots = setup.config, setup.slots
    method = optimizers.make_method(config, setup.length, setup.rules, jax.random.fold_in(key, 1))
    tx = optimizers.make_optimizer(config, setup.length, method, slots)
    params, opt_state = optimizers.family_of(method, config, slots).start(params, tx)
    count = jnp.zeros([], jnp.int32)
    effort = Effort(forward_ratio(setup, params, opt_state), count, jnp.zeros([]))
    return State(count, params, variables, opt_state, effort, jax.random.fold_in(key, 2))


def started(setup: Setup, state: State, seed: int) -> State:
    """Masks the state where the method looks at data before training."""
    config, task = setup.config, setup.task
    find = methods.METHODS[config.method].at_init
    if find is None:
        return state
    shardings = jax.tree.map(lambda x: x.sharding, state)
    assert not isinstance(task.train, Streamed)  # see set_up

    def loss(params: Any, batch: Any, temperature: float = 1.0) -> jax.Array:
        if task.scored_loss is None:
            return task.loss(params, state.model_state, batch, state.key)[0]
        return task.scored_loss(params, state.model_state, batch, temperature)

    forward, example = _counted(task)
    masks = find(
        methods.AtInit(
            state.params,
            loss,
            lambda params, x: forward(params, state.model_state, x),
            batches.sample(task.train, task.num_scored, seed, config.batch_size),
            example,
            config.sparsity,
            setup.rules,
        )
    )
    params = gj.apply_masks(state.params, masks)
    opt_state = gj.set_masks(state.opt_state, masks, setup.rules)
    effort = state.effort._replace(ratio=forward_ratio(setup, params, opt_state))
    state = state._replace(params=params, opt_state=opt_state, effort=effort)
    return jax.device_put(state, shardings)


def loss_fn(setup: Setup, params: Any, state: State, batch: Any) -> tuple[jax.Array, Any]:
    """The loss of a batch, and the task's variables after it."""
    is_update_step = setup.family.is_update_step(state.step + 1)
    key = jax.random.fold_in(_key_of_step(state), 0)
    with methods.products(setup.config, state.opt_state, is_update_step) as masks:
        variables = {**state.model_state, **masks} if masks else state.model_state
        loss, variables = setup.task.loss(params, variables, batch, key)
    return loss, {name: variables[name] for name in state.model_state} if masks else variables


def gradients(setup: Setup, state: State, batch: Any, event: bool | None = None) -> Any:
    """Loss and variables, gradients, and what the optimizer is told besides."""
    held = state.params, state.opt_state
    without = state._replace(params=None)  # nothing but the weights is differentiated
    return setup.family.gradients(functools.partial(loss_fn, setup), event, *held, without, batch)


def step(
    setup: Setup, state: State, batch: Any, event: bool | None = None
) -> tuple[State, jax.Array]:
    """One update.

    Args:
      setup: what to train.
      state: before.
      batch: as the source gives it.
      event: whether masks are updated, where programs differ by that; None = one for both.
    """
    batch = setup.task.augment(jax.random.fold_in(_key_of_step(state), 1), batch)
    (loss, variables), grads, told = gradients(setup, state, batch, event)
    updates, opt_state = setup.update(grads, state.opt_state, state.params, **told)
    params = optax.apply_updates(state.params, updates)
    t = state.step + 1

    def measured() -> Effort:
        return Effort(forward_ratio(setup, params, opt_state), t, _spent(state.effort, t))

    effort = state.effort
    if event is None:
        effort = jax.lax.cond(setup.family.is_update_step(t), measured, lambda: state.effort)
    elif event:
        effort = measured()
    return State(t, params, variables, opt_state, effort, state.key), loss


def forward_ratio(setup: Setup, params: Any, opt_state: Any) -> jax.Array:
    """Forward FLOPs under the masks over those of the dense network; NaN where there are none."""
    masks = setup.family.masks(params, opt_state)
    return ratio(setup, gj.metrics.densities(masks, setup.abstract_params, setup.rules))


def ratio(setup: Setup, densities: dict[str, Any]) -> jax.Array:
    """The same, given the density of each prunable leaf by path."""
    if not any(cost.macs for cost in setup.costs.leaves):
        return jnp.float32(jnp.nan)
    return jnp.asarray(gj.flops.ratio(setup.costs, densities), jnp.float32)


def evaluate(setup: Setup, sums: Callable[..., Any], state: State) -> dict[str, float]:
    """Each metric on each held-out split, a mean over its examples."""
    found: dict[str, float] = {}
    batch_size = setup.config.batch_size
    for split, source in setup.task.held_out.items():
        totals = {metric.name: 0.0 for metric in setup.task.metrics}
        for pair in batches.in_order(source, batch_size):
            each = sums(state, *batches.shared(pair, setup.mesh, batch_size))
            totals = {name: total + float(each[name]) for name, total in totals.items()}
        count = batches.size(source)
        found |= {f"{split}_{name}": total / count for name, total in totals.items()}
    return found


def _sums(setup: Setup, state: State, batch: Any, valid: jax.Array) -> dict[str, jax.Array]:
    def summed(params: Any, state: State, batch: Any, valid: jax.Array) -> Any:
        values = setup.task.evaluate(params, state.model_state, batch)
        return {k: jnp.sum(jnp.where(valid, v, 0.0).astype(jnp.float32)) for k, v in values.items()}

    through = setup.family.through(summed)
    return through(state.params, state.opt_state, state._replace(params=None), batch, valid)


def mean_forward_ratio(state: State) -> float:
    """Forward FLOPs over those of the dense network, as a mean over the steps so far."""
    return float(_spent(state.effort, state.step)) / max(int(state.step), 1)


def recalibrate(trainer: Trainer, state: State, some: Iterable[Any]) -> State:
    """Renews the statistics of batch norm, which pruning in one shot leaves wrong.

    Each batch passes through the network in training mode and moves the running statistics as in
    training; no parameter changes. With the usual momentum of .9, 100 batches leave a share of
    .9^100 = 3e-5 of the old statistics. A model without batch norm returns as it is.
    """
    mesh, batch_size = trainer.setup.mesh, trainer.settings.batch_size
    collect = functools.partial(_collect, trainer.loss_and_grads)
    shared = (batches.shared(batch, mesh, batch_size) for batch in some)
    return gj.one_shot.recalibrate(collect, state, shared)


@functools.partial(jax.jit, static_argnums=0)
def _collect(loss_and_grads: Callable[..., Any], state: State, batch: Any) -> State:
    (_, variables), _ = loss_and_grads(state, batch)  # the gradients are compiled away
    return state._replace(model_state=variables)


def _counted(task: Task) -> tuple[Callable[..., Any], Any]:
    """The function whose FLOPs count, and its abstract inputs."""
    example = task.example
    if example is None:
        example = batches.abstract(task.train, 1)
    if example is None:
        raise ValueError("this task streams its data: it has to give Task.example for FLOPs.")
    return task.forward or task.evaluate, example


def _check_metrics(task: Task, params: Any, variables: Any) -> None:
    if not task.held_out or not task.metrics:
        raise ValueError("Task.held_out is empty, or Task.metrics: nothing would be evaluated.")
    for split, source in task.held_out.items():
        example = batches.abstract(source, 3)
        if example is None:
            continue
        values = jax.eval_shape(task.evaluate, params, variables, example)
        odd = [m.name for m in task.metrics if m.name not in values or values[m.name].shape != (3,)]
        if odd:
            shapes = {name: value.shape for name, value in values.items()}
            raise ValueError(
                "Task.evaluate has to give a number for each example, of shape (3,) for 3 examples "
                f"of {split}, as {', '.join(odd)}; it gives {shapes}."
            )


def _check_at_init(task: Task, method: str) -> None:
    entry = methods.METHODS[method]
    if entry.at_init is None:
        return
    batches.check_sample(task.train, task.num_scored)
    if entry.needs_apply and task.forward is None:
        raise ValueError(f"{method} sends ones through the network: the task lacks Task.forward.")


def _facts(task: Task) -> dict[str, Any]:
    if task.facts is not None:
        return task.facts
    splits = {"train": task.train, **task.held_out}
    return {
        name: files.digest(source.arrays)[:16]
        for name, source in splits.items()
        if isinstance(source, Memory)
    }


def _spent(effort: Effort, count: jax.Array) -> jax.Array:
    return effort.total + effort.ratio * (count - effort.since)


def _key_of_step(state: State) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(state.key, 1), state.step)
