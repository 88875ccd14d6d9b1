"""Parts of a task's goals as tasks of their own: ``reach-v3@2of4`` is reaching for the second quarter of its goals.

A stream can so be made longer than the list of tasks, and the same skill can come back at goals it never saw.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MOST_PARTS = 25  # of 50 goals each part then has two
_REGION = re.compile(r"(?P<whole>.+)@(?P<number>[1-9]\d*)of(?P<parts>[1-9]\d*)")


class Region(NamedTuple):
    """Part `number` (from 1) of `parts` of the goals of the task `whole`."""

    whole: str
    number: int
    parts: int

    @property
    def exists(self) -> bool:
        return self.number <= self.parts <= MOST_PARTS

    def choose(self, places: NDArray[np.float64]) -> list[int]:
        """The goals of this part, int indices in increasing order; `places` float64 [goals, numbers] tells them apart.

        Goals are put in the order of the number that varies most among them, and cut into parts of equal size (of 50
        goals in 4 parts, the first two have one more). Whatever the order, every goal is in one part.
        """
        widest = int(places.std(axis=0).argmax())
        ordered = np.argsort(places[:, widest], kind="stable")
        return sorted(np.array_split(ordered, self.parts)[self.number - 1].tolist())


def region_of(name: str) -> Region | None:
    """The region that `name` asks for (it may not exist); None: a whole task."""
    found = _REGION.fullmatch(name)
    return Region(found["whole"], int(found["number"]), int(found["parts"])) if found else None
