"""A small run whose teachers are linear policies on random walks: everything but physics is real."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hpc_cpd.config import load_config
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import mark_done
from hpc_cpd.settings import Config
from hpc_cpd.trajectories.schema import Episode, Origin
from hpc_cpd.trajectories.shard import write_manifest, write_shard

TASKS = [f"metaworld/{name}-v3" for name in ("reach", "push", "door-open", "window-open")]
OBSERVATION_SIZE, ACTION_SIZE = 39, 4

SETTINGS = [
    f"stream.tasks=[{','.join(TASKS)}]",
    "stream.tasks_per_stage=2",
    "student.width=32",
    "student.backbone.heads=2",
    "student.expert_hidden=32",
    "student.task_embedding.gradient_steps=30",
    "student.task_embedding.size=8",
    "distill.batch_size=32",
    "distill.phase1_steps=30",
    "distill.phase2_steps=20",
    "distill.warmup_steps=5",
    "method.growth.freeze_old_experts=false",
    "method.memory.budget_fraction=0.2",
    "evaluation.episodes=2",
    "evaluation.forward_transfer=false",
]


def synthetic_config(*overrides: str) -> Config:
    return load_config(None, [*SETTINGS, *overrides])


def make_run(folder: Path, *overrides: str) -> Run:
    """A run whose teachers and trajectories are done."""
    run = Run(folder)
    run.open(synthetic_config(*overrides), {})
    for number, task in enumerate(TASKS):
        mark_done(run.teacher(task), {})
        record_task(run, task, number)
    return run


def record_task(
    run: Run,
    task: str,
    number: int,
    episodes: int = 10,
    steps: int = 20,
    teacher: str = "0" * 64,
    environment: str = "synthetic",
) -> None:
    folder = run.trajectories(task)
    rng = np.random.default_rng([7, number])
    centre = rng.normal(size=OBSERVATION_SIZE)
    weights = rng.normal(size=(OBSERVATION_SIZE, ACTION_SIZE)) * 0.1
    recorded = []
    for index in range(episodes):
        walk = centre + np.cumsum(rng.normal(size=(steps + 1, OBSERVATION_SIZE)) * 0.1, axis=0)
        observations = walk.astype(np.float32)
        mean = np.tanh(observations[:-1] @ weights).astype(np.float32)
        recorded.append(
            Episode(
                observations=observations[:-1],
                actions=mean,
                teacher_mean=mean,
                rewards=np.ones(steps, np.float32),
                success=np.arange(steps) == steps - 1,
                final_observation=observations[-1],
                goal_index=index,
                index=index,
            )
        )
    write_shard(folder, 0, 0, Origin(task, teacher, 0, "v2", environment), recorded)
    write_manifest(folder)
    mark_done(folder, {})
