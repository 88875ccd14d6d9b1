"""What the student minimises."""

from __future__ import annotations

import torch
from torch import Tensor

from hpc_cpd.losses import bounded_errors


def action_mean_error(predicted: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Squared error on the action means, averaged over action dimensions (arXiv 2601.22475: MSE on action means).

    predicted, target float32 [B, L, act]; valid bool [B, L]. Targets are the actions that count, so they are clipped
    to [-1, 1], and a mean past a target on the bound is no error. Returns float32 [B, L], zero where not valid.
    """
    error = bounded_errors(predicted, target.clamp(-1.0, 1.0)).square().mean(dim=-1)
    return torch.where(valid, error, torch.zeros_like(error))
