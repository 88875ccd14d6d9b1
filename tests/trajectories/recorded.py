"""Small recorded episodes for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from hpc_cpd.run.publish import mark_done
from hpc_cpd.trajectories import shard
from hpc_cpd.trajectories.schema import Episode, Origin

TASK = "metaworld/reach-v3"


def make_episode(index: int, steps: int = 5, observation_size: int = 3, action_size: int = 2, offset: float = 0.0):
    """An episode whose numbers follow from its index, with success at its last step."""
    rng = np.random.default_rng([index, 77])
    return Episode(
        observations=rng.normal(offset, 1.0, (steps, observation_size)).astype(np.float32),
        actions=rng.uniform(-1, 1, (steps, action_size)).astype(np.float32),
        teacher_mean=rng.uniform(-1, 1, (steps, action_size)).astype(np.float32),
        rewards=rng.random(steps).astype(np.float32),
        success=np.arange(steps) == steps - 1,
        final_observation=rng.normal(offset, 1.0, observation_size).astype(np.float32),
        goal_index=index % 50,
        index=index,
    )


def make_discrete(index: int, steps: int = 5):
    """The same with pictures [4, 4, 3], actions 0 to 2 and the teacher's logits."""
    rng = np.random.default_rng([index, 78])
    pictures = rng.integers(256, size=(steps + 1, 4, 4, 3), dtype=np.uint8)
    return replace(
        make_episode(index, steps),
        observations=pictures[:-1],
        actions=rng.integers(3, size=steps),
        teacher_mean=rng.normal(size=(steps, 3)).astype(np.float32),
        final_observation=pictures[-1],
    )


def write_shard(
    folder: Path, episodes: Iterable[Episode], rank: int = 0, part: int = 0, task_id: str = TASK, **changed
) -> Path:
    facts = {"teacher_sha256": "cafe", "seed": 3, "reward_version": "v2", "environment_version": "3.1.1", **changed}
    path = shard.write_shard(folder, rank, part, Origin(task_id, **facts), episodes)
    assert path is not None
    return path


def write_folder(folder: Path, episodes: Iterable[Episode], task_id: str = TASK, **changed) -> Path:
    """A published folder with one shard; returns it."""
    write_shard(folder, episodes, task_id=task_id, **changed)
    publish(folder)
    return folder


def publish(folder: Path) -> None:
    mark_done(folder, {"episodes": shard.write_manifest(folder)["episodes"]})


def assert_same_episode(left: Episode, right: Episode) -> None:
    assert (left.index, left.goal_index) == (right.index, right.goal_index)
    for name in ("observations", "actions", "teacher_mean", "rewards", "success", "final_observation"):
        here, there = getattr(left, name), getattr(right, name)
        assert here.dtype == there.dtype
        np.testing.assert_array_equal(here, there)
