"""One rank of steps whose gradient a replay memory corrects: ``rank_a_gem.py ARGUMENTS ANSWER``.

ARGUMENTS: JSON object with "expert_parallel_size", "top_k" and "cases": names of `TARGETS`. ANSWER: safetensors with,
for each case, the gradient before clipping and the update of every parameter, and the gradients that went into it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from hpc_cpd.config import load_config
from hpc_cpd.distill.batches import Batch
from hpc_cpd.distill.engine import PhaseEngine
from hpc_cpd.distill.train import _step
from hpc_cpd.distributed.torch import finish_distributed, gather, start_distributed
from hpc_cpd.errors import run_command
from hpc_cpd.methods.a_gem import AGEM
from hpc_cpd.methods.base import Phase
from hpc_cpd.student.checkpoint import gather_state
from hpc_cpd.student.network import Student, StudentShape
from hpc_cpd.worker import leave
from tests.student.reference import small_shape

NEW, REPLAYED = 9, 1  # the second rank has no replayed row
TARGETS = {"against": -1.0, "along": 1.0}
"""What replayed rows ask for, relative to what new rows ask for at the same observations."""


def shape_of(top_k: int) -> StudentShape:
    return small_shape(
        top_k, observation_size=5, action_size=2, task_vector_size=3, width=8, history=2, expert_hidden=8
    )


def whole_batch(case: str) -> Batch:
    """New rows, then replayed ones, which see what the first new rows see."""
    generator = torch.Generator().manual_seed(0)
    observations = torch.randn(NEW, 2, 5, generator=generator)
    vectors = torch.randn(NEW, 3, generator=generator)
    targets = torch.full((NEW, 2, 2), 0.8)
    valid = torch.tensor([[False, True]]).expand(NEW + REPLAYED, -1)
    same = torch.arange(REPLAYED)
    return Batch(
        torch.cat([observations, observations[same]]),
        torch.cat([targets, TARGETS[case] * targets[same]]),
        valid,
        torch.cat([vectors, vectors[same]]),
        torch.arange(NEW + REPLAYED) < NEW,
        None,
        NEW + REPLAYED,
        NEW,
        [],
    )


def with_small_actions(student: Student) -> Student:
    """So small that what a row asks for decides which way its gradient goes."""
    with torch.no_grad():
        for parameter in student.head.parameters():
            parameter.mul_(0.1)
    return student


class WholeBatches:
    """As much of `StageBatches` as a step asks for."""

    def __init__(self, case: str) -> None:
        self.case = case

    def batch(self, phase: int, step: int, rank: int, world_size: int) -> Batch:
        whole = whole_batch(self.case)
        rows = torch.cat([torch.arange(NEW)[rank::world_size], NEW + torch.arange(REPLAYED)[rank::world_size]])
        tensors = (whole.observations, whole.target, whole.valid, whole.task_vectors, whole.is_new_task)
        observations, target, valid, task_vectors, is_new = (part[rows] for part in tensors)
        return Batch(observations, target, valid, task_vectors, is_new, None, NEW + REPLAYED, NEW, [])


def everywhere(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What all ranks hold, by name; replicas hold the same."""
    found: dict[str, Tensor] = {}
    for part in gather(tensors):
        for name, tensor in part.items():
            assert name not in found or torch.equal(found[name], tensor), f"{name} differs between ranks"
            found[name] = tensor
    return found


def main() -> int:
    arguments, answer = json.loads(sys.argv[1]), Path(sys.argv[2])
    rank, _ = start_distributed()
    seen: dict[str, dict[str, Tensor]] = {}

    class Watched(PhaseEngine):
        def _clip(self) -> float:
            named = self.student.named_parameters()
            seen["projected"] = {name: value.grad.clone() for name, value in named if value.grad is not None}
            return super()._clip()

    class WatchedMethod(AGEM):
        def gradients(self, student: Student, reference: Sequence[Tensor] | None) -> None:
            assert reference is not None
            named = dict(student.named_parameters())
            seen["gradient"] = {name: value.grad.clone() for name, value in named.items() if value.grad is not None}
            seen["reference"] = dict(zip(named, reference, strict=True))
            super().gradients(student, reference)

    result: dict[str, Tensor] = {}
    for case in arguments["cases"]:
        student = Student(shape_of(arguments["top_k"]), [[0, 1, 2]], arguments["expert_parallel_size"], 0)
        with_small_actions(student)
        before = gather_state(student)
        words = ["method=a_gem", "distill.load_balancing_coefficient=0", "distill.warmup_steps=0"]
        method = WatchedMethod(load_config(None, words))
        engine = Watched(student, method.config.distill, 1, method)
        _step(engine, Phase(1, 1), 0, WholeBatches(case), "test")  # type: ignore[arg-type]
        after = gather_state(student)
        parts = {name: everywhere(tensors) for name, tensors in seen.items()}
        parts["update"] = {name: after[name] - before[name] for name in after}
        result |= {f"{case}/{part}/{name}": t.clone() for part, of in parts.items() for name, t in of.items()}
        engine.close()
    if rank == 0:
        save_file(result, answer)
    finish_distributed()
    return 0


if __name__ == "__main__":
    leave(run_command(main))
