"""What the frozen parts of a student made of observations, computed once and handed to later forward passes."""

from __future__ import annotations

from dataclasses import dataclass, replace

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

    It is one float32 [n, numbers], so that parts of it are chosen, joined and kept in a file like any rows.
    """

    rows: Tensor
    inputs_size: int
    experts: int
    """How many old experts there are; 0: they, or their rows of the gate, go on learning."""
    selected: int
    """How many of them serve a token; 0: all of them do."""

    @staticmethod
    def of(inputs: Tensor, old: OldExperts) -> Precomputed:
        """`inputs` float32 [n, inputs]: what the experts and the gate of the only mixture see, features first."""
        k = 0 if old.selected is None else old.selected.shape[1]
        places = [] if old.selected is None else [old.selected.to(inputs)]  # exact below 2^24
        rows = torch.cat([inputs, old.logits, *places, old.outputs.flatten(1)], dim=1)
        return Precomputed(rows, inputs.shape[1], old.logits.shape[1], k)

    @property
    def inputs(self) -> Tensor:
        """See `of`."""
        return self.rows[:, : self.inputs_size]

    @property
    def old(self) -> OldExperts | None:
        """What the old experts say, if they are frozen."""
        if not self.experts:
            return None
        logits, selected, outputs = self.rows[:, self.inputs_size :].tensor_split(
            [self.experts, self.experts + self.selected], dim=1
        )
        outputs = outputs.unflatten(1, (self.selected or 1, -1))
        return OldExperts(logits, selected.long() if self.selected else None, outputs)

    def without_experts(self) -> Precomputed:
        """The features alone."""
        return Precomputed(self.inputs, self.inputs_size, 0, 0)

    def with_rows(self, rows: Tensor) -> Precomputed:
        """Other `rows` of the same kind."""
        return replace(self, rows=rows)
