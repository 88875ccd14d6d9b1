"""The student network: a causal Transformer over the last observations, and mixtures of experts behind its last blocks.

Shapes: B windows, L positions (at most `history`), M mixtures, E experts in each.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from hpc_cpd.settings import StudentSettings
from hpc_cpd.student.attention import Block, reaches, rotation
from hpc_cpd.student.moe.gate import seeded_generator, seeded_linear
from hpc_cpd.student.moe.mixture import Mixture

OBSERVATION_CLIP = 10.0


@dataclass(frozen=True)
class StudentShape:
    """Everything that fixes the tensors' sizes and the meaning of a forward pass."""

    observation_size: int
    action_size: int
    task_vector_size: int
    width: int
    layers: int
    mixtures: int
    heads: int
    history: int
    expert_hidden: int
    shared_expert_hidden: int
    experts_see_observation: bool
    top_k: int
    gate_bias_at_birth: float

    @staticmethod
    def from_settings(
        settings: StudentSettings,
        observation_size: int,
        action_size: int,
        task_vector_size: int,
        initial_gate_bias: float,
    ) -> StudentShape:
        """The shape the settings ask for; sizes that come from tasks are given beside them."""
        return StudentShape(
            observation_size=observation_size,
            action_size=action_size,
            task_vector_size=task_vector_size,
            width=settings.width,
            layers=settings.layers,
            mixtures=settings.mixtures,
            heads=settings.heads,
            history=settings.history,
            expert_hidden=settings.expert_hidden,
            shared_expert_hidden=settings.shared_expert_hidden,
            experts_see_observation=settings.experts_see_observation,
            top_k=settings.top_k,
            gate_bias_at_birth=initial_gate_bias,
        )

    def as_json(self) -> dict[str, int | float | bool]:
        return dataclasses.asdict(self)


