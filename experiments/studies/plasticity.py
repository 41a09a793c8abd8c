"""Pruning plasticity: prunes copies of networks on the way, and how well they recover.

Source: Liu et al., "Sparse Training via Boosting Pruning Plasticity with Neuroregeneration",
NeurIPS 2021, section 3. As in the paper's code, the smallest ceil(rate * live) weights go, of all
layers together or of each, then each layer regrows as many as it lost, at random or by the
gradients of the network before the prune; what was pruned starts again at 0 with zero moments, be
it regrown at once. So a dense network regrows everything, whatever the rule.
"""

import functools
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import granet_jax as gj
from experiments.engine import batches, optimizers, records, run, training
from experiments.engine.files import Record
from experiments.engine.task import Metric
from experiments.engine.training import State, Trainer
from granet_jax.types import ScoreFn

RULES: dict[str, ScoreFn | None] = {  # what regrows is what scores highest
    "none": None,
    "random": gj.scores.random,
    "gradient": gj.scores.gradient,
}


class Plan(NamedTuple):
    """What is done to networks that train."""

    sparsities: tuple[float, ...]
    prune_epochs: tuple[int, ...]
    continue_epochs: int
    rates: tuple[float, ...]
    rules: tuple[str, ...]
    scope: str  # "global" or "uniform"
    gradient_batches: int
    recalibrate: int  # batches


class Branch(NamedTuple):
    """A pruned copy of a network, told from all others."""

    sparsity: float  # before the prune
    seed: int
    epoch: int  # after which it was pruned
    rate: float
    rule: str


class Outcome(NamedTuple):
    """What became of it, by the task's first metric on the split that tables show."""

    live: int  # weights with which it trained on
    pruned: float  # just after the prune
    recovered: float  # in the end


Results = dict[Branch, Outcome]


def num_kept(num_live: Any, rate: float, scope: str) -> Any:
    """How many weights a prune keeps: ``live - ceil(rate * live)``.

    Args:
      num_live: ints ``(layers,)``.
      rate: share of the live weights that goes. The product is a float64; what rounding may have
        lifted above an integer counts as that integer.
      scope: "global" for one count over all layers, "uniform" for one for each.

    Returns:
      int32, a scalar or ``(layers,)``.
    """
    live = np.asarray(num_live, np.int64)
    live = np.asarray(live.sum()) if scope == "global" else live
    return (live - np.ceil(np.round(rate * live, 6))).astype(np.int32)


@functools.partial(jax.jit, static_argnames=("grow", "prunable"))
def pruned_masks(
    masks: Any,
    params: Any,
    num_keep: Any,
    grow: ScoreFn | None = None,
    grads: Any = None,
    key: jax.Array | None = None,
    prunable: gj.trees.Rules = (),
) -> tuple[Any, Any]:
    """Keeps the largest weights; each layer may regrow as many as it lost.

    Args:
      masks: bool, tree of params.
      params: the weights.
      num_keep: int32, a scalar to rank all layers together, or ``(layers,)``.
      grow: regrown are the highest by this score among all that are off after the prune, those just
        pruned included; None = nothing regrows.
      grads: tree of params, for ``grow``.
      key: typed key, for ``grow``.
      prunable: path rules.

    Returns:
      New masks, and what was kept; the rest of the new masks has regrown.
    """
    prune = gj.prune_to(lambda shapes, step: num_keep, prunable=prunable)
    kept, _ = prune(masks, masks, gj.Event(params))
    if grow is None:
        return kept, kept
    leaves = gj.trees.describe(params, prunable)
    num_lost = gj.metrics.num_live(masks, params, prunable)
    num_lost -= gj.metrics.num_live(kept, params, prunable)
    stacks = gj.trees.split(kept, leaves)
    scores = gj.trees.split(grow(gj.Event(params, grads, kept, key=key)), leaves)
    grown = gj.top_k(scores, num_lost, [~x for x in stacks])
    new = gj.trees.join([x | g for x, g in zip(stacks, grown, strict=True)], kept, leaves)
    return new, kept


def under_masks(trainer: Trainer, state: State, masks: Any, kept: Any) -> State:
    """Puts a network under new masks; weights and moments outside ``kept`` become 0."""
    config, setup = trainer.settings, trainer.setup
    method = optimizers.make_method(config, setup.length, setup.rules, jax.random.key(0))
    optimizer = optimizers.make_optimizer(config, setup.length, method)
    opt_state = optax.tree.map_params(
        optimizer, lambda x, k: jnp.where(k, x, jnp.zeros_like(x)), state.opt_state, kept
    )
    state = state._replace(
        params=gj.apply_masks(state.params, kept),
        opt_state=gj.set_masks(opt_state, masks, setup.rules),
    )
    return jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), state, trainer.abstract_state)


