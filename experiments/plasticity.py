"""The pruning-plasticity study: how well networks recover from a prune, by when it happens.

Example:
  python -m experiments.plasticity
  python -m experiments.plasticity --dataset=mnist --data_dir=FOLDER --epochs=24 --seeds=2
  python -m experiments.plasticity --dataset=cifar10 --data_dir=FOLDER --sparsities=0 --seeds=1
  python -m experiments.plasticity --task=text --size=1m --seeds=1
  python -m experiments.plasticity --task=mine.py

Networks train as usual, dense or with static random masks (--sparsities). After some epochs
(--prune_epochs) copies are pruned at once, one for each rate (--rates) and rule of regeneration
(--rules), and train on for --continue_epochs at the learning rates that the unpruned network has in
these epochs. Plasticity is by how much a copy is better than the unpruned network at the end of
that, in test accuracy or what else measures the task. Which weights go and come back is told in
experiments/studies/plasticity.py.

Leaves in --out_dir: plasticity.svg and .png, table.txt, results.jsonl, and the folder of each
unpruned run. Stopped at any moment, the same command goes on; seeds can be added.
"""

import dataclasses
import itertools
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from absl import app, flags
from matplotlib import pyplot as plt
from matplotlib.ticker import FixedLocator, NullLocator
from rich.console import Console

from experiments import tasks
from experiments.engine import batches, files, memory, mesh, output, run, settings, training
from experiments.engine.settings import Settings
from experiments.engine.task import Metric, Told
from experiments.engine.training import Trainer
from experiments.studies import plasticity
from experiments.studies.plasticity import RULES, Line, Plan, Results, Unpruned, rules_for

matplotlib.use("Agg")

_UNUSED: dict[str, Any] = {  # settings that are no flags here
    "method": "static",
    "sparsity": 0.0,
    "update_every": 1,
    "compact": False,
    "prune_until": 0.5,
    "penalty": 0.0,
    "initial_threshold": 0.0,
    "seed": 0,
}


def define_flags(argv: list[str]) -> None:
    """Defines the flags of the task that the command line names, and of the plan."""
    tasks.define_flags(argv, leave_out=tuple(_UNUSED))
    define_plan_flags()
    flags.DEFINE_integer("seeds", 3, "seeds 0, 1, ...", lower_bound=1)
    flags.DEFINE_string("out_dir", None, "where to write (default: runs/plasticity-DATASET-...)")
    mesh.define_flags()
    run.define_flags()


