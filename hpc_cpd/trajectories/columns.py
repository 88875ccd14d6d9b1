"""Columns of many steps that stay in their files: what a store uses where memory is too small for the trajectories."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


class MappedColumn:
    """Pieces (one per episode, mapped from their shards) as if they were one array [S, ...]; rows are read when asked.

    The kernel keeps in memory what is read often, and drops it when others need the room.
    """

    def __init__(self, pieces: Sequence[NDArray[Any]]) -> None:
        self._pieces = list(pieces)
        self._stops = np.cumsum([len(piece) for piece in self._pieces])
        self._starts = self._stops - [len(piece) for piece in self._pieces]
        self.dtype = self._pieces[0].dtype
        self.shape = (int(self._stops[-1]), *self._pieces[0].shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        """The rows of a slice without a step, copied."""
        start, stop, step = rows.indices(len(self))
        if step != 1:
            raise ValueError("a mapped column is read without gaps")
        first, last = np.searchsorted(self._stops, [start, max(start, stop - 1)], side="right")
        parts = [
            self._pieces[number][max(0, start - self._starts[number]) : max(0, stop - self._starts[number])]
            for number in range(first, min(last + 1, len(self._pieces)))
        ]
        return np.concatenate(parts) if parts else np.empty((0, *self.shape[1:]), self.dtype)

    def take(self, rows: NDArray[np.int64], axis: int = 0) -> NDArray[Any]:
        """`rows` int64 [B, L], of which each line lies within one piece -> [B, L, ...]."""
        if axis != 0:
            raise ValueError("rows are taken along axis 0")
        taken = np.empty((*rows.shape, *self.shape[1:]), self.dtype)
        pieces = np.searchsorted(self._stops, rows[:, 0], side="right")
        for line, piece in enumerate(pieces):
            taken[line] = self._pieces[piece][rows[line] - self._starts[piece]]
        return taken


Column = NDArray[Any] | MappedColumn
