"""The student that a stage starts from: a vector for every new task, and room for what the method grows it by."""

from __future__ import annotations

import dataclasses

import numpy as np
from torch import Tensor

from hpc_cpd.methods.base import Method, Stage
from hpc_cpd.student.network import Student, StudentShape, grown
from hpc_cpd.student.policy import StudentParts, load_student_parts, save_student
from hpc_cpd.student.task_encoder import learn_task_vectors
from hpc_cpd.student.task_inference import EpisodeStatistics
from hpc_cpd.tasks.registry import stage_plan
from hpc_cpd.trajectories.store import TrajectoryStore

NORMALISER_FLOOR = 0.05
"""Least standard deviation of an observation. What stands still in stage 1 may move in a later task, and the
normaliser is fixed after stage 1: without a floor such an input would explode (metres and radians, mostly)."""


def initialize_stage(stage: Stage, method: Method, new: TrajectoryStore, memory: TrajectoryStore | None) -> None:
    """Write ``stages/K/start``: the student of stage K-1 with the new experts and the new tasks' vectors.

    Old tasks' vectors are carried over unchanged.
    """
    config, tasks = stage.config, stage.tasks
    previous = load_student_parts(stage.run.stage(stage.number - 1) / "student") if stage.number > 1 else None
    if previous is None:
        mean, deviation = new.observation_statistics()
        normaliser = (mean, np.maximum(deviation, NORMALISER_FLOOR).astype(np.float32))
    else:
        normaliser = previous.normaliser()
    encoder, vectors = _task_vectors(stage, new, memory, previous, normaliser)
    born = method.experts_born(stage)
    if previous is None:
        shape = StudentShape.from_settings(
            config.student,
            new.observations.shape[1],
            new.actions.shape[1],
            len(next(iter(vectors.values()))),
            method.initial_gate_bias,
        )
        student = Student(shape, [list(range(born))], 1, config.seed)
        student.set_normaliser(*normaliser)
        experts, state = student.experts_by_stage, _state_of(student)
    elif born:
        shape, first = previous.shape, sum(map(len, previous.experts_by_stage))
        new_ids = list(range(first, first + born))
        student = grown(previous.state, shape, previous.experts_by_stage, new_ids, 1, config.seed)
        experts, state = [*previous.experts_by_stage, new_ids], _state_of(student)
    else:
        shape, experts, state = previous.shape, previous.experts_by_stage, dict(previous.state)
    metadata = {"stage": stage.number, "tasks_by_stage": stage.plan[: stage.number], "seed": config.seed}
    statistics = dict(previous.episode_facts) if previous is not None else {}
    statistics |= {task: EpisodeStatistics.of(*new.episode_beginnings(task)) for task in tasks}
    parts = StudentParts(
        state=state,
        shape=shape,
        experts_by_stage=experts,
        task_vectors=vectors,
        task_encoder_state=encoder,
        metadata={**metadata, "trained": False},
        episode_facts=statistics,
        method_state=previous.method_state if previous is not None else None,
    )
    save_student(stage.run.stage(stage.number) / "start", parts)


def untrained(start: StudentParts, first: StudentParts) -> StudentParts:
    """The student of `first`, the beginning of stage 1, that is told what `start` is told."""
    return dataclasses.replace(
        first, task_vectors=start.task_vectors, episode_facts=start.episode_facts, method_state=None
    )


def _state_of(student: Student) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in student.state_dict().items()}


def _task_vectors(
    stage: Stage,
    new: TrajectoryStore,
    memory: TrajectoryStore | None,
    previous: StudentParts | None,
    normaliser: tuple[np.ndarray, np.ndarray],
) -> tuple[dict[str, Tensor] | None, dict[str, np.ndarray]]:
    """(task encoder's state, vector of every task seen so far in the order of arrival)."""
    config = stage.config
    settings = config.student.task_encoder
    old = dict(previous.task_vectors) if previous is not None else {}
    if config.student.task_embedding == "one_hot":
        # of all tasks of the stream: a task that is left out later must not move the others' places
        everything = [task for tasks in stage_plan(config.stream) for task in tasks]
        rows = np.eye(len(everything), dtype=np.float32)
        return None, {task: rows[everything.index(task)] for task in stage.seen}

    def windows_of(task: str, count: int, rng: np.random.Generator) -> np.ndarray:
        store = new if task in new.task_ids or memory is None else memory
        steps = store.steps(task)
        return store.gather(rng.integers(steps.start, steps.stop, count), settings.window)["observations"]

    remembered = [task for task in old if memory is not None and task in memory.task_ids]
    encoder = previous.task_encoder_state if previous is not None else None
    mean, deviation = normaliser
    encoder, vectors = learn_task_vectors(
        windows_of, stage.tasks, remembered, old, encoder, mean, deviation, settings, config.seed, stage.number
    )
    return encoder, {**old, **vectors}
