"""The pruning-plasticity study: how well networks recover from a prune, by when it happens.

Example:
  python -m experiments.plasticity
  python -m experiments.plasticity --dataset=mnist --data_dir=FOLDER --epochs=24 --seeds=2
  python -m experiments.plasticity --dataset=cifar10 --data_dir=FOLDER --sparsities=0 --seeds=1

Networks train as usual, dense or with static random masks (--sparsities). After some epochs
(--prune_epochs) copies are pruned at once, one for each rate (--rates) and rule of regeneration
(--rules), and train on for --continue_epochs at the learning rates that the unpruned network has in
these epochs. Plasticity is the difference in test accuracy between the two at the end of that.

Source: Liu et al., "Sparse Training via Boosting Pruning Plasticity with Neuroregeneration",
NeurIPS 2021, section 3. As in the paper's code, the smallest ceil(rate * live) weights go, of all
layers together or of each (--scope), then each layer regrows as many as it lost, at random or by
the gradients of the network before the prune; what was pruned starts again at 0 with zero moments,
be it regrown at once. So a dense network regrows everything, whatever the rule.

Leaves in --out_dir: plasticity.svg and .png, table.txt, results.jsonl, and the folder of each
unpruned run. Stopped at any moment, the same command goes on; seeds can be added.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from absl import app, flags
from matplotlib import pyplot as plt
from matplotlib.ticker import FixedLocator, NullLocator
from rich.console import Console

import granet_jax as gj
from experiments import data, files, optimizers, output, run, settings, training
from experiments.settings import Settings
from experiments.streams import Batch, Stream
from experiments.training import State, Trainer
from granet_jax.types import ScoreFn

matplotlib.use("Agg")

RULES: dict[str, ScoreFn | None] = {  # what regrows is what scores highest
    "none": None,
    "random": gj.scores.random,
    "gradient": gj.scores.gradient,
}

_UNUSED: dict[str, Any] = {  # settings that are no flags here
    "method": "static",
    "sparsity": 0.0,
    "update_every": 1,
    "compact": False,
    "prune_until": 0.5,
    "penalty": 0.0,
    "initial_threshold": 0.0,
    "validation": 0,
    "seed": 0,
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
    """What became of it; accuracies on the test images in percent."""

    live: int  # weights with which it trained on
    pruned: float  # accuracy just after the prune
    recovered: float  # accuracy in the end


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
    kept, _ = prune(masks, masks, params, grads, jnp.zeros([], jnp.int32), key)
    if grow is None:
        return kept, kept
    leaves = gj.trees.describe(params, prunable)
    num_lost = gj.metrics.num_live(masks, params, prunable)
    num_lost -= gj.metrics.num_live(kept, params, prunable)
    stacks = gj.trees.split(kept, leaves)
    scores = gj.trees.split(grow(params, grads, key), leaves)
    grown = gj.top_k(scores, num_lost, [~x for x in stacks])
    new = gj.trees.join([x | g for x, g in zip(stacks, grown, strict=True)], kept, leaves)
    return new, kept


def under_masks(
    optimizer: optax.GradientTransformation,
    state: State,
    masks: Any,
    kept: Any,
    prunable: gj.trees.Rules = (),
) -> State:
    """Puts a network under new masks; weights and moments outside ``kept`` become 0."""
    opt_state = optax.tree.map_params(
        optimizer, lambda x, k: jnp.where(k, x, jnp.zeros_like(x)), state.opt_state, kept
    )
    return state._replace(
        params=gj.apply_masks(state.params, kept),
        opt_state=gj.set_masks(opt_state, masks, prunable),
    )


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
    if not together:
        for state in states:
            for _ in range(epochs):
                state, _ = trainer.run(state, None, trainer.steps_per_epoch)
            yield state
        return
    # Steps and keys are common to all, so that batches are, and mask updates stay conditional.
    axes = jax.tree.map(lambda _: 0, states[0])._replace(step=None, key=None)
    axes = axes._replace(opt_state=axes.opt_state._replace(mask_step=None))
    map_by_axis = functools.partial(jax.tree.map, is_leaf=lambda x: x is None)

    def one_epoch(state: State) -> State:
        return trainer.run(state, None, trainer.steps_per_epoch)[0]

    run_all = jax.vmap(one_epoch, in_axes=(axes,), out_axes=axes)
    batch = map_by_axis(lambda axis, *x: x[0] if axis is None else jnp.stack(x), axes, *states)
    for _ in range(epochs):
        batch = run_all(batch)
    for i in range(len(states)):
        yield map_by_axis(lambda axis, x, i=i: x if axis is None else x[i], axes, batch)


def prune_and_train_on(
    trainer: Trainer,
    plan: Plan,
    batches: Sequence[Batch],
    state: State,
    copies: Sequence[Branch],
    together: bool,
) -> Iterator[tuple[Branch, Outcome]]:
    """Prunes copies of a network and trains them on; the network stays as it is.

    Args:
      trainer: of the network.
      plan: what is done.
      batches: training images, as many as the plan's gradients and recalibration take.
      state: of the network, at the end of an epoch.
      copies: what tells them apart.
      together: see :func:`train_on`.
    """
    if not copies:
        return
    config, steps_per_epoch = trainer.settings, trainer.steps_per_epoch
    method = optimizers.make_method(config, steps_per_epoch, jax.random.key(0))
    optimizer = optimizers.make_optimizer(config, steps_per_epoch, method)
    masks = gj.get_masks(state.opt_state)
    num_live = gj.metrics.num_live(masks, state.params, config.prunable)
    grads = jax.tree.map(jnp.zeros_like, state.params)
    for batch in batches[: plan.gradient_batches]:  # their sum ranks as their mean does
        grads = _add_gradients(trainer.loss_and_grads, grads, state, batch)
    key = jax.random.fold_in(jax.random.fold_in(state.key, 2), state.step)  # training has 0 and 1
    starts, live, accuracies = [], [], []
    for branch in copies:
        num_keep = num_kept(num_live, branch.rate, plan.scope)
        grow = RULES[branch.rule]
        new, kept = pruned_masks(masks, state.params, num_keep, grow, grads, key, config.prunable)
        start = under_masks(optimizer, state, new, kept, config.prunable)
        start = training.recalibrate(trainer, start, batches[: plan.recalibrate])
        live.append(int(gj.metrics.num_live(new, state.params, config.prunable).sum()))
        accuracies.append(trainer.evaluate(start)["test"])
        starts.append(jax.tree.map(jnp.copy, start))  # some buffers are those of `state`
    finals = train_on(trainer, starts, plan.continue_epochs, together)
    for i, (branch, final) in enumerate(zip(copies, finals, strict=True)):
        run.check_sparse(final)
        yield branch, Outcome(live[i], accuracies[i], trainer.evaluate(final)["test"])


@functools.partial(jax.jit, static_argnums=0)
def _add_gradients(
    loss_and_grads: Callable[..., Any], total: Any, state: State, batch: Batch
) -> Any:
    _, grads = loss_and_grads(state, batch)
    return jax.tree.map(jnp.add, total, grads)


def study(
    trainer: Trainer,
    plan: Plan,
    batches: Sequence[Batch],
    out_dir: pathlib.Path,
    results: Results,
    *,
    resume: bool,
    checkpoint_seconds: float,
    show: Callable[[files.Record], None],
) -> list[files.Record]:
    """Trains the unpruned network of one sparsity and seed, and branches off on the way.

    Args:
      trainer: its settings tell sparsity and seed.
      plan: what is done.
      batches: see :func:`prune_and_train_on`.
      out_dir: the folder of results.jsonl; the unpruned run has one inside.
      results: what is known; what is missing is added, there and in results.jsonl.
      resume: see :func:`experiments.run.run`, as for the rest.
      checkpoint_seconds: of the unpruned run.
      show: called with the record of each epoch of the unpruned run.

    Returns:
      The records of the unpruned run.
    """
    # XLA:CPU multiplies many matrices at once no faster than one after another.
    together = jax.default_backend() != "cpu"
    wanted = branches(plan, trainer.settings.sparsity, trainer.settings.seed)

    def evaluate(state: State) -> dict[str, float]:
        # Runs evaluate before they write a checkpoint: none is ahead of the results.
        epoch = int(state.step) // trainer.steps_per_epoch
        missing = [b for b in wanted if b.epoch == epoch and b not in results]
        for branch, outcome in prune_and_train_on(trainer, plan, batches, state, missing, together):
            results[branch] = outcome
            write_results(out_dir, results)
        return trainer.evaluate(state)

    folder = out_dir / f"unpruned-{trainer.settings.sparsity:g}-{trainer.settings.seed}"
    done = run.run_trainer(
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
    """A rule at a rate; arrays are ``(seeds, epochs of the prune)``."""

    sparsity: float
    rate: float
    rule: str
    live: np.ndarray  # weights
    damage: np.ndarray  # accuracy less the unpruned network's in points, just after the prune
    plasticity: np.ndarray  # and in the end


Unpruned = Mapping[float, np.ndarray]  # sparsity -> test accuracy (seeds, epochs of the run)


def lines(plan: Plan, results: Results, unpruned: Unpruned) -> list[Line]:
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
            damage = pruned - unpruned[sparsity][:, now]
            plasticity = recovered - unpruned[sparsity][:, now + plan.continue_epochs]
            found.append(Line(sparsity, rate, rule, live.astype(int), damage, plasticity))
    return found


def rows(plan: Plan, found: Sequence[Line], unpruned: Unpruned) -> list[dict[str, str]]:
    """The table: a column for each epoch of the prune."""
    then = np.array(plan.prune_epochs) - 1 + plan.continue_epochs
    table = []
    for sparsity, same in itertools.groupby(found, lambda line: line.sparsity):
        values = unpruned[sparsity][:, then]
        table.append(_row(plan, f"{sparsity:g}", "", "unpruned (%)", "", values, ".2f"))
        for rate, rules in itertools.groupby(same, lambda line: f"{line.rate:g}"):
            for i, line in enumerate(rules):
                if i == 0:
                    table.append(_row(plan, "", rate, "just pruned", "", line.damage))
                low, high = line.live.min(), line.live.max()
                live = f"{low:,}" if low == high else f"{low:,}-{high:,}"
                table.append(_row(plan, "", "", line.rule, live, line.plasticity))
    return table


def _row(
    plan: Plan, sparsity: str, rate: str, what: str, live: str, values: Any, form: str = "+.2f"
) -> dict[str, str]:
    std = (
        [f" ± {x:.2f}" for x in values.std(0, ddof=1)] if len(values) > 1 else [""] * len(values.T)
    )
    means = values.mean(0).round(2) + 0.0  # never -0
    cells = [f"{mean:{form}}{s}" for mean, s in zip(means, std, strict=True)]
    columns = [f"epoch {epoch}" for epoch in plan.prune_epochs]
    names = {"sparsity": sparsity, "rate": rate, "regrown": what, "weights": live}
    return names | dict(zip(columns, cells, strict=True))


_TICKS = (-100, -30, -10, -3, -1, -0.5, 0, 0.5, 1, 3, 10)
_STYLES: dict[str, dict[str, Any]] = {
    "pruned": {"color": "0.55", "linestyle": ":"},
    "none": {"color": "C3", "marker": "o", "markersize": 4},
    "random": {"color": "C1", "marker": "^", "markersize": 4},
    "gradient": {"color": "C0", "marker": "s", "markersize": 4},
}
_LABELS = {
    "pruned": "just pruned",
    "none": "trained on, nothing regrown",
    "random": "regrown at random and trained on",
    "gradient": "regrown by gradient and trained on",
}


def draw(config: Settings, plan: Plan, found: Sequence[Line], title: str) -> Any:
    """The figure: a panel for each sparsity and rate, all with the same axes."""
    shape = (len(plan.sparsities), len(plan.rates))
    figure, grid = plt.subplots(
        *shape,
        figsize=(1.2 + 2.8 * shape[1], 1.3 + 2.5 * shape[0]),
        layout="constrained",
        squeeze=False,
        sharex=True,
        sharey=True,
    )
    panels = dict(zip(itertools.product(plan.sparsities, plan.rates), grid.flat, strict=True))
    for (sparsity, rate), axes in panels.items():
        before = f"{100 * sparsity:g} % sparse" if sparsity else "dense"
        axes.set_title(f"{before}, {100 * rate:g} % pruned", loc="left", fontsize=10)
        axes.axhline(0, color="black", linewidth=0.8)
        for drop in _drops(config):
            axes.axvline(drop, color="0.5", linewidth=0.8, linestyle="--")
        axes.set_yscale("symlog", linthresh=1)
        axes.yaxis.set_major_locator(FixedLocator(_TICKS))
        axes.yaxis.set_major_formatter(lambda x, _: f"{x:+g}" if x else "0")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xlim(0, config.epochs)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    for line in found:
        shown = [(line.rule, line.plasticity)]
        if line.rule == rules_for(line.sparsity, plan)[0]:  # all fall as far
            shown.insert(0, ("pruned", line.damage))
        for name, points in shown:
            axes, x = panels[line.sparsity, line.rate], plan.prune_epochs
            axes.plot(x, points.mean(0), **_STYLES[name])
            color = _STYLES[name]["color"]
            axes.fill_between(x, points.min(0), points.max(0), color=color, alpha=0.15, linewidth=0)
    names = ("pruned", *plan.rules)
    handles = [grid[0, 0].plot([], [], label=_LABELS[n], **_STYLES[n])[0] for n in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=10)
    figure.suptitle(title, fontsize=10)
    for axes in grid[-1]:
        axes.set_xlabel("epoch of the prune")
    figure.supylabel("accuracy less that of the unpruned network (points)", fontsize=10)
    return figure


def _drops(config: Settings) -> list[float]:
    """The epochs after which the learning rate drops."""
    return [f * config.epochs for f in config.drop_at] if config.schedule == "steps" else []


def _caption(config: Settings, plan: Plan, num_seeds: int) -> str:
    drops = ", ".join(f"{epoch:g}" for epoch in _drops(config))
    return (
        f"{config.dataset}, {config.model}, {plan.scope} pruning; {config.epochs} epochs, learning "
        f"rate {'drops after ' + drops if drops else 'falls as a cosine'}; trained on for "
        f"{plan.continue_epochs} epochs; {num_seeds} seeds"
    )


def plan_from_flags(config: Settings, given: flags.FlagValues = flags.FLAGS) -> Plan:
    """The plan that the flags tell.

    Raises:
      ValueError: a list is empty, or holds something else than expected, or something twice.
    """
    continue_epochs = given.continue_epochs or max(1, round(3 / 16 * config.epochs))
    last = config.epochs - continue_epochs
    eighths = sorted({round(i * config.epochs / 8) for i in range(1, 8)})
    prune_epochs = given.prune_epochs or [epoch for epoch in eighths if 1 <= epoch <= last]
    return Plan(
        _all("sparsities", float, given.sparsities, lambda x: 0 <= x < 1, "numbers in [0, 1)"),
        _all("prune_epochs", int, prune_epochs, lambda x: 1 <= x <= last, f"epochs in [1, {last}]"),
        continue_epochs,
        _all("rates", float, given.rates, lambda x: 0 < x < 1, "numbers in (0, 1)"),
        _all("rules", str, given.rules, lambda x: x in RULES, f"some of {', '.join(RULES)}"),
        given.scope,
        given.gradient_batches,
        given.recalibrate,
    )


def _all(
    name: str,
    kind: Callable[[Any], Any],
    values: Sequence[Any],
    fits: Callable[[Any], bool],
    expected: str,
) -> tuple[Any, ...]:
    """The values of a flag, each once and in range."""
    try:
        read = tuple(kind(value) for value in values)
    except ValueError:
        read = ()
    if not read or len(set(read)) < len(read) or not all(map(fits, read)):
        given = ",".join(map(str, values))
        raise ValueError(f"--{name}={given}: give {expected}, each once at most.")
    return read


def define_flags(flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags of settings and plan."""
    to: dict[str, Any] = {"flag_values": flag_values}
    settings.define_flags(leave_out=tuple(_UNUSED), **to)
    sparsities = "of the networks to prune; 0 is dense, others have static random masks"
    flags.DEFINE_list("sparsities", ["0", "0.9"], sparsities, **to)
    prune_epochs = "epochs after which to prune (default: every eighth of training)"
    flags.DEFINE_list("prune_epochs", None, prune_epochs, **to)
    continue_epochs = "how long to train on (default: 3/16 of training)"
    flags.DEFINE_integer("continue_epochs", None, continue_epochs, lower_bound=1, **to)
    rates = ["0.2", "0.5", "0.9", "0.98"]
    flags.DEFINE_list("rates", rates, "shares of live weights to prune", **to)
    flags.DEFINE_list("rules", list(RULES), f"what regrows, of: {', '.join(RULES)}", **to)
    scope = "prune all layers together or each for itself"
    flags.DEFINE_enum("scope", "global", ["global", "uniform"], scope, **to)
    gradient_batches = "batches whose gradients decide what regrows"
    flags.DEFINE_integer("gradient_batches", 10, gradient_batches, lower_bound=1, **to)
    recalibrate = "batches that renew batch norm after the prune"
    flags.DEFINE_integer("recalibrate", 0, recalibrate, lower_bound=0, **to)


