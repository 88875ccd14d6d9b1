"""What acts: a teacher, a student, a scripted policy, a policy of somebody else's."""

from __future__ import annotations

from typing import Any, Protocol

from numpy.typing import NDArray


class Policy(Protocol):
    """Acts in several environments of one task at once. `load_student` and `load_teacher` return one."""

    def reset(self, task_id: str | None, num_envs: int) -> None:
        """Begin new episodes of `task_id` in `num_envs` environments, and forget everything seen before.

        None: the policy is not told its task.
        """

    def act(self, observations: NDArray[Any]) -> NDArray[Any]:
        """Actions [num_envs, *action shape] for `observations` [num_envs, *observation shape]."""
