"""Ids of the elements of arrays, and what is known of each: joined with others, fixed, needed."""

import math
from typing import NamedTuple

import numpy as np


class Value(NamedTuple):
    """What is known of one array."""

    ids: list[np.ndarray]  # for each axis, of its elements
    # For each axis, float64: the number that fills this slice whatever the inputs; NaN = there is
    # none, or it is not known. A scalar counts as one slice.
    const: list[np.ndarray]

    @property
    def zero(self) -> list[np.ndarray]:
        """For each axis, bool: whether the slice is 0 whatever the inputs."""
        return [c == 0 for c in self.const]

    @property
    def whole(self) -> float:
        """The number that fills all of it, or NaN."""
        return next((c[0] for c in self.const if len(c) and np.all(c == c[0])), math.nan)


class Channels:
    """Ids that are joined, fixed and needed while a program is walked through."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._fixed: dict[int, str] = {}  # by id, why
        self._needed: dict[int, str] = {}

    def new(self, length: int) -> np.ndarray:
        """Ids for the elements of one axis; where it has but one, that stays."""
        first = len(self._parent)
        self._parent += range(first, first + length)
        ids = np.arange(first, first + length)
        if length == 1:
            self.fix(ids, "the only one")
        return ids

    def join(self, a: np.ndarray, b: np.ndarray) -> None:
        """Element by element."""
        for x, y in zip(a.tolist(), b.tolist(), strict=True):
            if x != y:
                self._parent[self.root(x)] = self.root(y)

    def root(self, x: int) -> int:
        """The id that stands for all those joined with ``x``."""
        parent = self._parent
        while parent[x] != x:
            parent[x] = parent[parent[x]]
            x = parent[x]
        return x

    def roots(self, ids: np.ndarray) -> np.ndarray:
        """The same for many."""
        return np.array([self.root(x) for x in ids.tolist()], np.int64)

    def fix(self, ids: np.ndarray, why: str) -> None:
        """These may not be cut."""
        for x in ids.tolist():
            self._fixed.setdefault(x, why)

    def need(self, ids: np.ndarray, where: np.ndarray, why: str) -> None:
        """Those of them may not be cut where True."""
        for x in ids[where].tolist():
            self._needed.setdefault(x, why)

    def is_fixed(self, ids: np.ndarray) -> bool:
        """Whether none of them can be cut, as far as is known."""
        fixed = self.fixed()
        return all(self.root(x) in fixed for x in ids.tolist())

    def fixed(self) -> dict[int, str]:
        """Roots of the ids that may never be cut, with the reason."""
        return {self.root(x): why for x, why in self._fixed.items()}

    def kept(self) -> dict[int, str]:
        """Roots of all ids that have to stay, with the reason."""
        return {self.root(x): why for x, why in self._needed.items()} | self.fixed()
