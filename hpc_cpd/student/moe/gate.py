"""The gate of the mixture: which experts serve a token, and with what weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpc_cpd.randomness import torch_generator
from hpc_cpd.student.moe.precomputed import OldExperts

GATE_ROW_SCALE = 0.1
"""New gate rows are this much smaller than an ordinary layer's, so that the initial bias decides alone."""


@dataclass(frozen=True)
class Routing:
    """What the gate decided for n tokens and E experts (columns in order of ascending global id)."""

    probabilities: Tensor  # float [n, E]: softmax over all experts
    selected: Tensor | None  # int64 [n, k]: columns of the chosen experts; None: every expert serves every token
    weights: Tensor  # float [n, k] for the chosen, [n, E] when all are
    load: Tensor  # float64 [E]: how much the gate by itself asks of every expert; no gradient


class Gate(nn.Module):
    """Softmax gate whose rows and biases are separate parameters per stage, so that a stage can be frozen alone."""

    def __init__(
        self, input_size: int, experts_by_stage: list[list[int]], top_k: int, initial_bias: float, seed: int
    ) -> None:
        """Stage 1 starts at bias 0; experts of a later stage start at `initial_bias`, so that nothing old changes.

        `top_k` 0 mixes all experts.
        """
        super().__init__()
        self.top_k = top_k
        self.initial_bias = initial_bias
        self.stages = [stage for stage, ids in enumerate(experts_by_stage, start=1) if ids]
        self.num_experts = sum(map(len, experts_by_stage))
        self.newest = len(experts_by_stage[self.stages[-1] - 1])
        bound = GATE_ROW_SCALE * input_size**-0.5
        for stage in self.stages:
            count = len(experts_by_stage[stage - 1])
            rows = torch.empty(count, input_size).uniform_(
                -bound, bound, generator=torch_generator(seed, "gate", stage)
            )
            biases = torch.full((count,), self.initial_bias_of(count) if stage > 1 else 0.0)
            self.register_parameter(f"weight_{stage}", nn.Parameter(rows))
            self.register_parameter(f"bias_{stage}", nn.Parameter(biases))

    @property
    def selects(self) -> bool:
        """Whether tokens go to some experts alone."""
        return 0 < self.top_k < self.num_experts

    def initial_bias_of(self, new_experts: int) -> float:
        """That of each of so many. More than five share the weight that five have: many change no more than five do."""
        return self.initial_bias - math.log(max(1.0, new_experts / 5))

    def forward(
        self, tokens: Tensor, override: Tensor | None, old: OldExperts | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens [n, input] -> (logits [n, E], logits that select [n, E], or None where they are the same).

        `old`: what is known of the experts of all stages but the newest.

        Tokens flagged by `override` bool [n] are routed without the initial bias of the newest stage: an expert that
        starts at -5 would never be among the top k, and would get no gradient.
        """
        with torch.autocast(tokens.device.type, enabled=False):  # who serves a token must not be a matter of rounding
            logits = self.logits(tokens.float(), old)
        if override is None or not self.selects or len(self.stages) == 1:
            return logits, None
        change = logits.new_zeros(self.num_experts)
        change[-self.newest :] = -self.initial_bias_of(self.newest)
        return logits, logits.detach() + override[:, None] * change

    def logits(self, tokens: Tensor, old: OldExperts | None = None) -> Tensor:
        """Those of all experts, float [n, E], for `tokens` [n, input]."""
        # stage by stage: one product over all rows would round the old logits otherwise once there are more rows
        parts = [] if old is None else [old.logits]
        parts += [
            # not get_parameter, which takes no plain tensor in a parameter's place (torch.func.functional_call)
            F.linear(tokens, getattr(self, f"weight_{stage}"), getattr(self, f"bias_{stage}"))
            for stage in (self.stages if old is None else self.stages[-1:])
        ]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def route(self, logits: Tensor, chooser: Tensor | None, old: OldExperts | None = None) -> Routing:
        """Choose experts and weights for tokens with these logits; of `old` experts, among those it has answers of.

        With k >= 2 the weights are a softmax over the chosen logits alone: the renormalised probabilities, but
        computed without the others, so that growth leaves them the same to the last bit. With k = 1 that would be
        the constant 1 and the gate would learn nothing, while the raw probability would shrink with every expert
        that is born; so the weight is exactly 1 and its gradient is that of the log-probability.
        """
        probabilities = F.softmax(logits, dim=-1)
        if not self.selects:
            return Routing(probabilities, None, probabilities, probabilities.detach().sum(dim=0).double())
        # Where the bias was overridden the gate did not choose: as load, such tokens would push new experts down again.
        wished = self.highest(logits.detach(), old)
        load = counted(wished, self.num_experts)
        selected = wished if chooser is None else self.highest(chooser, old)
        if self.top_k == 1:
            weights = OneByLogProbability.apply(logits, probabilities.detach(), selected)
        else:
            weights = F.softmax(logits.gather(1, selected), dim=-1)
        return Routing(probabilities, selected, weights, load)

    def weights_of_all(self, logits: Tensor) -> Tensor:
        """Logits [n, E] -> the weights of `route` and their gradients [n, E], zero for experts that are not chosen.

        Made of differentiable operations whose shapes do not depend on the data, as `torch.func` demands.
        """
        if not self.selects:
            return F.softmax(logits, dim=-1)
        selected = self.highest(logits.detach())
        if self.top_k == 1:
            logarithms = F.log_softmax(logits, dim=-1).gather(1, selected)
            weights = 1.0 + logarithms - logarithms.detach()
        else:
            weights = F.softmax(logits.gather(1, selected), dim=-1)
        return torch.zeros_like(logits).scatter(1, selected, weights)

    def highest(self, logits: Tensor, old: OldExperts | None = None) -> Tensor:
        """Columns int64 [n, k] of the highest `logits` [n, E]."""
        if old is not None:
            logits = old.only_selected(logits)
        if self.top_k == 1:
            return logits.argmax(dim=-1, keepdim=True)  # topk takes up to ten times as long
        return logits.topk(self.top_k, dim=-1).indices


def counted(columns: Tensor, count: int) -> Tensor:
    """How often each of the numbers below `count` is in `columns`, float64 [count]; torch.bincount waits for a GPU."""
    ones = torch.ones(columns.numel(), dtype=torch.float64, device=columns.device)
    return ones.new_zeros(count).scatter_add_(0, columns.reshape(-1), ones)


class OneByLogProbability(torch.autograd.Function):
    """The constant 1 for each chosen expert, with the gradient of its log-probability."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, probabilities: Tensor, selected: Tensor) -> Tensor:
        ctx.save_for_backward(probabilities, selected)
        return torch.ones_like(selected, dtype=logits.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        probabilities, selected = ctx.saved_tensors
        return (probabilities * -gradients[0]).scatter_add_(1, selected, gradients[0]), None, None
