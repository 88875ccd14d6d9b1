"""What a learnt stage leaves for the later ones: replay memory, routing, weight penalties."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpc_cpd.config import Config
from hpc_cpd.distill.batches import StageBatches
from hpc_cpd.distill.learn import Beginning
from hpc_cpd.distill.losses import action_mean_error
from hpc_cpd.distill.penalties import Penalty, fisher_diagonal, next_penalty
from hpc_cpd.student.policy import StudentPolicy, load_student
from hpc_cpd.student.transformer import Student
from hpc_cpd.trajectories.memory import select_memory, write_memory
from hpc_cpd.trajectories.store import TrajectoryStore

FISHER_BATCHES = 32
ROUTING_STEPS = 512
STEPS_AT_ONCE = 512


def episode_errors(student_folder: Path, store: TrajectoryStore) -> np.ndarray:
    """Mean squared error of the student on every episode of `store`, float64 [episodes], on every rank.

    The steps are shared out over the ranks (a collective).
    """
    policy = load_student(student_folder)
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mine = np.array_split(np.arange(len(store)), world_size)[rank]
    errors = torch.zeros(len(store), dtype=torch.float64)
    done = 0
    with torch.inference_mode():
        for windows, predicted, _ in _predictions(policy, store, mine):
            target, valid = torch.tensor(windows["teacher_mean"]), torch.tensor(windows["valid"])
            steps = mine[done : done + len(valid)]
            errors[steps] = action_mean_error(predicted, target, valid).double().sum(dim=1)
            done += len(valid)
    torch.distributed.all_reduce(errors)
    return store.episode_means(errors.numpy())


def keep_memory(folder: Path, config: Config, stage: int, store: TrajectoryStore, errors: np.ndarray) -> None:
    """Write ``stages/K/memory``: of each new task the episodes that fit its budget of steps.

    `errors` float64 [episodes of the store]: the student's, the priority of the selection.
    """
    settings = config.memory
    memories = [
        select_memory(
            store,
            task,
            errors[store.task_episodes(task)],
            settings.budget_fraction,
            settings.selection,
            config.seed,
        )
        for task in store.task_ids
    ]
    facts = {"stage": stage, "method": settings.selection, "budget_fraction": settings.budget_fraction}
    write_memory(folder / "memory", memories, **facts)


def routing_by_task(student_folder: Path, stores: list[TrajectoryStore]) -> dict[str, Any]:
    """Mean gate probability of every expert at steps of each task (drawn with a fixed seed)."""
    policy = load_student(student_folder)
    tasks: dict[str, list[float]] = {}
    for store in stores:
        for task in store.task_ids:
            steps = store.steps(task)
            drawn = np.random.default_rng(0).integers(steps.start, steps.stop, ROUTING_STEPS)
            total = torch.zeros(policy.num_experts, dtype=torch.float64)
            with torch.inference_mode():
                for windows, _, gate in _predictions(policy, store, drawn):
                    total += gate[torch.tensor(windows["valid"])].double().sum(dim=0)
            tasks[task] = [float(value) for value in total / ROUTING_STEPS]
    stages: list[list[str]] = policy.metadata["tasks_by_stage"]
    experts = []
    for stage, (ids, names) in enumerate(zip(policy.experts_by_stage, stages, strict=False), start=1):
        per_task = max(1, len(ids) // len(names))
        experts += [{"id": e, "stage": stage, "task": names[n // per_task]} for n, e in enumerate(ids)]
    return {"experts": experts, "tasks": {task: tasks[task] for names in stages for task in names if task in tasks}}


def update_penalty(
    folder: Path,
    config: Config,
    beginning: Beginning,
    state: Mapping[str, Tensor],
    batches: StageBatches,
    previous: Penalty | None,
) -> None:
    """Write ``penalty.safetensors``: what the next stage must not move, and how firmly. For one rank alone."""
    student = Student(beginning.shape, beginning.experts_by_stage, 1, config.seed)
    student.load_canonical(state)

    def draws() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for number in range(FISHER_BATCHES):
            batch = batches.batch(0, number, 0, 1)  # phase 0: batches that no phase trains on
            yield batch.observations, batch.task_vectors, batch.valid

    generator = torch.Generator().manual_seed(config.seed)
    fisher = fisher_diagonal(student, draws(), generator)
    next_penalty(config.distill, previous, dict(state), fisher).save(folder / "penalty.safetensors")


def _predictions(
    policy: StudentPolicy, store: TrajectoryStore, steps: np.ndarray
) -> Iterator[tuple[dict[str, np.ndarray], Tensor, Tensor]]:
    """(histories, actions [B, L, act], gate probabilities [B, L, E] meant over the mixtures) at `steps`, in pieces."""
    for first in range(0, len(steps), STEPS_AT_ONCE):
        windows = store.gather_histories(steps[first : first + STEPS_AT_ONCE], policy.shape.history)
        vectors = np.stack([policy.task_vectors[store.task_ids[i]] for i in windows["task_index"]])
        actions, _, gate = policy.student(
            torch.tensor(windows["observations"]), torch.tensor(vectors), torch.tensor(windows["valid"]), None
        )
        yield windows, actions, gate.mean(dim=2)
