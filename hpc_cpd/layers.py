"""Linear layers that are born without values, for whoever draws their own."""

from __future__ import annotations

import torch
from torch import nn


def empty_linear(inputs: int, outputs: int) -> nn.Linear:
    """A float32 linear layer whose weights and biases are still to be drawn; no generator moves.

    `torch.nn.utils.skip_init` does the same by way of an operation whose first call imports sympy, more than half a
    second of every process that makes a network.
    """
    layer = nn.Linear(inputs, outputs, device="meta")
    layer.weight = nn.Parameter(torch.empty(outputs, inputs))
    layer.bias = nn.Parameter(torch.empty(outputs))
    return layer
