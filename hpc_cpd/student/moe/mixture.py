"""The mixture of experts itself: gate, experts keyed by global id, dense or top-k mixing, on one rank or many.

This module knows torch alone, so that a published student can be loaded anywhere; `deepspeed.py` puts it under
DeepSpeed's engine, `executors.py` has the forms in which nothing is trained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist

from hpc_cpd.layers import seeded_linear
from hpc_cpd.randomness import torch_generator
from hpc_cpd.student.moe.dispatch import Combine, ExchangeRows, Group, Reorder, RowPlan, SendToAll, Tie, plan_rows
from hpc_cpd.student.moe.gate import Gate, Routing, counted
from hpc_cpd.student.moe.precomputed import OldExperts

if TYPE_CHECKING:
    from hpc_cpd.student.network import StudentShape


class Expert(nn.Module):
    """Two hidden layers with GELU: [n, input] -> [n, output]."""

    def __init__(self, input_size: int, hidden: int, output_size: int, generator: torch.Generator) -> None:
        super().__init__()
        self.first = seeded_linear(input_size, hidden, generator)
        self.second = seeded_linear(hidden, hidden, generator)
        self.last = seeded_linear(hidden, output_size, generator)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.last(F.gelu(self.second(F.gelu(self.first(tokens)))))
        return hidden


class Mixture(nn.Module):
    """Gate and experts; expert e lives on rank ``e % expert_parallel_size`` of its group, any number per rank.

    Round robin, because contiguous placement would put all experts of a new stage on one rank.
    """

    def __init__(
        self, shape: StudentShape, inputs: int, experts_by_stage: list[list[int]], expert_parallel_size: int, seed: int
    ) -> None:
        """`experts_by_stage`: global ids in ascending order over the stages, at least one.

        Beside them may be a shared expert, which serves every token and is on every rank.
        """
        nn.Module.__init__(self)  # not super(): DeepSpeed's MoE, a base of the subclass, must not build its own layer
        ids = [global_id for stage in experts_by_stage for global_id in stage]
        if not ids or ids != sorted(set(ids)):
            raise ValueError(f"expert ids must ascend over the stages, but they are {experts_by_stage}")
        self.output_size = shape.width
        self.ids = ids
        self.expert_parallel_size = expert_parallel_size
        self.expert_parallel_rank = this_rank() % expert_parallel_size
        self.owners = np.array([global_id % expert_parallel_size for global_id in ids])
        self.gate = Gate(inputs, experts_by_stage, shape.top_k, shape.initial_gate_bias, seed)

        here = [number for number in ids if number % expert_parallel_size == self.expert_parallel_rank]
        self.experts = nn.ModuleDict(
            {  # how an expert starts is a function of the seed and its global id alone
                str(number): Expert(inputs, shape.expert_hidden, shape.width, torch_generator(seed, "expert", number))
                for number in here
            }
        )
        shared = torch_generator(seed, "shared expert")
        hidden = shape.shared_expert_hidden
        self.shared = Expert(inputs, hidden, shape.width, shared) if hidden else None
        # Never moves (its gradient is zero); keeps every rank in every backward pass and in DeepSpeed's groups.
        self.anchor = nn.Parameter(torch.zeros(1))
        self._group: Group = None

    def forward(
        self,
        tokens: Tensor,
        valid: Tensor | None = None,
        override: Tensor | None = None,
        old: OldExperts | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [n, input] -> (outputs [n, output], load-balancing loss [], gate probabilities [n, E]).

        Tokens with `valid` bool [n] False reach no expert, count in no statistics, and come out as zeros. The loss is
        scaled so that its mean over ranks is the loss of the global batch. `override` bool [n]: see `Gate.forward`.
        `old`: what the experts of all stages but the newest say, which are then not asked (without `valid`). A
        collective over the ranks when training or when experts are spread.
        """
        if self.expert_parallel_size > 1 and self._group is None:
            raise RuntimeError("experts are spread over ranks, but no expert-parallel group was set by the engine")
        logits, chooser = self.gate(tokens, override, old)
        index = None if valid is None or bool(valid.all()) else valid.nonzero().squeeze(1)
        if index is None:
            routing, served = self.gate.route(logits, chooser, old), tokens
            probabilities = routing.probabilities
        else:
            routing = self.gate.route(logits[index], None if chooser is None else chooser[index])
            served = tokens.index_select(0, index)
            probabilities = F.softmax(logits, dim=-1)
        first = 0 if old is None else old.logits.shape[1]  # column of the gate from which on experts are asked
        table = self._counts(routing, first)
        if routing.selected is None:
            outputs = self._mix_all(served, routing.weights[:, first:], table, first)
            if old is not None:
                outputs = outputs + old.outputs.squeeze(1) * routing.weights[:, :first].sum(dim=1, keepdim=True)
        elif old is None:
            outputs = self._mix_selected(served, routing, routing.selected, table)
        else:
            outputs = self._mix_with_old(served, routing, routing.selected, table, old)
        outputs = self.with_shared(outputs, served)
        if index is not None:
            outputs = outputs.new_zeros(tokens.shape[0], self.output_size).index_copy(0, index, outputs)
        return outputs, self._load_balancing_loss(routing, table), probabilities

    def with_shared(self, outputs: Tensor, tokens: Tensor) -> Tensor:
        """What the shared expert says of `tokens`, if there is one, added to `outputs`."""
        return outputs if self.shared is None else outputs + self.shared(tokens)

    @torch.no_grad()
    def as_old(self, tokens: Tensor) -> OldExperts:
        """What the experts of this mixture, all of them on this rank, say of `tokens` [n, input], for a later mixture
        that has more of them."""
        logits, _ = self.gate(tokens, None)
        experts = list(self.experts.values())
        if not self.gate.top_k:
            weights = F.softmax(logits, dim=-1).unsqueeze(-1).unbind(1)
            return OldExperts(logits, None, self._weighted_sum(tokens, weights, experts)[:, None])
        selected = logits.topk(min(self.gate.top_k, len(experts)), dim=-1).indices
        order = selected.flatten().argsort(stable=True)
        rows = tokens.index_select(0, order // selected.shape[1])
        counts = torch.bincount(selected.flatten(), minlength=len(experts)).tolist()
        done = [expert(part) for expert, part in zip(experts, rows.split(counts), strict=True) if len(part)]
        done.append(tokens.new_empty(0, self.output_size))  # of a rank without rows
        results = tokens.new_empty(len(rows), self.output_size).index_copy_(0, order, torch.cat(done))
        return OldExperts(logits, selected, results.view(*selected.shape, self.output_size))

    def newest(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, less the loss, for the newest observations [n, input] of a student that acts."""
        outputs, _, probabilities = self(tokens)
        return outputs, probabilities

    def weights_changed(self) -> None:
        """The parameters were given other values: whoever keeps copies makes new ones."""

    def _counts(self, routing: Routing, first: int) -> Tensor:
        """float64 [ranks, 1 + 2 E]: valid tokens, load of every expert, rows sent to every expert.

        One small exchange serves both the split sizes of the dispatch and the global load-balancing loss.
        """
        load = routing.load
        if routing.selected is None:
            rows = torch.zeros_like(load)
        else:
            rows = counted(routing.selected, len(self.ids))
            rows[:first] = 0.0
        own = torch.cat([load.new_full((1,), float(routing.probabilities.shape[0])), load, rows])
        if self._group is None or dist.get_world_size() == 1 or not (self.training or self.expert_parallel_size > 1):
            return own[None]
        table = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(table, own)
        return torch.stack(table)

    def _peers(self, table: np.ndarray) -> np.ndarray:
        """Rows of `table` [ranks, ...] of the ranks that share one set of experts with this one, in their order."""
        if self.expert_parallel_size == 1:
            return table[this_rank() if len(table) > 1 else 0][None]
        return table[dist.get_process_group_ranks(self._group)]

    def _rows(self, table: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Rows for every expert of each of the `_peers`, int64 [peers, E], and of all ranks, int64 [E]."""
        rows = table[:, 1 + len(self.ids) :].cpu().numpy().astype(np.int64)
        return self._peers(rows), rows.sum(axis=0)

    def _load_balancing_loss(self, routing: Routing, table: Tensor) -> Tensor:
        """E * sum over experts of (share of the load, no gradient) * (mean probability) (arXiv 2101.03961)."""
        total = table.sum(dim=0)
        tokens, load = total[0].clamp_min(1.0), total[1 : 1 + len(self.ids)]
        share = (load / load.sum().clamp_min(1e-30)).to(routing.probabilities)
        own = (routing.probabilities.sum(dim=0) * share).sum()
        return own * (len(self.ids) * len(table) / tokens).to(own)

    def _mix_all(self, tokens: Tensor, weights: Tensor, table: Tensor, first: int) -> Tensor:
        """The experts of the columns from `first` on, with `weights` [n, those]."""
        experts = self._local(first)
        if self.expert_parallel_size == 1:
            columns = weights.unsqueeze(-1).unbind(1)
            return self._tied(self._weighted_sum(tokens, columns, experts))
        counts, owners = [int(count) for count in self._peers(table.cpu().numpy())[:, 0]], self.owners[first:]
        blocks = [weights[:, torch.from_numpy(np.flatnonzero(owners == peer))] for peer in range(len(counts))]
        most = max(block.shape[1] for block in blocks)
        padded = torch.stack([F.pad(block, (0, most - block.shape[1])) for block in blocks])
        all_tokens, all_weights = SendToAll.apply(tokens, padded, counts, self._group)
        partial = self._weighted_sum(all_tokens, all_weights.unsqueeze(-1).unbind(1)[: len(experts)], experts)
        partial = self._tied(partial) if experts else self._tied(partial, all_tokens, all_weights)
        parts = ExchangeRows.apply(partial, counts, [len(tokens)] * len(counts), self._group)
        outputs: Tensor = parts.view(len(counts), len(tokens), self.output_size).sum(dim=0)
        return outputs

    def _local(self, first: int) -> list[nn.Module]:
        """The experts of the columns from `first` on that are on this rank."""
        return [expert for number, expert in self.experts.items() if int(number) >= self.ids[first]]

    def _weighted_sum(self, tokens: Tensor, columns: tuple[Tensor, ...], experts: list[nn.Module]) -> Tensor:
        total: Tensor | None = None
        for expert, weight in zip(experts, columns, strict=True):
            output = expert(tokens)
            total = output * weight if total is None else torch.addcmul(total, output, weight)
        return tokens.new_zeros(tokens.shape[0], self.output_size) if total is None else total

    def _mix_selected(self, tokens: Tensor, routing: Routing, selected: Tensor, table: Tensor) -> Tensor:
        plan = plan_rows(selected, *self._rows(table), self.owners, self.expert_parallel_rank)
        k = selected.shape[1]
        pairs = tokens.repeat_interleave(k, dim=0) if k > 1 else tokens
        rows = Reorder.apply(pairs, plan.outgoing, plan.returning)
        outputs: Tensor = Combine.apply(self._asked(rows, plan), routing.weights, plan)
        return outputs

    def _mix_with_old(
        self, tokens: Tensor, routing: Routing, selected: Tensor, table: Tensor, old: OldExperts
    ) -> Tensor:
        """`_mix_selected` where the answers of `old` experts are known, and nothing before the experts learns."""
        columns, first = selected.flatten(), old.logits.shape[1]
        rows, me = self._rows(table), self.expert_parallel_rank
        asked = (columns >= first).nonzero_static(size=int(rows[0][me].sum())).squeeze(1)
        plan = plan_rows(columns[asked], *rows, self.owners, me)
        asked = asked.index_select(0, plan.outgoing)
        done = self._asked(tokens.index_select(0, asked // selected.shape[1]), plan)
        answers = old.of_pairs(selected).flatten(0, 1).index_copy(0, asked, done)
        outputs: Tensor = (answers.view(*selected.shape, self.output_size) * routing.weights.unsqueeze(-1)).sum(dim=1)
        return outputs

    def _asked(self, rows: Tensor, plan: RowPlan) -> Tensor:
        """What the experts say of `rows`, which are in the order of `plan`."""
        if self.expert_parallel_size > 1:
            rows = ExchangeRows.apply(rows, plan.send, plan.receive, self._group)
        arrived = rows
        if plan.by_expert is not None:
            rows = Reorder.apply(rows, plan.by_expert, plan.by_peer)
        # An expert that no rank asks is not called. Without rows here, it is if it learns from those of another rank: a
        # parameter without a gradient on one replica alone would leave the ranks with gradients of different sizes.
        parts = zip(self.experts.values(), rows.split(plan.expert_rows), plan.asked, strict=True)
        results = [expert(part) for expert, part, asked in parts if len(part) or (asked and torch.is_grad_enabled())]
        if results:
            done = torch.cat(results)
            if plan.by_peer is not None:
                done = Reorder.apply(done, plan.by_peer, plan.by_expert)
            done = self._tied(done)
        else:
            done = self._tied(arrived.new_zeros(0, self.output_size), arrived)
        if self.expert_parallel_size > 1:
            done = ExchangeRows.apply(done, plan.receive, plan.send, self._group)
        return done

    def _tied(self, value: Tensor, *others: Tensor) -> Tensor:
        if self._group is None:
            return value
        tied: Tensor = Tie.apply(value, self.anchor, *(other for other in others if other.requires_grad))
        return tied


def this_rank() -> int:
    """The number of this process among the ranks; 0 where it is alone."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
