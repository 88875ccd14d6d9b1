"""Demonstrations to clone: the benchmark's scripted policies with noise on their actions, or a user's trajectories.

The noise takes the expert off its own path, and the target there is the clean action: this is what lets a
clone recover from its own errors (DART, arXiv 1703.09327).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_cpd.distributed.mpi import Communicator
from hpc_cpd.errors import UserError
from hpc_cpd.run.publish import is_done
from hpc_cpd.settings import DemonstrationSettings
from hpc_cpd.tasks.batch import BatchEnv
from hpc_cpd.tasks.registry import TaskSpec, make_batch
from hpc_cpd.tasks.spaces import flat_size
from hpc_cpd.teachers.rollouts import BLOCK, AttemptPlan, keep_successes, play_block
from hpc_cpd.teachers.seeds import generator
from hpc_cpd.teachers.validation import SCRIPTED_PREFIX
from hpc_cpd.trajectories.schema import Episode
from hpc_cpd.trajectories.shard import closed_shards, read_shard
from hpc_cpd.trajectories.store import verify_folder

STEPS_AFTER_SUCCESS = 15
"""A clone must learn to hold still at the goal, not to finish the episode."""
MAX_ATTEMPTS_FACTOR = 4
BLOCKS_PER_GOAL_SET = 6
"""48 attempts: a seed has 50 goals, and a clone of more goals generalises better to others."""


@dataclass
class Demonstrations:
    """Samples to clone, in the order of their episodes."""

    observations: NDArray[np.float32]
    """[samples, obs]"""
    targets: NDArray[np.float32]
    """[samples, act], clean actions in [-1, 1]"""
    episodes: int


@dataclass
class ScriptedActor:
    """The scripted Meta-World policy of one task (`metaworld.policies`), one per row."""

    name: str
    action_size: int
    _policies: list[Any] = field(default_factory=list)

    def begin(self, rows: int) -> None:
        from metaworld.policies import ENV_POLICY_MAP

        self._policies = [ENV_POLICY_MAP[self.name]() for _ in range(rows)]

    def means(self, observations: NDArray[np.float32], active: NDArray[np.bool_]) -> NDArray[np.float32]:
        actions = np.zeros((len(observations), self.action_size), np.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # each policy remarks that its gains are high: the clip below sees to that
            for row in np.flatnonzero(active):
                actions[row] = self._policies[row].get_action(observations[row].astype(np.float64))
        return np.clip(actions, -1.0, 1.0)


def record_demonstrations(
    task: TaskSpec, settings: DemonstrationSettings, seed: int, communicator: Communicator
) -> Demonstrations:
    """Record `settings.episodes` successful episodes of the scripted policy, the same on every rank.

    Raises UserError when the scripted policy hardly ever succeeds.
    """

    @lru_cache(maxsize=1)
    def environments(goal_set: int) -> BatchEnv:
        goal_seed = int(generator(seed, task.task_id, "demonstrated goals", goal_set).integers(2**31))
        return make_batch(task.task_id, BLOCK, goal_seed)

    actor = ScriptedActor(task.skill.removeprefix(SCRIPTED_PREFIX), flat_size(task.action_space))
    plan = AttemptPlan(seed, task.task_id, "demonstration", settings.action_noise, STEPS_AFTER_SUCCESS)
    mine: list[Episode] = []
    kept, attempts = keep_successes(
        settings.episodes,
        settings.episodes * MAX_ATTEMPTS_FACTOR,
        True,
        lambda block: play_block(environments(block // BLOCKS_PER_GOAL_SET), actor, plan, block),
        mine.extend,
        (),
        communicator,
    )
    if kept < settings.episodes:
        raise UserError(
            f"the scripted policy of {task.task_id} succeeded in {kept} of {attempts} attempts, but "
            f"{settings.episodes} demonstrations were asked for; lower teachers.demonstrations.action_noise"
        )
    return _as_samples([episode for episodes in communicator.gather(mine) for episode in episodes])


def read_demonstrations(task: TaskSpec, folder: Path, communicator: Communicator) -> Demonstrations:
    """Read the trajectories under ``folder/TASK`` to clone, the same on every rank.

    Raises UserError: no shards there, or broken ones, or sizes that are not those of the task.
    """

    def read() -> Demonstrations:
        shards = closed_shards(folder / task.task_id)
        if not shards:
            raise UserError(
                f"{folder / task.task_id} holds no trajectories (shard-*.h5) to clone; set "
                "teachers.demonstrations.folder to a folder that holds TASK folders of shards"
            )
        if is_done(folder / task.task_id):
            problems = verify_folder(folder / task.task_id)
            if problems:
                raise UserError(problems[0])
        samples = _as_samples([episode for path in shards for episode in read_shard(path, task.task_id)])
        found = (samples.observations.shape[-1], samples.targets.shape[-1])
        if found != (wanted := (flat_size(task.observation_space), flat_size(task.action_space))):
            raise UserError(
                f"the trajectories in {folder / task.task_id} have (observation, action) sizes {found}, but "
                f"{task.task_id} has {wanted}; record them with this version"
            )
        return samples

    return communicator.on_root(read)


def _as_samples(episodes: list[Episode]) -> Demonstrations:
    ordered = sorted(episodes, key=lambda episode: episode.index)
    return Demonstrations(
        observations=np.concatenate([episode.observations for episode in ordered]),
        targets=np.clip(np.concatenate([episode.teacher_mean for episode in ordered]), -1.0, 1.0),
        episodes=len(ordered),
    )
