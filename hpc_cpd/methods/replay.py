"""Experience replay: a part of every batch comes from a memory of old trajectories."""

from __future__ import annotations

from typing import Literal

from hpc_cpd.methods._replay import ReplayMethod, UniformReplaySettings


class ExperienceReplaySettings(UniformReplaySettings):
    """A memory chosen at random, in half of every batch."""

    name: Literal["replay"] = "replay"


class Replay(ReplayMethod):
    """Fine-tuning with remembered trajectories and their teachers' answers."""

    Settings = ExperienceReplaySettings


plugin = Replay
