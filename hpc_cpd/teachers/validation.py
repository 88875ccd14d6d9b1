"""What a teacher needs before its training can begin. Imports no torch: the launch asks, before any job does."""

from __future__ import annotations

from hpc_cpd.errors import UserError
from hpc_cpd.settings import TeacherSettings

SCRIPTED_PREFIX = "metaworld/"
"""Tasks that come with a scripted policy."""


def require_teacher(task_id: str, settings: TeacherSettings, ranks: int) -> None:
    """Raise UserError when the teacher of `task_id` cannot be trained with these settings on so many ranks."""
    demonstrations = settings.demonstrations
    if settings.start == "demonstrations" and demonstrations.folder is None and not task_id.startswith(SCRIPTED_PREFIX):
        raise UserError(
            f"there is no scripted policy for {task_id}, so its teacher cannot start from demonstrations; set "
            "teachers.start=scratch, or teachers.demonstrations.folder to a folder of trajectories to clone"
        )
    for count, key in (
        (settings.ppo.num_envs, "teachers.ppo.num_envs"),
        (demonstrations.batch_size, "teachers.demonstrations.batch_size"),
    ):
        if count < ranks:
            raise UserError(f"{key} is {count}, but there are {ranks} ranks; give each at least one")
