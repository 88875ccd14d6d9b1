"""What one launch is asked for, and what of it is left."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import is_done
from hpc_cpd.settings import Config


@dataclass(frozen=True)
class LaunchRequest:
    """`plan`: the task ids of each stage; `tasks` and `stages` (from 1): what was asked for of it."""

    run: Run
    config: Config
    plan: list[list[str]]
    asked: str
    tasks: list[str]
    stages: list[int]
    allow_missing: bool = False

    def task_done(self, task: str) -> bool:
        """Whether both the teacher and the trajectories of `task` are published."""
        return is_done(self.run.teacher(task)) and is_done(self.run.trajectories(task))

    def stage_done(self, stage: int) -> bool:
        return is_done(self.run.stage(stage))

    @property
    def todo_tasks(self) -> list[str]:
        """Tasks whose teacher or trajectories are missing."""
        return [task for task in self.tasks if not self.task_done(task)]

    @property
    def todo_stages(self) -> list[int]:
        return [stage for stage in self.stages if not self.stage_done(stage)]

    def todo_units(self) -> list[str]:
        """``teacher TASK`` and ``stage K`` of everything that is left, in the order of work."""
        return [*map(teacher_unit, self.todo_tasks), *map(stage_unit, self.todo_stages)]

    def needs(self, stage: int) -> list[str]:
        """Units that must be done before `stage`, and are not."""
        teachers = [teacher_unit(task) for task in self.plan[stage - 1] if not self.task_done(task)]
        before = [stage_unit(stage - 1)] if stage > 1 and not self.stage_done(stage - 1) else []
        return teachers + before


def unit_folder(run: Run, unit: str) -> Path:
    """Where a unit is published."""
    kind, name = unit.split(" ", 1)
    return run.stage(int(name)) if kind == "stage" else run.teacher(name)


def last_trace(run: Run, unit: str) -> float:
    """When a unit last wrote a checkpoint or a shard, in seconds since the epoch; 0: never."""
    paths = list(unit_folder(run, unit).glob("checkpoints/*"))
    if unit.startswith("teacher "):
        paths += run.trajectories(unit.removeprefix("teacher ")).glob("shard-*")
    return max((path.stat().st_mtime for path in paths), default=0.0)


def teacher_unit(task: str) -> str:
    return f"teacher {task}"


def stage_unit(stage: int) -> str:
    return f"stage {stage}"
