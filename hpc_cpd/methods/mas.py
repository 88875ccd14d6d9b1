"""Memory Aware Synapses (arXiv 1711.09601): what moves the squared norm of the action is important."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hpc_cpd.methods._quadratic import QuadraticMethod, QuadraticSettings


class MASSettings(QuadraticSettings):
    """Only the weight of the regulariser; 10 is the best of 1, 10 and 100 on MT10 in two stages."""

    name: Literal["mas"] = "mas"
    coefficient: float = Field(10.0, ge=0, description="weight of the regulariser")


class MAS(QuadraticMethod):
    """MAS: memory aware synapses, by the sensitivity of the actions' squared norm; importances of all stages add up."""

    Settings = MASSettings
    measured_by = "output_sensitivity"


plugin = MAS
