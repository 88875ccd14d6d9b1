"""What a stage computes once because it is frozen: features of every step, old experts' outputs, the past answers.

The student before the stage holds all that is frozen, so it computes what the student that learns need not: for steps
that come again and again under their own task's vector, before the first gradient step, into a table; for rows that
differ with every draw, when they are drawn. What is frozen is read from the parameters, after the method froze them.

The table is no state: it is made again by whoever resumes the stage, in the same pieces, and holds the same bits.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from hpc_cpd.distributed.torch import all_ranks_max
from hpc_cpd.methods.base import StageData
from hpc_cpd.student.moe.precomputed import Precomputed
from hpc_cpd.student.network import Student
from hpc_cpd.trajectories.store import TrajectoryStore

STEPS_AT_ONCE = 256
PIECES_AT_ONCE = 16  # of each rank, before the ranks exchange them: nobody waits long for another


class FrozenParts:
    """The frozen parts of the student of a stage after the first, and what they made of the steps of its data."""

    def __init__(self, data: StageData, gradient_steps: int, folder: Path, in_memory_gigabytes: float) -> None:
        """`gradient_steps` of the whole stage: steps that will be drawn once each, on average, get no table.

        Tables of more than `in_memory_gigabytes` are files under `folder`, one per rank, mapped into memory.
        """
        assert data.past is not None
        self.data, self.gradient_steps = data, gradient_steps
        self.past: Student = data.past.student
        self.device = next(self.past.parameters()).device
        self.folder, self.limit = folder, in_memory_gigabytes * 1e9
        self.with_experts = False
        self._tables: dict[TrajectoryStore, tuple[Tensor, Precomputed]] = {}

    def serve(self, student: Student) -> bool:
        """Whether `student`, which is about to learn, has the features frozen that the past student computes.

        From then on `with_experts` says whether its old experts are frozen too. The same on every rank (a collective).
        """
        past, sizes = self.past, [len(student.experts_by_stage), sum(map(len, student.experts_by_stage))]
        old = [number for stage in past.experts_by_stage for number in stage]
        newest, top_k = f"_{sizes[0]}", student.shape.top_k
        gate = {name: rows for name, rows in student.gate_parameters() if not name.endswith(newest)}
        features = (
            past.backbone.ends_with_experts
            and _frozen_alike(student.shared_parameters(), past.shared_parameters())
            and all(map(torch.equal, student.tokenizer.buffers(), past.tokenizer.buffers()))
        )
        experts = (
            sizes[0] > len(past.experts_by_stage) > 0
            and len(old) < sizes[1]
            and top_k < sizes[1]
            and _frozen_alike(gate.items(), past.gate_parameters())
            and _frozen_alike(student.expert_parameters(old), past.expert_parameters(old), all_of_them=False)
        )
        without_features, without_experts = all_ranks_max([float(not features), float(not experts)])
        self.with_experts = not without_experts
        return not without_features

    def of_rows(self, observations: Tensor, task_vectors: Tensor, valid: Tensor) -> tuple[Precomputed, Tensor]:
        """(what is frozen of these rows, the past student's actions float32 [B, act]). Shapes: `Student.forward`."""
        return self.past.precompute(observations, task_vectors, valid)

    def prepare(self, store: TrajectoryStore, drawn: int) -> None:
        """Make the table of `store`, of which each batch of all ranks has `drawn` steps (a collective)."""
        if drawn * self.gradient_steps >= len(store) and store not in self._tables:
            self._tables[store] = self._make(store)

    def of_steps(self, store: TrajectoryStore, steps: np.ndarray) -> Precomputed:
        """What is frozen of `steps` int64 [B] of `store`, under their own task's vector."""
        if store not in self._tables:
            return self._of(store, steps)
        table, like = self._tables[store]
        return like.with_rows(table[torch.tensor(steps, device=table.device)].to(self.device))

    def close(self) -> None:
        """Remove the files of the tables."""
        self._tables.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _of(self, store: TrajectoryStore, steps: np.ndarray) -> Precomputed:
        windows = store.gather_histories(steps, self.data.length)
        vectors = np.stack([self.data.task_vectors[store.task_ids[task]] for task in windows["task_index"]])
        inputs = windows["observations"], vectors, windows["valid"]
        return self.of_rows(*(torch.tensor(column).to(self.device) for column in inputs))[0]

    def _make(self, store: TrajectoryStore) -> tuple[Tensor, Precomputed]:
        """The table of `store`, float32 [steps, numbers], always in the same pieces: a product rounds by its size."""
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        like = self._of(store, np.arange(1))
        table = self._empty(len(store), like.rows.shape[1])
        for first in range(0, len(store), ranks * PIECES_AT_ONCE * STEPS_AT_ONCE):
            span = table[first : first + ranks * PIECES_AT_ONCE * STEPS_AT_ONCE]
            for begin in range(rank * STEPS_AT_ONCE, len(span), ranks * STEPS_AT_ONCE):
                part = span[begin : begin + STEPS_AT_ONCE]
                part.copy_(self._of(store, np.arange(first + begin, first + begin + len(part))).rows)
            if ranks > 1:
                torch.distributed.all_reduce(span)
        return table, like

    def _empty(self, rows: int, numbers: int) -> Tensor:
        made = sum(table.numel() for table, _ in self._tables.values())
        if 4 * (made + rows * numbers) <= self.limit:
            return torch.zeros(rows, numbers, device=self.device)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"table-{torch.distributed.get_rank()}-{len(self._tables)}.npy"
        return torch.from_numpy(np.lib.format.open_memmap(path, "w+", np.float32, (rows, numbers)))


def _frozen_alike(
    here: Iterable[tuple[str, nn.Parameter]], past: Iterable[tuple[str, nn.Parameter]], all_of_them: bool = True
) -> bool:
    """Whether the parameters `here` are frozen, and those of the `past`; `all_of_them`: no name is in one alone.

    A head may learn: nothing that is computed once stands behind it.
    """
    ours, theirs = ({name: p for name, p in part if not name.startswith("head.")} for part in (here, past))
    return (ours.keys() == theirs.keys() if all_of_them else ours.keys() <= theirs.keys()) and all(
        not parameter.requires_grad and torch.equal(parameter, theirs[name]) for name, parameter in ours.items()
    )
