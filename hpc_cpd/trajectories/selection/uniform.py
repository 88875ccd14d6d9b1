"""Episodes at random, every one as likely as any other."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hpc_cpd.settings import PluginSettings
from hpc_cpd.trajectories.selection.base import Candidates


class UniformSettings(PluginSettings):
    """Episodes at random."""

    name: Literal["uniform"] = "uniform"


class UniformSelection:
    """A random order of the episodes that fit the budget."""

    Settings = UniformSettings

    def __init__(self, settings: PluginSettings) -> None:
        pass

    def order(self, candidates: Candidates) -> NDArray[np.int64]:
        return candidates.rng.permutation(candidates.fitting)


plugin = UniformSelection
