"""What a source of teachers must offer, and the two questions that the launcher and the jobs ask of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol

from hpc_cpd import plugins
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import is_done
from hpc_cpd.settings import Config, PluginSettings
from hpc_cpd.tasks.families.base import TaskSpec
from hpc_cpd.tasks.registry import describe
from hpc_cpd.teachers.algorithms.base import TeacherContext

if TYPE_CHECKING:
    from hpc_cpd.distributed.mpi import Communicator


class Source(Protocol):
    """The plug-in. Its settings are checked on machines without torch: import it only in `make`."""

    Settings: type[PluginSettings]

    def check(self, settings: Any, config: Config, task: TaskSpec, ranks: int) -> None:
        """Raise UserError when the teacher of `task` cannot come from here, on so many ranks. Imports no torch."""

    def make(self, settings: Any, run: Run, context: TeacherContext, stop: Callable[[], bool]) -> None:
        """Publish the teacher of `context.task` in `run` (`hpc_cpd.teachers.publish`); all ranks call it together.

        Raises StopRequested after saving when `stop()` is true on any rank.
        """


def check_teachers(config: Config, tasks: Iterable[str], ranks: int | None = None) -> None:
    """Raise UserError when the teacher of one of `tasks` cannot be made with these settings. Imports no torch.

    `ranks`: how many there are; None: as many as the settings say.
    """
    source: Source = plugins.load("sources", config.teachers.source.name)
    for task in map(describe, tasks):
        source.check(config.teachers.source, config, task, config.teachers.ranks if ranks is None else ranks)


def make_teacher(run: Run, task_id: str, communicator: Communicator, stop: Callable[[], bool]) -> None:
    """Make and publish the teacher of `task_id`; return at once when it is published already.

    All ranks call it together. Raises StopRequested after saving when `stop()` is true on any rank, and UserError when
    the source cannot make it.
    """
    folder = run.teacher(task_id)
    if not communicator.on_root(lambda: is_done(folder)):
        config = run.config()
        check_teachers(config, [task_id], communicator.size)
        source: Source = plugins.load("sources", config.teachers.source.name)
        source.make(config.teachers.source, run, TeacherContext(describe(task_id), config.seed, communicator), stop)
    communicator.on_root(lambda: shutil.rmtree(folder / "checkpoints", ignore_errors=True))
