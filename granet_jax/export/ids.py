"""Ids of the elements of arrays, and which of them are joined, fixed or needed."""

import math
from typing import NamedTuple

import numpy as np


class Value(NamedTuple):
    """What is known about one array."""

    ids: list[np.ndarray]  # for each axis, the ids of its elements
    # For each axis and element, float64: the number that fills the slice for all inputs; NaN =
    # there is none, or it is unknown. A scalar counts as one slice.
    const: list[np.ndarray]

    @property
    def zero(self) -> list[np.ndarray]:
        """For each axis and element, bool: whether the slice is 0 for all inputs."""
        return [c == 0 for c in self.const]

    @property
    def whole(self) -> float:
        """The number that fills the whole array, or NaN."""
        return next((c[0] for c in self.const if len(c) and np.all(c == c[0])), math.nan)


class Channels:
    """Ids that are joined, fixed and needed while a program is walked through."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._fixed: dict[int, str] = {}  # by id, why
        self._needed: dict[int, str] = {}

    def new(self, length: int) -> np.ndarray:
        """Ids for the elements of one axis; a single element always stays."""
        first = len(self._parent)
        self._parent += range(first, first + length)
        ids = np.arange(first, first + length)
        if length == 1:
            self.fix(ids, "the only one")
        return ids

    def join(self, a: np.ndarray, b: np.ndarray) -> None:
        """Joins the ids of two axes, element by element."""
        for x, y in zip(a.tolist(), b.tolist(), strict=True):
            if x != y:
                self._parent[self.root(x)] = self.root(y)

    def root(self, x: int) -> int:
        """The id that represents all ids joined with ``x``."""
        parent = self._parent
        while parent[x] != x:
            parent[x] = parent[parent[x]]
            x = parent[x]
        return x

    def roots(self, ids: np.ndarray) -> np.ndarray:
        """The :meth:`root` of each id."""
        return np.array([self.root(x) for x in ids.tolist()], np.int64)

    def fix(self, ids: np.ndarray, why: str) -> None:
        """Marks ids that may not be cut."""
        for x in ids.tolist():
            self._fixed.setdefault(x, why)

    def need(self, ids: np.ndarray, where: np.ndarray, why: str) -> None:
        """Marks the ids under True in ``where``, which are read and may not be cut."""
        for x in ids[where].tolist():
            self._needed.setdefault(x, why)

    def is_fixed(self, ids: np.ndarray) -> bool:
        """Whether all of these ids are known to be fixed."""
        fixed = self.fixed()
        return all(self.root(x) in fixed for x in ids.tolist())

    def fixed(self) -> dict[int, str]:
        """Roots of the ids that may never be cut, with the reason."""
        return {self.root(x): why for x, why in self._fixed.items()}

    def kept(self) -> dict[int, str]:
        """Roots of all ids that have to stay (fixed or needed), with the reason."""
        return {self.root(x): why for x, why in self._needed.items()} | self.fixed()
