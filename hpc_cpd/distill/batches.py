"""Batches of a stage as a pure function of (seed, phase, step): a resumed run sees the batches it would have seen.

Every rank draws the same global batch and reads only its own rows, so the student does not depend on the number of
ranks. Which rows there are is the method's to say (`hpc_cpd.methods.base.Rows`).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hpc_cpd.distill.frozen import FrozenParts
from hpc_cpd.methods.base import Drawn, Rows, StageData
from hpc_cpd.randomness import numpy_generator
from hpc_cpd.run.cores import owned_cores
from hpc_cpd.student.moe.precomputed import Precomputed, joined
from hpc_cpd.trajectories.store import TrajectoryStore


@dataclass(frozen=True)
class Batch:
    """This rank's rows of a global batch: first those of the tasks of this stage."""

    observations: Tensor  # float32 [B, L, obs]
    target: Tensor  # float32 [B, L, act]
    valid: Tensor  # bool [B, L]
    task_vectors: Tensor  # float32 [B, D]
    is_new_task: Tensor  # bool [B]: the row belongs to a task of this stage
    override: Tensor | None  # bool [B]: rows that the gate must give new experts a chance at; None: it routes alone
    rows_of_all_ranks: int  # in the batch of all ranks; each row has one valid position
    new_rows_of_all_ranks: int
    origins: Sequence[tuple[TrajectoryStore, np.ndarray]]
    precomputed: Precomputed | None = None  # of each row, what is frozen in this phase

    def split(self) -> tuple[Batch, Batch]:
        """(rows of this stage's tasks, the others)."""
        here = int(self.is_new_task.sum())
        new = self.new_rows_of_all_ranks
        return self._rows(slice(None, here), new, new), self._rows(slice(here, None), self.rows_of_all_ranks - new, 0)

    def _rows(self, rows: slice, of_all_ranks: int, new: int) -> Batch:
        tensors = self.observations, self.target, self.valid, self.task_vectors, self.is_new_task
        observations, target, valid, told, is_new = (tensor[rows] for tensor in tensors)
        override = None if self.override is None else self.override[rows]
        known = None if self.precomputed is None else self.precomputed.rows(rows)
        return Batch(observations, target, valid, told, is_new, override, of_all_ranks, new, self.origins, known)

    def describe(self, rows: Sequence[int]) -> list[str]:
        """Where `rows` of the whole batch were recorded, for a message."""
        places = [(store, int(step)) for store, steps in self.origins for step in steps]
        return [store.describe_step(step) for store, step in (places[row] for row in rows)]


