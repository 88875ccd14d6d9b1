"""Proximal policy optimisation (arXiv 1707.06347) with generalised advantage estimation (arXiv 1506.02438)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, PositiveInt

from hpc_cpd.settings import PluginSettings
from hpc_cpd.tasks.families.base import TaskSpec
from hpc_cpd.tasks.policy import Policy
from hpc_cpd.teachers.algorithms.base import Hints, Learner, TeacherContext, require_one_each


class PPOSettings(PluginSettings):
    """Proximal policy optimisation (arXiv 1707.06347) with generalised advantages (arXiv 1506.02438)."""

    name: Literal["ppo"] = "ppo"
    hidden: list[PositiveInt] = Field([256, 256], min_length=1, description="widths of the hidden layers")
    iterations: int = Field(40, ge=0, description="rollout and update rounds; 0 publishes the policy as it started")
    num_envs: int = Field(16, ge=1, description="environments over all ranks")
    rollout_steps: int = Field(
        500, ge=1, description="steps per environment and iteration, from fresh episodes (Meta-World's end after 500)"
    )
    epochs: int = Field(10, ge=1, description="passes over a rollout")
    minibatches: int = Field(8, ge=1, description="gradient steps per pass")
    learning_rate: float = Field(3e-4, gt=0, description="learning rate of Adam")
    discount: float = Field(0.99, gt=0, le=1, description="gamma")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="lambda of the advantage estimate")
    clip_range: float = Field(0.2, gt=0, description="clip of the probability ratio")
    value_coefficient: float = Field(0.5, ge=0, description="weight of the value loss")
    entropy_coefficient: float = Field(0.0, ge=0, description="entropy bonus (Metaworld#115: none works best)")
    max_gradient_norm: float = Field(0.5, gt=0, description="global gradient norm clip")
    target_kl: float = Field(0.03, gt=0, description="a round ends early past this divergence from the rollout policy")
    reward_scale: float = Field(0.1, gt=0, description="rewards are multiplied by this before learning")


class PPO:
    """Proximal policy optimisation with generalised advantage estimation."""

    Settings = PPOSettings
    can_clone = True

    def check(self, settings: PPOSettings, task: TaskSpec, ranks: int) -> None:
        require_one_each("teachers.algorithm.num_envs", settings.num_envs, ranks)

    def learner(self, settings: PPOSettings, hints: Hints, context: TeacherContext) -> Learner:
        from hpc_cpd.teachers.algorithms._ppo import PPOLearner

        return PPOLearner(settings, hints, context)

    def load_policy(self, description: Mapping[str, Any], tensors: Mapping[str, Any]) -> Policy:
        from hpc_cpd.teachers.policy import TeacherPolicy

        return TeacherPolicy.from_description(description, tensors)


plugin = PPO()
