"""What a learnt stage leaves for the later ones: replay memory, routing, weight penalties."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpc_cpd.distill.batches import StageBatches
from hpc_cpd.distill.importance import Samples
from hpc_cpd.distill.learn import Beginning
from hpc_cpd.distill.losses import action_mean_error
from hpc_cpd.distill.penalties import Penalty, importance_of, next_penalty
from hpc_cpd.distributed.torch import device_of_rank, run_on_all_ranks, run_on_rank
from hpc_cpd.settings import Choice, Config
from hpc_cpd.student.network import Student
from hpc_cpd.student.policy import StudentPolicy, load_student
from hpc_cpd.trajectories.memory import select_memory, write_memory
from hpc_cpd.trajectories.store import TrajectoryStore

IMPORTANCE_SAMPLES = 256  # of the default student with 25 experts, under a minute on one core
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
            Choice("selections", "dpp").resolve(settings.selection),
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
    """Write ``penalty.safetensors``: what the next stage must not move, and how firmly.

    The samples are shared out over the ranks (a collective); `state` must be the same on all of them.
    """
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def of_my_samples() -> dict[str, Tensor]:
        student = Student(beginning.shape, beginning.experts_by_stage, inference=True).to(device_of_rank())
        student.load_canonical(state)
        observations, vectors, steps = (part.tensor_split(world_size)[rank] for part in _samples(batches))
        found = importance_of(config.distill, student, (observations, vectors, steps))
        return {name: (mean * (len(steps) / IMPORTANCE_SAMPLES)).cpu() for name, mean in found.items()}

    importance = run_on_all_ranks(of_my_samples)
    for share in importance.values():
        torch.distributed.all_reduce(share)
    penalty = next_penalty(config.distill, previous, dict(state), importance)
    run_on_rank(lambda: penalty.save(folder / "penalty.safetensors"))


def _samples(batches: StageBatches) -> Samples:
    """IMPORTANCE_SAMPLES histories of batches that no phase trains on, and the step of each that a batch asks for."""
    parts: list[Samples] = []
    while sum(len(steps) for _, _, steps in parts) < IMPORTANCE_SAMPLES:
        batch = batches.batch(0, len(parts), 0, 1)
        parts.append((batch.observations, batch.task_vectors, batch.valid.int().argmax(dim=1)))
    observations, task_vectors, steps = (torch.cat(column) for column in zip(*parts, strict=True))
    # of a larger batch, rows from all over it: new ones come first
    chosen = torch.arange(IMPORTANCE_SAMPLES, device=steps.device) * len(steps) // IMPORTANCE_SAMPLES
    return observations[chosen], task_vectors[chosen], steps[chosen]


def _predictions(
    policy: StudentPolicy, store: TrajectoryStore, steps: np.ndarray
) -> Iterator[tuple[dict[str, np.ndarray], Tensor, Tensor]]:
    """(histories, actions [B, L, act], gate probabilities [B, L, E] meant over the mixtures) at `steps`, in pieces."""
    for first in range(0, len(steps), STEPS_AT_ONCE):
        windows = store.gather_histories(steps[first : first + STEPS_AT_ONCE], policy.shape.history)
        tasks = [store.task_ids[i] for i in windows["task_index"]]
        policy.act_as_learnt(tasks)
        vectors = np.stack([policy.task_vectors[task] for task in tasks])
        actions, _, gate = policy.student(
            torch.tensor(windows["observations"]), torch.tensor(vectors), torch.tensor(windows["valid"]), None
        )
        yield windows, actions, gate.mean(dim=2)
