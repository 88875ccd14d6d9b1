"""What a tokenizer must offer: the observation and the task's vector in, one token out.

A plug-in of kind ``student.tokenizer`` has a class ``Settings`` and a function ``build`` that returns a
:class:`Tokenizer` (`hpc_cpd.student.network.Part`): a subclass, or, where settings are to be read without importing
torch, any object.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from hpc_cpd.layers import seeded_linear

if TYPE_CHECKING:
    from hpc_cpd.student.network import StudentShape

OBSERVATION_CLIP = 10.0


class Tokenizer(nn.Module):
    """Holds how observations are normalised, and makes tokens of them."""

    seen_size: int
    """How many numbers of each observation experts and gate get to see (``student.experts_see_observation``)."""
    observation_mean: Tensor
    observation_std: Tensor

    def __init__(self, shape: StudentShape) -> None:
        super().__init__()
        self.seen_size = shape.observation_size
        self.register_buffer("observation_mean", torch.zeros(shape.observation_size))
        self.register_buffer("observation_std", torch.ones(shape.observation_size))

    def forward(self, observations: Tensor, task_vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Raw observations [..., obs] and task vectors [..., D] -> (tokens [..., width], what experts see [...,
        `seen_size`]).
        """
        raise NotImplementedError  # every tokenizer has its own

    def normalised(self, observations: Tensor) -> Tensor:
        """Observations [..., obs] with mean 0 and standard deviation 1 in stage 1, clipped."""
        normalised = (observations - self.observation_mean) / self.observation_std
        return normalised.clamp(-OBSERVATION_CLIP, OBSERVATION_CLIP)

    def set_normaliser(self, mean: np.ndarray | Tensor, std: np.ndarray | Tensor) -> None:
        """Fix how observations are normalised, float [obs] each. Set once, before training; part of the state."""
        spread = torch.as_tensor(std, dtype=torch.float32)
        with torch.no_grad():
            self.observation_mean.copy_(torch.as_tensor(mean, dtype=torch.float32))
            self.observation_std.copy_(torch.where(spread > 0, spread, torch.ones_like(spread)))


class LinearTokenizer(Tokenizer):
    """Normalised and clipped observations, embedded; the embedded task vector is added."""

    def __init__(self, shape: StudentShape, generator: torch.Generator) -> None:
        super().__init__(shape)
        self.embed_observation = seeded_linear(shape.observation_size, shape.width, generator)
        self.embed_task = seeded_linear(shape.task_vector_size, shape.width, generator)

    def forward(self, observations: Tensor, task_vectors: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Tokenizer`."""
        normalised = self.normalised(observations)
        return self.embed_observation(normalised) + self.embed_task(task_vectors), normalised
