"""Tasks that cost nothing to simulate, for tests of what happens around the learning: ``toy/NAME``.

A point is pushed towards a goal. The name says how the task misbehaves: ``broken-*`` raises when it is made,
``hungry-*`` fills the memory, ``slow-*`` takes its time, ``hopeless-*`` never succeeds; any other behaves.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from gymnasium.spaces import Box
from numpy.typing import NDArray

from hpc_cpd.tasks.families.base import Step, TaskSpec

HORIZON = 25


class Point:
    num_goals: int | None = None

    def __init__(self, seed: int, slow: bool, hopeless: bool) -> None:
        self._seed = seed
        self._slow = slow
        self._reach = 0.0 if hopeless else 0.3

    def reset(self, goal_index: int) -> NDArray[Any]:
        self._goal = np.random.default_rng([self._seed, goal_index]).uniform(-1, 1, 2)
        self._place = np.zeros(2)
        self._steps = 0
        return self._observation()

    def step(self, action: NDArray[np.float32]) -> Step:
        if self._slow:
            time.sleep(0.02)
        self._place = self._place + 0.2 * action.astype(np.float64)
        self._steps += 1
        distance = float(np.linalg.norm(self._goal - self._place))
        return Step(self._observation(), -distance, False, self._steps >= HORIZON, distance < self._reach)

    def close(self) -> None:
        pass

    def _observation(self) -> NDArray[Any]:
        return np.concatenate([self._place, self._goal])


class Family:
    trusted = True  # what is wrong with these tasks must show when they are trained, not when they are launched

    def names(self) -> list[str]:
        return ["point", "broken", "hungry", "slow", "hopeless"]

    def describe(self, name: str) -> TaskSpec:
        return TaskSpec(f"toy/{name}", Box(-np.inf, np.inf, (4,)), Box(-1, 1, (2,)), HORIZON, "toy", "toy 1")

    def make(self, name: str, num: int, seed: int) -> list[Point]:
        kind = name.partition("-")[0]
        if kind == "broken":
            raise RuntimeError("this task is broken on purpose")
        if kind == "hungry":
            ballast = np.ones(2 * 10**9 // 8)
            time.sleep(30)
            del ballast
        return [Point(seed, kind == "slow", kind == "hopeless") for _ in range(num)]


family = Family()
