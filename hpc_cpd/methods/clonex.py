"""ClonEx-SAC's behavioural cloning (arXiv 2209.13900): the memory asks for what the student before the stage did."""

from __future__ import annotations

from typing import Literal

from hpc_cpd.methods._replay import ReplayMethod, UniformReplaySettings


class ClonExSettings(UniformReplaySettings):
    """A memory chosen at random, in half of every batch."""

    name: Literal["clonex"] = "clonex"


class ClonEx(ReplayMethod):
    """Replay whose targets are the past student's actions, not the teachers'."""

    Settings = ClonExSettings
    needs_new_and_old = True
    asks_past_student = True


plugin = ClonEx
