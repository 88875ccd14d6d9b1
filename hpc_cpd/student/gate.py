"""The gate of the mixture: which experts serve a token, and with what weight."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

GATE_ROW_SCALE = 0.1
"""New gate rows are this much smaller than an ordinary layer's, so that a birth bias decides alone."""


def seeded_generator(seed: int, *purpose: int) -> torch.Generator:
    """A generator that is a pure function of (seed, purpose), whatever was drawn before."""
    state = np.random.SeedSequence([seed, *purpose]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def seeded_linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """A linear layer, weights and biases uniform in +-1/sqrt(inputs), drawn from `generator` alone."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs)
    bound = inputs**-0.5
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
        layer.bias.uniform_(-bound, bound, generator=generator)
    return layer


@dataclass(frozen=True)
class Routing:
    """What the gate decided for n tokens and E experts (columns in order of ascending global id)."""

    probabilities: Tensor  # float [n, E]: softmax over all experts
    selected: Tensor | None  # int64 [n, k]: columns of the chosen experts; None: every expert serves every token
    weights: Tensor  # float [n, k] for the chosen, [n, E] when all are
    load: Tensor  # float64 [E]: how much the gate itself, not lifted, asks of every expert; no gradient


class Gate(nn.Module):
    """Softmax gate whose rows and biases are separate parameters per stage, so that a stage can be frozen alone."""

    def __init__(
        self, input_size: int, experts_by_stage: list[list[int]], top_k: int, bias_at_birth: float, seed: int
    ) -> None:
        """Stage 1 starts at bias 0; experts of a later stage start at `bias_at_birth`, so that nothing old changes.

        `top_k` 0 mixes all experts.
        """
        super().__init__()
        self.top_k = top_k
        self.bias_at_birth = bias_at_birth
        self.stages = [stage for stage, ids in enumerate(experts_by_stage, start=1) if ids]
        self.num_experts = sum(map(len, experts_by_stage))
        self.newest = len(experts_by_stage[self.stages[-1] - 1])
        bound = GATE_ROW_SCALE * input_size**-0.5
        for stage in self.stages:
            count = len(experts_by_stage[stage - 1])
            rows = torch.empty(count, input_size).uniform_(-bound, bound, generator=seeded_generator(seed, 1, stage))
            biases = torch.full((count,), self.bias_of(count) if stage > 1 else 0.0)
            self.register_parameter(f"weight_{stage}", nn.Parameter(rows))
            self.register_parameter(f"bias_{stage}", nn.Parameter(biases))

    def bias_of(self, newborns: int) -> float:
        """The bias at birth. More than five share the weight that five have: many change no more than five do."""
        return self.bias_at_birth - math.log(max(1.0, newborns / 5))

    def forward(self, tokens: Tensor, lift_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens [n, input] -> (logits [n, E], logits that select [n, E]).

        Tokens flagged by `lift_mask` bool [n] select without the birth bias of the newest stage: an expert born at
        -5 would never be among the top k, and would get no gradient.
        """
        # stage by stage: one product over all rows would round the old logits otherwise once there are more rows
        parts = [
            F.linear(tokens, self.get_parameter(f"weight_{stage}"), self.get_parameter(f"bias_{stage}"))
            for stage in self.stages
        ]
        logits = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        chooser = logits.detach()
        if lift_mask is not None and 0 < self.top_k < self.num_experts and len(self.stages) > 1:
            lift = torch.zeros_like(chooser[0])
            lift[-self.newest :] = -self.bias_of(self.newest)
            chooser = chooser + lift_mask[:, None] * lift
        return logits, chooser

    def route(self, logits: Tensor, chooser: Tensor) -> Routing:
        """Choose experts and weights for tokens with these logits.

        With k >= 2 the weights are a softmax over the chosen logits alone: the renormalised probabilities, but
        computed without the others, so that growth leaves them the same to the last bit. With k = 1 that would be
        the constant 1 and the gate would learn nothing, while the raw probability would shrink with every expert
        that is born; so the weight is exactly 1 and its gradient is that of the log-probability.
        """
        probabilities = F.softmax(logits, dim=-1)
        if not 0 < self.top_k < self.num_experts:
            return Routing(probabilities, None, probabilities, probabilities.detach().sum(dim=0).double())
        # Lifted tokens did not come by the gate's wish: counted as load, they would push new experts down again.
        wished = logits.detach().topk(self.top_k, dim=-1).indices
        load = torch.bincount(wished.reshape(-1), minlength=self.num_experts).double()
        selected = chooser.topk(self.top_k, dim=-1).indices
        if self.top_k == 1:
            log_probability = F.log_softmax(logits, dim=-1).gather(1, selected)
            weights = torch.exp(log_probability - log_probability.detach())
        else:
            weights = F.softmax(logits.gather(1, selected), dim=-1)
        return Routing(probabilities, selected, weights, load)
