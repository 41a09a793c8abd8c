"""The tables that the acceptance tests run over: methods, inner optimizers, wrappers.

All schedules end within STEPS updates; ``live`` gives the number of weights that a method must
keep after a step, written out from the papers' formulas.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import granet_jax as gj

STEPS = 24
KEY = jax.random.key(7)
TOTAL = 540  # prunable weights of gj.testing.example_params()


def sparsity_at(step, initial, final, end, every, last=STEPS):
    event = min(step // every, last // every) * every
    remaining = max(0.0, 1 - event / end) ** 3 if event else 1.0
    return final + (initial - final) * remaining


def kept(sparsity):
    return round(TOTAL * (1 - sparsity))


METHODS = {
    "granet": (
        lambda: gj.granet(final_sparsity=0.9, end_step=14, update_every=3, total_steps=STEPS),
        lambda t: kept(sparsity_at(t, 0.0, 0.9, 14, 3)),
    ),
    "granet_sparse_start": (
        lambda: gj.granet(
            initial_sparsity=0.5,
            final_sparsity=0.9,
            end_step=14,
            update_every=3,
            total_steps=STEPS,
            key=KEY,
        ),
        lambda t: kept(sparsity_at(t, 0.5, 0.9, 14, 3)),
    ),
    "gmp": (
        lambda: gj.gmp(final_sparsity=0.9, end_step=14, update_every=4),
        lambda t: kept(sparsity_at(t, 0.0, 0.9, 14, 4)),
    ),
    "rigl": (
        lambda: gj.rigl(sparsity=0.8, update_every=4, total_steps=STEPS, key=KEY),
        lambda t: kept(0.8),
    ),
    "set": (
        lambda: gj.set_(sparsity=0.8, update_every=4, total_steps=STEPS, key=KEY),
        lambda t: kept(0.8),
    ),
    "snfs": (
        lambda: gj.snfs(sparsity=0.8, update_every=4, total_steps=STEPS, key=KEY),
        lambda t: kept(0.8),
    ),
    "ac_dc": (
        lambda: gj.ac_dc(
            sparsity=0.8, warmup_steps=3, phase_steps=4, last_dense_step=13, last_sparse_step=18
        ),
        lambda t: kept(0.8) if 3 <= t < 7 or 11 <= t < 13 or t >= 18 else TOTAL,
    ),
    "chts": (
        lambda: gj.chts(sparsity=0.8, update_every=4, total_steps=STEPS, key=KEY),
        lambda t: kept(0.8),
    ),
    "static": (lambda: gj.static(sparsity=0.8, key=KEY), lambda t: kept(0.8)),
    "magnitude": (
        lambda: gj.magnitude(sparsity=0.8, at=5),
        lambda t: TOTAL if t < 5 else kept(0.8),
    ),
}

# Methods of the table with another rule: for the conformance kit alone.
VARIANTS = {
    "granet_by_layer": (
        lambda: gj.granet(
            final_sparsity=0.8, end_step=12, update_every=4, total_steps=STEPS, scope=gj.erk
        ),
        lambda t: kept(0.8) if t >= 12 else None,
    ),
    "chtss": (
        lambda: gj.chts(
            sparsity=0.8, initial_sparsity=0.4, update_every=4, total_steps=STEPS, key=KEY
        ),
        lambda t: kept(0.8) if t >= 16 else None,
    ),
    "rigl_itop": (
        lambda: gj.rigl_itop(sparsity=0.8, update_every=4, total_steps=STEPS, key=KEY),
        lambda t: kept(0.8),
    ),
    "set_by_sign": (
        lambda: gj.set_(
            sparsity=0.8,
            update_every=4,
            total_steps=STEPS,
            key=KEY,
            drop=gj.scores.magnitude_and_gradient(0.01),
            by_sign=True,
        ),
        lambda t: kept(0.8),
    ),
    "set_itop_unexplored": (
        lambda: gj.set_itop(
            sparsity=0.8, update_every=4, total_steps=STEPS, key=KEY, unexplored_first=True
        ),
        lambda t: kept(0.8),
    ),
}


def _decay_kernels(params):
    return jax.tree.map(lambda p: p.ndim >= 2, params)


def _label(params):
    return jax.tree.map(lambda p: "kernel" if p.ndim >= 2 else "rest", params)


INNERS = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "nesterov": lambda: optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.add_decayed_weights(5e-4),
        optax.sgd(optax.cosine_decay_schedule(0.1, STEPS), momentum=0.9, nesterov=True),
    ),
    "adam": lambda: optax.adam(1e-2),
    "adamw": lambda: optax.adamw(1e-2, mask=_decay_kernels),
    "lion": lambda: optax.lion(1e-3),
    "rmsprop": lambda: optax.rmsprop(1e-2, momentum=0.9),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=8, momentum=0.9),
    "muon": lambda: optax.contrib.muon(1e-2),
    "masked": lambda: optax.chain(
        optax.masked(optax.trace(0.9), _decay_kernels), optax.scale(-0.1)
    ),
    "partition": lambda: optax.partition(
        {"kernel": optax.adam(1e-2), "rest": optax.sgd(0.1, momentum=0.9)}, _label
    ),
    "schedule_free": lambda: optax.contrib.schedule_free(optax.sgd(0.1), 0.1, b1=0.9),
}

# Moments that must be exactly 0 wherever the mask is off, by the name of their state's field.
MOMENTS = ("trace", "mu", "nu", "m", "v")
EPSILON = {"adafactor": 1e-30}  # which it adds to squared gradients, zeros too


def _multi_steps(tx):
    steps = optax.MultiSteps(tx, every_k_schedule=2)
    return optax.GradientTransformationExtraArgs(steps.init, steps.update)


class Wrapper(NamedTuple):
    wrap: object  # transformation -> transformation
    updates_per_step: int = 1  # calls of update for one optimizer step


WRAPPERS = {
    "plain": Wrapper(lambda tx: tx),
    "chain": Wrapper(lambda tx: optax.chain(optax.identity(), tx)),
    "inject_hyperparams": Wrapper(
        lambda tx: optax.inject_hyperparams(lambda unused: tx)(unused=optax.constant_schedule(1.0))
    ),
    "multi_steps": Wrapper(_multi_steps, 2),
    "apply_if_finite": Wrapper(functools.partial(optax.apply_if_finite, max_consecutive_errors=3)),
}


def random_grads(params, step):
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(3), step), len(leaves))
    return jax.tree.unflatten(
        treedef,
        [
            jax.random.normal(k, p.shape, jnp.float32).astype(p.dtype)
            for k, p in zip(keys, leaves, strict=True)
        ],
    )
