"""Every optimizer and transformation of optax with ``sparsify``; writes docs/optimizers.md.

``python -m tests.optimizer_table`` tries each of them inside ``sparsify``, before it in a chain and
after or around it, on a small model whose masks wander, and writes what it found.
"""

import inspect
import pathlib
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import granet_jax as gj

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "optimizers.md"
STEPS = 8  # masks change at 2, 4 and 6
SGD = optax.sgd(0.05, momentum=0.9)
SMALL = {"learning_rate": 0.05}


def _kernels(params):
    return jax.tree.map(lambda p: p.ndim == 2, params)


def _labels(params):
    return jax.tree.map(lambda p: "kernel" if p.ndim == 2 else "rest", params)


def _halves(tx):
    return {"kernel": tx, "rest": optax.sgd(0.05)}


def _mostly(step, **extra):
    return step % 3 != 2


def _multi_steps(tx):
    steps = optax.MultiSteps(tx, every_k_schedule=1)
    return optax.GradientTransformationExtraArgs(steps.init, steps.update)


NOTHING = {"kernel": False, "square": False, "bias": False}


# What has to be given beside learning_rate: arguments of optimizers and transformations ...
ARGUMENTS = {
    "adaptive_grad_clip": {"clipping": 0.1},
    "add_decayed_weights": {"weight_decay": 0.01},
    "add_noise": {"eta": 0.1, "gamma": 0.5, "key": 0},
    "clip": {"max_delta": 0.1},
    "clip_by_block_rms": {"threshold": 0.1},
    "clip_by_global_norm": {"max_norm": 1.0},
    "dog": {"learning_rate": 1.0},
    "dowg": {"learning_rate": 1.0},
    "differentially_private_aggregate": {"l2_norm_clip": 1.0, "noise_multiplier": 0.1, "key": 0},
    "dpsgd": {"learning_rate": 0.1, "l2_norm_clip": 1.0, "noise_multiplier": 0.1, "key": 0},
    "ema": {"decay": 0.9},
    "freeze": {"mask": NOTHING},
    "galore": {"learning_rate": 0.05, "rank": 4, "update_proj_gap": 2},
    "noisy_sgd": {"learning_rate": 0.05, "eta": 0.01, "gamma": 0.5, "key": 0},
    "scale": {"step_size": 0.5},
    "scale_by_backtracking_linesearch": {"max_backtracking_steps": 4},
    "scale_by_galore": {"rank": 4, "update_proj_gap": 2},
    "scale_by_learning_rate": {"learning_rate": 0.05},
    "scale_by_schedule": {"step_size_fn": lambda count: 0.5},
    "scale_by_zoom_linesearch": {"max_linesearch_steps": 4},
    "snapshot": {
        "measure_name": "norm",
        "measure": lambda updates, *_, **__: optax.global_norm(updates),
    },
    "stateless": {"f": lambda updates, params: updates},
    "stateless_with_tree_map": {"f": lambda update, param: 0.5 * update},
    "trace": {"decay": 0.9},
    "monitor": {"measures": {"norm": lambda updates, *_, **__: optax.global_norm(updates)}},
}
# ... and what goes around a transformation.
WRAPPERS = {
    "MultiSteps": _multi_steps,
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "chain": lambda tx: optax.chain(optax.identity(), tx),
    "conditionally_mask": lambda tx: optax.conditionally_mask(tx, _mostly),
    "conditionally_transform": lambda tx: optax.conditionally_transform(tx, _mostly),
    "flatten": optax.flatten,
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(lambda unused: tx)(unused=1.0),
    "inject_stateful_hyperparams": lambda tx: optax.inject_stateful_hyperparams(lambda unused: tx)(
        unused=1.0
    ),
    "lookahead": lambda tx: optax.lookahead(tx, sync_period=3, slow_step_size=0.5),
    "masked": lambda tx: optax.masked(tx, _kernels),
    "mechanize": optax.contrib.mechanize,
    "multi_transform": lambda tx: optax.multi_transform(_halves(tx), _labels),
    "named_chain": lambda tx: optax.named_chain(("first", optax.identity()), ("second", tx)),
    "partition": lambda tx: optax.partition(_halves(tx), _labels),
    "sam": lambda tx: optax.contrib.sam(tx, optax.sgd(0.01), sync_period=2),
    "schedule_free": lambda tx: optax.contrib.schedule_free(tx, 0.05),
    "selective_transform": lambda tx: optax.selective_transform(tx, freeze_mask=NOTHING),
    "split_real_and_imaginary": optax.contrib.split_real_and_imaginary,
    "with_extra_args_support": optax.with_extra_args_support,
}
# They look like transformations and are none that stand alone.
OTHERS = ("hutchinson_estimator_diag_hessian", "measure_with_ema", "microbatch", "scale_by_muon")
UP_HILL = ("scale_by_param_block_norm", "scale_by_param_block_rms")  # and ever faster
WITH_VALUES = (  # they look at the loss
    *("lbfgs", "momo", "momo_adam", "polyak_sgd", "reduce_on_plateau", "scale_by_polyak"),
    *("scale_by_backtracking_linesearch", "scale_by_zoom_linesearch"),
)
PER_EXAMPLE = ("differentially_private_aggregate", "dpsgd")  # gradients have an axis of examples


