"""Batches of a stage: new trajectories beside the replay memory, as a pure function of (seed, step).

Every rank draws the same global batch and gathers only its own rows, so the student does not depend on the
number of ranks, and a resumed run sees the batches it would have seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from hpc_cpd.errors import UserError
from hpc_cpd.settings import DistillSettings
from hpc_cpd.student.policy import StudentPolicy
from hpc_cpd.trajectories.store import TrajectoryStore

Columns = tuple[np.ndarray, ...]
"""observations, teacher_mean, valid, task vectors and newness of some rows"""
Place = tuple[int, int, int, int]
"""phase, step, rank, world size"""


@dataclass(frozen=True)
class Batch:
    """This rank's rows of a global batch."""

    observations: Tensor  # float32 [B, L, obs]
    teacher_mean: Tensor  # float32 [B, L, act]
    valid: Tensor  # bool [B, L]
    task_vectors: Tensor  # float32 [B, D]
    is_new_task: Tensor  # bool [B]: the row belongs to a task of this stage
    lift: Tensor | None  # bool [B]: rows whose tokens new experts must be given a chance at
    global_valid: int  # valid positions in the batch of all ranks: one per row

    def without_lift(self) -> Batch:
        """The same rows, routed by the gate alone."""
        return replace(self, lift=None)

    def split(self, global_new: int) -> tuple[Batch, Batch]:
        """(rows of this stage's tasks, replayed rows); `global_new`: how many of the former all ranks have."""
        here = int(self.is_new_task.sum())  # they come first
        return (
            self._rows(slice(None, here), global_new),
            self._rows(slice(here, None), self.global_valid - global_new),
        )

    def _rows(self, rows: slice, global_valid: int) -> Batch:
        return Batch(
            self.observations[rows],
            self.teacher_mean[rows],
            self.valid[rows],
            self.task_vectors[rows],
            self.is_new_task[rows],
            None if self.lift is None else self.lift[rows],
            global_valid,
        )


