"""A replay memory: a few trajectories of every task, chosen under a budget and kept for the stages that follow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from hpc_cpd.errors import UserError
from hpc_cpd.methods.base import Method, MethodSettings, Rows, Stage, StageData
from hpc_cpd.settings import Choice, PluginSettings, Settings, chosen

if TYPE_CHECKING:
    import numpy as np

    from hpc_cpd.trajectories.store import TrajectoryStore

Selection = Annotated[PluginSettings, Choice("selections", "dpp")]
BUDGET = "share of each task's steps that is kept, in whole episodes, one at least"


class MemorySettings(Settings):
    """The replay memory."""

    budget_fraction: float = Field(0.05, gt=0, le=1, description=BUDGET)
    selection: Selection = chosen("which episodes are kept")


class UniformMemorySettings(MemorySettings):
    """The replay memory of the baselines, chosen at random."""

    selection: Selection = chosen("which episodes are kept", "uniform")


class ReplaySettings(MethodSettings):
    """Settings of a method that keeps a replay memory."""

    memory: MemorySettings = MemorySettings()
    replay_fraction: float = Field(0.5, gt=0, lt=1, description="share of a batch that is about old tasks")


class UniformReplaySettings(ReplaySettings):
    """The same with a memory that is chosen at random."""

    memory: UniformMemorySettings = UniformMemorySettings()


class ReplayMethod(Method):
    """A method that keeps a replay memory (``stages/K/memory``) and draws a part of every batch from it."""

    Settings: ClassVar[type[MethodSettings]] = ReplaySettings
    keeps_memory = True
    needs_new_and_old: ClassVar[bool] = False
    """Whether a batch of a later stage without new rows, or without remembered ones, makes no sense."""
    asks_past_student: ClassVar[bool] = False
    """Whether remembered steps ask for what the student before the stage did, not for the teachers' answers."""

    @property
    def self_distillation(self) -> tuple[float, float]:
        """Of the rows about old tasks, the share that asks the past student at other observations than remembered ones;
        of these, the share between two remembered states."""
        return 0.0, 0.0

    def check(self, stages: int) -> None:
        from hpc_cpd.tasks.registry import describe, resolve_tasks
        from hpc_cpd.trajectories.memory import try_selection

        memory: MemorySettings = self.settings.memory
        task, episodes = describe(resolve_tasks(self.config.stream.tasks)[0]), self.config.trajectories.episodes
        try_selection(memory.selection, task, episodes, memory.budget_fraction)

    def open_memory(self, stage: Stage) -> TrajectoryStore | None:
        from hpc_cpd.trajectories.memory import open_memory

        folders = [stage.run.stage(number) / "memory" for number in range(1, stage.number)]
        return open_memory(folders, self.config.distill.in_memory_gigabytes)

    def keep_memory(self, stage: Stage, new: TrajectoryStore, errors: np.ndarray) -> None:
        from hpc_cpd.trajectories.memory import select_memory, write_memory

        memory: MemorySettings = self.settings.memory
        budget, selection, seed = memory.budget_fraction, memory.selection, self.config.seed
        chosen = [
            select_memory(new, task, errors[new.task_episodes(task)], budget, selection, seed) for task in new.task_ids
        ]
        facts = {"stage": stage.number, "selection": selection.model_dump(), "budget_fraction": budget}
        write_memory(stage.run.stage(stage.number) / "memory", chosen, **facts)

    def rows(self, data: StageData, batch_size: int) -> list[Rows]:
        from hpc_cpd.methods._rows import with_replay

        shares = self.settings.replay_fraction, *self.self_distillation
        rows = with_replay(data, batch_size, *shares, self.asks_past_student)
        new = sum(row.count for row in rows if row.of_new_tasks)
        if self.needs_new_and_old and data.past is not None and not 0 < new < batch_size:
            raise UserError(
                f"stage {self.stage.number}: method {self.settings.name} needs new rows and remembered rows in every "
                f"batch, but of {batch_size} rows {new} are new and {batch_size - new} are remembered; begin another "
                "run with a larger method.memory.budget_fraction, another method.replay_fraction or a larger "
                "distill.batch_size"
            )
        return rows
