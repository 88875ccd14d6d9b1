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
from hpc_cpd.student.moe.precomputed import Precomputed
from hpc_cpd.trajectories.store import TrajectoryStore

STEPS_AT_ONCE = 8


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
        known = self.precomputed and self.precomputed.with_rows(self.precomputed.rows[rows])
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
        self._steps = 0
        # What is mapped may have to come from a disk, and a GPU need not wait for its rows. On a core of its own the
        # thread also asks the student before this stage while the other one learns.
        stores = [store for store in (data.new, data.memory) if store is not None]
        worth_it = owned_cores() > 1 or any(store.mapped for store in stores) or device.type != "cpu"
        threads = torch.get_num_threads()
        self._reader = ThreadPoolExecutor(1, "batches", torch.set_num_threads, (threads,)) if worth_it else None
        self._made: dict[tuple[int, ...], list[Batch] | Future[list[Batch]]] = {}

    def begin_phase(self, phase: int, steps: int, frozen: FrozenParts | None) -> None:
        """Get ready for the batches of a phase of so many steps (a collective).

        `frozen`: where what is frozen in it comes from; None: nothing is.
        """
        for made in self._made.values():
            if isinstance(made, Future) and not made.cancel():
                made.result()
        self._made, self._steps, self.frozen = {}, steps, frozen
        if frozen is not None:
            for part, row in zip(self._draw(phase, 0, 0, 1), self.rows, strict=True):
                if row.as_recorded and not row.asks_past_student:
                    frozen.prepare(part.origin[0], row.count)

    def batch(self, phase: int, step: int, rank: int, world_size: int) -> Batch:
        """Rows ``rank::world_size`` of each source, for the global batch of (phase, step).

        Batches are made several at once, always the same ones, because the student before this stage answers many rows
        faster than a few at a time; where it is worth it, the next ones while the steps of these are made.
        """
        first = step - step % STEPS_AT_ONCE
        key, following = (phase, first, rank, world_size), (phase, first + STEPS_AT_ONCE, rank, world_size)
        made = self._made.get(key)
        if made is None:
            made = self._make(*key)
        elif isinstance(made, Future):
            made = made.result()
        ahead = self._made.get(following)
        self._made = {key: made} if ahead is None else {key: made, following: ahead}
        if self._reader is not None and following not in self._made and following[1] < self._steps:
            self._made[following] = self._reader.submit(self._make, *following)
        return made[step - first]

    def _make(self, phase: int, first: int, rank: int, world_size: int) -> list[Batch]:
        """The batches of STEPS_AT_ONCE steps from `first` on, fewer at the end of a phase."""
        count = min(STEPS_AT_ONCE, self._steps - first) if self._steps else STEPS_AT_ONCE
        drawn = [self._draw(phase, first + number, rank, world_size) for number in range(count)]
        sources = [(row, [parts[number] for parts in drawn]) for number, row in enumerate(self.rows)]
        ordered = sorted(sources, key=lambda source: source[0].asks_past_student)
        columns = [[np.concatenate(column) for column in list(zip(*parts, strict=True))[:4]] for _, parts in ordered]
        tensors = [[self._tensor(column) for column in source] for source in columns]
        precomputed = self._ask_past_student(ordered, tensors)
        of_all, new = sum(row.count for row in self.rows), sum(row.count for row in self.rows if row.of_new_tasks)
        sizes = [len(parts[0].valid) for _, parts in ordered]
        is_new = [torch.full((size,), row.of_new_tasks) for size, (row, _) in zip(sizes, ordered, strict=True)]
        flags = torch.cat(is_new).to(self.device)
        batches = []
        for number in range(count):
            spans = [slice(number * size, (number + 1) * size) for size in sizes]
            observations, target, valid, told = (
                torch.cat([source[column][span] for source, span in zip(tensors, spans, strict=True)])
                for column in range(4)
            )
            known = None
            if precomputed:
                parts = [source.rows[span] for source, span in zip(precomputed, spans, strict=True)]
                known = precomputed[0].with_rows(torch.cat(parts))
            origins = [parts[number].origin for _, parts in ordered]
            batches.append(Batch(observations, target, valid, told, flags, flags, of_all, new, origins, known))
        return batches

    def _ask_past_student(
        self, sources: Sequence[tuple[Rows, list[Drawn]]], tensors: list[list[Tensor]]
    ) -> list[Precomputed]:
        """Put the answers of the student before this stage in the place of the targets (observations, target, valid,
        task vectors) of the sources that ask it; return what is frozen of each source, if anything is."""
        frozen, precomputed = self.frozen, list[Precomputed]()
        asked = [columns for (row, _), columns in zip(sources, tensors, strict=True) if row.asks_past_student]
        for (row, parts), (observations, _, valid, told) in zip(sources, tensors, strict=True):
            if frozen is None or row.asks_past_student:
                continue
            if row.as_recorded:
                steps = np.concatenate([part.origin[1] for part in parts])
                precomputed.append(frozen.of_steps(parts[0].origin[0], steps))
            else:
                precomputed.append(frozen.of_rows(observations, told, valid)[0])
        if asked:
            assert self.data.past is not None
            observations, _, valid, told = (torch.cat(column) for column in zip(*asked, strict=True))
            sizes = [len(columns[0]) for columns in asked]
            with torch.no_grad():
                if frozen is None:
                    answers = self.data.past.student(observations, told, valid)[0]
                else:
                    known, newest = frozen.of_rows(observations, told, valid)
                    answers = newest[:, None].expand(-1, valid.shape[1], -1)
                    precomputed += [known.with_rows(rows) for rows in known.rows.split(sizes)]
            for columns, part in zip(asked, answers.split(sizes), strict=True):
                columns[1] = part
        with_experts = frozen is None or frozen.with_experts
        return precomputed if with_experts else [known.without_experts() for known in precomputed]

    def _tensor(self, column: np.ndarray) -> Tensor:
        # torch.tensor copies into memory aligned alike on every run: vectorised sums then give the same bits
        tensor = torch.tensor(column)
        return tensor if self.device.type == "cpu" else tensor.pin_memory().to(self.device, non_blocking=True)

    def _draw(self, phase: int, step: int, rank: int, world_size: int) -> list[Drawn]:
        rng = numpy_generator(self.seed, "batch", self.stage, phase, step)
        return [row.draw(rng, rank, world_size) for row in self.rows]


def shares_of(store: TrajectoryStore, task_weights: dict[str, float] | None) -> np.ndarray | None:
    """The share of the rows that each task of `store` gets, float64 [tasks]; None: all alike."""
    if task_weights is None:
        return None
    weights = np.array([task_weights[task] for task in store.task_ids])
    return weights / weights.sum() if weights.any() else None
