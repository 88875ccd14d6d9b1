"""The benchmark's scripted policies, as policies like any other."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

PREFIX = "metaworld/"


def has_script(task_id: str) -> bool:
    """Whether `task_id` comes with a scripted policy."""
    return task_id.startswith(PREFIX)


class ScriptedPolicy:
    """The scripted Meta-World policy (`metaworld.policies`) of one task, ``metaworld/NAME``, one per environment."""

    def __init__(self, task_id: str) -> None:
        self._name = task_id.removeprefix(PREFIX)
        self._policies: list[Any] = []

    def reset(self, task_id: str | None, num_envs: int) -> None:
        from metaworld.policies import ENV_POLICY_MAP

        self._policies = [ENV_POLICY_MAP[self._name]() for _ in range(num_envs)]

    def act(self, observations: NDArray[np.float32]) -> NDArray[np.float32]:
        """float32 [num_envs, obs] -> float32 [num_envs, act], clipped to [-1, 1]."""
        exact = observations.astype(np.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # each policy remarks that its gains are high: the clip below sees to that
            actions = [policy.get_action(row) for policy, row in zip(self._policies, exact, strict=True)]
        return np.clip(np.array(actions, np.float32), -1.0, 1.0)
