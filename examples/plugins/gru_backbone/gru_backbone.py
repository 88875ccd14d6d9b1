"""A gated recurrent unit (arXiv 1406.1078) in place of the student's Transformer.

With this package installed, ``student.backbone=gru`` trains, publishes and plays a student that looks back by
recurrence. One mixture of experts follows it; `hpc_cpd` brings the experts, their growth and their exchange over ranks.

What may surprise in it:

* A student learns from windows of ``student.history`` observations, and acts for hundreds. A hidden state that went on
  for ever would be one that training never saw. So there is a state for each observation of the window, which began
  there, and the oldest one answers: the student that acts is, up to rounding, the one that learnt.
* Parameters are drawn from the generator that is handed over, so that all ranks begin with the same ones.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from hpc_cpd.layers import seeded_linear
from hpc_cpd.settings import PluginSettings
from hpc_cpd.student.backbones.base import Backbone, Cache, Experts
from hpc_cpd.student.network import StudentShape


class GRUSettings(PluginSettings):
    """What ``student.backbone`` may say beside the name."""

    name: Literal["gru"] = "gru"
    initial_update_bias: float = Field(1.0, description="bias of the update gate; above 0 a new state changes slowly")


class GRU(Backbone):
    """Hidden state [rows, width], begun at zero."""

    Settings = GRUSettings
    mixtures = 1
    ends_with_experts = True

    def __init__(self, settings: GRUSettings, shape: StudentShape, generator: torch.Generator) -> None:
        super().__init__()
        self.history, self.width = shape.history, shape.width
        self.of_token = seeded_linear(shape.width, 3 * shape.width, generator)
        self.of_state = seeded_linear(shape.width, 3 * shape.width, generator)
        self.norm = nn.LayerNorm(shape.width)
        with torch.no_grad():
            self.of_token.bias[: shape.width] += settings.initial_update_bias

    @classmethod
    def build(cls, settings: GRUSettings, shape: StudentShape, generator: torch.Generator) -> Self:
        return cls(settings, shape, generator)

    def forward(
        self, tokens: Tensor, experts: Experts, positions: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        states = self.window(tokens) if cache is None else self.newest(tokens[:, 0], cache)[:, None]
        features = (tokens + states).flatten(0, 1)
        if positions is not None:  # what nobody asks for need not pass the experts
            features = features.index_select(0, positions)
        return experts(0, self.norm(features), positions)

    def window(self, tokens: Tensor) -> Tensor:
        """The state after each token: [B, L, width] both."""
        state, states = torch.zeros_like(tokens[:, 0]), []
        for token in tokens.unbind(1):
            state = self.next_state(token, state)
            states.append(state)
        return torch.stack(states, dim=1)

    def next_state(self, token: Tensor, state: Tensor) -> Tensor:
        keep_t, reset_t, new_t = self.of_token(token).chunk(3, dim=-1)
        keep_s, reset_s, new_s = self.of_state(state).chunk(3, dim=-1)
        keep = torch.sigmoid(keep_t + keep_s)
        return keep * state + (1 - keep) * torch.tanh(new_t + torch.sigmoid(reset_t + reset_s) * new_s)

    def new_cache(self, rows: int) -> Cache:
        """States [rows, 2, history, width]. The 2: after the newest observation and after the one before it, because an
        observation that is given again replaces the first. History: the observation at which a state began."""
        device = self.norm.weight.device
        kept = torch.zeros(rows, 2, self.history, self.width, device=device)
        return Cache(torch.zeros(rows, dtype=torch.int64, device=device), [kept])

    def newest(self, token: Tensor, cache: Cache) -> Tensor:
        """The state that began at the oldest observation of the window, after `token`: [rows, width] both."""
        (kept,), ages = cache.kept, cache.ages
        rows = torch.arange(len(ages), device=ages.device)
        before = kept[rows, (ages + 1) % 2]
        before[rows, ages % self.history] = 0.0  # one begins now
        after = self.next_state(token[:, None].expand_as(before), before)
        kept[rows, ages % 2] = after
        return after[rows, (ages - self.history + 1).clamp(min=0) % self.history]
