"""A student as the teacher of its tasks: ``teachers.source={name: student, folder: RUN/stages/K/student}``.

What one network learnt of all tasks at once is distilled again, stage after stage. Its teacher folder holds a copy of
the student instead of a policy of its own, so that the run needs nothing outside its folder.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import Field

from hpc_cpd.distributed.outcome import run_on_all_ranks
from hpc_cpd.errors import UserError
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import atomic_folder, read_json
from hpc_cpd.settings import Config, PluginSettings
from hpc_cpd.tasks.families.base import TaskSpec
from hpc_cpd.tasks.policy import Policy
from hpc_cpd.teachers.algorithms.base import TeacherContext

STUDENT_FOLDER = "student"
"""A teacher that is a student has it instead of a policy of its own."""


class StudentSettings(PluginSettings):
    """One student that has learnt every task of the stream."""

    name: Literal["student"] = "student"
    folder: str = Field(description="folder of the student, RUN/stages/K/student")


class StudentSource:
    """A student as the teacher of its tasks."""

    Settings = StudentSettings

    def check(self, settings: StudentSettings, config: Config, task: TaskSpec, ranks: int) -> None:
        description = Path(settings.folder) / "student.json"
        if not description.is_file():
            raise UserError(
                f"{settings.folder} is not a student folder (no student.json); set teachers.source.folder to a run's "
                "stages/K/student"
            )
        learnt = read_json(description).get("tasks", [])
        if task.task_id not in learnt:
            raise UserError(
                f"the student {settings.folder} (teachers.source.folder) has not learnt {task.task_id}; it has learnt "
                f"{', '.join(learnt)}"
            )

    def make(self, settings: StudentSettings, run: Run, context: TeacherContext, stop: Callable[[], bool]) -> None:
        from hpc_cpd.student.policy import load_student
        from hpc_cpd.teachers.publish import publish_teacher

        began, folder = time.monotonic(), run.teacher(context.task.task_id) / STUDENT_FOLDER

        def copy() -> None:
            load_student(settings.folder)  # a damaged one is not copied
            with atomic_folder(folder) as temporary:
                shutil.copytree(settings.folder, temporary, dirs_exist_ok=True)

        context.communicator.on_root(copy)
        policy = run_on_all_ranks(context.communicator, lambda: load_student(folder))
        publish_teacher(run, policy, context, None, f"taken from the student {settings.folder}", began)


def load_any_teacher(folder: Path) -> Policy:
    """The published teacher in `folder`, whatever it is. Raises UserError like `load_teacher` and `load_student`."""
    from hpc_cpd.student.policy import load_student
    from hpc_cpd.teachers.policy import load_teacher

    student = folder / STUDENT_FOLDER
    policy: Policy = load_student(student) if student.is_dir() else load_teacher(folder)
    return policy


def weights_of(folder: Path) -> Path:
    """The file whose SHA-256 tells teachers apart: that of a student lists the SHA-256 of the others."""
    from hpc_cpd.student.policy import JSON_FILE
    from hpc_cpd.teachers.policy import WEIGHTS

    student = folder / STUDENT_FOLDER
    return student / JSON_FILE if student.is_dir() else folder / WEIGHTS


plugin = StudentSource()
