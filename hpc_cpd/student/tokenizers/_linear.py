"""The network of the linear tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hpc_cpd.layers import seeded_linear
from hpc_cpd.student.tokenizers.base import Tokenizer

if TYPE_CHECKING:
    from hpc_cpd.student.network import StudentShape


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
