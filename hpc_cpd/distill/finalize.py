"""What a learnt stage leaves besides its student: errors of the episodes, the routing of tasks, samples for methods."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpc_cpd.distill.batches import StageBatches
from hpc_cpd.distributed.torch import device_of_rank
from hpc_cpd.losses import action_mean_error
from hpc_cpd.methods.base import Samples
from hpc_cpd.student.policy import StudentPolicy, load_student
from hpc_cpd.trajectories.store import TrajectoryStore

ROUTING_STEPS = 512
STEPS_AT_ONCE = 512


def episode_errors(student_folder: Path, store: TrajectoryStore) -> np.ndarray:
    """Mean squared error of the student on every episode of `store`, float64 [episodes], on every rank.

    The steps are shared out over the ranks (a collective).
    """
    policy = load_student(student_folder, device_of_rank())
    mine = np.array_split(np.arange(len(store)), torch.distributed.get_world_size())[torch.distributed.get_rank()]
    errors = torch.zeros(len(store), dtype=torch.float64)
    done = 0
    for windows, predicted, _ in _predictions(policy, store, mine):
        target, valid = torch.tensor(windows["teacher_mean"]), torch.tensor(windows["valid"])
        steps = mine[done : done + len(valid)]
        errors[steps] = action_mean_error(predicted, target, valid).double().sum(dim=1)
        done += len(valid)
    torch.distributed.all_reduce(errors)
    return store.episode_means(errors.numpy())


def routing_by_task(student_folder: Path, stores: list[TrajectoryStore], due: Collection[str]) -> dict[str, Any]:
    """Mean gate probability of every expert at steps of each of the tasks `due` (drawn with a fixed seed)."""
    policy = load_student(student_folder, device_of_rank())
    tasks: dict[str, list[float]] = {}
    for store in stores:
        for task in filter(due.__contains__, store.task_ids):
            steps = store.steps(task)
            drawn = np.random.default_rng(0).integers(steps.start, steps.stop, ROUTING_STEPS)
            total = torch.zeros(sum(map(len, policy.experts_by_stage)), dtype=torch.float64)
            for windows, _, gate in _predictions(policy, store, drawn):
                total += gate[torch.tensor(windows["valid"])].double().sum(dim=0)
            tasks[task] = (total / ROUTING_STEPS).tolist()
    stages: list[list[str]] = policy.metadata["tasks_by_stage"]
    experts = []
    for stage, (ids, names) in enumerate(zip(policy.experts_by_stage, stages, strict=False), start=1):
        per_task = max(1, len(ids) // len(names))
        experts += [{"id": e, "stage": stage, "task": names[n // per_task]} for n, e in enumerate(ids)]
    return {"experts": experts, "tasks": {task: tasks[task] for names in stages for task in names if task in tasks}}


def samples_of(batches: StageBatches, count: int) -> Samples:
    """`count` steps of batches that no phase trains on, from all over the batches."""
    parts: list[Samples] = []
    while sum(len(part.steps) for part in parts) < count:
        batch = batches.batch(0, len(parts), 0, 1)
        parts.append(Samples(batch.observations, batch.task_vectors, batch.valid.int().argmax(dim=1)))
    observations, task_vectors, steps = (torch.cat(column) for column in zip(*parts, strict=True))
    # of a larger batch, rows from all over it: new ones come first
    chosen = torch.arange(count, device=steps.device) * len(steps) // count
    return Samples(observations[chosen], task_vectors[chosen], steps[chosen])


@torch.inference_mode()
def _predictions(
    policy: StudentPolicy, store: TrajectoryStore, steps: np.ndarray
) -> Iterator[tuple[dict[str, np.ndarray], Tensor, Tensor]]:
    """(histories, actions [B, L, act], gate probabilities [B, L, E] meant over the mixtures) at `steps`, in pieces."""
    for first in range(0, len(steps), STEPS_AT_ONCE):
        windows = store.gather_histories(steps[first : first + STEPS_AT_ONCE], policy.shape.history)
        tasks = [store.task_ids[i] for i in windows["task_index"]]
        policy.act_as_learnt(tasks)
        vectors = np.stack([policy.task_vectors[task] for task in tasks])
        columns = windows["observations"], vectors, windows["valid"]
        actions, _, gate = policy.student(*(torch.tensor(column).to(device_of_rank()) for column in columns))
        yield windows, actions.cpu(), gate.mean(dim=2).cpu()