def define_plan_flags(flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags of the plan."""
    to: dict[str, Any] = {"flag_values": flag_values}
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
        memory.keep()
        mesh.use_devices()
        kind, devices = tasks.load(given.task), mesh.from_flags()
        config = kind.from_flags(**_UNUSED)
        task = kind.make(config, devices, given.data_dir)
        plan = plan_from_flags(task.epochs)
        num_batches = max(plan.gradient_batches, plan.recalibrate)
        some = batches.first(task.train, num_batches, config.batch_size)
        task = batches.placed(task, devices)
        trainers = [  # all, so that infeasible sparsities are told before the first run
            training.make_trainer(dataclasses.replace(config, sparsity=sparsity), task, devices)
            for sparsity in plan.sparsities
        ]
        name = f"plasticity-{config.title.replace(', ', '-')}-{plan.scope}-{task.epochs}ep"
        out_dir = pathlib.Path(given.out_dir or f"runs/{name}")
        written = dataclasses.asdict(config) | plan._asdict()
        with files.opened(out_dir, written, given.resume, defaults(config, task.epochs)):
            results = plasticity.read_results(out_dir)
            unpruned = _run_all(console, trainers, plan, some, out_dir, results)
            _show(console, trainers[0], plan, out_dir, results, unpruned)
    print(_above(trainers[0].told))
    if any(rules_for(sparsity, plan) != plan.rules for sparsity in plan.sparsities):
        print("The dense network regrows all it lost; at random would be as by gradient.")
    print(f"written: {out_dir}/plasticity.svg, .png, table.txt, results.jsonl and a folder a run")


def plan_from_flags(epochs: int, given: flags.FlagValues = flags.FLAGS) -> Plan:
    """The plan that the flags tell for a run of so many epochs.

    Raises:
      ValueError: a list is empty, or holds something else than expected, or something twice.
    """
    continue_epochs = given.continue_epochs or max(1, round(3 / 16 * epochs))
    last = epochs - continue_epochs
    eighths = sorted({round(i * epochs / 8) for i in range(1, 8)})
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


def defaults(config: Settings, epochs: int) -> dict[str, Any]:
    """The settings of a folder from before they could be chosen."""
    given = flags.FlagValues()
    define_plan_flags(given)
    given.mark_as_parsed()
    chosen = settings.defaults(type(config), dataclasses.asdict(config))
    return chosen | _UNUSED | plan_from_flags(epochs, given)._asdict()


def _run_all(
    console: Console,
    trainers: Sequence[Trainer],
    plan: Plan,
    some: Sequence[Any],
    out_dir: pathlib.Path,
    results: Results,
) -> Unpruned:
    """All studies; adds to the results."""
    unpruned = {}
    for trainer in trainers:
        told, plain_every = trainer.told, max(1, trainer.length.epochs // 4)
        values = []
        for seed in range(flags.FLAGS.seeds):
            this = dataclasses.replace(trainer.settings, seed=seed)
            label = f"sparsity {this.sparsity:g} seed {seed}"
            with output.progress(console, label, trainer, plain_every) as show:
                history = plasticity.study(
                    trainer._replace(settings=this),
                    plan,
                    some,
                    out_dir,
                    results,
                    show=show,
                    **run.from_flags(),
                )
            values.append([record[told.key(told.shown)] for record in history])
        unpruned[trainer.settings.sparsity] = np.array(values)
    return unpruned


def _show(
    console: Console,
    trainer: Trainer,
    plan: Plan,
    out_dir: pathlib.Path,
    results: Results,
    unpruned: Unpruned,
) -> None:
    """The table and the figure."""
    metric = trainer.told.metrics[0]
    found = plasticity.lines(plan, results, unpruned, metric)
    caption = _caption(trainer, plan, flags.FLAGS.seeds)
    table = output.print_table(console, caption, rows(plan, found, unpruned, metric))
    (out_dir / "table.txt").write_text(table)
    figure = draw(trainer, plan, found, caption)
    figure.savefig(out_dir / "plasticity.svg", metadata={"Date": None})
    figure.savefig(out_dir / "plasticity.png", dpi=110)
    plt.close(figure)


def rows(
    plan: Plan, found: Sequence[Line], unpruned: Unpruned, metric: Metric
) -> list[dict[str, str]]:
    """The table: a column for each epoch of the prune."""
    then = np.array(plan.prune_epochs) - 1 + plan.continue_epochs
    unit = metric.unit or metric.name.replace("_", " ")
    form = metric.form.lstrip("5")  # not wider than it is
    table = []
    for sparsity, same in itertools.groupby(found, lambda line: line.sparsity):
        values = unpruned[sparsity][:, then]
        table.append(_row(plan, f"{sparsity:g}", "", f"unpruned ({unit})", "", values, form))
        for rate, rules in itertools.groupby(same, lambda line: f"{line.rate:g}"):
            for i, line in enumerate(rules):
                if i == 0:
                    damage = line.damage
                    table.append(_row(plan, "", rate, "just pruned", "", damage, form, "+"))
                low, high = line.live.min(), line.live.max()
                live = f"{low:,}" if low == high else f"{low:,}-{high:,}"
                table.append(_row(plan, "", "", line.rule, live, line.plasticity, form, "+"))
    return table


def _row(
    plan: Plan,
    sparsity: str,
    rate: str,
    what: str,
    live: str,
    values: Any,
    form: str,
    sign: str = "",
) -> dict[str, str]:
    std = [""] * len(values.T)
    if len(values) > 1:
        std = [f" ± {x:{form}}" for x in values.std(0, ddof=1)]
    # With z, what is rounded to 0 has no minus.
    cells = [f"{mean:{sign}z{form}}{s}" for mean, s in zip(values.mean(0), std, strict=True)]
    columns = [f"epoch {epoch}" for epoch in plan.prune_epochs]
    names = {"sparsity": sparsity, "rate": rate, "regrown": what, "weights": live}
    return names | dict(zip(columns, cells, strict=True))


_TICKS = (-1000, -300, -100, -30, -10, -3, -1, -0.5, 0, 0.5, 1, 3, 10)  # times the metric's grain
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


def draw(trainer: Trainer, plan: Plan, found: Sequence[Line], title: str) -> Any:
    """The figure: a panel for each sparsity and rate, all with the same axes."""
    metric = trainer.told.metrics[0]
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
        for drop in _drops(trainer):
            axes.axvline(drop, color="0.5", linewidth=0.8, linestyle="--")
        axes.set_yscale("symlog", linthresh=metric.grain)
        axes.yaxis.set_major_locator(FixedLocator([metric.grain * tick for tick in _TICKS]))
        axes.yaxis.set_major_formatter(lambda x, _: f"{x:+g}" if x else "0")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xlim(0, trainer.length.epochs)
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
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(4, shape[1]),
        frameon=False,
        fontsize=10,
    )
    figure.suptitle(title, fontsize=10, wrap=True)
    for axes in grid[-1]:
        axes.set_xlabel("epoch of the prune")
    figure.supylabel(_difference(metric), fontsize=10)
    return figure


def _difference(metric: Metric) -> str:
    """What the figure shows, in words."""
    name = metric.name.replace("_", " ")
    unit = {"%": " (points)", "": ""}.get(metric.unit, f" ({metric.unit})")
    if metric.higher_is_better:
        return f"{name} less that of the unpruned network{unit}"
    return f"{name} below the unpruned network's{unit}; above 0 is better"


def _above(told: Told) -> str:
    """What the table shows, in words."""
    metric = told.metrics[0]
    where = "above" if metric.higher_is_better else "below"
    name = metric.label(told.shown)
    if metric.unit == "%":
        name = f"points of {metric._replace(unit='').label(told.shown)}"
    return (
        f"{name[0].upper()}{name[1:]} {where} the unpruned network; mean and deviation over seeds."
    )


def _drops(trainer: Trainer) -> list[float]:
    """The epochs after which the learning rate drops."""
    config = trainer.settings
    if config.schedule != "steps":
        return []
    return [fraction * trainer.length.epochs for fraction in config.drop_at]


def _caption(trainer: Trainer, plan: Plan, num_seeds: int) -> str:
    drops = ", ".join(f"{epoch:g}" for epoch in _drops(trainer))
    return (
        f"{trainer.told.title}, {plan.scope} pruning; {trainer.length.epochs} epochs, learning "
        f"rate {'drops after ' + drops if drops else 'falls as a cosine'}; trained on for "
        f"{plan.continue_epochs} epochs; {num_seeds} seeds"
    )


if __name__ == "__main__":
    define_flags(sys.argv)
    app.run(main)
