"""Online EWC (arXiv 1805.06370): one running sum of Fisher diagonals, around the parameters reached last."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from hpc_cpd.methods._quadratic import QuadraticMethod, QuadraticSettings


class OnlineEWCSettings(QuadraticSettings):
    """The weight of the regulariser, and how fast older stages are forgotten by it."""

    name: Literal["online_ewc"] = "online_ewc"
    decay: float = Field(0.95, ge=0, le=1, description="gamma: each stage multiplies the earlier importance by this")


class OnlineEWC(QuadraticMethod):
    """Online EWC: as EWC, by the Fisher information of the actions, but that of earlier stages decays."""

    Settings = OnlineEWCSettings
    measured_by = "fisher_diagonal"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.decay = self.settings.decay


plugin = OnlineEWC
