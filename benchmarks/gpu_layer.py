"""One mixture on a GPU, for benchmarks/gpu.py: ours, DeepSpeed's own, and a dense layer of the same arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gpu_timing import operations, seconds
from mixture import BALANCE, Dense, check_routing, make_deepspeed, make_ours, make_tokens
from torch import Tensor, nn


def layer(device: torch.device, small: bool, peak: float) -> list[dict[str, Any]]:
    """Forward and backward of 64 experts of which two serve a token, in bfloat16. The same tokens choose the same
    experts in both mixtures, which is checked. DeepSpeed's pads all experts to the fullest one, so the skewed case,
    where seven tokens in ten choose the same expert first, has fewer tokens; null: even so it ran out of memory.
    """
    width, hidden, experts, k = (32, 16, 8, 2) if small else (1024, 2048, 64, 2)
    rows = []
    for routing, count in (("balanced", 64 if small else 16384), ("skewed", 64 if small else 4096)):
        tokens = make_tokens(count, width, routing, 0).detach().to(device).requires_grad_()
        gradient = torch.randn(count, width, device=device)
        ours = make_ours(width, hidden, experts, k, routing, 1).to(device)
        theirs = make_deepspeed(width, hidden, experts, k, routing, 1).to(device)
        dense = Dense(width, hidden, k).to(device)
        contenders = {"dense": dense, "ours": ours, "DeepSpeed": theirs}
        found: dict[str, Any] = {"routing": routing, "tokens": count}
        done = 0
        for who, module in contenders.items():
            work = both_ways(module, tokens, gradient)
            if not done:
                done = operations(work)  # the dense layer's: what the tokens need
            try:
                if who == "DeepSpeed":
                    check_routing(ours, theirs, tokens, routing)
                spent = seconds(work, device, small)
            except torch.OutOfMemoryError:
                found[f"{who}_ms"] = None
                continue
            found[f"{who}_ms"] = 1000.0 * spent
            found[f"{who}_share_of_peak"] = done / spent / peak
        rows.append(found)
    return rows


def both_ways(module: nn.Module, tokens: Tensor, gradient: Tensor) -> Callable[[], object]:
    """Forward and backward of a layer that gives its outputs and, if it is a mixture, its load-balancing loss."""
    balance = torch.tensor(BALANCE, device=tokens.device)

    def work() -> None:
        module.zero_grad(set_to_none=True)
        tokens.grad = None
        with torch.autocast(tokens.device.type, torch.bfloat16):
            found = module(tokens)
        outputs = found[:2] if isinstance(found, tuple) else (found,)
        weights = (gradient, balance)[: len(outputs)]
        torch.autograd.backward(outputs, [weight.to(output) for weight, output in zip(weights, outputs, strict=True)])

    return work
