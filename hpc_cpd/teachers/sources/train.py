"""Teachers that are trained in the run: ``teachers.source=train``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from pydantic import Field

from hpc_cpd import plugins
from hpc_cpd.run.paths import Run
from hpc_cpd.settings import Config, PluginSettings
from hpc_cpd.tasks.families.base import TaskSpec
from hpc_cpd.teachers.algorithms.base import TeacherContext


class TrainSettings(PluginSettings):
    """How often a teacher in training is evaluated, and when it is good enough."""

    name: Literal["train"] = "train"
    evaluation_episodes: int = Field(20, ge=1, description="episodes per evaluation while training")
    evaluate_every_rounds: int = Field(5, ge=1, description="rounds of the algorithm between two evaluations")
    target_success: float = Field(
        0.95, gt=0, le=1, description="stop once evaluated at this twice in a row; a clone is evaluated twice at once"
    )


class Train:
    """Teachers that are trained in the run."""

    Settings = TrainSettings

    def check(self, settings: TrainSettings, config: Config, task: TaskSpec, ranks: int) -> None:
        algorithm = plugins.load("algorithms", config.teachers.algorithm.name)
        start = plugins.load("starts", config.teachers.start.name)
        start.check(config.teachers.start, task, ranks, algorithm)
        algorithm.check(config.teachers.algorithm, task, ranks)

    def make(self, settings: TrainSettings, run: Run, context: TeacherContext, stop: Callable[[], bool]) -> None:
        from hpc_cpd.teachers.train import train_teacher

        train_teacher(settings, run, context, stop)


plugin = Train()
