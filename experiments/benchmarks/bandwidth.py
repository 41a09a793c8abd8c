"""How fast memory is: what all passes over weights are bounded by."""

import jax
import jax.numpy as jnp

from experiments.benchmarks import timing
from experiments.benchmarks.tables import Table


def tables(quick: bool) -> list[Table]:
    """A copy, a sum and a count over the same number of weights."""
    size = 10_000 if quick else 100_000_000
    x = jax.random.normal(jax.random.key(0), (size,))
    copied = jnp.copy(x)
    add_one = jax.jit(lambda x: x + 1, donate_argnums=0)
    total = jax.jit(lambda x: jnp.sum(jnp.abs(x)))
    count = jax.jit(lambda x, above: jnp.sum(jnp.abs(x) > above, dtype=jnp.int32))
    above = jnp.float32(1.0)

    def copy() -> jax.Array:
        nonlocal copied
        copied = add_one(copied)
        return copied

    moved = {"x + 1, donated": 8, "sum(|x|)": 4, "sum(|x| > c)": 4}  # bytes for each weight
    runs = [copy, lambda: total(x), lambda: count(x, above)]
    times = timing.in_turns(dict(zip(moved, runs, strict=True)), rounds=9)
    speeds = {name: size * moved[name] / m.median for name, m in times.items()}
    rows = [
        {
            "pass": name,
            "ms": timing.ms(m.median),
            "quartiles": timing.quartiles(m.seconds, timing.ms),
            "GB/s": f"{speeds[name] / 1e9:.3g}",
            "share of the copy's": f"{speeds[name] / speeds['x + 1, donated']:.2f}",
        }
        for name, m in times.items()
    ]
    note = (
        f"{size:,} float32 ({4 * size / 1e6:g} MB), as XLA compiles them; bytes read and written."
    )
    return [Table("Bandwidth of memory", rows, note)]
