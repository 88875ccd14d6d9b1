"""The student network: a causal Transformer over the last observations, then a mixture of experts.

Shapes: B windows, L positions (at most `history`), E experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpc_cpd.config import StudentSettings
from hpc_cpd.student.gate import seeded_generator, seeded_linear
from hpc_cpd.student.mixture import Mixture

OBSERVATION_CLIP = 10.0
FEED_FORWARD_FACTOR = 4


@dataclass(frozen=True)
class StudentShape:
    """Everything that fixes the tensors' sizes and the meaning of a forward pass."""

    observation_size: int
    action_size: int
    task_vector_size: int
    width: int
    layers: int
    heads: int
    history: int
    expert_hidden: int
    experts_see_observation: bool
    top_k: int
    gate_bias_at_birth: float

    @staticmethod
    def from_settings(
        settings: StudentSettings, observation_size: int, action_size: int, task_vector_size: int
    ) -> StudentShape:
        """The shape the settings ask for; sizes that come from tasks are given beside them."""
        return StudentShape(
            observation_size=observation_size,
            action_size=action_size,
            task_vector_size=task_vector_size,
            width=settings.width,
            layers=settings.layers,
            heads=settings.heads,
            history=settings.history,
            expert_hidden=settings.expert_hidden,
            experts_see_observation=settings.experts_see_observation,
            top_k=settings.top_k,
            gate_bias_at_birth=settings.gate_bias_at_birth,
        )

    def as_json(self) -> dict[str, int | float | bool]:
        return dataclasses.asdict(self)


