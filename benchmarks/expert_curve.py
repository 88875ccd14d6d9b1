"""Time of a token in the mixture of experts, from 5 to 1,000 experts, two of which serve it.

    python benchmarks/expert_curve.py [--tokens N] [--hidden N] [--experts N ...] [--json OUT.json]

Forward and backward of our layer on one core, load-balancing loss included, without an optimizer. In "five asked" every
token chooses two of the same five experts, and the others only take memory. In "all asked" every expert is chosen, so
that each has fewer rows the more there are, and its weights are read and their gradients written for these few.

Beside the layer stands its gate alone, forward and backward: the only arithmetic that grows with the experts. "rest"
is the layer less the gate, for a token, in microseconds, and what it is times that of the fewest experts. DeepSpeed's
layer takes its turns up to --deepspeed-up-to experts: it makes and multiplies tensors of tokens x experts x capacity.

Figures are the least of the turns, in processor time.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import mixture
import torch
from mixture import DEEPSPEED, OURS, Contender, take_turn

from hpc_cpd.cluster.provenance import describe_origin
from hpc_cpd.distributed.torch import finish_distributed, start_distributed
from hpc_cpd.errors import run_command

CURVE = (5, 10, 25, 50, 100, 300, 1000)
ASKED, WIDTH, K, GATE = 5, 256, 2, "gate"
NEVER = -500.0
"""What the gate thinks of an expert that is not to be asked."""


def compare(tokens: int, hidden: int, experts: int, asked: int, turns: int, deepspeed_up_to: int) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(0)
    inputs, gradient = torch.randn(2, tokens, WIDTH, generator=draw)
    inputs[:, -1] = 1.0
    rows = torch.randn(experts, WIDTH, generator=draw)
    rows[:, -1] = torch.where(torch.arange(experts) < asked, 0.0, NEVER)
    inputs.requires_grad_()
    ours = mixture.make_ours(WIDTH, hidden, experts, K, "balanced", 1)
    ours.gate.weight_1.data.copy_(rows)

    def gate_alone(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        routing = ours.gate.route(*ours.gate(x, None))
        return routing.weights, routing.probabilities.sum(dim=0)[0]

    weights = gate_alone(inputs)[0]
    contenders = {
        OURS: Contender(ours, lambda x: ours(x)[:2], inputs, gradient),
        GATE: Contender(ours, gate_alone, inputs, torch.randn(weights.shape, generator=draw)),
    }
    if experts <= deepspeed_up_to:
        theirs = mixture.make_deepspeed(WIDTH, hidden, experts, K, "balanced", 1)
        theirs.deepspeed_moe.gate.wg.weight.data.copy_(rows)
        chosen = mixture.check_routing(ours, theirs, inputs, "balanced")
        contenders[DEEPSPEED] = Contender(theirs, lambda x: theirs(x)[:2], inputs, gradient)
    else:
        selected = ours.gate.route(*ours.gate(inputs, None)).selected
        chosen = torch.bincount(selected.reshape(-1), minlength=experts)
    for _ in range(turns + 1):  # the first one is to warm up
        for contender in contenders.values():
            take_turn(contender)
    least = {who: min(turn[1] for turn in contender.turns[1:]) for who, contender in contenders.items()}
    microseconds = {who: 1e6 * seconds / tokens for who, seconds in least.items()}
    microseconds["rest"] = microseconds[OURS] - microseconds[GATE]
    return {"experts": experts, "asked": int((chosen > 0).sum()), "us_per_token": microseconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=256, help="width of an expert")
    parser.add_argument("--experts", type=int, nargs="+", default=CURVE)
    parser.add_argument("--deepspeed-up-to", type=int, default=50)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write all figures here")
    given = parser.parse_args()
    torch.set_num_threads(1)
    start_distributed()
    found: dict[str, list[dict[str, Any]]] = {}
    for name, asked in (("five asked", ASKED), ("all asked", max(given.experts))):
        found[name] = cases = []
        for experts in given.experts:
            sizes = given.tokens, given.hidden, experts, min(asked, experts)
            cases.append(compare(*sizes, given.turns, given.deepspeed_up_to))
            case, times = cases[-1], cases[-1]["us_per_token"]
            case["rest_over_fewest"] = times["rest"] / cases[0]["us_per_token"]["rest"]
            theirs = f"  DeepSpeed {times[DEEPSPEED]:7.1f}" if DEEPSPEED in times else ""
            print(
                f"{name}, {experts:4d} experts ({case['asked']} asked): a token takes {times[OURS]:6.2f} us, of which "
                f"the gate {times[GATE]:5.2f}, the rest {times['rest']:6.2f}: {case['rest_over_fewest']:.2f} times "
                f"that of {given.experts[0]} experts{theirs}",
                flush=True,
            )
    if given.json is not None:
        settings = {word: value for word, value in vars(given).items() if word != "json"}
        given.json.write_text(
            json.dumps({"settings": settings, "cases": found, "origin": describe_origin()}, indent=1) + "\n"
        )
    finish_distributed()


if __name__ == "__main__":
    sys.exit(run_command(main))
