"""A student as the teacher of its tasks: ``teachers.source=student``.

What one network learnt of all tasks at once is distilled again, stage after stage. Its teacher folder holds a copy of
the student instead of a policy of its own, so that the run needs nothing outside its folder.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hpc_cpd.distributed.mpi import Communicator
from hpc_cpd.errors import UserError
from hpc_cpd.progress import Progress
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import atomic_folder
from hpc_cpd.student.policy import MODEL_FILE, StudentPolicy, load_student
from hpc_cpd.teachers.policy import STUDENT_FOLDER, WEIGHTS, TeacherPolicy, load_teacher
from hpc_cpd.teachers.publish import Evaluate, publish_teacher


class StudentTeacher:
    """Acts as the teacher of one task that `policy` has learnt."""

    def __init__(self, task_id: str, policy: StudentPolicy) -> None:
        self.task_id = task_id
        self.policy = policy

    def reset(self, task_id: str | None = None, num_envs: int = 1) -> None:
        self.policy.reset(self.task_id, num_envs)

    def act(self, observations: NDArray[np.float32]) -> NDArray[np.float32]:
        """float32 [num_envs, obs] -> float32 [num_envs, act]: the action, clipped to [-1, 1]."""
        return self.policy.act(observations)


def load_any_teacher(folder: Path, task_id: str) -> TeacherPolicy | StudentTeacher:
    """The published teacher of `task_id` in `folder`, of whichever kind. Raises UserError like `load_teacher`."""
    if (folder / STUDENT_FOLDER).is_dir():
        return StudentTeacher(task_id, load_student(folder / STUDENT_FOLDER))
    return load_teacher(folder)


def weights_of(folder: Path) -> Path:
    """The file whose SHA-256 tells teachers apart."""
    student = folder / STUDENT_FOLDER
    return student / MODEL_FILE if student.is_dir() else folder / WEIGHTS


def take_from_student(run: Run, task_id: str, communicator: Communicator, evaluate: Evaluate) -> None:
    """Publish the student of ``teachers.student`` as the teacher of `task_id`; all ranks call it together.

    Raises UserError: no such student, or one that has not learnt the task.
    """
    began = time.monotonic()
    progress = Progress(f"teacher {task_id}", enabled=communicator.rank == 0, folder=run.teacher(task_id))
    source = run.config().teachers.student
    if source is None:
        raise UserError("teachers.source is student, but teachers.student names no folder; give RUN/stages/K/student")
    target = run.teacher(task_id) / STUDENT_FOLDER

    def copy() -> StudentPolicy:
        policy = load_student(source)
        if task_id not in policy.task_ids:
            known = ", ".join(policy.task_ids)
            raise UserError(f"the student {source} (teachers.student) has not learnt {task_id}; it has learnt {known}")
        with atomic_folder(target) as temporary:
            shutil.copytree(source, temporary, dirs_exist_ok=True)
        return load_student(target)

    policy = StudentTeacher(task_id, communicator.on_root(copy))
    successes = publish_teacher(
        run, policy, communicator, evaluate, None, environment_steps=0, seconds=lambda: time.monotonic() - began
    )
    progress.update(f"taken from the student {source}, success {successes}", last=True)
