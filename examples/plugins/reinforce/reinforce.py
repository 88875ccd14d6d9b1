"""REINFORCE (Williams 1992) with a linear policy: a teacher algorithm in one file.

Install it beside hpc_cpd (``pip install examples/plugins/reinforce``) and name it in a config::

    teachers: {algorithm: {name: reinforce, rounds: 60}, start: scratch}

Three objects make an algorithm: its settings, a learner that collects and updates round after round, and the plug-in
that ties them together. The loop around them (evaluations, checkpoints, publishing, ranks that die) is hpc_cpd's.
"""

from typing import Literal

import numpy as np
import torch
from gymnasium.spaces import flatdim
from pydantic import Field

from hpc_cpd.errors import UserError
from hpc_cpd.settings import PluginSettings
from hpc_cpd.tasks.batch import UNBOUNDED_GOALS
from hpc_cpd.teachers.algorithms.base import RoundResult
from hpc_cpd.teachers.rollouts import TrainingEnvironments, generator


class ReinforceSettings(PluginSettings):
    """The keys behind ``teachers.algorithm``."""

    name: Literal["reinforce"] = "reinforce"
    rounds: int = Field(60, ge=0, description="episodes of every environment, each followed by one gradient step")
    num_envs: int = Field(32, ge=1, description="environments over all ranks")
    learning_rate: float = Field(0.3, gt=0, description="step along the normalised gradient")


class LinearPolicy(torch.nn.Linear):
    """A Gaussian around a linear function of the observation [obs] -> [act]. What is published is its mean."""

    def __init__(self, task_id: str, observation_size: int, action_size: int) -> None:
        super().__init__(observation_size, action_size)
        torch.nn.init.zeros_(self.weight)
        torch.nn.init.zeros_(self.bias)
        self.task_id = task_id

    def reset(self, task_id: str | None, num_envs: int) -> None:
        """Nothing: it remembers nothing of an episode."""

    @torch.inference_mode()
    def act(self, observations: np.ndarray) -> np.ndarray:
        """float32 [num_envs, obs] -> float32 [num_envs, act] in [-1, 1], without noise."""
        return self(torch.tensor(observations)).clamp(-1.0, 1.0).numpy()

    def description(self) -> dict:
        return {"observation_size": self.in_features, "action_size": self.out_features}

    def tensors(self) -> dict:
        return {name: value.clone() for name, value in self.state_dict().items()}

    def set_tensors(self, tensors: dict) -> None:
        self.load_state_dict(dict(tensors))


class ReinforceLearner:
    """One teacher in training. The ranks share the environments; their gradients are summed."""

    def __init__(self, settings, hints, context) -> None:
        self.settings, self.task, self.seed, self.ranks = settings, context.task, context.seed, context.communicator
        self.rounds = settings.rounds
        self.std = float(np.exp(hints.initial_log_std))  # what the start advises
        sizes = flatdim(self.task.observation_space), flatdim(self.task.action_space)
        self.policy = LinearPolicy(self.task.task_id, *sizes)
        self.numbers = self.ranks.local_range(settings.num_envs)  # this rank's environments among those of all
        self.environments = TrainingEnvironments(self.task.task_id, self.seed, len(self.numbers))

    def collect(self, number):
        """One episode of every environment: observations and actions [T, N, ...], rewards, alive, success [T, N]."""
        envs = self.environments.of_round(number)
        # every draw depends on the seed, the task, the round and the environment: a resumed training is the same
        draws = [generator(self.seed, self.task.task_id, "reinforce", number, env) for env in self.numbers]
        goals = np.array([rng.integers(envs.num_goals or UNBOUNDED_GOALS) for rng in draws])
        observations, _ = envs.reset(options={"goal_index": goals})
        steps = []
        while envs.active.any():
            noise = np.array([rng.standard_normal(self.policy.out_features) for rng in draws], np.float32)
            actions = self.policy.act(observations) + self.std * noise
            following, rewards, _, _, info = envs.step(actions)
            steps.append((observations, actions, rewards, info["active"], info["success"]))
            observations = following
        return [np.array(column) for column in zip(*steps, strict=True)]

    def update(self, number, experience):
        """Make actions likelier that were followed by more reward than others at the same time of the episode."""
        observations, actions, rewards, alive, success = experience
        to_go = np.cumsum((rewards * alive)[::-1], axis=0)[::-1]
        sums = self.ranks.sum(np.stack([(to_go * alive).sum(axis=1), alive.sum(axis=1).astype(np.float64)]))
        advantages = (to_go - (sums[0] / np.maximum(sums[1], 1.0))[:, None]) * alive
        means = self.policy(torch.tensor(observations))
        log_probs = -((torch.tensor(actions) - means) / self.std).square().sum(-1) / 2
        self.policy.zero_grad()
        (-(log_probs * torch.tensor(advantages, dtype=torch.float32)).sum() / self.settings.num_envs).backward()
        self.ranks.sum_gradients(list(self.policy.parameters()))
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in self.policy.parameters()])
        with torch.no_grad():
            for parameter in self.policy.parameters():
                parameter -= self.settings.learning_rate / (1.0 + number) ** 0.5 * parameter.grad / (norm + 1e-8)
        totals = self.ranks.sum(np.array([alive.sum(), (rewards * alive).sum(), success.any(axis=0).sum()], np.float64))
        count = self.settings.num_envs
        return RoundResult(int(totals[0]), {"mean_return": totals[1] / count, "success": totals[2] / count})

    def state_dict(self):
        return {}, {}  # besides the policy there is nothing to remember: no momentum, and the round is counted outside

    def load_state_dict(self, tensors, state) -> None:
        """Nothing was kept."""

    def close(self) -> None:
        self.environments.close()


class Reinforce:
    """The plug-in that the entry point names; hpc_cpd never needs an instance."""

    Settings = ReinforceSettings
    can_clone = False

    @staticmethod
    def check(settings, task, ranks) -> None:
        if settings.num_envs < ranks:
            raise UserError(
                f"teachers.algorithm.num_envs is {settings.num_envs}; give each of {ranks} ranks at least one"
            )

    @staticmethod
    def learner(settings, hints, context) -> ReinforceLearner:
        return ReinforceLearner(settings, hints, context)

    @staticmethod
    def load_policy(description, tensors) -> LinearPolicy:
        policy = LinearPolicy(description["task_id"], description["observation_size"], description["action_size"])
        policy.set_tensors(tensors)
        return policy
