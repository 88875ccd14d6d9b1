"""Where the rows of a batch come from: new trajectories, remembered ones, and answers of the student before the stage.

Every rank draws the rows of all ranks and reads only its own, so a batch does not depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hpc_cpd.methods.base import Drawn, Rows, StageData
from hpc_cpd.trajectories.store import TrajectoryStore


class _RowsOfStore:
    """Rows of one store, tasks drawn evenly or by their shares."""

    of_new_tasks = False
    asks_past_student = False

    def __init__(self, data: StageData, store: TrajectoryStore, count: int) -> None:
        self.data = data
        self.store = store
        self.count = count
        self.shares = data.shares(store)
        self.vectors = np.stack([data.task_vectors[task] for task in store.task_ids])

    def draw(self, rng: np.random.Generator, rank: int, world_size: int) -> Drawn:
        return self._read(self._steps(rng)[rank::world_size])

    def _steps(self, rng: np.random.Generator) -> np.ndarray:
        return self.store.draw_windows(self.count, rng, True, self.shares)

    def _read(self, steps: np.ndarray) -> Drawn:
        # the very windows the student acts on: the loss is on their newest step, and only it takes experts' time
        windows = self.store.gather_histories(steps, self.data.length)
        told = self.vectors[windows["task_index"]]
        return Drawn(windows["observations"], windows[self.data.target], windows["valid"], told, (self.store, steps))


class NewRows(_RowsOfStore):
    """Steps of the new tasks, for which the teachers' answers are known."""

    of_new_tasks = True

    def __init__(self, data: StageData, count: int) -> None:
        super().__init__(data, data.new, count)


class MemoryRows(_RowsOfStore):
    """Remembered steps of old tasks, with the teacher's answer or that of the student before the stage."""

    def __init__(self, data: StageData, memory: TrajectoryStore, count: int, asks_past_student: bool = False) -> None:
        super().__init__(data, memory, count)
        self.asks_past_student = asks_past_student


class SelfDistillationRows(_RowsOfStore):
    """New observations under the vector of an old task: what the past student would do there (arXiv 1606.09282)."""

    asks_past_student = True

    def __init__(self, data: StageData, old_vectors: np.ndarray, count: int) -> None:
        super().__init__(data, data.new, count)
        self.old_vectors = old_vectors

    def draw(self, rng: np.random.Generator, rank: int, world_size: int) -> Drawn:
        drawn = super().draw(rng, rank, world_size)
        told = rng.integers(len(self.old_vectors), size=self.count)[rank::world_size]
        return drawn._replace(task_vectors=self.old_vectors[told])


class InterpolatedRows(_RowsOfStore):
    """Mixtures of two remembered histories of one task, as far on in their episodes: there the goals lie between.

    A memory of ten episodes knows ten goals of a task, but the past student knows what to do at those in between.
    """

    asks_past_student = True

    def draw(self, rng: np.random.Generator, rank: int, world_size: int) -> Drawn:
        one = self._steps(rng)
        other = self.store.matching_steps(one, rng)
        share = rng.random(self.count, dtype=np.float32)[rank::world_size, None, None]
        drawn = self._read(one[rank::world_size])
        others = self.store.gather_histories(other[rank::world_size], self.data.length)["observations"]
        return drawn._replace(observations=share * drawn.observations + (1.0 - share) * others)


def with_replay(
    data: StageData,
    batch_size: int,
    replay_fraction: float,
    self_distillation_fraction: float = 0.0,
    interpolation_fraction: float = 0.0,
    asks_past_student: bool = False,
) -> list[Rows]:
    """New rows, and `replay_fraction` of the batch about old tasks, where anything is remembered.

    Of the latter, `self_distillation_fraction` ask the student before this stage: at new observations under an old
    task's vector and, `interpolation_fraction` of them, between two remembered states. The others are remembered steps,
    which with `asks_past_student` ask it too (behavioural cloning of ClonEx-SAC, arXiv 2209.13900).
    """
    memory, past = data.memory, data.past
    replayed = round(batch_size * replay_fraction) if memory is not None else 0
    distilled = round(replayed * self_distillation_fraction) if past is not None else 0
    between = round(distilled * interpolation_fraction)
    rows: list[Rows] = [NewRows(data, batch_size - replayed)]
    if memory is not None:
        rows.append(MemoryRows(data, memory, replayed - distilled, asks_past_student and past is not None))
        if past is not None:
            rows.append(SelfDistillationRows(data, np.stack(list(past.task_vectors.values())), distilled - between))
            rows.append(InterpolatedRows(data, memory, between))
    return [row for row in rows if row.count]


def counts(rows: Sequence[Rows]) -> tuple[int, int]:
    """(rows of new tasks, remembered rows) in every batch."""
    new = sum(row.count for row in rows if row.of_new_tasks)
    return new, sum(row.count for row in rows if isinstance(row, MemoryRows))
