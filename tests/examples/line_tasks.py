"""A task that is learnt in seconds: move a point along a line to its goal, ``line/short``."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.spaces import Box
from numpy.typing import NDArray

from hpc_cpd.tasks.families.base import Step, TaskSpec


class _Point:
    num_goals: int | None = None

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.offset = 0.0

    def reset(self, goal_index: int) -> NDArray[Any]:
        distance = np.random.default_rng([self.seed, goal_index]).uniform(0.3, 1.0)
        self.offset = distance if goal_index % 2 else -distance
        return self._observation()

    def step(self, action: NDArray[np.float32]) -> Step:
        self.offset -= 0.2 * float(action[0])
        success = abs(self.offset) < 0.05
        return Step(self._observation(), -abs(self.offset), False, False, success)

    def close(self) -> None:
        pass

    def _observation(self) -> NDArray[Any]:
        return np.array([self.offset, 1.0], np.float32)


class LineFamily:
    def names(self) -> list[str]:
        return ["short"]

    def describe(self, name: str) -> TaskSpec:
        return TaskSpec(f"line/{name}", Box(-np.inf, np.inf, (2,)), Box(-1, 1, (1,)), 20, "native", "line 1")

    def make(self, name: str, num: int, seed: int) -> list[_Point]:
        return [_Point(seed) for _ in range(num)]


family = LineFamily()
