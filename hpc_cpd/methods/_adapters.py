"""Low-rank adapters (LoRA, arXiv 2106.09685) on every linear layer and gate of a student."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpc_cpd.randomness import torch_generator
from hpc_cpd.student.moe.gate import Gate
from hpc_cpd.student.moe.precomputed import OldExperts
from hpc_cpd.student.network import Student

_UP, _DOWN = "_up", "_down"
_FLAGS = ("allreduce", "group_name")  # what DeepSpeed knows an expert's parameters by (see moe/deepspeed.py)


@dataclass(frozen=True)
class Adapters:
    """The low-rank adapters of every stage after the first, as a student folder holds them.

    `tensors`: ``STAGE/WEIGHT_up`` float32 [out, r] and ``STAGE/WEIGHT_down`` [r, in], r = min(rank, out, in).
    """

    tensors: Mapping[str, Tensor]

    def state_of_stage(self, state: Mapping[str, Tensor], stage: int) -> dict[str, Tensor]:
        """The canonical state that a task of `stage` (from 1) acts with; `state` is that of stage 1.

        A stage that has no adapters, because it has not learnt yet, acts as stage 1 does.
        """
        acting = dict(state)
        for name, weight in state.items():
            key = f"{stage}/{name}"
            if key + _UP in self.tensors:
                acting[name] = weight + self.tensors[key + _UP] @ self.tensors[key + _DOWN]
        return acting


def add_adapters(student: Student, rank: int, seed: int, stage: int) -> None:
    """Give every linear layer and gate of `student` a trainable adapter, with which it computes what it did before.

    How an adapter starts (up at zero, down uniform in +-1/sqrt(in)) is a function of seed, stage, and the name of the
    weight within its part of the student. That of an expert is spread over the ranks as the expert is. Raises
    ValueError for a student that has grown.
    """
    for place, module in list(student.named_modules()):
        if isinstance(module, nn.Linear):
            _adapt(module, AdaptedLinear, place, "weight", rank, seed, stage)
        elif isinstance(module, Gate):
            if module.stages != [1]:
                raise ValueError(f"adapters need a student that does not grow, but it has experts of {module.stages}")
            _adapt(module, AdaptedGate, place, "weight_1", rank, seed, stage)


class AdaptedLinear(nn.Linear):
    """A linear layer whose weight is weight + weight_up @ weight_down; that product is never made."""

    weight_up: nn.Parameter
    weight_down: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + F.linear(F.linear(input, self.weight_down), self.weight_up)


class AdaptedGate(Gate):
    """A gate of one stage, adapted likewise."""

    weight_1_up: nn.Parameter
    weight_1_down: nn.Parameter

    def logits(self, tokens: Tensor, old: OldExperts | None = None) -> Tensor:
        return super().logits(tokens, old) + F.linear(F.linear(tokens, self.weight_1_down), self.weight_1_up)


def _adapt(module: nn.Module, kind: type[nn.Module], place: str, name: str, rank: int, seed: int, stage: int) -> None:
    weight = module.get_parameter(name)
    outputs, inputs = weight.shape
    rank = min(rank, outputs, inputs)
    bound = inputs**-0.5
    generator = torch_generator(seed, f"adapter {place}.{name}", stage)
    down = torch.empty(rank, inputs).uniform_(-bound, bound, generator=generator)
    for suffix, values in ((_UP, torch.zeros(outputs, rank)), (_DOWN, down)):
        parameter = nn.Parameter(values.to(weight))
        vars(parameter).update({flag: value for flag, value in vars(weight).items() if flag in _FLAGS})
        module.register_parameter(name + suffix, parameter)
    module.__class__ = kind  # in place: whoever holds the layer goes on holding it
