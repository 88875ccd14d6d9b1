"""A task that is seen through a camera and told one of four directions: ``image/corner``.

It shows what a family does about observations and actions that are no vectors. Such a task can be listed
(``hpc-cpd tasks image/corner``), made and stepped (``hpc_cpd.make_batch``); teachers and students learn from vectors
alone so far, and a launch with this task says so. ``examples/plugins/point_task`` is a task that they learn.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from gymnasium.spaces import Box, Discrete
from numpy.typing import NDArray

from hpc_cpd.errors import UserError
from hpc_cpd.tasks import Step, TaskSpec

SIZE = 8
HORIZON = 20
CORNERS = ((0, 0), (0, SIZE - 1), (SIZE - 1, 0), (SIZE - 1, SIZE - 1))
MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1))


class Corner:
    """A red pixel is moved to the green one, which stands in a corner."""

    num_goals = len(CORNERS)  # a goal index means the same goal for ever

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def reset(self, goal_index: int) -> NDArray[np.uint8]:
        # from the seed and the goal alone: whatever was played before, this goal begins in the same way
        self._place = np.random.default_rng([self._seed, goal_index]).integers(2, SIZE - 2, size=2)
        self._goal = np.array(CORNERS[goal_index])
        return self._image()

    def step(self, action: int) -> Step:
        self._place = np.clip(self._place + MOVES[action], 0, SIZE - 1)
        distance = int(np.abs(self._place - self._goal).sum())
        return Step(self._image(), float(-distance), terminated=False, truncated=False, success=distance == 0)

    def close(self) -> None:
        pass

    def _image(self) -> NDArray[np.uint8]:
        image = np.zeros((SIZE, SIZE, 3), np.uint8)
        image[(*self._place, 0)] = 255
        image[(*self._goal, 1)] = 255
        return image


class ImageFamily:
    """The tasks ``image/...``: the word ``image`` stands in pyproject.toml."""

    def names(self) -> list[str]:
        return ["corner"]

    def describe(self, name: str) -> TaskSpec:
        if name != "corner":
            raise UserError(f"there is no task 'image/{name}'; known: image/corner")
        return TaskSpec(
            task_id="image/corner",
            observation_space=Box(0, 255, (SIZE, SIZE, 3), np.uint8),
            action_space=Discrete(len(MOVES)),
            horizon=HORIZON,
            reward_version="1",
            environment_version="image_task 0.1.0",
        )

    def make(self, name: str, num: int, seed: int) -> Sequence[Corner]:
        return [Corner(seed) for _ in range(num)]


family = ImageFamily()
