"""Weights that a stage has to itself: what a student keeps for every stage, and the state its tasks act with.

PackNet (arXiv 1711.05769) shares the entries of every matrix out among the stages: a task acts with those that its own
stage and earlier ones own. Vectors (biases, layer norms, gate biases) belong to stage 1. Low-rank adapters (LoRA, arXiv
2106.09685) leave the student of stage 1 as it is: a task of a later stage acts with W + up @ down of its own stage.

    owner/NAME                    uint8, the shape of matrix NAME: the stage that owns each entry; 0: still free
    adapter/STAGE/NAME_up|_down   float32 [out, r] and [r, in], r = min(rank, out, in); none for stage 1
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpc_cpd.student.moe.gate import Gate, seeded_generator
from hpc_cpd.student.network import Student

_UP, _DOWN = "_up", "_down"


class Owners:
    """PackNet: the stage that owns each entry of each matrix."""

    method: ClassVar[str] = "packnet"

    def __init__(self, owners: Mapping[str, Tensor]) -> None:
        """`owners`: uint8 by canonical name, one for every matrix of the student."""
        self.owners = dict(owners)

    @staticmethod
    def of_nobody(state: Mapping[str, Tensor]) -> Owners:
        """Every matrix of the canonical `state` is free."""
        return Owners({name: torch.zeros(w.shape, dtype=torch.uint8) for name, w in state.items() if w.dim() > 1})

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> Owners:
        """What `tensors` gave; other keys are passed over."""
        return Owners({name.removeprefix("owner/"): t for name, t in tensors.items() if name.startswith("owner/")})

    def tensors(self) -> dict[str, Tensor]:
        """As a student folder holds them."""
        return {f"owner/{name}": owner for name, owner in self.owners.items()}

    def state_of_stage(self, state: Mapping[str, Tensor], stage: int) -> dict[str, Tensor]:
        """The canonical state that a task of `stage` (from 1) acts with; `state` is that of the newest stage."""
        acting = dict(state)
        for name, owner in self.owners.items():
            acting[name] = torch.where((owner >= 1) & (owner <= stage), state[name], 0.0)
        return acting

    def pruned(self, state: Mapping[str, Tensor], stage: int, stages: int) -> tuple[Owners, dict[str, Tensor]]:
        """Give `stage` (from 1, of `stages`) its share of what is free; (the owners then, the state then).

        Of the n free entries of a matrix it gets the ceil(n / (stages - stage + 1)) of largest magnitude, of equals
        the first; the others become zero and stay free. The last stage gets everything that is left.
        """
        owners, after = {}, dict(state)
        for name, owner in self.owners.items():
            free = (owner == 0).flatten()
            magnitudes = torch.where(free, state[name].flatten().abs(), -1.0)
            share = -(-int(free.sum()) // (stages - stage + 1))
            taken = owner.flatten().clone()
            taken[magnitudes.sort(descending=True, stable=True).indices[:share]] = stage
            owners[name] = taken.view_as(owner)
            after[name] = torch.where(owners[name] > 0, state[name], 0.0)
        return Owners(owners), after


class Adapters:
    """LoRA: the low-rank adapters of every stage after the first."""

    method: ClassVar[str] = "lora"

    def __init__(self, by_stage: Mapping[int, Mapping[str, Tensor]]) -> None:
        """`by_stage`: for each stage its up and down matrices, by canonical name."""
        self.by_stage = {stage: dict(adapters) for stage, adapters in by_stage.items()}

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> Adapters:
        """What `tensors` gave; other keys are passed over."""
        by_stage: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            if key.startswith("adapter/"):
                _, stage, name = key.split("/")
                by_stage.setdefault(int(stage), {})[name] = tensor
        return Adapters(by_stage)

    def tensors(self) -> dict[str, Tensor]:
        """As a student folder holds them."""
        return {f"adapter/{stage}/{name}": t for stage, part in self.by_stage.items() for name, t in part.items()}

    def state_of_stage(self, state: Mapping[str, Tensor], stage: int) -> dict[str, Tensor]:
        """The canonical state that a task of `stage` (from 1) acts with; `state` is that of stage 1.

        A stage that has no adapters, because it has not learnt yet, acts as stage 1 does.
        """
        acting, adapters = dict(state), self.by_stage.get(stage, {})
        for name, up in adapters.items():
            if name.endswith(_UP):
                weight = name.removesuffix(_UP)
                acting[weight] = state[weight] + up @ adapters[weight + _DOWN]
        return acting


Isolation = Owners | Adapters


def isolation_from(method: str, tensors: Mapping[str, Tensor]) -> Isolation:
    """What a student folder of `method` holds in `tensors`. Raises ValueError for a method that is not known."""
    for kind in (Owners, Adapters):
        if kind.method == method:
            return kind.from_tensors(tensors)
    raise ValueError(f"there is no isolation '{method}'")


def is_adapter(name: str) -> bool:
    """Whether the parameter `name` of a student with adapters is part of one."""
    return name.endswith((_UP, _DOWN))


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

    def _logits(self, tokens: Tensor) -> Tensor:
        return super()._logits(tokens) + F.linear(F.linear(tokens, self.weight_1_down), self.weight_1_up)


def _adapt(module: nn.Module, kind: type[nn.Module], place: str, name: str, rank: int, seed: int, stage: int) -> None:
    weight = module.get_parameter(name)
    outputs, inputs = weight.shape
    rank = min(rank, outputs, inputs)
    within = f"{place}.{name}".removeprefix("tokenizer.").removeprefix("backbone.")
    purpose = int.from_bytes(hashlib.sha256(within.encode()).digest()[:8], "big")
    bound = inputs**-0.5
    down = torch.empty(rank, inputs).uniform_(-bound, bound, generator=seeded_generator(seed, 4, stage, purpose))
    for suffix, values in ((_UP, torch.zeros(outputs, rank)), (_DOWN, down)):
        parameter = nn.Parameter(values.to(weight))
        # what DeepSpeed knows an expert's parameters by (see moe/deepspeed.py)
        for flag in ("allreduce", "group_name"):
            if hasattr(weight, flag):
                setattr(parameter, flag, getattr(weight, flag))
        module.register_parameter(name + suffix, parameter)
    module.__class__ = kind  # in place: whoever holds the layer goes on holding it
