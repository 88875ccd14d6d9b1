"""Greedy MAP of a determinantal point process: a small subset of items that differ from each other.

The process has kernel ``L = B B^T`` with one row of B per item, so det(L_S) is the squared volume that the
rows in S span. The greedy rule adds the item that raises the determinant most (Chen, Zhang and Zhou 2018,
"Fast Greedy MAP Inference for Determinantal Point Process", arXiv 1709.05135). Their Cholesky rows are
c_i = Q b_i, where Q is an orthonormal basis of the rows picked so far; keeping Q instead of all c_i needs
memory for D numbers per pick and none for N x N or N x k.

Gains only ever fall, so a gain from some picks ago is a bound. Only the rows with the highest bounds are brought up to
date after each pick; all others when the best of those is no longer above every bound, by one matrix product over all
picks since the last time. That is the same arithmetic, but it reads the rows a few times instead of once per pick.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

CANDIDATES = 4096
"""Rows whose gains are kept up to date."""
ROWS_AT_ONCE = 512
"""Rows of which a scaled copy is held: with 256 numbers each, a megabyte, which stays in a core's cache."""


def greedy_map(features: ArrayLike, k: int, relative_tolerance: float = 1e-10) -> NDArray[np.int64]:
    """Pick up to `k` rows of `features` (float [N, D]), most diverse first: int64 [<= k].

    The gain of an item is det(L_{S + i}) / det(L_S): the squared distance of its row from the span of the
    rows in S. To prefer good items, scale each row by its quality. Stops early when no gain exceeds
    `relative_tolerance` times the largest squared norm: there are at most rank(B) picks. Ties go to the
    lower index. Time O(k N D), computed in float64; memory for some thousand rows beside `features`.

    Raises ValueError unless `features` is a finite matrix and `k` is not negative.
    """
    rows = np.asarray(features)
    if rows.dtype != np.float32:
        rows = np.asarray(rows, np.float64)
    # each is NaN or infinite when any number is
    scale = float(max(rows.max(initial=0.0), -rows.min(initial=0.0)))
    if rows.ndim != 2 or not np.isfinite(scale):
        raise ValueError(f"features must be a finite matrix [items, numbers], not of shape {rows.shape}")
    if k < 0:
        raise ValueError(f"k must not be negative, but it is {k}")
    if scale == 0.0:
        return np.zeros(0, np.int64)
    gains = _Gains(rows, scale)
    smallest = relative_tolerance * gains.highest()[1]
    limit = min(k, *rows.shape)
    basis = np.zeros((limit, rows.shape[1]))
    picked: list[int] = []
    while len(picked) < limit:
        best, gain = gains.highest()
        if gain <= smallest:
            break
        span = basis[: len(picked)]
        rest = gains.scaled(best)
        for _ in range(2):  # once more, because one Gram-Schmidt pass loses orthogonality near the rank
            rest = rest - (span @ rest) @ span
        length = np.sqrt(rest @ rest)
        if length * length <= smallest:
            gains.set(best, 0.0)  # what was left of its gain was rounding
            continue
        basis[len(picked)] = rest / length
        gains.lower(basis[len(picked)])
        gains.set(best, -np.inf)
        picked.append(best)
    return np.array(picked, np.int64)


class _Gains:
    """The gains of all rows: exact for the candidates, bounds for the others."""

    def __init__(self, rows: NDArray[np.floating], scale: float) -> None:
        self._rows = rows
        self._scale = scale  # no overflow in the squares; the order of the gains is the same
        self._bounds = np.zeros(len(rows))
        self._subtract(lambda part: -np.einsum("nd,nd->n", part, part))
        self._behind: list[NDArray[np.float64]] = []  # directions that the bounds do not know of yet
        self._choose_candidates()

    def scaled(self, which: int | NDArray[np.int64]) -> NDArray[np.float64]:
        return np.divide(self._rows[which], self._scale, dtype=np.float64)

    def highest(self) -> tuple[int, float]:
        """The row with the highest gain (the lowest such row), and its gain."""
        place = int(self._gains.argmax())
        if self._gains[place] > self._others:
            return int(self._candidates[place]), float(self._gains[place])
        if self._behind:
            directions = np.stack(self._behind, axis=1)
            self._subtract(lambda part: np.einsum("nk,nk->n", shares := part @ directions, shares))
            self._behind = []
        self._choose_candidates()
        best = int(self._bounds.argmax())
        return best, float(self._bounds[best])

    def lower(self, direction: NDArray[np.float64]) -> None:
        """Take off what the unit vector `direction` explains."""
        self._gains -= (self._candidate_rows @ direction) ** 2
        self._behind.append(direction)

    def set(self, row: int, gain: float) -> None:
        """From now on `row` has this gain; it is below what it had."""
        self._bounds[row] = gain
        place = int(np.searchsorted(self._candidates, row))
        if place < len(self._candidates) and self._candidates[place] == row:
            self._gains[place] = gain

    def _choose_candidates(self) -> None:
        first = len(self._bounds) - CANDIDATES
        if first <= 0:
            self._candidates, self._others = np.arange(len(self._bounds)), -np.inf
        else:
            order = self._bounds.argpartition(first - 1)
            self._candidates, self._others = np.sort(order[first:]), self._bounds[order[first - 1]]
        self._candidate_rows = self.scaled(self._candidates)
        self._gains = self._bounds[self._candidates]

    def _subtract(self, explained: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> None:
        """Take `explained` of the scaled rows off the bounds."""
        part = np.empty((min(ROWS_AT_ONCE, len(self._rows)), self._rows.shape[1]))
        for first in range(0, len(self._rows), ROWS_AT_ONCE):
            rows, bounds = (each[first : first + ROWS_AT_ONCE] for each in (self._rows, self._bounds))
            bounds -= explained(np.divide(rows, self._scale, out=part[: len(rows)], dtype=np.float64))