class StageBatches:
    """Draws the batches of one stage."""

    def __init__(self, rows: Sequence[Rows], data: StageData, seed: int, stage: int, device: torch.device) -> None:
        """`rows`: the sources of every batch, in the order in which they draw."""
        self.rows, self.data = list(rows), data
        self.seed, self.stage = seed, stage
        self.device = device
        self.frozen: FrozenParts | None = None
        self._past = data.past.student if data.past is not None else None
        self._steps = 0
        # What is mapped may have to come from a disk, and a GPU need not wait for its rows. On a core of its own the
        # thread also asks the student before this stage while the other one learns.
        stores = [store for store in (data.new, data.memory) if store is not None]
        worth_it = owned_cores() > 1 or any(store.mapped for store in stores) or device.type != "cpu"
        threads = torch.get_num_threads()
        self._reader = ThreadPoolExecutor(1, "batches", torch.set_num_threads, (threads,)) if worth_it else None
        self._ahead: dict[tuple[int, ...], Future[Batch]] = {}

    def begin_phase(self, phase: int, steps: int, frozen: FrozenParts | None) -> None:
        """Get ready for the batches of a phase of so many steps (a collective).

        `frozen`: where what is frozen in it comes from; None: nothing is.
        """
        for batch in self._ahead.values():
            batch.cancel()
        self._ahead, self._steps, self.frozen = {}, steps, frozen
        if frozen is not None:
            for part, row in zip(self._draw(phase, 0, 0, 1), self.rows, strict=True):
                if row.as_recorded and not row.asks_past_student:
                    frozen.prepare(part.origin[0], row.count)

    def batch(self, phase: int, step: int, rank: int, world_size: int) -> Batch:
        """Rows ``rank::world_size`` of each source, for the global batch of (phase, step).

        Where it is worth it, the next one is made while the step of this one is.
        """
        key, following = (phase, step, rank, world_size), (phase, step + 1, rank, world_size)
        if self._reader is None:
            return self._make(*key)
        batch = (self._ahead.get(key) or self._reader.submit(self._make, *key)).result()
        self._ahead = {following: self._reader.submit(self._make, *following)} if step + 1 < self._steps else {}
        return batch

    def _make(self, phase: int, step: int, rank: int, world_size: int) -> Batch:
        drawn = list(zip(self._draw(phase, step, rank, world_size), self.rows, strict=True))
        known = [(part, row) for part, row in drawn if not row.asks_past_student]
        asked = [part for part, row in drawn if row.asks_past_student]
        precomputed = [self._precomputed(part, row) for part, row in known] if self.frozen is not None else []
        columns: list[tuple[np.ndarray, ...]] = [
            (part.observations, part.target, part.valid, part.task_vectors, np.full(len(part.valid), row.of_new_tasks))
            for part, row in known
        ]
        if asked:
            answered, frozen = self._answered(asked)
            columns.append(answered)
            precomputed += [frozen] if frozen is not None else []
        # torch.tensor copies into memory aligned alike on every run: vectorised sums then give the same bits
        tensors = [torch.tensor(np.concatenate(column)) for column in zip(*columns, strict=True)]
        if self.device.type != "cpu":
            tensors = [tensor.pin_memory().to(self.device, non_blocking=True) for tensor in tensors]
        of_all, new = sum(row.count for row in self.rows), sum(row.count for row in self.rows if row.of_new_tasks)
        origins = [part.origin for part in (*(part for part, _ in known), *asked)]
        observations, target, valid, told, is_new = tensors
        whole = None
        if self.frozen is not None:
            whole = joined(
                precomputed if self.frozen.with_experts else [part.without_experts() for part in precomputed]
            )
        return Batch(observations, target, valid, told, is_new, is_new, of_all, new, origins, whole)

    def _draw(self, phase: int, step: int, rank: int, world_size: int) -> list[Drawn]:
        rng = numpy_generator(self.seed, "batch", self.stage, phase, step)
        return [row.draw(rng, rank, world_size) for row in self.rows]

    def _precomputed(self, part: Drawn, row: Rows) -> Precomputed:
        assert self.frozen is not None
        if row.as_recorded:
            return self.frozen.of_steps(*part.origin)
        return self.frozen.of_rows(*self._inputs(part.observations, part.task_vectors, part.valid))[0]

    def _answered(self, asked: Sequence[Drawn]) -> tuple[tuple[np.ndarray, ...], Precomputed | None]:
        """Rows that ask for what the student before this stage does, which is known without a teacher."""
        assert self._past is not None
        observations, _, valid, told = (np.concatenate(column) for column in list(zip(*asked, strict=True))[:4])
        inputs, frozen = self._inputs(observations, told, valid), None
        with torch.no_grad():
            if self.frozen is None:
                actions = self._past(*inputs)[0]
            else:
                frozen, newest = self.frozen.of_rows(*inputs)
                actions = newest[:, None].expand(-1, valid.shape[1], -1)
        return (observations, actions.cpu().numpy(), valid, told, np.zeros(len(valid), bool)), frozen

    def _inputs(self, *columns: np.ndarray) -> list[Tensor]:
        return [torch.tensor(column).to(self.device) for column in columns]


def shares_of(store: TrajectoryStore, task_weights: dict[str, float] | None) -> np.ndarray | None:
    """The share of the rows that each task of `store` gets, float64 [tasks]; None: all alike."""
    if task_weights is None:
        return None
    weights = np.array([task_weights[task] for task in store.task_ids])
    return weights / weights.sum() if weights.any() else None
