"""What a backbone must offer: the tokens of a history in, features of each observation out, with experts in between.

A plug-in of kind ``student.backbone`` has a class ``Settings`` and a function ``build`` that returns a
:class:`Backbone` (`hpc_cpd.student.network.Part`): a subclass, or, where settings are to be read without importing
torch, any object.

The features of an observation may depend on the last ``student.history`` observations and on nothing before them: a
student learns from windows of that length, and acts one observation at a time with what its backbone keeps of the
others. Both must give the same features.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn


class Experts(Protocol):
    """The student's mixtures of experts, for the tokens of one forward pass."""

    def __call__(self, number: int, features: Tensor, positions: Tensor | None = None) -> Tensor:
        """`features` [n, width] with the outputs of mixture `number` (from 0) added.

        They belong to the `positions` int64 [n] of the B * L observations; None: to all of them.
        """


@dataclass
class Cache:
    """What is kept of the observations of every row (an environment, in which episodes begin at different times)."""

    ages: Tensor
    """int64 [rows]: how many observations of its episode each row has had before the one that is given. The student
    counts. An observation that is given at an age that a row has had already replaces the one before, and nothing that
    was kept of later ones may be looked at again: an episode begins anew, or the task is thought to be another one."""
    kept: list[Tensor] = field(default_factory=list)
    """Whatever the backbone keeps."""


class Backbone(nn.Module):
    """The part of the student that looks back."""

    mixtures: int
    """How many mixtures of experts it calls."""
    ends_with_experts: bool = False
    """Whether nothing behind its only mixture looks at another observation: `finish` is all that is left to do there. A
    stage in which the backbone is frozen then computes the features of a step once."""
    functional: bool = False
    """Whether `torch.func` computes gradients of single samples through it: then no shape may depend on the data."""

    def forward(
        self, tokens: Tensor, experts: Experts, positions: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Tokens [B, L, width], oldest first -> features [n, width].

        `experts` must be called once for each mixture, in order. `positions` int64 [n], into B * L: the observations
        that features are wanted of; None: all. With `cache`, L is 1: the newest observation of each row.
        """
        raise NotImplementedError  # every backbone has its own

    def finish(self, features: Tensor) -> Tensor:
        """What `forward` does behind its only mixture, where it `ends_with_experts`: [n, width] -> [n, width]."""
        return features

    def new_cache(self, rows: int) -> Cache:
        """For `rows` environments that each begin an episode."""
        raise NotImplementedError  # every backbone keeps something else
