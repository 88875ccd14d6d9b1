"""How a stage begins: a vector for every new task, and a student with room for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from hpc_cpd.distill.learn import Beginning
from hpc_cpd.run.paths import Run
from hpc_cpd.settings import Config
from hpc_cpd.student.network import Student, StudentShape, grown
from hpc_cpd.student.policy import StudentParts, load_student_parts, save_student
from hpc_cpd.student.task_encoder import learn_task_vectors
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
    encoder, vectors = _task_vectors(config, plan, stage, new, memory, previous, normaliser)

    count = len(tasks) * config.student.experts_per_task
    if previous is None:
        shape = StudentShape.from_settings(
            config.student, new.observations.shape[1], new.actions.shape[1], len(next(iter(vectors.values())))
        )
        student = Student(shape, [list(range(count))], 1, config.seed)
        student.set_normaliser(*normaliser)
        experts = student.experts_by_stage
        state: dict[str, Tensor] = {name: tensor.detach().clone() for name, tensor in student.state_dict().items()}
    elif config.student.grow:
        shape, first = previous.shape, sum(map(len, previous.experts_by_stage))
        new_ids = list(range(first, first + count))
        experts = [*previous.experts_by_stage, new_ids]
        student = grown(previous.state, shape, previous.experts_by_stage, new_ids, 1, config.seed)
        state = {name: tensor.detach().clone() for name, tensor in student.state_dict().items()}
    else:
        shape, experts, state = previous.shape, previous.experts_by_stage, dict(previous.state)
    metadata = {"stage": stage, "tasks_by_stage": plan[:stage], "seed": config.seed, "trained": False}
    facts = dict(previous.episode_facts) if previous is not None else {}
    facts |= {task: EpisodeStatistics.of(*new.episode_beginnings(task)) for task in tasks}
    isolation = previous.isolation if previous is not None else None
    save_student(run.stage(stage) / "start", state, shape, experts, vectors, encoder, metadata, facts, isolation)


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
) -> tuple[dict[str, Tensor] | None, dict[str, np.ndarray]]:
    """(task encoder's state, vector of every task seen so far in the order of arrival)."""
    settings = config.student.task_encoder
    old = dict(previous.task_vectors) if previous is not None else {}
    if config.student.task_embedding == "one_hot":
        # of all tasks of the stream: a task that is left out later must not move the others' places
        everything = [task for tasks in stage_plan(config.stream) for task in tasks]
        rows = np.eye(len(everything), dtype=np.float32)
        return None, {task: rows[everything.index(task)] for tasks in plan[:stage] for task in tasks}

    def windows_of(task: str, count: int, rng: np.random.Generator) -> np.ndarray:
        store = new if memory is None or task in new.task_ids else memory
        steps = store.steps(task)
        return store.gather(rng.integers(steps.start, steps.stop, count), settings.window)["observations"]

    encoder = previous.task_encoder_state if previous is not None else None
    mean, deviation = normaliser
    encoder, vectors = learn_task_vectors(
        windows_of, plan[stage - 1], old, encoder, mean, deviation, settings, config.seed, stage
    )
    return encoder, {**old, **vectors}
