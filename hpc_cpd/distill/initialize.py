"""How a stage begins: a vector for every new task, and a student with room for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from hpc_cpd import plugins
from hpc_cpd.distill.learn import Beginning
from hpc_cpd.run.paths import Run
from hpc_cpd.settings import Config
from hpc_cpd.student.embeddings.base import NewTasks
from hpc_cpd.student.network import Student, StudentShape, grown
from hpc_cpd.student.policy import StudentParts, load_student_parts, save_student
from hpc_cpd.student.task_inference import EpisodeStatistics
from hpc_cpd.tasks.registry import stage_plan
from hpc_cpd.trajectories.store import TrajectoryStore

NORMALISER_FLOOR = 0.05
"""Least standard deviation of an observation. What stands still in stage 1 may move in a later task, and the
normaliser is fixed after stage 1: without a floor such an input would explode (metres and radians, mostly)."""


def begin_stage(
    run: Run,
    config: Config,
    plan: list[list[str]],
    stage: int,
    new: TrajectoryStore,
    memory: TrajectoryStore | None,
) -> None:
    """Write ``stages/K/start``: the student of stage K-1 grown by the new experts, with the new tasks' vectors.

    Old tasks' vectors are carried over unchanged. The new experts are born with the gate bias of the settings.
    """
    tasks = plan[stage - 1]
    previous = load_student_parts(run.stage(stage - 1) / "student") if stage > 1 else None
    if previous is None:
        mean, deviation = new.observation_statistics()
        normaliser = (mean, np.maximum(deviation, NORMALISER_FLOOR).astype(np.float32))
    else:
        normaliser = previous.normaliser()
    embedding_state, vectors = _task_vectors(config, plan, stage, new, memory, previous, normaliser)

    count = len(tasks) * config.student.experts_per_task
    if previous is None:
        shape = StudentShape.from_settings(
            config.student, new.observations.shape[1], new.actions.shape[1], len(next(iter(vectors.values())))
        )
        student = Student(shape, [list(range(count))], 1, config.seed)
        student.set_normaliser(*normaliser)
        experts = student.experts_by_stage
        state = {name: tensor.detach().clone() for name, tensor in student.state_dict().items()}
    elif config.student.grow:
        shape, first = previous.shape, sum(map(len, previous.experts_by_stage))
        new_ids = list(range(first, first + count))
        experts = [*previous.experts_by_stage, new_ids]
        student = grown(previous.state, shape, previous.experts_by_stage, new_ids, 1, config.seed)
        state = {name: tensor.detach().clone() for name, tensor in student.state_dict().items()}
    else:
        shape, experts, state = previous.shape, previous.experts_by_stage, dict(previous.state)
    metadata = {"stage": stage, "tasks_by_stage": plan[:stage], "seed": config.seed, "trained": False}
    statistics = dict(previous.episode_statistics) if previous is not None else {}
    statistics |= {task: EpisodeStatistics.of(*new.episode_beginnings(task)) for task in tasks}
    parts = StudentParts(
        state=state,
        shape=shape,
        experts_by_stage=experts,
        task_vectors=vectors,
        episode_statistics=statistics,
        task_embedding=config.student.task_embedding,
        task_embedding_state=embedding_state,
        method_state=previous.method_state if previous is not None else None,
        metadata=metadata,
    )
    save_student(run.stage(stage) / "start", parts)


def load_beginning(folder: Path, stage: int) -> tuple[Beginning, StudentParts]:
    """What `begin_stage` wrote."""
    parts = load_student_parts(folder)
    new_experts = parts.experts_by_stage[stage - 1] if len(parts.experts_by_stage) == stage else []
    return Beginning(parts.state, parts.shape, parts.experts_by_stage, new_experts), parts


def _task_vectors(
    config: Config,
    plan: list[list[str]],
    stage: int,
    new: TrajectoryStore,
    memory: TrajectoryStore | None,
    previous: StudentParts | None,
    normaliser: tuple[np.ndarray, np.ndarray],
) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
    """(task embedding's state, vector of every task seen so far in the order of arrival)."""
    settings = config.student.task_embedding
    old = dict(previous.task_vectors) if previous is not None else {}

    def windows_of(task: str, count: int, length: int, rng: np.random.Generator) -> np.ndarray:
        store = new if memory is None or task in new.task_ids else memory
        steps = store.steps(task)
        return store.gather(rng.integers(steps.start, steps.stop, count), length)["observations"]

    learnt = NewTasks(
        tasks=plan[stage - 1],
        # of the whole stream: a task that is left out later must not move the others' places
        all_tasks=[task for tasks in stage_plan(config.stream) for task in tasks],
        windows_of=windows_of,
        old_vectors=old,
        state=previous.task_embedding_state if previous is not None else {},
        mean=normaliser[0],
        std=normaliser[1],
        seed=config.seed,
        stage=stage,
    )
    state, vectors = plugins.load("embeddings", settings.name).learn(settings, learnt)
    return state, {**old, **vectors}
