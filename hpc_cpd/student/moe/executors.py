"""Other ways to ask the experts of a mixture, for a student that acts and for gradients of single samples."""

from __future__ import annotations

from itertools import chain
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from hpc_cpd.student.moe.mixture import Expert, Mixture
from hpc_cpd.student.moe.precomputed import OldExperts

FEW_ROWS = 64
"""Up to so many, one product for all experts is faster than one for each; beyond, their results leave the cache."""


class StackedMixture(Mixture):
    """Answers for newest observations with weights laid out once: mostly, a control step reads the experts' weights."""

    _layout: list[Any] | None = None

    def newest(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Mixture`; the same up to rounding."""
        if not self.gate.selects and len(tokens) > FEW_ROWS:
            return super().newest(tokens)
        if self._layout is None:
            experts = cast(list[Expert], list(self.experts.values()))
            self._layout = _each(experts) if self.gate.selects else _side_by_side(experts)
        logits = self.gate.logits(tokens)
        probabilities = F.softmax(logits, dim=-1)
        if self.gate.selects:
            selected = self.gate.highest(logits)
            outputs = self._by_selected(tokens, selected, F.softmax(logits.gather(1, selected), dim=-1), self._layout)
        else:
            outputs = self._by_all(tokens, probabilities, self._layout)
        return self.with_shared(outputs, tokens), probabilities

    def weights_changed(self) -> None:
        self._layout = None

    def _by_all(self, tokens: Tensor, weights: Tensor, layout: list[Any]) -> Tensor:
        """All experts of a dense mixture: three products instead of 75."""
        first_bias, first, second_bias, second, last_bias, last = layout
        hidden = F.gelu(torch.addmm(first_bias, tokens, first)).unflatten(1, (len(last_bias), -1))
        hidden = F.gelu(torch.baddbmm(second_bias, hidden.transpose(0, 1), second)).transpose(0, 1)
        return torch.addmm(weights @ last_bias, (hidden * weights[:, :, None]).flatten(1), last)

    def _by_selected(self, tokens: Tensor, selected: Tensor, weights: Tensor, layout: list[Any]) -> Tensor:
        """The experts of a top-k mixture for the tokens that selected them, layer by layer: others are not read."""
        places: dict[int, list[int]] = {}
        for place, expert in enumerate(selected.flatten().tolist()):
            places.setdefault(expert, []).append(place)
        counts = [len(here) for here in places.values()]
        order = torch.tensor(list(chain(*places.values())), device=tokens.device)
        rows = tokens.expand(len(order), -1) if len(tokens) == 1 else tokens[order // selected.shape[1]]
        for layer, parameters in enumerate(layout):
            results = rows.new_empty(len(order), parameters[0][0].shape[0])
            parts = zip(places, rows.split_with_sizes(counts), results.split_with_sizes(counts), strict=True)
            for expert, part, result in parts:
                bias, weight = parameters[expert]
                torch.addmm(bias, part, weight, out=result)
            rows = F.gelu(results) if layer < len(layout) - 1 else results
        if len(tokens) == 1:  # in its order already
            return weights @ rows
        answers = torch.empty_like(rows).index_copy_(0, order, rows).view(*selected.shape, -1)
        return torch.bmm(weights[:, None], answers).squeeze(1)


def _side_by_side(experts: list[Expert]) -> list[Any]:
    """Biases and weights of the three layers of all experts."""
    # every expert reads the same tokens: one product; the last layers are added up: one product again
    return [
        torch.cat([expert.first.bias for expert in experts]),
        torch.cat([expert.first.weight for expert in experts]).T.contiguous(),
        torch.stack([expert.second.bias for expert in experts])[:, None],
        torch.stack([expert.second.weight.T for expert in experts]).contiguous(),
        torch.stack([expert.last.bias for expert in experts]),
        torch.cat([expert.last.weight.T for expert in experts]).contiguous(),
    ]


def _each(experts: list[Expert]) -> list[Any]:
    """(bias, weight) of each expert, for each of the three layers."""
    layers = zip(*((expert.first, expert.second, expert.last) for expert in experts), strict=True)
    return [[(layer.bias, layer.weight.T.contiguous()) for layer in same] for same in layers]


class FunctionalMixture(Mixture):
    """Asks every expert at every token, with the weight zero for those that a top-k gate did not choose.

    So nothing depends on the data, as `torch.func` demands; actions and their gradients are those of `Mixture`.
    """

    def forward(
        self,
        tokens: Tensor,
        valid: Tensor | None = None,
        override: Tensor | None = None,
        old: OldExperts | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [n, input] -> (outputs [n, output], 0 in place of a loss, gate probabilities [n, E]).

        Every token is served, whatever `valid` says, every expert is asked, and the gate routes alone.
        """
        logits = self.gate(tokens, None)[0]
        weights = self.gate.weights_of_all(logits)
        outputs = torch.stack([expert(tokens) for expert in self.experts.values()], dim=1)
        mixed = self.with_shared((outputs * weights.unsqueeze(-1)).sum(dim=1), tokens)
        return mixed, mixed.new_zeros(()), F.softmax(logits, dim=-1)