INTRODUCTION = """# Optimizers

Each optimizer and transformation of optax {version} with `sparsify`, tried out by
`python -m tests.optimizer_table`: two kernels and a bias, masks that wander. *Works* means: zeros
stay exactly 0 at every step, counts stay, values stay finite, and weights that grow move.

- **inside**: `sparsify(it, method)`; of wrappers, `sparsify(it(sgd), method)`;
- **before**: `chain(it, sparsify(sgd, method))`;
- **after, around**: `chain(sparsify(sgd, method), it)`; of wrappers, `it(sparsify(sgd, method))`.
  *check_sparse finds it* means that it switches pruned weights on, which optax cannot refuse:
  `gj.check_sparse(params, opt_state)` tells.

The state of the optimizer needs no care: `tx.init(params)` shows it the parameters as they are
under the masks, whatever is pruned later counts as if it had never been there, and what grows
starts with the state's initial values.
"""


class Row(NamedTuple):
    """A line of the table."""

    name: str
    inside: str  # sparsify(it), or sparsify(chain(it, ...)), or sparsify(it(sgd))
    before: str  # chain(it, sparsify(sgd)); "" for what wraps
    after: str  # chain(sparsify(sgd), it), or it(sparsify(sgd))


def names():
    """All that optax has, by name: wrappers, and functions that make transformations."""
    found = {}
    for module in (optax, optax.contrib):
        for name, value in vars(module).items():
            if name in WRAPPERS or name in ARGUMENTS:
                found[name] = module
            elif not name.startswith("_") and inspect.isfunction(value):
                returned = str(inspect.signature(value).return_annotation)
                if "GradientTransformation" in returned or "MultiSteps" in returned:
                    found[name] = module
    return {name: found[name] for name in sorted(found, key=str.lower) if name not in OTHERS}


def make(name):
    """The transformation of that name, with default arguments where it has them."""
    factory = getattr(names()[name], name)
    if name in ARGUMENTS:
        arguments = dict(ARGUMENTS[name])
        if "key" in arguments and "key" not in inspect.signature(factory).parameters:
            arguments["seed"] = arguments.pop("key")
        return factory(**arguments)
    needed = inspect.signature(factory).parameters.get("learning_rate")
    if needed is not None and needed.default is inspect.Parameter.empty:
        return factory(**SMALL)
    return factory()


def try_out(name):
    """Fills in a line of the table."""
    # Optax keeps, and uses, what it deprecates, and promotes ranks.
    with warnings.catch_warnings(), jax.numpy_rank_promotion("allow"):
        warnings.simplefilter("ignore", DeprecationWarning)
        return _try_out(name)


def _try_out(name):
    if name in WRAPPERS:
        wrap = WRAPPERS[name]
        inside = outcome(lambda method: gj.sparsify(wrap(SGD), method), name)
        return Row(name, inside, "", outcome(lambda method: wrap(gj.sparsify(SGD, method)), name))
    tx = make(name)
    if name in UP_HILL:
        tx = optax.chain(tx, optax.scale(-0.05))
    return Row(
        name,
        outcome(lambda method: gj.sparsify(tx, method), name),
        outcome(lambda method: optax.chain(tx, gj.sparsify(SGD, method)), name),
        outcome(lambda method: optax.chain(gj.sparsify(SGD, method), tx), name),
    )


