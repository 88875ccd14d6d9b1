"""Moving tokens between the ranks of an expert-parallel group: variable sizes, no capacity, no token dropped.

Every function here is a collective over its group, in the forward and in the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

Group = Any  # torch.distributed.ProcessGroup


@dataclass(frozen=True)
class RowPlan:
    """Who sends how many rows to whom when every (token, chosen expert) pair is one row."""

    outgoing: Tensor  # int64 [n * k]: flat (token, choice) pairs in the order they are sent
    returning: Tensor  # int64 [n * k]: the inverse, position of every pair among the sent rows
    send: list[int]  # rows to each peer
    receive: list[int]  # rows from each peer
    by_expert: Tensor | None  # int64 [received]: puts received rows in order of local expert; None: they are
    by_peer: Tensor | None  # int64 [received]: the inverse
    expert_rows: list[int]  # rows of each local expert
    asked: list[bool]  # whether any rank at all has rows for each local expert


def plan_rows(selected: Tensor, counts: np.ndarray, total: np.ndarray, owners: np.ndarray, me: int) -> RowPlan:
    """Plan the exchange.

    `selected` int64 [n, k]: columns chosen by each token; `counts` int [peers, E]: rows of every peer for every
    column; `total` int [E]: those of all ranks, of other groups too; `owners` int [E]: peer holding each column; `me`:
    this rank's number among the peers.
    """
    device = selected.device
    place = np.argsort(np.argsort(owners, kind="stable"))  # of columns by owner: rows for one peer then lie together
    columns = selected.reshape(-1)
    outgoing = (torch.tensor(place, device=device)[columns] if len(counts) > 1 else columns).argsort(stable=True)
    returning = torch.empty_like(outgoing)
    returning[outgoing] = torch.arange(len(outgoing), device=device)
    peers = len(counts)
    mine = counts[:, owners == me]  # [peers, local experts]
    expert_rows = [int(rows) for rows in mine.sum(axis=0)]
    by_expert = by_peer = None
    if peers > 1 and mine.shape[1] > 1:
        sizes = mine.reshape(-1)  # as received: by peer, then by expert
        starts = (np.cumsum(sizes) - sizes).reshape(mine.shape)
        pieces = [np.arange(start, start + size) for start, size in zip(starts.T.flat, mine.T.flat, strict=True)]
        by_expert = torch.tensor(np.concatenate(pieces), device=device)
        by_peer = torch.empty_like(by_expert)
        by_peer[by_expert] = torch.arange(len(by_expert), device=device)
    send = [int(counts[me][owners == peer].sum()) for peer in range(peers)]
    receive = [int(rows) for rows in mine.sum(axis=1)]
    return RowPlan(
        outgoing, returning, send, receive, by_expert, by_peer, expert_rows, (total[owners == me] > 0).tolist()
    )


def _all_to_all(rows: Tensor, send: list[int], receive: list[int], group: Group) -> Tensor:
    received = rows.new_empty(sum(receive), rows.shape[1])
    dist.all_to_all_single(received, rows.contiguous(), receive, send, group=group)
    return received


class ExchangeRows(torch.autograd.Function):
    """Rows [sum(send), D] to their peers; gradients travel back the way the rows came."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: Group) -> Tensor:
        ctx.way = (send, receive, group)
        return _all_to_all(rows, send, receive, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        send, receive, group = ctx.way
        return _all_to_all(gradients[0], receive, send, group), None, None, None


class Reorder(torch.autograd.Function):
    """Rows in another order. `inverse` serves the gradient, where autograd would add rows up one by one."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.inverse = inverse
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0].index_select(0, ctx.inverse), None, None


class Combine(torch.autograd.Function):
    """Results [n * k, D] in the order of `RowPlan.outgoing`, weights [n, k] -> their weighted sums [n, D]."""

    @staticmethod
    def forward(ctx: Any, results: Tensor, weights: Tensor, plan: RowPlan) -> Tensor:
        chosen = results.index_select(0, plan.returning).view(*weights.shape, results.shape[1])
        ctx.save_for_backward(chosen, weights)
        ctx.outgoing = plan.outgoing
        if weights.shape[1] == 1:
            return chosen.squeeze(1) * weights
        return (chosen * weights.unsqueeze(-1)).sum(dim=1)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        chosen, weights = ctx.saved_tensors
        rows = gradients[0].unsqueeze(1)
        for_weights = (chosen * rows).sum(dim=-1) if ctx.needs_input_grad[1] else None
        back = (rows * weights.unsqueeze(-1)).flatten(0, 1).index_select(0, ctx.outgoing)
        return back, for_weights, None


class SendToAll(torch.autograd.Function):
    """Every token to every peer once, with the weights of that peer's experts beside it.

    Tokens [n, D] and weights [peers, n, M] -> tokens of all peers [sum(counts), D], my weights [sum(counts), M].
    Only the gradients somebody needs are computed and sent: with everything below the mixture frozen the experts
    need no gradient towards their input at all.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weights: Tensor, counts: list[int], group: Group) -> Any:
        peers, own, size = len(counts), tokens.shape[0], tokens.shape[1]
        buffer = torch.cat([tokens.expand(peers, own, size), weights], dim=2).flatten(0, 1)
        received = _all_to_all(buffer, [own] * peers, counts, group)
        all_tokens, all_weights = received[:, :size], received[:, size:]
        ctx.way = (own, counts, group)
        # a frozen side must not look trainable to the experts, on any rank: flags are the same on all of them
        ctx.needed = ctx.needs_input_grad[:2]
        unneeded = [part for part, needed in zip((all_tokens, all_weights), ctx.needed, strict=True) if not needed]
        ctx.mark_non_differentiable(*unneeded)
        return all_tokens, all_weights

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        own, counts, group = ctx.way
        parts = [gradient for gradient, needed in zip(gradients, ctx.needed, strict=True) if needed]
        rows = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        back = _all_to_all(rows, counts, [own] * len(counts), group).view(len(counts), own, rows.shape[1])
        size = gradients[0].shape[1] if ctx.needed[0] else 0
        tokens = back[:, :, :size].sum(dim=0) if ctx.needed[0] else None
        weights = back[:, :, size:] if ctx.needed[1] else None
        return tokens, weights, None, None


class Tie(torch.autograd.Function):
    """`value` unchanged, made to depend on other tensors, which get a gradient of exactly zero.

    A rank without experts, or with frozen ones, would otherwise not take part in the backward exchanges and the
    others would wait for it for ever.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, *others: Tensor) -> Tensor:
        ctx.likes = [(other.shape, other.dtype, other.device) for other in others]
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        zeros = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.likes]
        return gradients[0], *zeros
