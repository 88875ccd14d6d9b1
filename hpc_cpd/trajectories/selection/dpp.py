"""Episodes that differ from each other, and hard ones first: greedy MAP of a determinantal point process.

Measured on five Meta-World tasks (100 scripted episodes each, budgets of 6 to 12%): kernel regression on the kept
steps predicts the teacher on all steps with 0.80 times the error of a uniform choice (geometric mean); without the
length it was 1.16 times, as the oddest episodes are the longest.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hpc_cpd.settings import PluginSettings
from hpc_cpd.trajectories.dpp import greedy_map
from hpc_cpd.trajectories.selection.base import Candidates


class DPPSettings(PluginSettings):
    """Diverse episodes by a determinantal point process."""

    name: Literal["dpp"] = "dpp"


class DPPSelection:
    """The greedy MAP order of the feature rows, scaled by quality and by the inverse square root of the lengths."""

    Settings = DPPSettings

    def __init__(self, settings: PluginSettings) -> None:
        pass

    def order(self, candidates: Candidates) -> NDArray[np.int64]:
        """When the rank of the rows is used up, another round begins on the rest."""
        sizes, rest = candidates.lengths, candidates.fitting
        weights = candidates.quality / np.sqrt(sizes)
        rows = candidates.features * weights[:, None]
        rows[np.setdiff1d(np.arange(len(rows)), rest)] = 0.0  # a row of zeros is never picked, and no copy is needed
        order: list[NDArray[np.int64]] = []
        total = 0
        while len(rest) and total <= candidates.budget_steps:
            picks = greedy_map(rows, len(rest))
            if not len(picks):  # nothing but zeros: nothing tells them apart
                picks = rest
            order.append(picks)
            total += int(sizes[picks].sum())
            rows[picks] = 0.0
            rest = np.setdiff1d(rest, picks)
        return np.concatenate(order) if order else np.zeros(0, np.int64)


plugin = DPPSelection
