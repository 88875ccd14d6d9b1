"""The student that a stage starts from: a vector for every new task, and room for what the method grows it by."""

from __future__ import annotations

import dataclasses

import numpy as np
from torch import Tensor

from hpc_cpd import plugins
from hpc_cpd.methods.base import Method, Stage
from hpc_cpd.student.embeddings.base import NewTasks
from hpc_cpd.student.network import Student, StudentShape, grown
from hpc_cpd.student.policy import StudentParts, load_student_parts, save_student
from hpc_cpd.student.task_inference import EpisodeStatistics
from hpc_cpd.tasks.registry import stage_plan
from hpc_cpd.trajectories.store import TrajectoryStore


def initialize_stage(stage: Stage, method: Method, new: TrajectoryStore, memory: TrajectoryStore | None) -> None:
    """Write ``stages/K/start``: the student of stage K-1 with the new experts and the new tasks' vectors.

    Old tasks' vectors are carried over unchanged.
    """
    config, tasks = stage.config, stage.tasks
    before = stage.run.stage(stage.number - 1) / "student" if stage.number > 1 else None
    previous = load_student_parts(before) if before is not None else None
    if previous is None:
        mean, deviation = new.observation_statistics()
        # What stands still in stage 1 may move in a later task, and the normaliser is fixed after stage 1: without a
        # floor such an input would explode (metres and radians, mostly).
        normaliser = (mean, np.maximum(deviation, 0.05).astype(np.float32))
    else:
        normaliser = previous.normaliser()
    embedding_state, vectors = _task_vectors(stage, new, memory, previous, normaliser)
    born, student = method.experts_born(stage), None
    if previous is None:
        shape = StudentShape.from_settings(
            config.student,
            observation_size=new.observations.shape[1],
            action_size=new.actions.shape[1],
            task_vector_size=len(next(iter(vectors.values()))),
            initial_gate_bias=method.initial_gate_bias,
        )
        student = Student(shape, [list(range(born))], 1, config.seed)
        student.tokenizer.set_normaliser(*normaliser)
        parts = StudentParts({}, shape, [], {}, {}, config.student.task_embedding)
    else:
        parts = previous
        if born:
            first = sum(map(len, parts.experts_by_stage))
            new_ids = list(range(first, first + born))
            student = grown(parts.state, parts.shape, parts.experts_by_stage, new_ids, config.seed)
    if student is not None:
        state = {name: tensor.detach().clone() for name, tensor in student.state_dict().items()}
        parts = dataclasses.replace(parts, state=state, experts_by_stage=student.experts_by_stage)
    statistics = {task: EpisodeStatistics.of(*new.episode_beginnings(task)) for task in tasks}
    metadata = {"stage": stage.number, "tasks_by_stage": stage.plan[: stage.number], "seed": config.seed}
    parts = dataclasses.replace(
        parts,
        task_vectors=vectors,
        episode_statistics={**parts.episode_statistics, **statistics},
        task_embedding=config.student.task_embedding,
        task_embedding_state=embedding_state,
        metadata={**metadata, "trained": False},
    )
    save_student(stage.run.stage(stage.number) / "start", parts, before)


def untrained(start: StudentParts, first: StudentParts) -> StudentParts:
    """The student of `first`, the beginning of stage 1, that is told what `start` is told."""
    return dataclasses.replace(
        first, task_vectors=start.task_vectors, episode_statistics=start.episode_statistics, method_state=None
    )


def _task_vectors(
    stage: Stage,
    new: TrajectoryStore,
    memory: TrajectoryStore | None,
    previous: StudentParts | None,
    normaliser: tuple[np.ndarray, np.ndarray],
) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
    """(task embedding's state, vector of every task seen so far in the order of arrival)."""
    config = stage.config
    settings = config.student.task_embedding
    old = dict(previous.task_vectors) if previous is not None else {}

    def windows_of(task: str, count: int, length: int, rng: np.random.Generator) -> np.ndarray:
        store = new if task in new.task_ids or memory is None else memory
        steps = store.steps(task)
        return store.gather(rng.integers(steps.start, steps.stop, count), length)["observations"]

    known = NewTasks(
        tasks=stage.tasks,
        remembered=[task for task in old if memory is not None and task in memory.task_ids],
        # of the whole stream: a task that is left out later must not move the others' places
        all_tasks=[task for tasks in stage_plan(config.stream) for task in tasks],
        windows_of=windows_of,
        old_vectors=old,
        state=previous.task_embedding_state if previous is not None else {},
        mean=normaliser[0],
        std=normaliser[1],
        seed=config.seed,
        stage=stage.number,
    )
    state, vectors = plugins.load("embeddings", settings.name).learn(settings, known)
    return state, {**old, **vectors}
