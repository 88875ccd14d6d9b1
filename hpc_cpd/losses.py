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
