"""The pieces of work of a run, each done by one job: a teacher with its trajectories, and a stage."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import is_done
from hpc_cpd.settings import Config


@dataclass(frozen=True)
class Unit(ABC):
    """One teacher or one stage of `run`. `uses_mpi`: whether its ranks find each other by MPI.

    `kind`: what it is, in one word; `key`: the field that tells it from the others of its kind.
    """

    run: Run
    kind: ClassVar[str]
    key: ClassVar[str]
    uses_mpi: ClassVar[bool] = False
    traces: ClassVar[Sequence[str]] = ("checkpoints/*",)
    """What it leaves in its folders while it is at work."""

    @property
    def name(self) -> str:
        """``teacher TASK`` or ``stage K``: what messages, logs and ``hpc-cpd status`` call it."""
        return f"{self.kind} {getattr(self, self.key)}"

    @property
    @abstractmethod
    def folders(self) -> list[Path]:
        """What it publishes. The first one also holds its lock, its checkpoints and its job record."""

    @property
    def arguments(self) -> list[str]:
        """The words after ``python -m hpc_cpd.worker`` that make one rank of it."""
        return [self.kind, "--run", str(self.run.folder.absolute()), f"--{self.key}", str(getattr(self, self.key))]

    @abstractmethod
    def ranks(self, config: Config) -> int:
        """How many ranks work on it together."""

    def needs(self, plan: Sequence[Sequence[str]]) -> list[Unit]:
        """The units that must be done before it and are not. `plan`: the task ids of each stage."""
        return []

    @property
    def folder(self) -> Path:
        return self.folders[0]

    @property
    def done(self) -> bool:
        return all(map(is_done, self.folders))

    def last_trace(self) -> float:
        """When it last wrote a checkpoint or a shard, in seconds since the epoch; 0: never."""
        return newest(self.folders, self.traces)


@dataclass(frozen=True)
class TeacherUnit(Unit):
    """The teacher of `task`, and the trajectories that it records."""

    task: str
    kind, key = "teacher", "task"
    uses_mpi: ClassVar[bool] = True
    traces: ClassVar[Sequence[str]] = ("checkpoints/*", "shard-*")

    @property
    def folders(self) -> list[Path]:
        return [self.run.teacher(self.task), self.run.trajectories(self.task)]

    def ranks(self, config: Config) -> int:
        return config.teachers.ranks


@dataclass(frozen=True)
class StageUnit(Unit):
    """Stage `stage` of the stream, counted from 1."""

    stage: int
    kind, key = "stage", "stage"

    @property
    def folders(self) -> list[Path]:
        return [self.run.stage(self.stage)]

    def ranks(self, config: Config) -> int:
        return config.distill.ranks

    def needs(self, plan: Sequence[Sequence[str]]) -> list[Unit]:
        units: list[Unit] = [TeacherUnit(self.run, task) for task in plan[self.stage - 1]]
        if self.stage > 1:
            units.append(StageUnit(self.run, self.stage - 1))
        return not_done(units)


SomeUnit = TypeVar("SomeUnit", bound=Unit)


@dataclass(frozen=True)
class LaunchRequest:
    """What one launch is asked for. `plan`: the task ids of each stage; `asked`: teachers, a stage's number, or all;
    `units`: what that means, in the order of work; `allow_missing`: stages do without tasks that have no teacher.
    """

    run: Run
    config: Config
    plan: list[list[str]]
    asked: str
    units: list[Unit]
    allow_missing: bool = False

    @property
    def teachers(self) -> list[TeacherUnit]:
        return [unit for unit in self.units if isinstance(unit, TeacherUnit)]

    @property
    def stages(self) -> list[StageUnit]:
        return [unit for unit in self.units if isinstance(unit, StageUnit)]

    @property
    def todo(self) -> list[Unit]:
        return not_done(self.units)

    def arguments(self, unit: Unit) -> list[str]:
        """The worker's words for `unit`, as this launch wants it done."""
        return unit.arguments + ["--allow-missing"] * (self.allow_missing and isinstance(unit, StageUnit))


def newest(folders: Sequence[Path], patterns: Sequence[str]) -> float:
    """When the youngest file that matches was written, in seconds since the epoch; 0: there is none."""
    paths = [path for folder in folders for pattern in patterns for path in folder.glob(pattern)]
    return max((path.stat().st_mtime for path in paths), default=0.0)


def not_done(units: Sequence[SomeUnit]) -> list[SomeUnit]:
    """Those of `units` that are not published yet."""
    return [unit for unit in units if not unit.done]


def request_of(
    run: Run, config: Config, plan: list[list[str]], asked: str, allow_missing: bool = False
) -> LaunchRequest:
    """The units that `asked` (teachers, all, or the number of a stage, from 1) means."""
    units: list[Unit] = []
    if asked in ("teachers", "all"):
        units += [TeacherUnit(run, task) for tasks in plan for task in tasks]
    if asked != "teachers":
        units += [StageUnit(run, stage) for stage in range(1, len(plan) + 1) if asked in ("all", str(stage))]
    return LaunchRequest(run, config, plan, asked, units, allow_missing)