def outcome(make_tx, name=""):
    """What becomes of sparse training with a transformation, in a few words."""
    params = example()
    if name == "lookahead":
        params = optax.LookaheadParams.init_synced(params)
    try:
        tx = optax.with_extra_args_support(make_tx(method()))
        state = tx.init(params)
        params = masked(params, state)
        run = jax.jit(lambda params, state, step: update(tx, params, state, step, name))
        counts, odd = {live(state)}, 0
        for step in range(STEPS):
            params, state, num = run(params, state, step)
            counts.add(live(state))
            odd += num
    except Exception as error:
        return f"refused: {_first_words(str(error))}" if _is_ours(error) else f"fails: {error!r}"
    if len(counts) > 1:
        return "wrong counts"
    if odd:
        return "check_sparse finds it"
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(params)):
        return "not finite"
    return "works" if moved(params, state) else "weights that grew do not move"


def method():
    """Half of each kernel, and at each event the masks move on by a column: quick to compile."""

    def init(params):
        def half(p):
            columns = jnp.arange(p.shape[-1]) < (p.shape[-1] // 2 if p.ndim == 2 else p.size)
            return jnp.broadcast_to(columns, p.shape)

        return (jax.tree.map(half, params),)

    def step_on(state, event):
        masks = jax.tree.map(lambda m: jnp.roll(m, 1, axis=-1), state[0])
        return (masks,), jax.tree.map(jnp.logical_and, masks, state[0])

    return gj.Method(init, step_on, gj.every(2, last_step=6))


def example():
    keys = jax.random.split(jax.random.key(1), 3)
    shapes = {"kernel": (16, 12), "square": (8, 8), "bias": (12,)}
    return {
        name: 0.3 * jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def masked(params, state):
    def mask(part):
        return gj.apply_masks(part, gj.get_masks(state))

    if isinstance(params, optax.LookaheadParams):
        return optax.LookaheadParams(mask(params.fast), mask(params.slow))
    return mask(params)


def loss(params, step=0):
    target = jax.tree.map(lambda p: jnp.sin(1.0 + jnp.arange(p.size, dtype=p.dtype)), params)
    parts = jax.tree.map(lambda p, t: jnp.sum((p - t.reshape(p.shape)) ** 2), params, target)
    return sum(jax.tree.leaves(parts)) * (1 + 0.1 * step)


def update(tx, params, state, step, name):
    weights = params.fast if isinstance(params, optax.LookaheadParams) else params
    value, grads = jax.value_and_grad(loss)(weights, step)
    if name in PER_EXAMPLE:
        grads = jax.tree.map(lambda g: g[None], grads)
    told = {"value": value, "grad": grads, "value_fn": loss} if name in WITH_VALUES else {}
    if name == "sophia":
        told = {"obj_fn": loss}
    updates, state = tx.update(grads, state, params, **told)
    params = optax.apply_updates(params, updates)
    return params, state, gj.check_sparse(params, state)


def live(state):
    return sum(int(mask.sum()) for mask in jax.tree.leaves(gj.get_masks(state)))


def moved(params, state):
    """Whether weights that are on are not 0: a third of them, or more, are of the start."""
    weights = params.slow if isinstance(params, optax.LookaheadParams) else params
    masks = gj.get_masks(state)
    on = [np.asarray(weights[k])[np.asarray(masks[k])] != 0 for k in ("kernel", "square")]
    return all(x.mean() > 0.4 for x in on)


def _is_ours(error):
    frames = []
    trace = error.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame.f_globals.get("__name__", ""))
        trace = trace.tb_next
    return isinstance(error, ValueError) and frames[-1].startswith("granet_jax")


def _first_words(text):
    return text.split(". ")[0].split(": use ")[0].rstrip(".").replace("|", "\\|")


def page(rows):
    """The text of docs/optimizers.md."""
    refused = sorted({r.inside for r in rows if r.inside.startswith("refused")})
    notes = {text: f"refused ({i})" for i, text in enumerate(refused, start=1)}
    text = INTRODUCTION.format(version=optax.__version__)
    lines = [text, "| name | inside | before | after, around |", "|---|---|---|---|"]
    for row in rows:
        cells = [notes.get(cell, cell) for cell in row[1:]]
        lines.append(f"| `{row.name}` | {' | '.join(cells)} |")
    lines += ["", *(f"{i}. {text.removeprefix('refused: ')}" for i, text in enumerate(refused, 1))]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    jax.config.update("jax_disable_most_optimizations", True)
    table = []
    for each in names():
        table.append(try_out(each))
        print(*table[-1], sep=" | ", flush=True)
    PAGE.write_text(page(table))
