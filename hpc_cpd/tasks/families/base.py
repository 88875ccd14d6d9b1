"""What a task is, and what a family of tasks must offer.

A family is an object registered under one word in the entry-point group ``hpc_cpd.tasks``; the tasks it
makes are called ``word/name``. In the ``pyproject.toml`` of the package that brings it::

    [project.entry-points."hpc_cpd.tasks"]
    mylab = "mylab.tasks:family"

``docs/extending/tasks.md`` shows how to write one.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from hpc_cpd.tasks.spaces import Data, mapped, stack

if TYPE_CHECKING:
    from gymnasium import Space


@dataclass(frozen=True)
class TaskSpec:
    """The facts of a task that everything else is built on."""

    task_id: str
    observation_space: Space[Any]
    """Of one environment: a Box of any shape and dtype, Discrete, MultiDiscrete, or a Dict of these."""
    action_space: Space[Any]
    """The same kinds. A Box of floats must be float32 with the bounds -1 and 1: a family scales to its simulator's."""
    horizon: int
    """Steps after which an episode is truncated."""
    reward_version: str
    """Which reward function; results with different ones must not be compared."""
    environment_version: str
    """Packages and versions that simulate the task."""
    parent_task: str | None = None
    """The task of which this one has a part of the goals; who can do that one can do this one."""
    has_success: bool = True
    """Whether an episode can succeed at all; False: the task has rewards alone."""

    @property
    def skill(self) -> str:
        """The task that teachers and scripts know this one by."""
        return self.parent_task or self.task_id


class Step(NamedTuple):
    """What one simulator returns for one action."""

    observation: Data
    """An element of the observation space; a Box of floats may come in any float type."""
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

    def reset(self, goal_index: int) -> Data:
        """Begin an episode and return the observation, an element of the observation space."""

    def step(self, action: Any) -> Step:
        """Apply one element of the action space; of a Box of floats: float32, within [-1, 1]."""

    def close(self) -> None:
        """Free what the simulator holds."""


class Steps(NamedTuple):
    """What M environments return for one action each."""

    observations: Data
    """[M, *observation shape]; of a Dict: such an array per key."""
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

    def reset(self, rows: NDArray[np.int64], goals: NDArray[np.int64]) -> Data:
        """Begin the episodes of `goals` [M] in `rows` [M]; the observations [M, *observation shape]."""

    def step(self, rows: NDArray[np.int64], actions: Any) -> Steps:
        """Advance `rows` [M] by one step; `actions` [N, *action shape] of all environments."""

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

    def reset(self, rows: NDArray[np.int64], goals: NDArray[np.int64]) -> Data:
        pairs = zip(rows, goals, strict=True)
        return stack([self._simulators[row].reset(int(goal)) for row, goal in pairs])

    def step(self, rows: NDArray[np.int64], actions: Any) -> Steps:
        results = [self._simulators[row].step(mapped(operator.itemgetter(row), actions)) for row in rows]
        observations, rewards, terminated, truncated, success = zip(*results, strict=True)
        return Steps(
            stack(observations), np.array(rewards), np.array(terminated), np.array(truncated), np.array(success), {}
        )

    def close(self) -> None:
        for simulator in self._simulators:
            simulator.close()


class TaskFamily(Protocol):
    """A maker of tasks. Its name is the part of the task id before the slash.

    One environment of every task that a launch asks for is made, reset and stepped once before anything is written
    (`hpc_cpd.tasks.probe`). A family whose environments are too costly for that sets an attribute ``trusted = True``.
    """

    def names(self) -> Sequence[str]:
        """The names of its tasks, for listings and spelling hints; importing no simulator if possible.

        Empty where they cannot be listed: the first line of the class's docstring says how one is written.
        """

    def describe(self, name: str) -> TaskSpec:
        """The facts of a task. Raises UserError if there is no such task or it cannot be used."""

    def make(self, name: str, num: int, seed: int) -> Sequence[Simulator] | Batch:
        """`num` environments of a task that share the goals of `seed`; together, where that is faster."""
