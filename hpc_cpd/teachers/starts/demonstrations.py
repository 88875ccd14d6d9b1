"""Teachers that start as clones of demonstrations: ``teachers.start=demonstrations``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from hpc_cpd.errors import UserError
from hpc_cpd.settings import PluginSettings
from hpc_cpd.tasks.families.base import TaskSpec
from hpc_cpd.teachers.algorithms.base import Algorithm, Hints, TeacherContext, require_one_each
from hpc_cpd.teachers.starts.base import Pretraining

SCRIPTED = "metaworld/"
"""The tasks that come with a scripted policy begin with it."""


class DemonstrationsSettings(PluginSettings):
    """Behavioural cloning, and an algorithm that goes on from a policy that can do something already."""

    name: Literal["demonstrations"] = "demonstrations"
    folder: str | None = Field(
        None, description="trajectory folder holding TASK/ folders to clone; null records the scripted policy"
    )
    episodes: int = Field(100, ge=1, description="successful demonstrations recorded per task")
    action_noise: list[float] = Field(
        [0.0, 0.1, 0.3, 0.5], min_length=1, description="standard deviations of the noise, one drawn per episode"
    )
    gradient_steps: int = Field(3000, ge=1, description="Adam steps of cloning; 3,000 reach 98% success on MT25")
    batch_size: int = Field(512, ge=1, description="samples per step, over all ranks")
    learning_rate: float = Field(1e-3, gt=0, description="learning rate of Adam while cloning")
    initial_log_std: float = Field(
        -1.0, description="first log standard deviation afterwards: explore close to the demonstrations"
    )
    policy_learning_rate: float = Field(3e-5, gt=0, description="learning rate of the cloned policy afterwards")
    critic_only_rounds: int = Field(1, ge=0, description="rounds afterwards that fit the critic alone")


class Demonstrations:
    """Teachers that start as clones of demonstrations."""

    Settings = DemonstrationsSettings

    def check(self, settings: DemonstrationsSettings, task: TaskSpec, ranks: int, algorithm: Algorithm) -> None:
        if not getattr(algorithm, "can_clone", False):
            raise UserError(
                "teachers.algorithm names one whose policy cannot be cloned from demonstrations; set "
                "teachers.start=scratch"
            )
        if settings.folder is None and not task.task_id.startswith(SCRIPTED):
            raise UserError(
                f"there is no scripted policy for {task.task_id}, so its teacher cannot start from demonstrations; set "
                "teachers.start=scratch, or teachers.start.folder to a folder of trajectories to clone"
            )
        require_one_each("teachers.start.batch_size", settings.batch_size, ranks)

    def hints(self, settings: DemonstrationsSettings) -> Hints:
        chosen = settings.model_dump(include={"initial_log_std", "policy_learning_rate", "critic_only_rounds"})
        # measured: ReLU clones better than tanh; a moving normaliser would move the cloned policy
        return Hints(**chosen, activation="relu", freeze_normaliser=True)

    def pretraining(self, settings: DemonstrationsSettings, policy: Any, context: TeacherContext) -> Pretraining:
        from hpc_cpd.teachers.starts._cloning import Cloning

        return Cloning(settings, policy, context)


plugin = Demonstrations()
