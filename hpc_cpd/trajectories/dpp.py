"""Greedy MAP of a determinantal point process: a small subset of items that differ from each other.

The process has kernel ``L = B B^T`` with one row of B per item, so det(L_S) is the squared volume that the
rows in S span. The greedy rule adds the item that raises the determinant most (Chen, Zhang and Zhou 2018,
"Fast Greedy MAP Inference for Determinantal Point Process", arXiv 1709.05135). Their Cholesky rows are
c_i = Q b_i, where Q is an orthonormal basis of the rows picked so far; keeping Q instead of all c_i needs
memory for D numbers per pick and none for N x N or N x k.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def greedy_map(features: ArrayLike, k: int, relative_tolerance: float = 1e-10) -> NDArray[np.int64]:
    """Pick up to `k` rows of `features` (float [N, D]), most diverse first: int64 [<= k].

    The gain of an item is det(L_{S + i}) / det(L_S): the squared distance of its row from the span of the
    rows in S. To prefer good items, scale each row by its quality. Stops early when no gain exceeds
    `relative_tolerance` times the largest squared norm: there are at most rank(B) picks. Ties go to the
    lower index. Time O(k N D), computed in float64.

    Raises ValueError unless `features` is a finite matrix and `k` is not negative.
    """
    rows = np.asarray(features, np.float64)
    if rows.ndim != 2 or not np.isfinite(rows).all():
        raise ValueError(f"features must be a finite matrix [items, numbers], not of shape {rows.shape}")
    if k < 0:
        raise ValueError(f"k must not be negative, but it is {k}")
    scale = np.abs(rows).max(initial=0.0)
    if scale == 0.0:
        return np.zeros(0, np.int64)
    rows = rows / scale  # no overflow in the squares; the order of the gains is the same
    gains = np.einsum("nd,nd->n", rows, rows)
    smallest = relative_tolerance * gains.max()
    limit = min(k, *rows.shape)
    basis = np.zeros((limit, rows.shape[1]))
    picked: list[int] = []
    while len(picked) < limit:
        best = int(gains.argmax())
        if gains[best] <= smallest:
            break
        span = basis[: len(picked)]
        rest = rows[best]
        for _ in range(2):  # once more, because one Gram-Schmidt pass loses orthogonality near the rank
            rest = rest - (span @ rest) @ span
        length = np.sqrt(rest @ rest)
        if length * length <= smallest:
            gains[best] = 0.0  # what was left of its gain was rounding
            continue
        basis[len(picked)] = rest / length
        gains -= (rows @ basis[len(picked)]) ** 2
        gains[best] = -np.inf
        picked.append(best)
    return np.array(picked, np.int64)
