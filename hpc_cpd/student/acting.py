"""A student at work: one observation per control tick in many environments at once, and nothing computed twice.

Keys and values of the observations that a block can still look back at are kept, so that a tick costs one token
instead of a window of them. Of the rest most is reading the experts' weights, and they are kept as a tick reads them.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from hpc_cpd.student.attention import Block, rotation
from hpc_cpd.student.moe.mixture import Expert, Mixture
from hpc_cpd.student.network import Student

FEW_ROWS = 64
"""Up to so many, one product for all experts is faster than one for each; beyond, their results leave the cache."""


class Actor:
    """Acts with the weights that `student` has when the actor is made; the student must hold all its experts."""

    def __init__(self, student: Student) -> None:
        self.student = student
        self.blocks = cast(list[Block], list(student.blocks))
        self.mixtures = cast(list[Mixture], list(student.mixtures))
        self._experts = [_SelectedExperts(m) if m.gate.selects else _StackedExperts(m) for m in self.mixtures]

    def begin(self, rows: int) -> None:
        """Forget everything and act in `rows` environments."""
        shape, size = self.student.shape, self.student.head_size
        self.ages = torch.zeros(rows, dtype=torch.int64)  # observations seen in this episode
        self._rows = torch.arange(rows)
        self._kept = [torch.zeros(2, rows, shape.heads, block.reach, size) for block in self.blocks]

    def act(self, observations: Tensor, task_vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Newest observations [rows, obs], task vectors [rows, D] -> (actions [rows, act], gate probabilities
        [rows, E], the mean of all mixtures).
        """
        student = self.student
        turn = rotation(self.ages, student.head_size).unsqueeze(2)
        tokens, context = student.embed(observations, task_vectors)
        gates = []
        for number, (block, kept) in enumerate(zip(self.blocks, self._kept, strict=True)):
            query, key, value = block.query_key_and_value(tokens[:, None], turn)
            slot = self.ages % block.reach
            kept[0, self._rows, :, slot] = key[:, :, 0]
            kept[1, self._rows, :, slot] = value[:, :, 0]
            written = torch.arange(block.reach) <= self.ages[:, None]
            attended = F.scaled_dot_product_attention(query, kept[0], kept[1], attn_mask=written[:, None, None])
            tokens = block.after_attention(tokens, attended.flatten(1))
            place = student.mixture_behind(number)
            if place is not None:
                features = student.norms_features[place](tokens)
                inputs = torch.cat([features, context], dim=-1)
                if self.mixtures[place].gate.selects or len(inputs) <= FEW_ROWS:
                    mixed, gate = self._experts[place](inputs)
                else:
                    mixed, _, gate = self.mixtures[place](inputs)
                tokens = features + mixed
                gates.append(gate)
        self.ages += 1
        return student.head(student.norm_head(tokens)), torch.stack(gates).mean(dim=0)


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

    Weights stand as the products of few rows read them, and what training needs is left out: 1.4 times as fast.
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