class Block(nn.Module):
    """Pre-LayerNorm causal Transformer block: [B, L, width] -> [B, L, width]."""

    def __init__(self, width: int, heads: int, generator: torch.Generator) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.query_key_value = seeded_linear(width, 3 * width, generator)
        self.attention_out = seeded_linear(width, width, generator)
        self.norm_feed_forward = nn.LayerNorm(width)
        self.feed_forward_in = seeded_linear(width, FEED_FORWARD_FACTOR * width, generator)
        self.feed_forward_out = seeded_linear(FEED_FORWARD_FACTOR * width, width, generator)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, length, width = tokens.shape
        mixed = self.query_key_value(self.norm_attention(tokens))
        query, key, value = mixed.view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        tokens = tokens + self.attention_out(attended.transpose(1, 2).reshape(batch, length, width))
        hidden = F.gelu(self.feed_forward_in(self.norm_feed_forward(tokens)))
        after: Tensor = tokens + self.feed_forward_out(hidden)
        return after


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
        imported. Raises ValueError when `heads` does not divide `width`.
        """
        super().__init__()
        if shape.width % shape.heads:
            raise ValueError(f"student.heads is {shape.heads}, which does not divide student.width {shape.width}")
        self.shape = shape
        self.experts_by_stage = [list(stage) for stage in experts_by_stage]
        self.expert_parallel_size = expert_parallel_size
        self.register_buffer("observation_mean", torch.zeros(shape.observation_size))
        self.register_buffer("observation_std", torch.ones(shape.observation_size))
        generator = seeded_generator(seed, 0)
        self.embed_observation = seeded_linear(shape.observation_size, shape.width, generator)
        self.embed_task = seeded_linear(shape.task_vector_size, shape.width, generator)
        self.position = nn.Parameter(torch.empty(shape.history, shape.width).normal_(0.0, 0.02, generator=generator))
        self.blocks = nn.ModuleList(Block(shape.width, shape.heads, generator) for _ in range(shape.layers))
        self.norm_features = nn.LayerNorm(shape.width)
        self.norm_head = nn.LayerNorm(shape.width)
        self.head = seeded_linear(shape.width, shape.action_size, generator)
        mixture: type[Mixture] = Mixture
        if not inference:
            from hpc_cpd.student.experts import MixtureOfExperts

            mixture = MixtureOfExperts
        observation = shape.observation_size if shape.experts_see_observation else 0
        self.mixture = mixture(
            input_size=shape.width + observation + shape.task_vector_size,
            output_size=shape.width,
            expert_hidden=shape.expert_hidden,
            experts_by_stage=self.experts_by_stage,
            expert_parallel_size=expert_parallel_size,
            top_k=shape.top_k,
            gate_bias_at_birth=shape.gate_bias_at_birth,
            seed=seed,
        )

    def forward(
        self,
        observations: Tensor,
        task_vectors: Tensor,
        valid: Tensor | None = None,
        lift_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Raw observations float32 [B, L, obs], task vectors float32 [B, D], valid bool [B, L] (None: all).

        Returns (actions [B, L, act], load-balancing loss [], gate probabilities [B, L, E]). Actions at positions that
        are not valid mean nothing. `lift_mask` bool [B]: windows whose tokens give experts of the newest stage a
        chance under a top-k gate (see `gate.Gate`).
        """
        length = observations.shape[1]
        features, normalised = self._features(observations, task_vectors)
        tasks = task_vectors[:, None].expand(-1, length, -1)
        flat = self._mixture_input(features, normalised, tasks).flatten(0, 1)
        lift = None if lift_mask is None else lift_mask[:, None].expand(-1, length).reshape(-1)
        mixed, balance, gate = self.mixture(flat, None if valid is None else valid.reshape(-1), lift)
        actions = self.head(self.norm_head(features + mixed.view_as(features)))
        return actions, balance, gate.view(*observations.shape[:2], gate.shape[1])

    def act_at(self, observations: Tensor, task_vectors: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Actions [B, act] and gate probabilities [B, E] at one `position` int64 [B] per window, for acting.

        The mixture sees B tokens rather than B * L, always as many: rounding does not depend on the windows' ages.
        """
        features, normalised = self._features(observations, task_vectors)
        rows = torch.arange(len(position), device=position.device)
        last = features[rows, position]
        mixed, _, gate = self.mixture(
            self._mixture_input(last, normalised[rows, position], task_vectors), every_expert=True
        )
        return self.head(self.norm_head(last + mixed)), gate

    def _features(self, observations: Tensor, task_vectors: Tensor) -> tuple[Tensor, Tensor]:
        normalised = (observations - self.observation_mean) / self.observation_std
        normalised = normalised.clamp(-OBSERVATION_CLIP, OBSERVATION_CLIP)
        tokens = self.embed_observation(normalised) + self.embed_task(task_vectors)[:, None]
        tokens = tokens + self.position[: observations.shape[1]]
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm_features(tokens), normalised

    def _mixture_input(self, features: Tensor, normalised: Tensor, task_vectors: Tensor) -> Tensor:
        seen = [normalised] if self.shape.experts_see_observation else []
        return torch.cat([features, *seen, task_vectors], dim=-1)

    def set_normaliser(self, mean: np.ndarray | Tensor, std: np.ndarray | Tensor) -> None:
        """Fix how observations are normalised, float [obs] each. Set once, before training; part of the state."""
        spread = torch.as_tensor(std, dtype=torch.float32)
        with torch.no_grad():
            self.observation_mean.copy_(torch.as_tensor(mean, dtype=torch.float32))
            self.observation_std.copy_(torch.where(spread > 0, spread, torch.ones_like(spread)))

    def shared_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) of everything outside the mixture; the same on every rank."""
        return [(name, value) for name, value in self.named_parameters() if not name.startswith("mixture.")]

    def gate_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) of the gate; the same on every rank."""
        return [(name, value) for name, value in self.named_parameters() if name.startswith("mixture.gate.")]

    def expert_parameters(self, ids: Iterable[int] | None = None) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) of the experts `ids` (None: all) that live on this rank."""
        prefixes = tuple(expert_prefix(e) for e in (self.mixture.ids if ids is None else ids))
        return [(name, value) for name, value in self.named_parameters() if name.startswith(prefixes)]

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


def expert_prefix(global_id: int) -> str:
    """How the names of one expert's parameters begin."""
    return f"mixture.experts.{global_id}."


def expert_of(name: str) -> int | None:
    """Global id of the expert a parameter name belongs to, None for everything else."""
    prefix = "mixture.experts."
    return int(name.removeprefix(prefix).partition(".")[0]) if name.startswith(prefix) else None


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
    born = {f"mixture.gate.weight_{stage}", f"mixture.gate.bias_{stage}"}
    fresh = {
        name: tensor.clone()
        for name, tensor in student.state_dict().items()
        if name in born or expert_of(name) in new_ids
    }
    student.load_canonical({**state, **fresh})
    return student
