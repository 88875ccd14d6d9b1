"""Demonstrations to clone, and the cloning: scripted policies with noise on their actions, or a user's trajectories.

The noise takes the expert off its own path, and the target there is the clean action: this is what lets a
clone recover from its own errors (DART, arXiv 1703.09327).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import flatdim
from numpy.typing import NDArray
from torch import Tensor

from hpc_cpd.distributed.mpi import Communicator
from hpc_cpd.errors import UserError
from hpc_cpd.losses import bounded_errors
from hpc_cpd.optimizers import Adam
from hpc_cpd.run.publish import is_done
from hpc_cpd.tasks.families.base import TaskSpec
from hpc_cpd.teachers.algorithms.base import TeacherContext
from hpc_cpd.teachers.checkpoint import adam_tensors, restore_adam
from hpc_cpd.teachers.policy import TeacherPolicy
from hpc_cpd.teachers.rollouts import BLOCK, EpisodePlan, TrainingEnvironments, generator, keep_successes, play_block
from hpc_cpd.teachers.starts.demonstrations import SCRIPTED, DemonstrationsSettings
from hpc_cpd.trajectories.schema import Episode
from hpc_cpd.trajectories.shard import closed_shards, load_shard
from hpc_cpd.trajectories.store import verify_folder

STEPS_AFTER_SUCCESS = 15
"""A clone must learn to hold still at the goal, not to finish the episode."""
BLOCKS_PER_GOAL_SET = 6
"""48 episodes: a seed has 50 goals, and a clone of more goals generalises better to others."""


Samples = tuple[NDArray[np.float32], NDArray[np.float32]]
"""What is cloned, in the order of episodes: observations [samples, obs], clean actions [samples, act] in [-1, 1]."""


class ScriptedPolicy:
    """The scripted Meta-World policy (`metaworld.policies`) of one task, ``metaworld/NAME``, one per environment."""

    def __init__(self, task_id: str) -> None:
        self._name = task_id.removeprefix(SCRIPTED)
        self._policies: list[Any] = []

    def reset(self, task_id: str | None, num_envs: int) -> None:
        from metaworld.policies import ENV_POLICY_MAP

        self._policies = [ENV_POLICY_MAP[self._name]() for _ in range(num_envs)]

    def act(self, observations: NDArray[np.float32]) -> NDArray[np.float32]:
        """float32 [num_envs, obs] -> float32 [num_envs, act], clipped to [-1, 1]."""
        exact = observations.astype(np.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # each policy remarks that its gains are high: the clip below sees to that
            actions = [policy.get_action(row) for policy, row in zip(self._policies, exact, strict=True)]
        return np.clip(np.array(actions, np.float32), -1.0, 1.0)


class Cloning:
    """Behavioural cloning (mean squared error, cosine learning rate). See `hpc_cpd.teachers.starts.base.Pretraining`.

    Raises UserError: no demonstrations to read, or hardly any success of the scripted policy.
    """

    def __init__(self, settings: DemonstrationsSettings, policy: TeacherPolicy, context: TeacherContext) -> None:
        self.settings, self.policy, self.context = settings, policy, context
        self.steps = settings.gradient_steps
        if settings.folder is None:
            samples = record_demonstrations(context.task, settings, context.seed, context.communicator)
        else:
            folder = Path(settings.folder) / context.task.task_id
            samples = context.communicator.on_root(lambda: read_demonstrations(context.task, folder))
        self._observations, self._targets = map(torch.tensor, samples)
        self._part = context.communicator.local_range(settings.batch_size)
        self._optimizer = Adam(policy.actor.parameters(), eps=1e-5, fused=True)

    def step(self, number: int) -> float:
        settings, communicator = self.settings, self.context.communicator
        if number == 0:
            seen = self._observations.numpy().astype(np.float64)
            self.policy.set_normaliser(seen.mean(axis=0), seen.var(axis=0), len(seen))
        draws = generator(self.context.seed, self.policy.task_id, "clone", number)
        rows = draws.integers(len(self._observations), size=settings.batch_size)
        mine = torch.tensor(rows[self._part.start : self._part.stop])
        cosine = 0.5 * (1.0 + math.cos(math.pi * number / self.steps))
        self._optimizer.param_groups[0]["lr"] = settings.learning_rate * cosine
        self._optimizer.zero_grad(set_to_none=True)
        errors = bounded_errors(self.policy.action_mean(self._observations[mine]), self._targets[mine])
        loss = errors.square().sum() * (1.0 / (settings.batch_size * self._targets.shape[1]))
        loss.backward()
        summed = communicator.sum_gradients(list(self.policy.actor.parameters()), [loss])[0]
        self._optimizer.step()
        return summed

    def state_dict(self) -> dict[str, Tensor]:
        return adam_tensors(self._optimizer, self.policy.actor)

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        restore_adam(self._optimizer, self.policy.actor, tensors)


def record_demonstrations(
    task: TaskSpec, settings: DemonstrationsSettings, seed: int, communicator: Communicator
) -> Samples:
    """Record `settings.episodes` successful episodes of the scripted policy, the same on every rank.

    Raises UserError when the scripted policy hardly ever succeeds.
    """
    environments = TrainingEnvironments(task.task_id, seed, BLOCK, "demonstrated goals", BLOCKS_PER_GOAL_SET)
    policy = ScriptedPolicy(task.skill)
    plan = EpisodePlan(seed, task.task_id, "demonstration", settings.action_noise, STEPS_AFTER_SUCCESS)
    mine: list[Episode] = []

    def play(block: int) -> list[Episode]:
        return play_block(environments.of_round(block), policy, plan, block)

    wanted = settings.episodes
    kept, played = keep_successes(wanted, 4 * wanted, True, play, lambda new, _: mine.extend(new), (), communicator)
    environments.close()
    if kept < wanted:
        raise UserError(
            f"the scripted policy of {task.task_id} succeeded in {kept} of {played} episodes, but {wanted} "
            "demonstrations were asked for; lower teachers.start.action_noise"
        )
    return _as_samples([episode for episodes in communicator.gather(mine) for episode in episodes])


def read_demonstrations(task: TaskSpec, folder: Path) -> Samples:
    """Read the trajectories of `task` in `folder` to clone.

    Raises UserError: no shards there, or broken ones, or sizes that are not those of the task.
    """
    shards = closed_shards(folder)
    if not shards:
        raise UserError(
            f"{folder} holds no trajectories (shard-*.h5) to clone; set teachers.start.folder to a folder that holds "
            "TASK folders of shards"
        )
    if is_done(folder) and (problems := verify_folder(folder)):
        raise UserError(problems[0])
    samples = _as_samples([episode for path in shards for episode in load_shard(path, task.task_id)[1]])
    found = tuple(values.shape[-1] for values in samples)
    wanted = (flatdim(task.observation_space), flatdim(task.action_space))
    if found != wanted:
        raise UserError(
            f"the trajectories in {folder} have (observation, action) sizes {found}, but {task.task_id} has {wanted}; "
            "record them with this version"
        )
    return samples


def _as_samples(episodes: list[Episode]) -> Samples:
    ordered = sorted(episodes, key=lambda episode: episode.index)
    targets = np.concatenate([episode.teacher_mean for episode in ordered])
    return np.concatenate([episode.observations for episode in ordered]), np.clip(targets, -1.0, 1.0)
