"""Fine-tuning: one network goes on learning everywhere, and nothing is kept. The usual lower bound."""

from __future__ import annotations

from typing import Literal

from hpc_cpd.methods.base import Method, MethodSettings


class FineTuningSettings(MethodSettings):
    """Nothing but the size of the network."""

    name: Literal["fine_tuning"] = "fine_tuning"


class FineTuning(Method):
    """Go on learning, without anything against forgetting."""

    Settings = FineTuningSettings


plugin = FineTuning
