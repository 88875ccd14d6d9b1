"""The student network: a tokenizer, a backbone with mixtures of experts in it, and a head.

Shapes: B windows, L positions (at most `history`), M mixtures, E experts in each.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from hpc_cpd import plugins
from hpc_cpd.randomness import numpy_generator, torch_generator
from hpc_cpd.settings import NetworkSettings, PluginSettings, StudentSettings
from hpc_cpd.student.backbones.base import Backbone, Cache
from hpc_cpd.student.moe.executors import FunctionalMixture, StackedMixture
from hpc_cpd.student.moe.mixture import Mixture
from hpc_cpd.student.moe.precomputed import Precomputed
from hpc_cpd.student.tokenizers.base import Tokenizer

Executor = Literal["sparse", "stacked", "functional"]
"""How the experts are asked: as in training, over ranks; for acting (`StackedMixture`); for `torch.func`
(`FunctionalMixture`)."""


class Part(Protocol):
    """What a plug-in must offer that is a tokenizer, a backbone or a head."""

    Settings: type[PluginSettings]

    @staticmethod
    def build(settings: Any, shape: StudentShape, generator: torch.Generator) -> Any:
        """A new module. Every random number must come from `generator`: all ranks then begin alike."""


class StudentShape(NetworkSettings):
    """Everything that fixes the tensors' sizes and the meaning of a forward pass."""

    observation_size: int
    action_size: int
    task_vector_size: int
    initial_gate_bias: float

    @staticmethod
    def from_settings(settings: StudentSettings, **others: Any) -> StudentShape:
        """The shape the settings ask for; `others`: the fields that come from tasks and method."""
        return StudentShape(**{name: getattr(settings, name) for name in NetworkSettings.model_fields}, **others)


