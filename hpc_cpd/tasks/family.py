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


class TaskFamily(Protocol):
    """A maker of tasks. `name` is the part of the task id behind the first slash."""

    def names(self) -> Sequence[str]:
        """The names of its tasks, for listings and spelling hints; importing no simulator if possible."""

    def describe(self, name: str) -> TaskSpec:
        """The facts of a task. Raises UserError if there is no such task or it cannot be used."""

    def make(self, name: str, num: int, seed: int) -> Sequence[Simulator]:
        """`num` simulators of a task that all share the goals of `seed`."""
