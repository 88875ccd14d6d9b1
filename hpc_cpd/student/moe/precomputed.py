"""What the frozen parts of a student made of observations, computed once and handed to later forward passes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class OldExperts:
    """What the frozen experts of a mixture say of n tokens: E of them, the first columns of its gate."""

    logits: Tensor
    """float32 [n, E]: those of the gate's frozen rows."""
    selected: Tensor | None
    """int64 [n, k]: columns of the k experts with the highest logits; None: all experts serve every token."""
    outputs: Tensor
    """float32 [n, k, width]: what these experts say. With all of them: [n, 1, width], weighted by the softmax of their
    logits."""

    def mixed(self) -> Tensor:
        """What a mixture of these experts alone says, float32 [n, width]."""
        if self.selected is None:
            return self.outputs.squeeze(1)
        weights = torch.softmax(self.logits.gather(1, self.selected), dim=-1)
        return (self.outputs * weights.unsqueeze(-1)).sum(dim=1)

    def only_selected(self, logits: Tensor) -> Tensor:
        """`logits` [n, all experts] with -inf for old experts whose outputs are not here, should logits be equal."""
        if self.selected is None:
            return logits
        old = torch.full_like(self.logits, -torch.inf).scatter(1, self.selected, self.logits.gather(1, self.selected))
        return torch.cat([old, logits[:, old.shape[1] :]], dim=1)

    def of_pairs(self, selected: Tensor) -> Tensor:
        """Outputs [n, k, width] of the columns `selected` int64 [n, k]; any numbers for columns that are not here."""
        assert self.selected is not None
        place = (selected.unsqueeze(-1) == self.selected.unsqueeze(1)).int().argmax(dim=-1)
        return self.outputs.take_along_dim(place.unsqueeze(-1), dim=1)


@dataclass(frozen=True)
class Precomputed:
    """What a student need not compute again of n observations, each with its history and the vector of a task.

    `inputs` float32 [n, inputs]: what the experts and the gate of the only mixture see, features first. `old`: None
    where old experts, or their rows of the gate, go on learning.
    """

    inputs: Tensor
    old: OldExperts | None

    def without_experts(self) -> Precomputed:
        """The features alone."""
        return Precomputed(self.inputs, None)

    def rows(self, rows: slice) -> Precomputed:
        """Those of some of the observations."""
        return unpack(self.pack()[rows], self)

    def pack(self) -> Tensor:
        """All of it as float32 [n, numbers], as `unpack` reads it. (Columns below 2^24 are exact in float32.)"""
        if self.old is None:
            return self.inputs
        selected = [] if self.old.selected is None else [self.old.selected.to(self.inputs)]
        return torch.cat([self.inputs, self.old.logits, *selected, self.old.outputs.flatten(1)], dim=1)


def unpack(rows: Tensor, like: Precomputed) -> Precomputed:
    """`Precomputed.pack` undone; the sizes are those of `like`."""
    old = like.old
    if old is None:
        return Precomputed(rows, None)
    k = 0 if old.selected is None else old.selected.shape[1]
    inputs, logits, selected, outputs = rows.split(
        [like.inputs.shape[1], old.logits.shape[1], k, old.outputs[0].numel()], dim=1
    )
    places = None if old.selected is None else selected.long()
    return Precomputed(inputs, OldExperts(logits, places, outputs.unflatten(1, old.outputs.shape[1:])))


def joined(parts: list[Precomputed]) -> Precomputed:
    """The rows of several, one after the other."""
    return parts[0] if len(parts) == 1 else unpack(torch.cat([part.pack() for part in parts]), parts[0])
