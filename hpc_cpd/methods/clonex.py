"""ClonEx-SAC's behavioural cloning (arXiv 2209.13900): the memory asks for what the student before the stage did."""

from __future__ import annotations

from typing import Literal

from hpc_cpd.methods._replay import ReplayMethod, UniformReplaySettings
from hpc_cpd.methods.base import Rows, StageData


class ClonExSettings(UniformReplaySettings):
    """A memory chosen at random, in half of every batch."""

    name: Literal["clonex"] = "clonex"


class ClonEx(ReplayMethod):
    """Replay whose targets are the past student's actions, not the teachers'."""

    Settings = ClonExSettings
    needs_new_and_old = True

    def replay_rows(self, data: StageData, batch_size: int) -> list[Rows]:
        from hpc_cpd.methods._rows import with_replay

        return with_replay(data, batch_size, self.settings.replay_fraction, asks_past_student=True)


plugin = ClonEx
