"""Other ways to ask the experts of a mixture, for a student that acts and for gradients of single samples."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from hpc_cpd.student.moe.mixture import Expert, Mixture

FEW_ROWS = 64
"""Up to so many, one product for all experts is faster than one for each; beyond, their results leave the cache."""


class StackedMixture(Mixture):
    """Answers for newest observations with weights laid out once: mostly, a control step reads the experts' weights."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._experts: _SelectedExperts | _StackedExperts | None = None

    def newest(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Mixture`; the same up to rounding."""
        if not self.gate.selects and len(tokens) > FEW_ROWS:
            return super().newest(tokens)
        if self._experts is None:
            self._experts = _SelectedExperts(self) if self.gate.selects else _StackedExperts(self)
        return self._experts(tokens)

    def weights_changed(self) -> None:
        self._experts = None


class FunctionalMixture(Mixture):
    """Asks every expert at every token, with the weight zero for those that a top-k gate did not choose.

    So nothing depends on the data, as `torch.func` demands; actions and their gradients are those of `Mixture`.
    """

    def forward(
        self, tokens: Tensor, valid: Tensor | None = None, override: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [n, input] -> (outputs [n, output], 0 in place of a loss, gate probabilities [n, E]).

        Every token is served, whatever `valid` says, and the gate routes alone.
        """
        logits = self.gate(tokens, None)[0]
        weights = self.gate.weights_of_all(logits)
        outputs = torch.stack([expert(tokens) for expert in self.experts.values()], dim=1)
        mixed = (outputs * weights.unsqueeze(-1)).sum(dim=1)
        if self.shared is not None:
            mixed = mixed + self.shared(tokens)
        return mixed, mixed.new_zeros(()), F.softmax(logits, dim=-1)


class _StackedExperts:
    """All experts of a dense mixture side by side: the same outputs up to rounding, three products instead of 75."""

    def __init__(self, mixture: Mixture) -> None:
        experts = cast(list[Expert], list(mixture.experts.values()))
        self.gate = mixture.gate
        self.shared = mixture.shared
        # every expert reads the same tokens: one product; the last layers are added up: one product again
        self.first = torch.cat([expert.first.weight for expert in experts]).T.contiguous()
        self.first_bias = torch.cat([expert.first.bias for expert in experts])
        self.second = torch.stack([expert.second.weight.T for expert in experts]).contiguous()
        self.second_bias = torch.stack([expert.second.bias for expert in experts])[:, None]
        self.last = torch.cat([expert.last.weight.T for expert in experts]).contiguous()
        self.last_bias = torch.stack([expert.last.bias for expert in experts])

    def __call__(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [n, input] -> (outputs [n, output], gate probabilities [n, E])."""
        weights = F.softmax(self.gate(tokens, None)[0], dim=-1)
        hidden = F.gelu(torch.addmm(self.first_bias, tokens, self.first)).unflatten(1, (len(self.last_bias), -1))
        hidden = F.gelu(torch.baddbmm(self.second_bias, hidden.transpose(0, 1), self.second)).transpose(0, 1)
        outputs = (hidden * weights[:, :, None]).flatten(1) @ self.last + weights @ self.last_bias
        if self.shared is not None:
            outputs = outputs + self.shared(tokens)
        return outputs, weights


class _SelectedExperts:
    """The experts of a top-k mixture for the tokens that selected them: the same outputs up to rounding.

    Weights are laid out as products of few rows read them, and what training needs is left out: 1.4 times as fast.
    """

    def __init__(self, mixture: Mixture) -> None:
        experts = cast(list[Expert], list(mixture.experts.values()))
        self.gate = mixture.gate
        self.shared = mixture.shared
        self.output_size = mixture.output_size
        layers = [(expert.first, expert.second, expert.last) for expert in experts]
        self.layers = [[(layer.bias, layer.weight.T.contiguous()) for layer in expert] for expert in layers]

    def __call__(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [n, input] -> (outputs [n, output], gate probabilities [n, E])."""
        routing = self.gate.route(*self.gate(tokens, None))
        assert routing.selected is not None
        selected = routing.selected.flatten()
        order = selected.argsort(stable=True)
        counts = torch.bincount(selected, minlength=len(self.layers)).tolist()
        rows = tokens.index_select(0, order // routing.selected.shape[1])
        results = tokens.new_empty(len(rows), self.output_size)
        for part, result, (*inner, (bias, weight)) in zip(
            rows.split(counts), results.split(counts), self.layers, strict=True
        ):
            if len(part):
                for inner_bias, inner_weight in inner:
                    part = F.gelu(torch.addmm(inner_bias, part, inner_weight))
                torch.addmm(bias, part, weight, out=result)
        ordered = torch.empty_like(results).index_copy_(0, order, results)
        outputs = (ordered.view(*routing.selected.shape, -1) * routing.weights.unsqueeze(-1)).sum(dim=1)
        if self.shared is not None:
            outputs = outputs + self.shared(tokens)
        return outputs, routing.probabilities
