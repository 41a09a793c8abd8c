"""Times of calls taken in turns, so that what else the machine does falls on all of them."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax


class Measured(NamedTuple):
    """A call that has been measured."""

    result: Any  # of its first run, which is not among the seconds
    seconds: list[float]  # of each round

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)


def in_turns(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Measured]:
    """Runs each call once, to warm up, and then all of them in each round, forth and back.

    Args:
      runs: calls by name; what they return is waited for.
      rounds: how often each is measured, at least once.
    """
    measured = {name: Measured(jax.block_until_ready(run()), []) for name, run in runs.items()}
    order = list(runs)
    for _ in range(rounds):
        for name in order:
            started = time.perf_counter()
            jax.block_until_ready(runs[name]())
            measured[name].seconds.append(time.perf_counter() - started)
        order.reverse()
    return measured


def ratios(over: Measured, under: Measured) -> list[float]:
    """Of the two times in each round."""
    return [a / b for a, b in zip(over.seconds, under.seconds, strict=True)]


def figure(value: float) -> str:
    """Three digits or more, as shown in tables."""
    return f"{value:,.1f}" if value >= 10 else f"{value:.3g}"


def ms(seconds: float) -> str:
    """Milliseconds, as shown in tables."""
    return figure(1000 * seconds)


def quartiles(values: Sequence[float], show: Callable[[float], str] = "{:.2f}".format) -> str:
    """The first and the third, as shown in tables; of one value, that value twice."""
    twice = [*values] * (2 if len(values) == 1 else 1)
    first, _, third = statistics.quantiles(twice, n=4, method="inclusive")
    return f"{show(first)} to {show(third)}"
