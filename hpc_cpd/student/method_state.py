"""What a continual-learning method keeps beside a student's parameters."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class MethodState:
    """`method`: its name as a plug-in; `tensors`: what its ``state_dict`` gave."""

    method: str
    tensors: dict[str, Tensor]
