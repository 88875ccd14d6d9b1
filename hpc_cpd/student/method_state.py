"""What a continual-learning method keeps from stage to stage, beside the student's weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class MethodState:
    """The state of the method called `method`, a plug-in of kind ``methods``; only that knows what the tensors mean."""

    method: str
    tensors: dict[str, Tensor]
