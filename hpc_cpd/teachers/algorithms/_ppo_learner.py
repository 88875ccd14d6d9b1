"""The training of one PPO teacher, round by round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpc_cpd.optimizers import Adam
from hpc_cpd.tasks.spaces import flat_size
from hpc_cpd.teachers.algorithms._ppo_update import (
    Rollout,
    adapted_learning_rate,
    collect_rollout,
    update,
    update_normaliser,
)
from hpc_cpd.teachers.algorithms.base import Hints, RoundResult, TeacherContext
from hpc_cpd.teachers.algorithms.ppo import PPOSettings
from hpc_cpd.teachers.checkpoint import adam_tensors, restore_adam
from hpc_cpd.teachers.policy import TeacherPolicy
from hpc_cpd.teachers.rollouts import TrainingEnvironments, generator

NORMALISER_STEPS = 100
"""Steps of the untrained policy that give the normaliser its first statistics."""


class PPOLearner:
    """See `hpc_cpd.teachers.algorithms.base.Learner`."""

    def __init__(self, settings: PPOSettings, hints: Hints, context: TeacherContext) -> None:
        task = context.task
        self.settings, self.hints = settings, hints
        self.seed, self.communicator = context.seed, context.communicator
        self.rounds = settings.iterations
        sizes = flat_size(task.observation_space), flat_size(task.action_space), settings.hidden
        weights = generator(self.seed, task.task_id, "weights")
        self.policy = TeacherPolicy(
            task.task_id, *sizes, hints.activation, hints.initial_log_std, weights, smallest_std=hints.smallest_std
        )
        actor = [*self.policy.actor.parameters(), self.policy.log_std]
        groups = [
            {"params": actor, "lr": hints.policy_learning_rate or settings.learning_rate},
            {"params": list(self.policy.critic.parameters()), "lr": settings.learning_rate},
        ]
        self.optimizer: torch.optim.Optimizer = Adam(groups, eps=1e-5, fused=True)  # all weights in one pass
        self._numbers = self.communicator.local_range(settings.num_envs)
        self._environments = TrainingEnvironments(task.task_id, self.seed, len(self._numbers))

    def collect(self, number: int) -> Rollout:
        if number == 0 and not self.hints.freeze_normaliser:
            first = self._rollout(0, NORMALISER_STEPS)
            update_normaliser(self.policy, first.observations, self.communicator)
        return self._rollout(number)

    def update(self, number: int, experience: Rollout) -> RoundResult:
        settings, both = self.settings, number >= self.hints.critic_only_rounds
        measured = update(
            self.policy, self.optimizer, experience, settings, self.seed, number, self.communicator, train_actor=both
        )
        if not self.hints.freeze_normaliser:
            update_normaliser(self.policy, experience.observations, self.communicator)
        if self.hints.desired_kl is not None:
            learning_rate = self.optimizer.param_groups[-1]["lr"]
            self._set_learning_rate(adapted_learning_rate(learning_rate, measured["kl_met"], self.hints.desired_kl))
        mine = [experience.mean_return * len(self._numbers), experience.successes, experience.ended.sum()]
        sums = self.communicator.sum(np.array(mine, np.float64))
        measured |= {
            "mean_return": float(sums[0] / settings.num_envs),
            "success": float(sums[1] / sums[2]),
            "std": float(self.policy.log_std.detach().exp().mean()),
        }
        return RoundResult(settings.num_envs * settings.rollout_steps, measured)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        learning_rate = self.optimizer.param_groups[-1]["lr"]
        return adam_tensors(self.optimizer, self.policy), {"learning_rate": learning_rate}

    def load_state_dict(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        restore_adam(self.optimizer, self.policy, tensors)
        if self.hints.desired_kl is not None:
            self._set_learning_rate(state["learning_rate"])

    def close(self) -> None:
        self._environments.close()

    def _rollout(self, number: int, steps: int | None = None) -> Rollout:
        """The rollout of round `number`; with `steps`, the one before the first round."""
        envs = self._environments.of_round(number)
        draws = 1 + number if steps is None else 0
        return collect_rollout(envs, self.policy, self.settings, self.seed, draws, self._numbers.start, steps)

    def _set_learning_rate(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
