"""What a task is, and what a family of tasks must offer.

A family is an object registered under one word in the entry-point group ``hpc_cpd.tasks``; the tasks it
makes are called ``word/name``. In the ``pyproject.toml`` of the package that brings it::

    [project.entry-points."hpc_cpd.tasks"]
    mylab = "mylab.tasks:family"
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class TaskSpec:
    """The facts of a task that everything else is built on."""

    task_id: str
    observation_size: int
    """Length of the flat observation."""
    action_size: int
    """Length of the action; every component lies in [-1, 1]."""
    horizon: int
    """Steps after which an episode is truncated."""
    reward_version: str
    """Which reward function; results with different ones must not be compared."""
    environment_version: str
    """Packages and versions that simulate the task."""
    whole: str | None = None
    """The task of which this one has a part of the goals; who can do that one can do this one."""

    @property
    def skill(self) -> str:
        """The task that teachers and scripts know this one by."""
        return self.whole or self.task_id


class Step(NamedTuple):
    """What one simulator returns for one action."""

    observation: NDArray[Any]
    """[observation_size], any float type."""
    reward: float
    terminated: bool
    truncated: bool
    success: bool
    """The flag of this step; it may go off again later in the episode."""


class Simulator(Protocol):
    """One environment of one task.

    After ``reset(goal_index)`` everything that follows must be a pure function of the seed that the simulator was
    made with, the goal index and the actions, whatever was simulated before: exact resume rests on this.
    """

    @property
    def num_goals(self) -> int | None:
        """How many goals there are; None: any non-negative index below 2**31 is one."""

    def reset(self, goal_index: int) -> NDArray[Any]:
        """Begin an episode and return the observation [observation_size]."""

    def step(self, action: NDArray[np.float32]) -> Step:
        """Apply one action, float32 [action_size] within [-1, 1]."""

    def close(self) -> None:
        """Free what the simulator holds."""


class Steps(NamedTuple):
    """What M environments return for one action each."""

    observations: NDArray[Any]
    """[M, observation_size], any float type."""
    rewards: NDArray[np.float64]
    """[M]"""
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    success: NDArray[np.bool_]
    info: dict[str, NDArray[Any]]
    """More numbers by name, [M] each."""


class Batch(Protocol):
    """Environments of one task that are stepped together, each under the rule of :class:`Simulator`.

    `rows` are the increasing numbers of those that take part; the others stand still.
    """

    num_envs: int

    @property
    def num_goals(self) -> int | None:
        """See :class:`Simulator`."""

    def reset(self, rows: NDArray[np.int64], goals: NDArray[np.int64]) -> NDArray[Any]:
        """Begin the episodes of `goals` [M] in `rows` [M]; the observations [M, observation_size]."""

    def step(self, rows: NDArray[np.int64], actions: NDArray[np.float32]) -> Steps:
        """Advance `rows` [M] by one step; `actions` float32 [N, action_size] of all environments."""

    def close(self) -> None:
        """Free what the environments hold."""


class OneByOne:
    """A :class:`Batch` of simulators that know nothing of each other."""

    def __init__(self, simulators: Sequence[Simulator]) -> None:
        self._simulators = list(simulators)
        self.num_envs = len(self._simulators)

    @property
    def num_goals(self) -> int | None:
        return self._simulators[0].num_goals

    def reset(self, rows: NDArray[np.int64], goals: NDArray[np.int64]) -> NDArray[Any]:
        pairs = zip(rows, goals, strict=True)
        return np.array([self._simulators[row].reset(int(goal)) for row, goal in pairs])

    def step(self, rows: NDArray[np.int64], actions: NDArray[np.float32]) -> Steps:
        results = [self._simulators[row].step(actions[row]) for row in rows]
        observations, rewards, terminated, truncated, success = map(np.array, zip(*results, strict=True))
        return Steps(observations, rewards, terminated, truncated, success, {})

    def close(self) -> None:
        for simulator in self._simulators:
            simulator.close()


class TaskFamily(Protocol):
    """A maker of tasks. `name` is the part of the task id behind the first slash."""

    def names(self) -> Sequence[str]:
        """The names of its tasks, for listings and spelling hints; importing no simulator if possible."""

    def describe(self, name: str) -> TaskSpec:
        """The facts of a task. Raises UserError if there is no such task or it cannot be used."""

    def make(self, name: str, num: int, seed: int) -> Sequence[Simulator] | Batch:
        """`num` environments of a task that share the goals of `seed`; together, where that is faster."""
