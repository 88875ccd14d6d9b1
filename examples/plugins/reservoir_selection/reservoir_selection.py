"""Reservoir sampling (Vitter 1985, algorithm R) as the selection of a replay memory.

In a config::

    method:
      memory:
        selection: {name: reservoir, slots: 20}

Episodes arrive one after another, as they were recorded. The first `slots` are kept; the n-th after them takes the
place of a random one with probability slots / n, so that every episode is kept with the same probability. The kept ones
are then handed over until the budget of steps is used.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from hpc_cpd.settings import PluginSettings
from hpc_cpd.trajectories.selection.base import Candidates


class ReservoirSettings(PluginSettings):
    """Its fields are what a config may set; a wrong one is refused in one sentence."""

    name: Literal["reservoir"] = "reservoir"
    slots: int | None = Field(None, ge=1, description="episodes kept at most; null: as many as the budget may hold")


class ReservoirSelection:
    """Made once per task with its settings; `order` says which rows to keep, the most wanted first."""

    Settings = ReservoirSettings

    def __init__(self, settings: ReservoirSettings) -> None:
        self._slots = settings.slots

    def order(self, candidates: Candidates) -> NDArray[np.int64]:
        # `fitting` leaves out episodes that are longer than the whole budget
        arriving = candidates.fitting
        slots = self._slots or max(1, candidates.budget_steps // int(candidates.lengths[arriving].min()))
        kept = list(arriving[:slots])
        for seen, row in enumerate(arriving[slots:], start=slots):
            place = int(candidates.rng.integers(seen + 1))  # no other source of chance: the seed decides
            if place < slots:
                kept[place] = row
        # in a random order, for the budget may cut off the end
        return candidates.rng.permutation(np.array(kept, np.int64))