class Student(nn.Module):
    """The generalist policy network.

    A new object starts the same on every rank: each parameter is a pure function of `seed` and its place.
    """

    observation_mean: Tensor
    observation_std: Tensor

    def __init__(
        self,
        shape: StudentShape,
        experts_by_stage: list[list[int]],
        expert_parallel_size: int = 1,
        seed: int = 0,
        inference: bool = False,
    ) -> None:
        """`experts_by_stage`: global expert ids, ascending. `inference`: never under an engine, so DeepSpeed is not
        imported. Raises ValueError when the sizes do not fit each other.
        """
        super().__init__()
        if shape.width % (2 * shape.heads):
            raise ValueError(
                f"student.heads is {shape.heads}, but student.width {shape.width} is no multiple of twice it"
            )
        if shape.mixtures > shape.layers:
            raise ValueError(f"student.mixtures is {shape.mixtures}, more than student.layers, {shape.layers}")
        self.shape = shape
        self.experts_by_stage = [list(stage) for stage in experts_by_stage]
        self.expert_parallel_size = expert_parallel_size
        self.register_buffer("observation_mean", torch.zeros(shape.observation_size))
        self.register_buffer("observation_std", torch.ones(shape.observation_size))
        generator = seeded_generator(seed, 0)
        self.embed_observation = seeded_linear(shape.observation_size, shape.width, generator)
        self.embed_task = seeded_linear(shape.task_vector_size, shape.width, generator)
        self.blocks = nn.ModuleList(
            Block(shape.width, shape.heads, reach, generator) for reach in reaches(shape.history, shape.layers)
        )
        self.norms_features = nn.ModuleList(nn.LayerNorm(shape.width) for _ in range(shape.mixtures))
        self.norm_head = nn.LayerNorm(shape.width)
        self.head = seeded_linear(shape.width, shape.action_size, generator)
        kind: type[Mixture] = Mixture
        if not inference:
            from hpc_cpd.student.moe.deepspeed import MixtureOfExperts

            kind = MixtureOfExperts
        observation = shape.observation_size if shape.experts_see_observation else 0
        self.mixtures = nn.ModuleList(
            kind(
                input_size=shape.width + observation + shape.task_vector_size,
                output_size=shape.width,
                expert_hidden=shape.expert_hidden,
                experts_by_stage=self.experts_by_stage,
                expert_parallel_size=expert_parallel_size,
                top_k=shape.top_k,
                gate_bias_at_birth=shape.gate_bias_at_birth,
                seed=int(np.random.SeedSequence([seed, 3, number]).generate_state(1)[0]),
                shared_hidden=shape.shared_expert_hidden,
            )
            for number in range(shape.mixtures)
        )

    @property
    def expert_ids(self) -> list[int]:
        """Global ids of all experts, ascending."""
        return [global_id for stage in self.experts_by_stage for global_id in stage]

    def forward(
        self,
        observations: Tensor,
        task_vectors: Tensor,
        valid: Tensor | None = None,
        lift_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Raw observations float32 [B, L, obs], task vectors float32 [B, D], valid bool [B, L] (None: all).

        Returns (actions [B, L, act], load-balancing loss [], gate probabilities [B, L, M, E]). Actions and the last
        mixture's probabilities are 0 at positions that are not valid. `lift_mask` bool [B]: windows whose tokens give
        experts of the newest stage a chance under a top-k gate (see `gate.Gate`).
        """
        rows, length = observations.shape[:2]
        tokens, context = self.embed(observations, task_vectors[:, None].expand(-1, length, -1))
        turn = rotation(torch.arange(length, device=tokens.device), self.head_size)
        lift = None if lift_mask is None else lift_mask[:, None].expand(-1, length).reshape(-1)
        # behind the last block's attention every position goes its own way, and those that are not valid none at all
        read = None if valid is None else valid.reshape(-1).nonzero().squeeze(1)
        balances, gates = [], []
        for number, block in enumerate(self.blocks):
            last = number == self.shape.layers - 1
            tokens = block(tokens, turn, read if last else None).flatten(0, -2)
            place = self.mixture_behind(number)
            if place is not None:
                features = self.norms_features[place](tokens)
                seen, served, born = context.flatten(0, 1), self._served(valid, place), lift
                if last and read is not None:
                    seen, served = seen.index_select(0, read), None
                    born = None if lift is None else lift.index_select(0, read)
                mixed, balance, gate = self.mixtures[place](torch.cat([features, seen], dim=-1), served, born)
                tokens = features + mixed
                balances.append(balance)
                gates.append(gate)
            if not last:
                tokens = tokens.view(rows, length, self.shape.width)
        actions = self.head(self.norm_head(tokens))
        if read is not None:
            *before, gate = gates
            actions = actions.new_zeros(rows * length, actions.shape[1]).index_copy(0, read, actions)
            gates = [*before, gate.new_zeros(rows * length, gate.shape[1]).index_copy(0, read, gate)]
        gate = torch.stack(gates, dim=1)
        places = (rows, length)  # in full: a rank without rows cannot infer them
        return (
            actions.view(*places, self.shape.action_size),
            torch.stack(balances).mean(),
            gate.view(*places, *gate.shape[1:]),
        )

    @property
    def head_size(self) -> int:
        return self.shape.width // self.shape.heads

    def embed(self, observations: Tensor, task_vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Raw observations [..., obs] and task vectors [..., D] -> (tokens [..., width], what experts also see)."""
        normalised = (observations - self.observation_mean) / self.observation_std
        normalised = normalised.clamp(-OBSERVATION_CLIP, OBSERVATION_CLIP)
        tokens = self.embed_observation(normalised) + self.embed_task(task_vectors)
        seen = [normalised] if self.shape.experts_see_observation else []
        return tokens, torch.cat([*seen, task_vectors], dim=-1)

    def mixture_behind(self, block: int) -> int | None:
        """Number of the mixture that follows block `block`, if one does."""
        number = block - (self.shape.layers - self.shape.mixtures)
        return number if number >= 0 else None

    def _served(self, valid: Tensor | None, mixture: int) -> Tensor | None:
        """bool [B * L]: a mixture before the last serves valid positions and those that these look back at."""
        if valid is None or mixture == self.shape.mixtures - 1:
            return None
        return (valid.flip(1).cumsum(1).flip(1) > 0).reshape(-1)

    def set_normaliser(self, mean: np.ndarray | Tensor, std: np.ndarray | Tensor) -> None:
        """Fix how observations are normalised, float [obs] each. Set once, before training; part of the state."""
        spread = torch.as_tensor(std, dtype=torch.float32)
        with torch.no_grad():
            self.observation_mean.copy_(torch.as_tensor(mean, dtype=torch.float32))
            self.observation_std.copy_(torch.where(spread > 0, spread, torch.ones_like(spread)))

    def shared_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) of everything but gates and experts that grow; the same on every rank."""
        return [(name, value) for name, value in self.named_parameters() if not _OF_MIXTURES.match(name)]

    def gate_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) of the gates; the same on every rank."""
        return [(name, value) for name, value in self.named_parameters() if _OF_GATES.match(name)]

    def expert_parameters(self, ids: Iterable[int] | None = None) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) of the experts `ids` (None: all) that live on this rank."""
        wanted = set(self.expert_ids if ids is None else ids)
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
    state: Mapping[str, Tensor],
    shape: StudentShape,
    experts_by_stage_old: list[list[int]],
    new_ids: list[int],
    expert_parallel_size: int,
    seed: int,
) -> Student:
    """A student with one more stage of experts: old tensors copied, new experts seeded, new gate rows at birth bias.

    `state` is canonical. Raises ValueError when it does not hold the old student.
    """
    student = Student(shape, [*experts_by_stage_old, new_ids], expert_parallel_size, seed)
    stage = len(experts_by_stage_old) + 1
    born = {f"mixtures.{n}.gate.{part}_{stage}" for n in range(shape.mixtures) for part in ("weight", "bias")}
    fresh = {
        name: tensor.clone()
        for name, tensor in student.state_dict().items()
        if name in born or expert_of(name) in new_ids
    }
    student.load_canonical({**state, **fresh})
    return student
