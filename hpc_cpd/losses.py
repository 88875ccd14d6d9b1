"""Errors of actions that are clipped when they are executed: for cloning and for distillation."""

from __future__ import annotations

import torch
from torch import Tensor


def bounded_errors(means: Tensor, targets: Tensor) -> Tensor:
    """`means` minus `targets` [..., act], but nothing where both go past the same bound of [-1, 1].

    An action is clipped when it is executed, so a mean beyond a target on the bound is right. Scripted
    policies sit on the bounds most of the time: fitting how far beyond would waste most of the network.
    """
    errors = means - targets
    errors = torch.where(targets >= 1.0, errors.clamp(max=0.0), errors)
    return torch.where(targets <= -1.0, errors.clamp(min=0.0), errors)


def action_mean_error(predicted: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Squared error on the action means, averaged over action dimensions (arXiv 2601.22475: MSE on action means).

    predicted, target float32 [B, L, act]; valid bool [B, L]. Targets are the actions that count, so they are clipped
    to [-1, 1], and a mean past a target on the bound is no error. Returns float32 [B, L], zero where not valid.
    """
    error = bounded_errors(predicted, target.clamp(-1.0, 1.0)).square().mean(dim=-1)
    return torch.where(valid, error, torch.zeros_like(error))
