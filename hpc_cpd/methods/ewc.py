"""Elastic weight consolidation (arXiv 1612.00796): a quadratic for every past stage, weighted by Fisher."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from hpc_cpd.methods._quadratic import QuadraticMethod, QuadraticSettings

if TYPE_CHECKING:
    from torch import Tensor


class EWCSettings(QuadraticSettings):
    """Only the weight of the regulariser; 100 is the best of 1, 10, 100 and 1000 on MT10 in two stages."""

    name: Literal["ewc"] = "ewc"


class EWC(QuadraticMethod):
    """EWC: elastic weight consolidation, by the Fisher information of the actions; penalties of all stages add up."""

    Settings = EWCSettings
    measured_by = "fisher_diagonal"

    def carried_on(self, name: str, importance: Tensor, reached: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of two quadratics has the summed weights and the weighted mean of the anchors."""
        import torch

        old = self.importance[name]
        total = old + importance
        weighted = old * self.anchor[name] + importance * reached
        return total, torch.where(total > 0, weighted / total.clamp_min(1e-30), reached)


plugin = EWC