class StageBatches:
    """Draws the batches of one stage."""

    def __init__(
        self,
        new: TrajectoryStore,
        memory: TrajectoryStore | None,
        task_vectors: dict[str, np.ndarray],
        length: int,
        settings: DistillSettings,
        seed: list[int],
        device: torch.device,
        past: StudentPolicy | None = None,
        task_weights: Mapping[str, float] | None = None,
    ) -> None:
        """`seed` names the stage; `length` is the student's history in steps; without `memory` nothing is replayed.

        `past`: the student before this stage, whom ``anchor_fraction`` of the replayed rows ask: at new observations
        or, ``between_fraction`` of them, between two that the memory keeps. With ``replay_targets=past_student`` the
        others ask it too, in place of the teacher (behavioural cloning of ClonEx-SAC, arXiv 2209.13900, with the
        student as each stage finds it). Tasks are drawn in proportion to `task_weights`, the new ones and those of the
        memory apart; None: all alike.
        """
        self.sources = [new] if memory is None else [new, memory]
        self.replayed = round(settings.batch_size * settings.replay_fraction) if memory is not None else 0
        self.anchored = round(self.replayed * settings.anchor_fraction) if past is not None else 0
        self.between = round(self.anchored * settings.between_fraction)
        self.rows = [settings.batch_size - self.replayed, self.replayed - self.anchored][: len(self.sources)]
        self.past = past
        self.past_answers_memory = past is not None and settings.replay_targets == "past_student"
        self.old_vectors = np.stack(list(past.task_vectors.values())) if past is not None else None
        self.target = "teacher_mean" if settings.target == "mean" else "actions"
        self.shares = [_shares(store, task_weights) for store in self.sources]
        self.vectors = [np.stack([task_vectors[task] for task in store.task_ids]) for store in self.sources]
        self.length = length
        self.seed = seed
        self.device = device
        # what is mapped may have to come from a disk, and a GPU need not wait for its rows
        slow = any(store.mapped for store in self.sources) or device.type != "cpu"
        self._reader = ThreadPoolExecutor(1, "batches") if slow else None
        self._ahead: tuple[Place, Future[tuple[list[Columns], Columns | None]]] | None = None

    def batch(self, phase: int, step: int, rank: int, world_size: int) -> Batch:
        """Rows ``rank::world_size`` of the global batch of (phase, step)."""
        parts, asked = self._windows_ahead((phase, step, rank, world_size))
        if asked is not None:
            parts.append(self._answered(asked))
        # torch.tensor copies into memory aligned alike on every run: vectorised sums then give the same bits
        tensors = [torch.tensor(np.concatenate(column)) for column in zip(*parts, strict=True)]
        if self.device.type != "cpu":
            tensors = [tensor.pin_memory().to(self.device, non_blocking=True) for tensor in tensors]
        observations, teacher_mean, valid, task_vectors, is_new = tensors
        return Batch(observations, teacher_mean, valid, task_vectors, is_new, is_new, sum(self.rows) + self.anchored)

    def _windows_ahead(self, place: Place) -> tuple[list[Columns], Columns | None]:
        """`_windows`, read while the step before was made."""
        if self._reader is None:
            return self._windows(place)
        if self._ahead is None or self._ahead[0] != place:
            self._ahead = (place, self._reader.submit(self._windows, place))
        windows = self._ahead[1].result()
        phase, step, rank, world_size = place
        following = (phase, step + 1, rank, world_size)
        self._ahead = (following, self._reader.submit(self._windows, following))
        return windows

    def _windows(self, place: Place) -> tuple[list[Columns], Columns | None]:
        """The rows that have a teacher, in parts, and those that the past student is to answer, if there are any."""
        phase, step, rank, world_size = place
        rng = np.random.default_rng([*self.seed, phase, step])
        parts: list[Columns] = []
        for new, (store, rows, vectors) in enumerate(zip(self.sources, self.rows, self.vectors, strict=True)):
            if rows:
                drawn = store.draw_windows(rows, rng, True, self.shares[new])[rank::world_size]
                parts.append(self._columns(store, drawn, vectors, new == 0))
        asked = [parts.pop()] if self.past_answers_memory and self.replayed > self.anchored else []
        if self.old_vectors is not None and self.anchored > self.between:
            asked.append(self._new_anchors(rng, rank, world_size, self.old_vectors))
        if self.between:
            asked.append(self._anchors_between(rng, rank, world_size))
        return parts, tuple(np.concatenate(column) for column in zip(*asked, strict=True)) if asked else None

    def _new_anchors(self, rng: np.random.Generator, rank: int, world_size: int, old_vectors: np.ndarray) -> Columns:
        count = self.anchored - self.between
        drawn = self.sources[0].draw_windows(count, rng, True, self.shares[0])[rank::world_size]
        told = rng.integers(len(old_vectors), size=count)[rank::world_size]
        observations, means, valid, _, newness = self._columns(self.sources[0], drawn, self.vectors[0], False)
        return observations, means, valid, old_vectors[told], newness

    def _anchors_between(self, rng: np.random.Generator, rank: int, world_size: int) -> Columns:
        """Mixtures of two remembered histories of one task, as far on in their episodes: there the goals lie between.

        A memory of ten episodes knows ten goals of a task, but the past student knows what to do at those in between.
        """
        memory, vectors = self.sources[1], self.vectors[1]
        one = memory.draw_windows(self.between, rng, True, self.shares[1])
        other = memory.matching_steps(one, rng)
        share = rng.random(self.between, dtype=np.float32)[rank::world_size, None, None]
        observations, means, valid, told, newness = self._columns(memory, one[rank::world_size], vectors, False)
        others = memory.gather_histories(other[rank::world_size], self.length)["observations"]
        return share * observations + (1.0 - share) * others, means, valid, told, newness

    def _columns(self, store: TrajectoryStore, drawn: np.ndarray, vectors: np.ndarray, new: bool) -> Columns:
        # the very windows the student acts on: the loss is on their newest step, and only it takes experts' time
        windows = store.gather_histories(drawn, self.length)
        told = vectors[windows["task_index"]]
        newness = np.full(len(drawn), new)
        return windows["observations"], windows[self.target], windows["valid"], told, newness

    def _answered(self, asked: Columns) -> Columns:
        """Rows that pin the student's function on old tasks, also between the few states that the memory keeps.

        What the past student would do there is known without a teacher, at any observation (arXiv 1606.09282).
        """
        assert self.past is not None
        observations, _, valid, told, newness = asked
        with torch.inference_mode():
            actions, _, _ = self.past.student(torch.tensor(observations), torch.tensor(told), torch.tensor(valid), None)
        return observations, actions.numpy(), valid, told, newness

    def origins(self, phase: int, step: int, rank: int, world_size: int) -> list[str]:
        """Where each row of `batch` was recorded, for a message."""
        rng = np.random.default_rng([*self.seed, phase, step])
        drawn = [
            (store, store.draw_windows(rows, rng, True, shares))
            for store, rows, shares in zip(self.sources, self.rows, self.shares, strict=True)
            if rows
        ]
        if self.old_vectors is not None and self.anchored > self.between:
            count = self.anchored - self.between
            drawn.append((self.sources[0], self.sources[0].draw_windows(count, rng, True, self.shares[0])))
            rng.integers(len(self.old_vectors), size=len(drawn[-1][1]))  # as `batch` draws
        if self.between:
            drawn.append((self.sources[1], self.sources[1].draw_windows(self.between, rng, True, self.shares[1])))
        return [store.describe_step(first) for store, windows in drawn for first in windows[rank::world_size]]


def _shares(store: TrajectoryStore, task_weights: Mapping[str, float] | None) -> np.ndarray | None:
    """The share of the rows that each task of `store` gets, float64 [tasks]; None: all alike."""
    if task_weights is None:
        return None
    weights = np.array([task_weights[task] for task in store.task_ids])
    return weights / weights.sum() if weights.any() else None


def require_replay(settings: DistillSettings, stage: int, batches: StageBatches) -> None:
    """Raise UserError when `settings` are about rows that the batches of a stage after the first do not have."""
    from_memory = batches.replayed - batches.anchored
    for name, lacks in (
        ("gradient_projection", settings.gradient_projection and not (batches.rows[0] and from_memory)),
        ("replay_targets", batches.past_answers_memory and not from_memory),
    ):
        if lacks and stage > 1:
            raise UserError(
                f"stage {stage}: distill.{name} needs new rows and rows of the replay memory in every batch, but of "
                f"{sum(batches.rows) + batches.anchored} rows {batches.rows[0]} are new and {from_memory} of the "
                "memory; begin another run with a larger memory.budget_fraction, or another distill.replay_fraction, "
                "distill.anchor_fraction or distill.batch_size"
            )
