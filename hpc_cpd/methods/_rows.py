"""Where the rows of a batch come from: new trajectories, remembered ones, and answers of the student before the stage.

Every rank draws the rows of all ranks and reads only its own, so a batch does not depend on the number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hpc_cpd.methods.base import Drawn, Rows, StageData
from hpc_cpd.trajectories.store import TrajectoryStore


@dataclass
class StoreRows:
    """Steps of `store`, tasks drawn evenly or by their shares, with the teachers' answers or the past student's."""

    data: StageData
    store: TrajectoryStore
    count: int
    of_new_tasks: bool = False
    asks_past_student: bool = False
    as_recorded: bool = True

    def __post_init__(self) -> None:
        self.shares = self.data.shares(self.store)
        self.vectors = np.stack([self.data.task_vectors[task] for task in self.store.task_ids])

    def draw(self, rng: np.random.Generator, rank: int, world_size: int) -> Drawn:
        return self._read(self._steps(rng)[rank::world_size])

    def _steps(self, rng: np.random.Generator) -> np.ndarray:
        return self.store.draw_windows(self.count, rng, True, self.shares)

    def _read(self, steps: np.ndarray) -> Drawn:
        # the very windows the student acts on: the loss is on their newest step, and only it takes experts' time
        windows = self.store.gather_histories(steps, self.data.length)
        told = self.vectors[windows["task_index"]]
        return Drawn(windows["observations"], windows[self.data.target], windows["valid"], told, (self.store, steps))


class SelfDistillationRows(StoreRows):
    """New observations under the vector of an old task: what the past student would do there (arXiv 1606.09282)."""

    as_recorded: bool = False

    def draw(self, rng: np.random.Generator, rank: int, world_size: int) -> Drawn:
        assert self.data.past is not None
        drawn, old_vectors = super().draw(rng, rank, world_size), np.stack(list(self.data.past.task_vectors.values()))
        told = rng.integers(len(old_vectors), size=self.count)[rank::world_size]
        return drawn._replace(task_vectors=old_vectors[told])


class InterpolatedRows(StoreRows):
    """Mixtures of two remembered histories of one task, as far on in their episodes: there the goals lie between.

    A memory of ten episodes knows ten goals of a task, but the past student knows what to do at those in between.
    """

    as_recorded: bool = False

    def draw(self, rng: np.random.Generator, rank: int, world_size: int) -> Drawn:
        one = self._steps(rng)
        other = self.store.matching_steps(one, rng)
        share = rng.random(self.count, dtype=np.float32)[rank::world_size, None, None]
        drawn = self._read(one[rank::world_size])
        others = self.store.gather_histories(other[rank::world_size], self.data.length)["observations"]
        return drawn._replace(observations=share * drawn.observations + (1.0 - share) * others)


def with_replay(
    data: StageData, batch_size: int, replayed: float, distilled: float, between: float, asks_past_student: bool
) -> list[Rows]:
    """New rows, and the share `replayed` of the batch about old tasks, where anything is remembered.

    Of the latter, the share `distilled` asks the student before this stage: at new observations under an old task's
    vector and, `between` of them, between two remembered states. The others are remembered steps, which with
    `asks_past_student` ask it too (behavioural cloning of ClonEx-SAC, arXiv 2209.13900).
    """
    memory, past = data.memory, data.past
    old = round(batch_size * replayed) if memory is not None else 0
    asked = round(old * distilled) if past is not None else 0
    mixed = round(asked * between)
    rows: list[Rows] = [StoreRows(data, data.new, batch_size - old, of_new_tasks=True)]
    if memory is not None:
        asks = asks_past_student and past is not None
        rows.append(StoreRows(data, memory, old - asked, asks_past_student=asks))
        if past is not None:
            rows.append(SelfDistillationRows(data, data.new, asked - mixed, asks_past_student=True))
            rows.append(InterpolatedRows(data, memory, mixed, asks_past_student=True))
    return [row for row in rows if row.count]
