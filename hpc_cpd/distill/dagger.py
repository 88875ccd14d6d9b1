"""The new tasks as the student plays them, with its teachers' answers (DAgger, arXiv 1011.0686).

A student that is a little off meets states that no teacher recorded. ``stages/K/dagger/TASK`` holds episodes in
which the student acted: ``actions`` are its own, ``teacher_mean`` is what the teacher would have done there.
"""

from __future__ import annotations

import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch

from hpc_cpd.distributed.torch import run_on_all_ranks, run_on_rank, stop_together
from hpc_cpd.methods.base import Stage
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import is_done, mark_done, sha256
from hpc_cpd.student.policy import StudentPolicy, load_student
from hpc_cpd.tasks.registry import describe, make_batch
from hpc_cpd.teachers.rollouts import BLOCK, EpisodePlan, play_block
from hpc_cpd.teachers.sources.student import load_any_teacher, weights_of
from hpc_cpd.trajectories.schema import Origin
from hpc_cpd.trajectories.shard import write_manifest, write_shard
from hpc_cpd.trajectories.store import TrajectoryStore, open_trajectories

FIRST_INDEX = 2**40
"""Their numbers begin here, far beyond those of a teacher's attempts."""


def open_new(stage: Stage) -> TrajectoryStore:
    """What teaches the new tasks of `stage`: their trajectories, and the answered episodes once all are there."""
    run, tasks = stage.run, stage.tasks
    folders, names = [run.trajectories(task) for task in tasks], list(tasks)
    answered = [run.dagger(stage.number, task) for task in tasks]
    if all(map(is_done, answered)):
        folders, names = folders + answered, names + names
    return open_trajectories(folders, names, stage.config.distill.in_memory_gigabytes)


def play_and_answer(stage: Stage, student_folder: Path, episodes: int) -> None:
    """Let the student of `student_folder` play `episodes` of every new task, and record the teachers' answers.

    On the goals of the trajectories, never on those of the evaluation. What is recorded does not depend on the number
    of ranks. A task that is done is not played again. A collective. Raises StopRequested between two tasks.
    """
    student = load_student(student_folder)
    for task in stage.tasks:
        stop_together(stage.stop, f"stage {stage.number} stops before the student has played {task}")
        _record(stage, task, student, episodes)


def _record(stage: Stage, task: str, student: StudentPolicy, episodes: int) -> None:
    folder = stage.run.dagger(stage.number, task)
    if run_on_rank(lambda: is_done(folder)):
        return
    run_on_rank(lambda: shutil.rmtree(folder, ignore_errors=True))
    run_on_all_ranks(lambda: _play(stage, task, folder, student, episodes))  # the manifest lists every rank's shard
    run_on_rank(lambda: _publish(stage.run, task, folder))


def _play(stage: Stage, task: str, folder: Path, student: StudentPolicy, wanted: int) -> None:
    """This rank's blocks of episodes."""
    run, config, spec = stage.run, stage.config, describe(task)
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    plan = EpisodePlan(config.seed, task, "relabelled", [0.0], config.trajectories.steps_after_success)
    teacher = load_any_teacher(run.teacher(task))
    digest = sha256(weights_of(run.teacher(task)))
    origin = Origin(task, digest, config.seed, spec.reward_version, spec.environment_version)
    with closing(make_batch(task, BLOCK, config.seed)) as envs:
        blocks = range(rank, -(-wanted // BLOCK), world_size)
        played = [episode for block in blocks for episode in play_block(envs, student, plan, block, teacher)]
    kept = [replace(episode, index=FIRST_INDEX + episode.index) for episode in played if episode.index < wanted]
    write_shard(folder, rank, 0, origin, kept)


def _publish(run: Run, task: str, folder: Path) -> None:
    teacher = sha256(weights_of(run.teacher(task)))
    manifest = write_manifest(folder, teacher_sha256=teacher, seed=run.config().seed, actor="student")
    mark_done(folder, {key: manifest[key] for key in ("episodes", "steps", "success")})
