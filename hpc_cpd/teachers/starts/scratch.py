"""Teachers that start with random weights: ``teachers.start=scratch``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from hpc_cpd.settings import PluginSettings
from hpc_cpd.tasks.families.base import TaskSpec
from hpc_cpd.teachers.algorithms.base import Algorithm, Hints, TeacherContext


class ScratchSettings(PluginSettings):
    """Random weights, and an algorithm that explores."""

    name: Literal["scratch"] = "scratch"
    initial_log_std: float = Field(0.0, description="first log standard deviation of the exploration noise")
    smallest_std: float = Field(
        0.1, gt=0, description="observations that vary less are divided by this, not by their standard deviation"
    )
    desired_kl: float | None = Field(
        0.01, gt=0, description="the learning rate follows this divergence per round; null keeps it fixed"
    )


class Scratch:
    """Teachers that start with random weights."""

    Settings = ScratchSettings

    def check(self, settings: ScratchSettings, task: TaskSpec, ranks: int, algorithm: Algorithm) -> None:
        """Every task can be learnt from nothing."""

    def hints(self, settings: ScratchSettings) -> Hints:
        # the activation stays tanh: measured, it explores better than ReLU
        return Hints(settings.initial_log_std, smallest_std=settings.smallest_std, desired_kl=settings.desired_kl)

    def pretraining(self, settings: ScratchSettings, policy: Any, context: TeacherContext) -> None:
        """None: training begins at once."""


plugin = Scratch()
