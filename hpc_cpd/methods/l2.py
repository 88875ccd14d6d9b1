"""L2 to the parameters before the stage: every parameter is held alike."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hpc_cpd.methods._quadratic import QuadraticMethod, QuadraticSettings


class L2Settings(QuadraticSettings):
    """Only the weight of the regulariser; 0.1 is the best of 0.01, 0.1 and 1 on MT10 in two stages."""

    name: Literal["l2"] = "l2"
    coefficient: float = Field(0.1, ge=0, description="weight of the regulariser")


class L2(QuadraticMethod):
    """L2: every parameter is held equally near to its value after the stage before."""

    Settings = L2Settings
    measured_by = "all_alike"
    decay = 0.0


plugin = L2
