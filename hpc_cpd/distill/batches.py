"""Batches of a stage: new trajectories beside the replay memory, as a pure function of (seed, step).

Every rank draws the same global batch and gathers only its own rows, so the student does not depend on the
number of ranks, and a resumed run sees the batches it would have seen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from hpc_cpd.student.policy import StudentPolicy
from hpc_cpd.trajectories.store import TrajectoryStore


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


class StageBatches:
    """Draws the batches of one stage."""

    def __init__(
        self,
        new: TrajectoryStore,
        memory: TrajectoryStore | None,
        task_vectors: dict[str, np.ndarray],
        length: int,
        batch_size: int,
        replay_fraction: float,
        seed: list[int],
        device: torch.device,
        past: StudentPolicy | None = None,
        anchor_fraction: float = 0.0,
    ) -> None:
        """`seed` names the stage; `length` is the student's history in steps; without `memory` nothing is replayed.

        `past`: the student before this stage; `anchor_fraction` of the replayed rows ask for what it did.
        """
        self.sources = [new] if memory is None else [new, memory]
        replayed = round(batch_size * replay_fraction) if memory is not None else 0
        self.anchored = round(replayed * anchor_fraction) if past is not None else 0
        self.rows = [batch_size - replayed, replayed - self.anchored][: len(self.sources)]
        self.past = past
        self.old_vectors = np.stack(list(past.task_vectors.values())) if past is not None else None
        self.vectors = [np.stack([task_vectors[task] for task in store.task_ids]) for store in self.sources]
        self.length = length
        self.seed = seed
        self.device = device

    def batch(self, phase: int, step: int, rank: int, world_size: int) -> Batch:
        """Rows ``rank::world_size`` of the global batch of (phase, step)."""
        rng = np.random.default_rng([*self.seed, phase, step])
        parts: list[tuple[np.ndarray, ...]] = []
        for new, (store, rows, vectors) in enumerate(zip(self.sources, self.rows, self.vectors, strict=True)):
            if rows == 0:
                continue
            drawn = store.draw_windows(rows, rng, balance_tasks=True)
            # the very windows the student acts on: the loss is on their newest step, and only it takes experts' time
            windows = store.gather_histories(drawn[rank::world_size], self.length)
            newness = np.full(len(windows["task_index"]), new == 0)
            told = vectors[windows["task_index"]]
            parts.append((windows["observations"], windows["teacher_mean"], windows["valid"], told, newness))
        if self.past is not None and self.old_vectors is not None and self.anchored:
            parts.append(self._anchors(self.past, self.old_vectors, rng, rank, world_size))
        # torch.tensor copies into memory aligned alike on every run: vectorised sums then give the same bits
        observations, teacher_mean, valid, task_vectors, is_new = (
            torch.tensor(np.concatenate(column), device=self.device) for column in zip(*parts, strict=True)
        )
        return Batch(observations, teacher_mean, valid, task_vectors, is_new, is_new, sum(self.rows) + self.anchored)

    def origins(self, phase: int, step: int, rank: int, world_size: int) -> list[str]:
        """Where each row of `batch` was recorded, for a message."""
        rng = np.random.default_rng([*self.seed, phase, step])
        drawn = [
            (store, store.draw_windows(rows, rng, balance_tasks=True))
            for store, rows in zip([*self.sources, self.sources[0]], [*self.rows, self.anchored], strict=True)
            if rows
        ]
        return [store.describe_step(first) for store, windows in drawn for first in windows[rank::world_size]]

    def _anchors(
        self, past: StudentPolicy, old_vectors: np.ndarray, rng: np.random.Generator, rank: int, world_size: int
    ) -> tuple[np.ndarray, ...]:
        """Rows that pin the student's function on old tasks between the few states that the memory keeps.

        What the past student would do there is known without a teacher, at any observation (arXiv 1606.09282).
        """
        store = self.sources[0]
        drawn = store.draw_windows(self.anchored, rng, balance_tasks=True)[rank::world_size]
        told = old_vectors[rng.integers(len(old_vectors), size=self.anchored)[rank::world_size]]
        windows = store.gather_histories(drawn, self.length)
        with torch.inference_mode():
            actions, _, _ = past.student(
                torch.tensor(windows["observations"]), torch.tensor(told), torch.tensor(windows["valid"]), None
            )
        return windows["observations"], actions.numpy(), windows["valid"], told, np.zeros(len(drawn), np.bool_)