class Student(nn.Module):
    """The generalist policy network.

    A new object starts the same on every rank: each parameter is a pure function of `seed` and its place.
    """

    def __init__(
        self,
        shape: StudentShape,
        experts_by_stage: list[list[int]],
        expert_parallel_size: int = 1,
        seed: int = 0,
        for_training: bool = True,
        executor: Executor = "sparse",
    ) -> None:
        """`experts_by_stage`: global expert ids, ascending. `for_training`: under DeepSpeed's engine, which is imported
        for no other student. Raises UserError when a part of the student is not installed.
        """
        super().__init__()
        self.shape = shape
        self.experts_by_stage = [list(stage) for stage in experts_by_stage]
        self.expert_parallel_size = expert_parallel_size
        generator = torch_generator(seed, "student")

        def build(kind: str, settings: PluginSettings) -> Any:
            part: Part = plugins.load(kind, settings.name)
            return part.build(settings, shape, generator)

        # registered, and drawn, in this order: the optimizer's sums go over the parameters in it
        self.tokenizer: Tokenizer = build("tokenizers", shape.tokenizer)
        self.backbone: Backbone = build("backbones", shape.backbone)
        self.head: nn.Module = build("heads", shape.head)
        self.backbone.functional = executor == "functional"
        kind: type[Mixture] = {"sparse": Mixture, "stacked": StackedMixture, "functional": FunctionalMixture}[executor]
        if for_training and kind is Mixture:
            from hpc_cpd.student.moe.deepspeed import MixtureOfExperts

            kind = MixtureOfExperts
        seen = self.tokenizer.seen_size if shape.experts_see_observation else 0
        inputs = shape.width + seen + shape.task_vector_size
        seeds = [numpy_generator(seed, "mixture", n).integers(2**32) for n in range(self.backbone.mixtures)]
        self.mixtures = nn.ModuleList(
            kind(shape, inputs, self.experts_by_stage, expert_parallel_size, int(seed)) for seed in seeds
        )

    def forward(
        self,
        observations: Tensor,
        task_vectors: Tensor,
        valid: Tensor | None = None,
        override: Tensor | None = None,
        cache: Cache | None = None,
        at: Tensor | None = None,
        precomputed: Precomputed | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Raw observations float32 [B, L, obs], task vectors float32 [B, D], valid bool [B, L] (None: all).

        Returns (actions [B, L, act], load-balancing loss [], gate probabilities [B, L, M, E]). Actions and the last
        mixture's probabilities are 0 at positions that are not valid. `override` bool [B]: windows whose tokens give
        experts of the newest stage a chance under a top-k gate (see `Gate.forward`).

        With `cache` L is 1: the newest observation of every row, whose past is in the cache; the load-balancing loss
        is 0 then. `at` int64 [B], in place of `valid`: one position of each window, and L is 1 in what is returned.

        `precomputed`: what `precompute` gave for the same windows, or a student with the same frozen parts; where one
        position of each is valid.
        """
        if precomputed is not None and valid is not None:
            return self._from_precomputed(precomputed, valid, override)
        rows, length = observations.shape[:2]
        tokens, context = self._tokens(observations, task_vectors)
        positions = None
        if at is not None:
            positions = at + length * torch.arange(rows, device=at.device)
        elif valid is not None:
            positions = valid.reshape(-1).nonzero().squeeze(1)
        if override is not None:
            override = override[:, None].expand(-1, length).reshape(-1)
        experts = _ExpertsOfPass(self.mixtures, context, valid, override, cache is not None)
        actions = self.head(self.backbone(tokens, experts, positions, cache))
        gates = experts.gates
        if at is not None and positions is not None:
            length = 1
            gates = [gate if gate.shape[0] == rows else gate.index_select(0, positions) for gate in gates]
        elif positions is not None:
            actions = actions.new_zeros(rows * length, actions.shape[1]).index_copy(0, positions, actions)
        if cache is not None:
            cache.ages += 1
        gate = torch.stack(gates, dim=1)
        places = (rows, length)  # in full: a rank without rows cannot infer them
        return (
            actions.view(*places, self.shape.action_size),
            torch.stack(experts.balances).mean() if experts.balances else actions.new_zeros(()),
            gate.view(*places, *gate.shape[1:]),
        )

    def _tokens(self, observations: Tensor, task_vectors: Tensor) -> tuple[Tensor, Tensor]:
        """(tokens [B, L, width], what experts see beside the features [B * L, C])."""
        vectors = task_vectors[:, None].expand(-1, observations.shape[1], -1)
        tokens, seen = self.tokenizer(observations, vectors)
        context = torch.cat([seen, vectors], dim=-1) if self.shape.experts_see_observation else vectors
        return tokens, context.flatten(0, 1)

    def _from_precomputed(
        self, known: Precomputed, valid: Tensor, override: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`forward` from the experts on: what comes before them is not computed, and enters no gradient."""
        mixture = cast(Mixture, self.mixtures[0])
        mixed, balance, gate = mixture(known.inputs, None, override, known.old)
        features = self.backbone.finish(known.inputs[:, : self.shape.width] + mixed)
        positions = torch.arange(0, valid.numel(), valid.shape[1], device=valid.device) + valid.int().argmax(dim=1)
        actions, gate = (
            values.new_zeros(valid.numel(), values.shape[1]).index_copy(0, positions, values)
            for values in (self.head(features), gate)
        )
        return actions.view(*valid.shape, actions.shape[1]), balance, gate.view(*valid.shape, 1, gate.shape[1])

    @torch.no_grad()
    def precompute(self, observations: Tensor, task_vectors: Tensor, valid: Tensor) -> tuple[Precomputed, Tensor]:
        """(what a later student with these parts frozen need not compute again, actions [B, act] of this one).

        Shapes as for `forward`, with one valid position in each window. For a student whose backbone
        `ends_with_experts` and that holds all of its experts.
        """
        found: list[Precomputed] = []
        tokens, context = self._tokens(observations, task_vectors)
        positions = valid.reshape(-1).nonzero().squeeze(1)

        def experts(number: int, features: Tensor, places: Tensor | None = None) -> Tensor:
            if places is None:
                features = features.index_select(0, positions)
            inputs = torch.cat([features, context.index_select(0, positions)], dim=-1)
            mixture = cast(Mixture, self.mixtures[number])
            old = mixture.as_old(inputs)
            found.append(Precomputed.of(inputs, old))
            return features + mixture.with_shared(old.mixed(), inputs)

        actions = self.head(self.backbone(tokens, experts, positions))
        return found[0], actions

    def shared_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) of everything but gates and experts that grow; the same on every rank."""
        return [(name, value) for name, value in self.named_parameters() if not _OF_MIXTURES.match(name)]

    def gate_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) of the gates; the same on every rank."""
        return [(name, value) for name, value in self.named_parameters() if _OF_GATES.match(name)]

    def expert_parameters(self, ids: Iterable[int] | None = None) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) of the experts `ids` (None: all) that live on this rank."""
        wanted = set(chain(*self.experts_by_stage) if ids is None else ids)
        return [(name, value) for name, value in self.named_parameters() if expert_of(name) in wanted]

    def load_canonical(self, state: Mapping[str, Tensor]) -> None:
        """Copy the tensors of a canonical state (names of an expert-parallel size of 1) that live on this rank.

        Raises ValueError naming a tensor that is missing or has another shape.
        """
        with torch.no_grad():
            for name, tensor in self.state_dict().items():
                if name not in state:
                    raise ValueError(f"the state has no tensor '{name}'")
                if state[name].shape != tensor.shape:
                    raise ValueError(f"tensor '{name}' has shape {list(state[name].shape)}, not {list(tensor.shape)}")
                tensor.copy_(state[name])
        for mixture in self.mixtures:
            cast(Mixture, mixture).weights_changed()


@dataclass
class _ExpertsOfPass:
    """The mixtures in one forward pass, as the backbone calls them (`backbones.base.Experts`)."""

    mixtures: nn.ModuleList
    context: Tensor  # [B * L, C]: what experts see beside the features
    valid: Tensor | None  # bool [B, L]
    override: Tensor | None  # bool [B * L]
    newest: bool  # whether L is 1, and the student acts
    balances: list[Tensor] = field(default_factory=list)
    gates: list[Tensor] = field(default_factory=list)

    def __call__(self, number: int, features: Tensor, positions: Tensor | None = None) -> Tensor:
        mixture = cast(Mixture, self.mixtures[number])
        context, override, served = self.context, self.override, None
        if positions is not None:
            context = context.index_select(0, positions)
            override = None if override is None else override.index_select(0, positions)
        elif self.valid is not None:  # valid positions, and those that they can look back at
            served = (self.valid.flip(1).cumsum(1).flip(1) > 0).reshape(-1)
        inputs = torch.cat([features, context], dim=-1)
        if self.newest:
            mixed, gate = mixture.newest(inputs)
        else:
            mixed, balance, gate = mixture(inputs, served, override)
            self.balances.append(balance)
        if positions is not None and self.valid is not None:
            gate = gate.new_zeros(len(self.context), gate.shape[1]).index_copy(0, positions, gate)
        self.gates.append(gate)
        return features + mixed


_OF_MIXTURES = re.compile(r"mixtures\.\d+\.(gate|experts|anchor)\b")
_OF_GATES = re.compile(r"mixtures\.\d+\.gate\.")
_OF_EXPERTS = re.compile(r"mixtures\.(\d+)\.experts\.(\d+)\.")


def expert_place(name: str) -> tuple[int, int] | None:
    """(mixture, global id of the expert) that a parameter name belongs to, None for everything else."""
    found = _OF_EXPERTS.match(name)
    return (int(found[1]), int(found[2])) if found else None


def expert_of(name: str) -> int | None:
    """Global id of the expert a parameter name belongs to, None for everything else."""
    place = expert_place(name)
    return place[1] if place is not None else None


def grown(
    state: Mapping[str, Tensor], shape: StudentShape, experts_by_stage: list[list[int]], new_ids: list[int], seed: int
) -> Student:
    """A student with one more stage of experts: old tensors copied, new experts seeded, new gate rows at initial bias.

    `state` is canonical. Raises ValueError when it does not hold the old student.
    """
    student = Student(shape, [*experts_by_stage, new_ids], seed=seed)
    newest = f"_{len(student.experts_by_stage)}"
    fresh = {
        name: tensor.clone()
        for name, tensor in student.state_dict().items()
        if expert_of(name) in new_ids or (_OF_GATES.match(name) and name.endswith(newest))
    }
    student.load_canonical({**state, **fresh})
    return student
