"""What a selection must offer: which episodes of a task a replay memory keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hpc_cpd.errors import UserError
from hpc_cpd.settings import PluginSettings
from hpc_cpd.trajectories.schema import Episode

LANDMARKS = 8
"""Steps of an episode by which `trajectory_features` describes it."""


class Selection(Protocol):
    """A class: it is made once per task, with its own settings, and asked once."""

    Settings: type[PluginSettings]

    def __init__(self, settings: PluginSettings) -> None: ...

    def order(self, candidates: Candidates) -> ArrayLike:
        """Row numbers, each at most once, the one to keep first at the front.

        Rows are kept in this order until the next does not fit the budget; what is left out is not kept. Draw from
        `candidates.rng` alone, so that the choice follows from the seed.
        """


@dataclass(frozen=True)
class Candidates:
    """The N episodes of one task among which to choose."""

    task_id: str
    episodes: Sequence[Episode]
    lengths: NDArray[np.int64]
    """[N] steps, which are what the budget counts"""
    quality: NDArray[np.float64]
    """[N] in [0.5, 2]: higher where the student's error is; see `hpc_cpd.trajectories.memory.episode_quality`"""
    budget_steps: int
    rng: np.random.Generator
    compute_features: Callable[[], NDArray[np.float64]]

    @cached_property
    def features(self) -> NDArray[np.float64]:
        """[N, D], what the episodes look like, rows of length one; computed when it is first asked for."""
        return self.compute_features()

    @property
    def fitting(self) -> NDArray[np.int64]:
        """Rows that alone are no longer than the budget, increasing."""
        return np.flatnonzero(self.lengths <= self.budget_steps)

    def choose(self, selection: Selection) -> NDArray[np.int64]:
        """The rows that `selection` keeps, in its order: int64 [<= N]. Raises UserError when its order is none."""
        order = np.asarray(selection.order(self))
        if problem := self._problem(order):
            raise UserError(
                f"the selection '{selection.Settings.model_fields['name'].default}' returned {problem} for "
                f"{self.task_id}; it must return row numbers below {len(self.lengths)}, each at most once, the first "
                f"of an episode that fits the budget of {self.budget_steps} steps; repair its order() "
                "(docs/extending/selections.md)"
            )
        rows = order.astype(np.int64)
        return rows[np.cumsum(self.lengths[rows]) <= self.budget_steps]

    def _problem(self, order: NDArray[Any]) -> str | None:
        """What a selection returned instead of an order of which something is kept; None: it is one."""
        if order.ndim != 1:
            return f"{order!r:.200}"
        rows = order.tolist()
        if strange := [row for row in rows if row not in range(len(self.lengths))]:
            return f"row {strange[0]!r:.80}"
        if len(set(rows)) < len(rows):
            return f"row {max(rows, key=rows.count)} more than once"
        if not len(self.fitting):
            return None
        if not rows:
            return "nothing"
        steps = self.lengths[int(rows[0])]
        return f"first row {rows[0]}, an episode of {steps} steps," if steps > self.budget_steps else None


def trajectory_features(
    episodes: Sequence[Episode], mean: ArrayLike, std: ArrayLike, max_features: int = 512
) -> NDArray[np.float64]:
    """One row of length one per episode, float64 [N, D].

    An episode is described by eight evenly spaced observations (normalised by `mean` and `std` of
    observations), the final one (where the goal was reached), and the mean action between landmarks; more
    than `max_features` numbers are folded by a count sketch (arXiv 0902.2206), which keeps inner products
    in expectation. The rows are centred over the episodes and scaled to mean square norm one, and a
    constant is appended, so that an ordinary episode counts as ordinary rather than as noise.
    """
    centre, spread = np.asarray(mean, np.float64), np.asarray(std, np.float64)
    scale = np.where(spread > 1e-6, spread, 1.0)  # numbers that never change say nothing
    raw = np.stack([_describe(episode, centre, scale, max_features) for episode in episodes])
    raw = raw - raw.mean(axis=0)
    norm = np.sqrt((raw * raw).sum(axis=1).mean())
    features = np.column_stack([raw / norm if norm > 0 else raw, np.ones(len(raw))])
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def _describe(episode: Episode, mean: NDArray[Any], scale: NDArray[Any], max_features: int) -> NDArray[np.float64]:
    steps = np.linspace(0, len(episode) - 1, LANDMARKS).round().astype(np.int64)
    observations = (episode.observations[steps].astype(np.float64) - mean) / scale
    final = (episode.final_observation.astype(np.float64) - mean) / scale
    starts = np.arange(LANDMARKS) * len(episode) // LANDMARKS
    counts = np.maximum(np.diff(starts, append=len(episode)), 1)  # an episode may have fewer steps than landmarks
    flat = episode.actions.astype(np.float64).reshape(len(episode), -1)
    actions = np.add.reduceat(flat, starts, axis=0) / counts[:, None]
    numbers = np.concatenate([observations.ravel(), final.ravel(), actions.ravel()])
    if len(numbers) <= max_features:
        return numbers
    sketch = np.random.default_rng([len(numbers), max_features])  # the same folding for every episode
    bins = sketch.integers(max_features, size=len(numbers))
    signs = sketch.integers(2, size=len(numbers)) * 2 - 1
    folded = np.zeros(max_features)
    np.add.at(folded, bins, signs * numbers)
    return folded