def train_on(
    trainer: Trainer, states: Sequence[State], epochs: int, together: bool
) -> Iterator[State]:
    """Trains networks of one seed and step for some epochs; takes their buffers.

    Args:
      trainer: of all of them.
      states: one for each network.
      epochs: passes over the data.
      together: whether as one batch of networks, by ``vmap``, or one after another.

    Yields:
      The state of each network in the end, in order.
    """
    epoch_steps = trainer.length.epoch_steps
    if not together:
        for state in states:
            for _ in range(epochs):
                state, _ = trainer.run(state, None, epoch_steps)
            yield state
        return
    # Steps and keys are common to all, so that batches are, and mask updates stay conditional.
    axes = jax.tree.map(lambda _: 0, states[0])._replace(step=None, key=None)
    axes = axes._replace(opt_state=axes.opt_state._replace(mask_step=None, grew=None))
    map_by_axis = functools.partial(jax.tree.map, is_leaf=lambda x: x is None)

    def one_epoch(state: State) -> State:
        return trainer.run(state, None, epoch_steps)[0]

    run_all = jax.vmap(one_epoch, in_axes=(axes,), out_axes=axes)
    batch = map_by_axis(lambda axis, *x: x[0] if axis is None else jnp.stack(x), axes, *states)
    for _ in range(epochs):
        batch = run_all(batch)
    for i in range(len(states)):
        yield map_by_axis(lambda axis, x, i=i: x if axis is None else x[i], axes, batch)


def prune_and_train_on(
    trainer: Trainer,
    plan: Plan,
    some: Sequence[Any],
    state: State,
    copies: Sequence[Branch],
    together: bool,
) -> Iterator[tuple[Branch, Outcome]]:
    """Prunes copies of a network and trains them on; the network stays as it is.

    Args:
      trainer: of the network.
      plan: what is done.
      some: batches to train on, as many as the plan's gradients and recalibration take.
      state: of the network, at the end of an epoch.
      copies: what tells them apart.
      together: see :func:`train_on`.
    """
    if not copies:
        return
    shown, rules = trainer.told.key(trainer.told.shown), trainer.setup.rules
    masks = gj.get_masks(state.opt_state)
    num_live = gj.metrics.num_live(masks, state.params, rules)
    grads = jax.tree.map(jnp.zeros_like, state.params)
    for batch in some[: plan.gradient_batches]:  # their sum ranks as their mean does
        batch = batches.shared(batch, trainer.setup.mesh, trainer.settings.batch_size)
        grads = _add_gradients(trainer.loss_and_grads, grads, state, batch)
    key = jax.random.fold_in(jax.random.fold_in(state.key, 2), state.step)  # training has 0 and 1
    starts, live, pruned = [], [], []
    for branch in copies:
        num_keep = num_kept(num_live, branch.rate, plan.scope)
        grow = RULES[branch.rule]
        new, kept = pruned_masks(masks, state.params, num_keep, grow, grads, key, rules)
        start = under_masks(trainer, state, new, kept)
        if plan.recalibrate:
            start = training.recalibrate(trainer, start, some[: plan.recalibrate])
        live.append(int(gj.metrics.num_live(new, state.params, rules).sum()))
        pruned.append(trainer.evaluate(start)[shown])
        starts.append(jax.tree.map(jnp.copy, start))  # some buffers are those of `state`
    finals = train_on(trainer, starts, plan.continue_epochs, together)
    for i, (branch, final) in enumerate(zip(copies, finals, strict=True)):
        records.check_sparse(final)
        yield branch, Outcome(live[i], pruned[i], trainer.evaluate(final)[shown])


@functools.partial(jax.jit, static_argnums=0)
def _add_gradients(loss_and_grads: Callable[..., Any], total: Any, state: State, batch: Any) -> Any:
    _, grads = loss_and_grads(state, batch)
    return jax.tree.map(jnp.add, total, grads)


