"""Demonstrations to clone, and the cloning: scripted policies with noise on their actions, or a user's trajectories.

The noise takes the expert off its own path, and the target there is the clean action: this is what lets a
clone recover from its own errors (DART, arXiv 1703.09327).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpc_cpd.distributed.mpi import Communicator
from hpc_cpd.errors import UserError
from hpc_cpd.losses import bounded_errors
from hpc_cpd.optimizers import Adam
from hpc_cpd.run.publish import is_done
from hpc_cpd.tasks.batch import BatchEnv
from hpc_cpd.tasks.families.base import TaskSpec
from hpc_cpd.tasks.registry import make_batch
from hpc_cpd.tasks.spaces import flat_size
from hpc_cpd.teachers.algorithms.base import TeacherContext
from hpc_cpd.teachers.checkpoint import adam_tensors, restore_adam
from hpc_cpd.teachers.rollouts import BLOCK, EpisodePlan, generator, keep_successes, play_block
from hpc_cpd.teachers.scripted import ScriptedPolicy
from hpc_cpd.trajectories.schema import Episode
from hpc_cpd.trajectories.shard import closed_shards, read_shard
from hpc_cpd.trajectories.store import verify_folder

if TYPE_CHECKING:
    from hpc_cpd.teachers.policy import TeacherPolicy
    from hpc_cpd.teachers.starts.demonstrations import DemonstrationsSettings

STEPS_AFTER_SUCCESS = 15
"""A clone must learn to hold still at the goal, not to finish the episode."""
MAX_EPISODES_FACTOR = 4
BLOCKS_PER_GOAL_SET = 6
"""48 episodes: a seed has 50 goals, and a clone of more goals generalises better to others."""


@dataclass
class Demonstrations:
    """Samples to clone, in the order of their episodes."""

    observations: NDArray[np.float32]
    """[samples, obs]"""
    targets: NDArray[np.float32]
    """[samples, act], clean actions in [-1, 1]"""
    episodes: int


class Cloning:
    """Behavioural cloning (mean squared error, cosine learning rate). See `hpc_cpd.teachers.starts.base.Pretraining`.

    Raises UserError: no demonstrations to read, or hardly any success of the scripted policy.
    """

    def __init__(self, settings: DemonstrationsSettings, policy: TeacherPolicy, context: TeacherContext) -> None:
        self.settings, self.policy, self.context = settings, policy, context
        self.steps = settings.gradient_steps
        if settings.folder is not None:
            data = read_demonstrations(context.task, Path(settings.folder), context.communicator)
        else:
            data = record_demonstrations(context.task, settings, context.seed, context.communicator)
        self._data, self._observations, self._targets = data, *map(torch.tensor, (data.observations, data.targets))
        self._part = context.communicator.local_range(settings.batch_size)
        self._optimizer = Adam(policy.actor.parameters(), eps=1e-5, fused=True)

    def step(self, number: int) -> float:
        settings, task = self.settings, self.context.task
        if number == 0:
            samples = self._data.observations.astype(np.float64)
            self.policy.set_normaliser(samples.mean(axis=0), samples.var(axis=0), len(samples))
        draws = generator(self.context.seed, task.task_id, "clone", number)
        rows = draws.integers(len(self._observations), size=settings.batch_size)
        mine = torch.tensor(rows[self._part.start : self._part.stop])
        for group in self._optimizer.param_groups:
            group["lr"] = settings.learning_rate * (0.5 * (1.0 + math.cos(math.pi * number / self.steps)))
        self._optimizer.zero_grad(set_to_none=True)
        errors = bounded_errors(self.policy.action_mean(self._observations[mine]), self._targets[mine])
        loss = errors.square().sum() * (1.0 / (settings.batch_size * flat_size(task.action_space)))
        loss.backward()
        summed = self.context.communicator.sum_gradients(list(self.policy.actor.parameters()), [loss])[0]
        self._optimizer.step()
        return summed

    def state_dict(self) -> dict[str, Tensor]:
        return adam_tensors(self._optimizer, self.policy.actor)

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        restore_adam(self._optimizer, self.policy.actor, tensors)


def record_demonstrations(
    task: TaskSpec, settings: DemonstrationsSettings, seed: int, communicator: Communicator
) -> Demonstrations:
    """Record `settings.episodes` successful episodes of the scripted policy, the same on every rank.

    Raises UserError when the scripted policy hardly ever succeeds.
    """

    @lru_cache(maxsize=1)
    def environments(goal_set: int) -> BatchEnv:
        goal_seed = int(generator(seed, task.task_id, "demonstrated goals", goal_set).integers(2**31))
        return make_batch(task.task_id, BLOCK, goal_seed)

    policy = ScriptedPolicy(task.skill)
    plan = EpisodePlan(seed, task.task_id, "demonstration", settings.action_noise, STEPS_AFTER_SUCCESS)
    mine: list[Episode] = []
    kept, played = keep_successes(
        settings.episodes,
        settings.episodes * MAX_EPISODES_FACTOR,
        True,
        lambda block: play_block(environments(block // BLOCKS_PER_GOAL_SET), policy, plan, block),
        lambda episodes, _: mine.extend(episodes),
        (),
        communicator,
    )
    if kept < settings.episodes:
        raise UserError(
            f"the scripted policy of {task.task_id} succeeded in {kept} of {played} episodes, but "
            f"{settings.episodes} demonstrations were asked for; lower teachers.start.action_noise"
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
                "teachers.start.folder to a folder that holds TASK folders of shards"
            )
        if is_done(folder / task.task_id):
            problems = verify_folder(folder / task.task_id)
            if problems:
                raise UserError(problems[0])
        samples = _as_samples([episode for path in shards for episode in read_shard(path, task.task_id)])
        found = (samples.observations.shape[-1], samples.targets.shape[-1])
        wanted = (flat_size(task.observation_space), flat_size(task.action_space))
        if found != wanted:
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
