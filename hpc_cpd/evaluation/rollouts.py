"""Success of a policy on fixed goals: batched, seeded, and the same whoever does which episode.

The rule is the benchmark's own: an episode succeeds when the success flag is on at *any* step within the
horizon of its task. Nothing after that step can change the verdict, so the episode ends there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from hpc_cpd.settings import EvaluationSettings
from hpc_cpd.tasks.batch import BatchEnv
from hpc_cpd.tasks.policy import Policy
from hpc_cpd.tasks.registry import make_batch

MOST_ROWS = 50
"""A policy call has at most so many rows, so that one wave plays the usual evaluations whole."""


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


def evaluate_policy(
    policy: Policy,
    task_id: str,
    episodes: int,
    seed: int,
    indices: Iterable[int] | None = None,
    num_envs: int | None = None,
) -> list[EpisodeResult]:
    """Play the episodes `indices` of the `episodes` that belong to (task_id, seed), in increasing order.

    Episode i plays goal ``i % num_goals`` of ``make_batch(task_id, n, seed)`` and always sits in row
    ``i % num_envs`` of a policy call of exactly `num_envs` rows. So a rank may play any subset: the lists
    of all ranks, joined and sorted by ``episode``, are what one rank alone would return. Rows without a
    running episode are padding: they cost no physics and their actions go nowhere.

    `num_envs`: None: `episodes`, but no more than MOST_ROWS.

    Raises ValueError for an index outside ``range(episodes)`` or actions of the wrong shape, UserError
    for an unknown task.
    """
    chosen = sorted(set(range(episodes) if indices is None else (int(index) for index in indices)))
    num_envs = min(max(1, episodes), MOST_ROWS) if num_envs is None else num_envs
    if num_envs < 1 or episodes < 0:
        raise ValueError(f"num_envs must be at least 1 and episodes at least 0, got {num_envs} and {episodes}")
    if chosen and not 0 <= chosen[0] <= chosen[-1] < episodes:
        raise ValueError(f"episode numbers must lie in 0..{episodes - 1}, got {chosen[0]}..{chosen[-1]}")
    waves = [np.array(list(wave)) for _, wave in groupby(chosen, lambda episode: episode // num_envs)]
    if not waves:
        return []
    with closing(make_batch(task_id, max(map(len, waves)), seed)) as envs:
        return [result for wave in waves for result in _play(policy, task_id, envs, wave, num_envs)]


def _play(policy: Policy, task_id: str, envs: BatchEnv, episodes: np.ndarray, rows: int) -> list[EpisodeResult]:
    """Play `episodes` (int [E], E <= envs.num_envs) side by side; environment e plays the e-th of them."""
    count, size = len(episodes), envs.num_envs
    goals = np.resize(episodes if envs.num_goals is None else episodes % envs.num_goals, size)
    observations, _ = envs.reset(options={"goal_index": goals})
    running = np.arange(size) < count
    envs.halt(~running)
    # Row of every environment, and the environment that every row shows the policy.
    row_of = np.resize(episodes % rows, size)
    shown = np.zeros(rows, dtype=np.int64)
    shown[row_of[:count]] = np.arange(count)

    total = np.zeros(size)
    length = np.zeros(size, dtype=np.int64)
    success = np.zeros(size, dtype=bool)
    policy.reset(task_id, rows)
    while running.any():
        actions = np.asarray(policy.act(np.ascontiguousarray(observations[shown], dtype=np.float32)))
        if actions.shape[:1] != (rows,):
            raise ValueError(f"the policy was given {rows} observations and returned actions {actions.shape}")
        observations, rewards, terminated, truncated, info = envs.step(actions[row_of])
        total[running] += np.asarray(rewards, dtype=np.float64)[running]
        length += running
        success |= running & np.asarray(info["success"], dtype=bool)
        running &= ~(success | terminated | truncated)
        envs.halt(~running)
    played = zip(*(column[:count].tolist() for column in (episodes, goals, success, total, length)), strict=True)
    return [
        EpisodeResult(episode, goal, won, reward, steps if won else None, steps)
        for episode, goal, won, reward, steps in played
    ]
