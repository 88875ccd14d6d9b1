"""Tasks of one's own that teachers and students learn: ``point/near`` and ``point/far``.

A point in the plane is pushed to a goal. This file is all that an environment needs: a simulator (reset, step, close),
and a family that describes the tasks and makes simulators. Copy it and put your simulator in the place of `Point`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from gymnasium.spaces import Box
from numpy.typing import NDArray

from hpc_cpd.errors import UserError
from hpc_cpd.tasks import Step, TaskSpec

DISTANCES = {"near": 0.5, "far": 1.0}  # of the goal, by the name of the task
HORIZON = 30


class Point:
    """One environment. After ``reset(goal_index)`` everything follows from the seed, the goal index and the actions."""

    num_goals = None  # any goal index is one; a number if there are only so many

    def __init__(self, distance: float, seed: int) -> None:
        self._distance = distance
        self._seed = seed

    def reset(self, goal_index: int) -> NDArray[np.float32]:
        angle = np.random.default_rng([self._seed, goal_index]).uniform(0, 2 * np.pi)
        self._goal = self._distance * np.array([np.cos(angle), np.sin(angle)])
        self._place = np.zeros(2)
        return self._observation()

    def step(self, action: NDArray[np.float32]) -> Step:
        # `action` lies in [-1, 1] always: scale it here to what the simulator wants
        self._place = self._place + 0.1 * action
        distance = float(np.linalg.norm(self._goal - self._place))
        return Step(self._observation(), -distance, terminated=False, truncated=False, success=distance < 0.1)

    def close(self) -> None:
        pass

    def _observation(self) -> NDArray[np.float32]:
        return np.concatenate([self._place, self._goal]).astype(np.float32)


class PointFamily:
    """The tasks ``point/...``: the word ``point`` stands in pyproject.toml."""

    def names(self) -> list[str]:
        return list(DISTANCES)

    def describe(self, name: str) -> TaskSpec:
        if name not in DISTANCES:
            raise UserError(f"there is no task 'point/{name}'; known: {', '.join(DISTANCES)}")
        return TaskSpec(
            task_id=f"point/{name}",
            observation_space=Box(-np.inf, np.inf, (4,)),
            action_space=Box(-1, 1, (2,)),
            horizon=HORIZON,  # an episode is cut after so many steps
            reward_version="1",  # change it with the reward: results of different versions are not compared
            environment_version="point_task 0.1.0",
        )

    def make(self, name: str, num: int, seed: int) -> Sequence[Point]:
        return [Point(DISTANCES[name], seed) for _ in range(num)]


family = PointFamily()
