"""The outcome of an episode, and the record of a task that evaluations are stored as.

Here, below teachers and student, because both publish an ``evaluation.json``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpc_cpd.settings import EvaluationSettings


@dataclass(frozen=True)
class EpisodeResult:
    """One evaluated episode.

    `total_reward` and `length` (steps) reach up to the first success, or to the end of the episode.
    """

    episode: int
    goal_index: int
    success: bool
    total_reward: float
    steps_to_success: int | None
    length: int


def task_record(results: Sequence[EpisodeResult]) -> dict[str, Any]:
    """The entry of one task in an ``evaluation.json``. Means over nothing are null."""
    steps = [result.steps_to_success for result in results if result.steps_to_success is not None]
    return {
        "successes": sum(result.success for result in results),
        "episodes": len(results),
        "goals": len({result.goal_index for result in results}),
        "mean_return": float(np.mean([result.total_reward for result in results])) if results else None,
        "mean_steps_to_success": float(np.mean(steps)) if steps else None,
    }


def evaluation_json(stage: int, settings: EvaluationSettings, tasks: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """What an ``evaluation.json`` holds, from the `task_record` of every task; `stage` is 0 for a teacher."""
    return {"stage": stage, "episodes_per_task": settings.episodes, "seed": settings.seed, "tasks": dict(tasks)}
