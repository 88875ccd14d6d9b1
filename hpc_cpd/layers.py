"""Linear layers whose values are drawn from a given generator, or by the caller."""

from __future__ import annotations

import torch
from torch import nn


class _Undrawn(nn.Linear):
    def reset_parameters(self) -> None:
        """Draws nothing."""


def empty_linear(inputs: int, outputs: int) -> nn.Linear:
    """A float32 linear layer whose weights and biases are still to be drawn; no generator moves.

    `torch.nn.utils.skip_init` does the same by way of the meta device, whose operations import sympy, more than half a
    second of every process that makes a network.
    """
    layer: nn.Linear = _Undrawn(inputs, outputs)
    layer.__class__ = nn.Linear  # for whoever asks for the type
    return layer


def seeded_linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """A linear layer, weights and biases uniform in +-1/sqrt(inputs), drawn from `generator` alone."""
    layer = empty_linear(inputs, outputs)
    bound = inputs**-0.5
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
        layer.bias.uniform_(-bound, bound, generator=generator)
    return layer
