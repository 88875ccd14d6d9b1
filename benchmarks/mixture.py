"""Time of our mixture of experts against DeepSpeed's own layer and a dense layer of the same arithmetic.

Top-1 routing, forward and backward on one rank and one thread. "skewed" sends most tokens to one expert, as
happens when experts are born with a gate bias of -5: a layer with capacity pads every expert to the fullest one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn

from hpc_cpd.distill.engine import finish_distributed, start_distributed
from hpc_cpd.student.mixture import Mixture

DENSE, OURS, DEEPSPEED = "dense layer, same arithmetic", "ours", "DeepSpeed's layer"
TOKENS, WIDTH, HIDDEN, EXPERTS, ROUNDS = 2048, 128, 256, 10, 5


def expert() -> nn.Module:
    hidden = [nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN), nn.GELU()]
    return nn.Sequential(*hidden, nn.Linear(HIDDEN, WIDTH))


def milliseconds(forward: Callable[[Tensor], Tensor], tokens: Tensor) -> float:
    """The fastest of a few rounds: the one that was least disturbed."""
    best = float("inf")
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        forward(tokens).sum().backward()
        best = min(best, time.perf_counter() - began)
    return best * 1000


def main() -> None:
    start_distributed()
    from deepspeed.moe.layer import MoE

    torch.manual_seed(0)
    tokens = torch.randn(TOKENS, WIDTH, requires_grad=True)
    for routing in ("balanced", "skewed"):
        ours = Mixture(WIDTH, WIDTH, HIDDEN, [list(range(EXPERTS))], 1, 1, 0.0, 0).train()
        theirs = MoE(WIDTH, expert(), EXPERTS, 1, k=1, drop_tokens=False, use_rts=False, min_capacity=0)
        theirs.set_deepspeed_parallelism()
        favour = torch.zeros(EXPERTS)
        rows = torch.randn(EXPERTS, WIDTH)
        if routing == "skewed":
            rows[0] = 0.0
            favour[0] = rows.norm(dim=1).mean() * 1.3
        with torch.no_grad():
            gate = dict(ours.gate.named_parameters())
            gate["weight_1"].copy_(rows)
            gate["bias_1"].copy_(favour)
        # the native gate has no bias, so its tokens carry one as a constant feature
        shifted = tokens.detach().clone()
        shifted[:, 0] = 1.0
        with torch.no_grad():
            theirs.deepspeed_moe.gate.wg.weight.copy_(rows)
            theirs.deepspeed_moe.gate.wg.weight[:, 0] = favour
        dense = expert()
        times = {
            DENSE: milliseconds(dense, tokens),
            OURS: milliseconds(lambda x, layer=ours: layer(x)[0], tokens),
            DEEPSPEED: milliseconds(lambda x, layer=theirs: layer(x)[0], shifted.requires_grad_()),
        }
        for name, value in times.items():
            print(f"{routing:9s} {name:30s} {value:8.1f} ms")
        print(f"{routing:9s} ratio ours/dense {times[OURS] / times[DENSE]:.2f}, ", end="")
        print(f"DeepSpeed/ours {times[DEEPSPEED] / times[OURS]:.2f}")
    finish_distributed()


if __name__ == "__main__":
    main()