def main(argv: list[str]) -> None:
    """Runs what the flags say."""
    if len(argv) > 1:
        sys.exit(f"error: {argv[1]!r} is no flag; flags look like --seeds=3. See --help.")
    console = Console()
    given = flags.FLAGS
    with settings.errors_in_one_line():
        config = settings.from_flags(**_UNUSED)
        plan = plan_from_flags(config)
        dataset = data.load(config.dataset, given.data_dir, config.validation)
        if isinstance(dataset.train, Stream):
            raise ValueError(f"the study needs training data in memory; {config.dataset} streams.")
        all_batches = data.host_batches(dataset.train, config.batch_size)
        num_batches = max(plan.gradient_batches, plan.recalibrate)
        batches = list(itertools.islice(all_batches, num_batches))
        dataset = dataset._replace(train=training.placed(dataset.train))
        trainers = [  # all, so that infeasible sparsities are told before the first run
            training.make_trainer(dataclasses.replace(config, sparsity=sparsity), dataset)
            for sparsity in plan.sparsities
        ]
        name = f"plasticity-{config.dataset}-{config.model}-{plan.scope}-{config.epochs}ep"
        out_dir = pathlib.Path(given.out_dir or f"runs/{name}")
        unpruned = {}
        told = dataclasses.asdict(config) | plan._asdict()
        with files.opened(out_dir, told, given.resume, _defaults(config)):
            results = read_results(out_dir)
            for trainer in trainers:
                histories = []
                for seed in range(given.seeds):
                    this = dataclasses.replace(trainer.settings, seed=seed)
                    label, plain_every = (
                        f"sparsity {this.sparsity:g} seed {seed}",
                        config.epochs // 4,
                    )
                    with output.progress(console, label, config.epochs, plain_every or 1) as show:
                        history = study(
                            trainer._replace(settings=this),
                            plan,
                            batches,
                            out_dir,
                            results,
                            show=show,
                            **run.from_flags(),
                        )
                    histories.append([record["test_accuracy"] for record in history])
                unpruned[this.sparsity] = np.array(histories)
            found = lines(plan, results, unpruned)
            caption = _caption(config, plan, given.seeds)
            table = output.print_table(console, caption, rows(plan, found, unpruned))
            (out_dir / "table.txt").write_text(table)
            figure = draw(config, plan, found, caption)
            figure.savefig(out_dir / "plasticity.svg", metadata={"Date": None})
            figure.savefig(out_dir / "plasticity.png", dpi=110)
            plt.close(figure)
    print("Points of test accuracy above the unpruned network; mean and deviation over seeds.")
    if any(rules_for(sparsity, plan) != plan.rules for sparsity in plan.sparsities):
        print("The dense network regrows all it lost; at random would be as by gradient.")
    print(f"written: {out_dir}/plasticity.svg, .png, table.txt, results.jsonl and a folder a run")


def _defaults(config: Settings) -> dict[str, Any]:
    """The settings of a folder from before they could be chosen."""
    given = flags.FlagValues()
    define_flags(given)
    given.mark_as_parsed()
    plan = plan_from_flags(config, given)
    return settings.defaults(config.dataset) | _UNUSED | plan._asdict()


if __name__ == "__main__":
    define_flags()
    flags.DEFINE_integer("seeds", 3, "seeds 0, 1, ...", lower_bound=1)
    flags.DEFINE_string("out_dir", None, "where to write (default: runs/plasticity-DATASET-...)")
    run.define_flags()
    app.run(main)