def study(
    trainer: Trainer,
    plan: Plan,
    some: Sequence[Any],
    out_dir: pathlib.Path,
    results: Results,
    *,
    resume: bool,
    checkpoint_seconds: float,
    show: Callable[[Record], None],
) -> list[Record]:
    """Trains the unpruned network of one sparsity and seed, and branches off on the way.

    Args:
      trainer: its settings tell sparsity and seed.
      plan: what is done.
      some: see :func:`prune_and_train_on`.
      out_dir: the folder of results.jsonl; the unpruned run has one inside.
      results: what is known; what is missing is added, there and in results.jsonl.
      resume: see :func:`experiments.engine.run.run`, as for the rest.
      checkpoint_seconds: of the unpruned run.
      show: called with the record of each epoch of the unpruned run.

    Returns:
      The records of the unpruned run.

    Raises:
      ValueError: the unpruned run is there, but not all results.
    """
    # XLA:CPU multiplies many matrices at once no faster than one after another.
    together = jax.default_backend() != "cpu"
    wanted = branches(plan, trainer.settings.sparsity, trainer.settings.seed)

    def evaluate(state: State) -> dict[str, float]:
        # Runs evaluate before they write a checkpoint: none is ahead of the results.
        epoch = int(state.step) // trainer.length.epoch_steps
        missing = [b for b in wanted if b.epoch == epoch and b not in results]
        for branch, outcome in prune_and_train_on(trainer, plan, some, state, missing, together):
            results[branch] = outcome
            write_results(out_dir, results)
        return trainer.evaluate(state)

    folder = out_dir / f"unpruned-{trainer.settings.sparsity:g}-{trainer.settings.seed}"
    done = run.run(
        trainer._replace(evaluate=evaluate),
        folder,
        resume=resume,
        checkpoint_seconds=checkpoint_seconds,
        show=show,
    )
    if missing := [branch for branch in wanted if branch not in results]:
        raise ValueError(
            f"{out_dir}/results.jsonl lacks {len(missing)} results that {folder} had once led to. "
            "Put it back, or choose another --out_dir."
        )
    return done.history


def branches(plan: Plan, sparsity: float, seed: int) -> list[Branch]:
    """All copies of one network, in the order in which they are made."""
    kinds = itertools.product(plan.prune_epochs, plan.rates, rules_for(sparsity, plan))
    return [Branch(sparsity, seed, *kind) for kind in kinds]


def rules_for(sparsity: float, plan: Plan) -> tuple[str, ...]:
    """The rules that differ: of random and gradient, a dense network needs one."""
    same = sparsity == 0 and "gradient" in plan.rules
    return tuple(rule for rule in plan.rules if not (same and rule == "random"))


def write_results(out_dir: pathlib.Path, results: Results) -> None:
    """Writes results.jsonl, whole or not at all."""
    lines = [json.dumps(b._asdict() | outcome._asdict()) for b, outcome in results.items()]
    new = out_dir / "results.new"
    new.write_text("".join(line + "\n" for line in lines))
    new.replace(out_dir / "results.jsonl")


def read_results(out_dir: pathlib.Path) -> Results:
    """Reads results.jsonl.

    Raises:
      ValueError: a line is not as it was written.
    """
    path = out_dir / "results.jsonl"
    try:
        lines = path.read_text().splitlines() if path.exists() else []
        return {
            Branch(*(r[k] for k in Branch._fields)): Outcome(*(r[k] for k in Outcome._fields))
            for r in map(json.loads, lines)
        }
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{path} holds a result that cannot be read ({error!r}). Put it back, or choose "
            "another --out_dir."
        ) from error


class Line(NamedTuple):
    """A rule at a rate; arrays are ``(seeds, epochs of the prune)``.

    Differences are by how much the pruned network is better than the unpruned one.
    """

    sparsity: float
    rate: float
    rule: str
    live: np.ndarray  # weights
    damage: np.ndarray  # the difference just after the prune
    plasticity: np.ndarray  # and in the end


Unpruned = Mapping[float, np.ndarray]  # sparsity -> the metric (seeds, epochs of the run)


def lines(plan: Plan, results: Results, unpruned: Unpruned, metric: Metric) -> list[Line]:
    """What figure and table show."""
    now = np.array(plan.prune_epochs) - 1
    found = []
    for sparsity, rate in itertools.product(plan.sparsities, plan.rates):
        seeds = range(len(unpruned[sparsity]))
        for rule in rules_for(sparsity, plan):
            outcomes = [
                [results[Branch(sparsity, s, e, rate, rule)] for e in plan.prune_epochs]
                for s in seeds
            ]
            live, pruned, recovered = np.moveaxis(np.array(outcomes), -1, 0)
            damage = metric.sign * (pruned - unpruned[sparsity][:, now])
            then = unpruned[sparsity][:, now + plan.continue_epochs]
            plasticity = metric.sign * (recovered - then)
            found.append(Line(sparsity, rate, rule, live.astype(int), damage, plasticity))
    return found
