"""Time of our mixture of experts against DeepSpeed's own layer and a dense layer of the same arithmetic.

    python benchmarks/mixture.py [--tokens N] [--width N] [--hidden N] [--json OUT.json]

Forward and backward of one layer, gate and load-balancing loss included (the dense layer has neither), top-1 and top-2,
as one rank and as two that share the experts. The dense layer sends every token through k experts and adds them. Both
mixtures have the same experts, and the same tokens choose the same ones, which is checked:

balanced    every expert is chosen about equally often
skewed      seven tokens in ten choose the first expert first
newborn     half of the experts are a later stage's, born with a gate bias of -5: no token chooses them

DeepSpeed's layer runs without dropping tokens, and therefore pads all experts to the fullest one. It refuses experts
that the ranks do not divide: there every rank holds all of them. "experts alone" is our layer without its gate, its
moving of rows and its exchange: the experts called on rows that lie ready. It is what is left for a mixture to gain,
as many small matrix products, each with weights of its own, take longer than one large product.

The contenders take turns; a time is the least of its turns. One rank is timed in processor time (neighbours do not
count); of two ranks processor time is their sum and says what the layer costs, while wall-clock also has the waiting
for the rank that has more to do: with one copy of each expert, no exchange can make a skewed gate even. The fewer
tokens an expert has, the more its weights cost beside its arithmetic, and the smaller it is, the more gate and exchange
weigh: compare with the default student's training (--tokens 128 --width 128 --hidden 256).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor, nn
from torch import distributed as dist

from hpc_cpd.cluster.provenance import describe_origin
from hpc_cpd.distributed.torch import finish_distributed, start_distributed
from hpc_cpd.errors import run_command
from hpc_cpd.randomness import torch_generator
from hpc_cpd.student.moe.mixture import Expert
from tests.rank_environments import rank_environments

DENSE, ALONE, OURS, DEEPSPEED = "dense", "experts alone", "ours", "DeepSpeed"
ROUTINGS = ("balanced", "skewed", "newborn")
EXPERTS = (5, 10, 25, 50)
BIRTH_BIAS, SKEW, FAVOUR = -5.0, 0.7, 10.0
BALANCE = 0.01
"""Weight of the load-balancing loss."""
PATIENCE_SECONDS = 10.0
"""A contender takes no further turn once it has had this long: what DeepSpeed pads can take fifty times as long."""
TARGET = 1.10
RESULT = "result of the ranks: "

Work = Callable[[Tensor], tuple[Tensor, ...]]
"""(tokens) -> (outputs, load-balancing loss if there is one)."""


@dataclass
class Contender:
    layer: nn.Module
    work: Work
    tokens: Tensor
    gradient: Tensor
    turns: list[tuple[float, float]] = field(default_factory=list)
    """(wall-clock of the slowest rank, processor time of all ranks) in seconds"""


class Dense(nn.Module):
    """k experts for every token."""

    def __init__(self, width: int, hidden: int, k: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            Expert(width, hidden, width, torch_generator(0, "expert", number)) for number in range(k)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        outputs: Tensor = self.experts[0](tokens)
        for expert in list(self.experts)[1:]:
            outputs = outputs + expert(tokens)
        return outputs


def make_tokens(count: int, width: int, routing: str, rank: int) -> Tensor:
    """Feature e is what the gate thinks of expert e; the last one is 1."""
    generator = torch.Generator().manual_seed(rank)
    tokens = torch.randn(count, width, generator=generator)
    if routing == "skewed":
        tokens[torch.rand(count, generator=generator) < SKEW, 0] += FAVOUR
    tokens[:, -1] = 1.0
    return tokens.requires_grad_()


def make_ours(width: int, hidden: int, experts: int, k: int, routing: str, ranks: int) -> Any:
    from hpc_cpd.student.moe.deepspeed import MixtureOfExperts
    from hpc_cpd.student.network import StudentShape

    old = -(-experts // 2) if routing == "newborn" else experts
    stages = [list(range(old)), list(range(old, experts))]
    shape = StudentShape(
        width=width,
        expert_hidden=hidden,
        top_k=k,
        initial_gate_bias=BIRTH_BIAS,
        observation_size=1,
        action_size=1,
        task_vector_size=1,
    )
    layer = MixtureOfExperts(shape, width, stages, ranks, 0).train()
    layer.set_deepspeed_parallelism()  # type: ignore[operator]
    with torch.no_grad():
        for number, stage in enumerate(layer.gate.stages):
            rows = layer.gate.get_parameter(f"weight_{stage}")
            rows.copy_(torch.eye(len(rows), width) if number == 0 else torch.zeros_like(rows))
    return layer


def make_deepspeed(width: int, hidden: int, experts: int, k: int, routing: str, ranks: int) -> Any:
    """Raises AssertionError when DeepSpeed refuses."""
    from deepspeed.moe.layer import MoE

    noiseless = {"use_rts": False, "top2_2nd_expert_sampling": False}
    expert = Expert(width, hidden, width, torch_generator(0, "expert", 0))
    layer = MoE(width, expert, experts, ranks, k=k, drop_tokens=False, min_capacity=0, **noiseless).train()
    layer.set_deepspeed_parallelism()
    gate = layer.deepspeed_moe.gate.wg.weight
    with torch.no_grad():
        gate.copy_(torch.eye(width)[:experts])
        if routing == "newborn":  # this gate has no bias: the last feature of the tokens stands for it
            gate[-(experts // 2) :] = 0.0
            gate[-(experts // 2) :, -1] = BIRTH_BIAS
    return layer


def check_routing(ours: Any, theirs: Any, tokens: Tensor, routing: str) -> Tensor:
    """Tokens of all ranks for each expert."""
    with torch.no_grad():
        selected = ours.gate.route(*ours.gate(tokens, None)).selected
        counts = theirs(tokens)[2]
    chosen = torch.bincount(selected.reshape(-1), minlength=len(ours.ids))
    if chosen.tolist() != counts.tolist():
        raise RuntimeError(f"our gate gives the experts {chosen.tolist()} tokens, DeepSpeed's {counts.tolist()}")
    if routing == "newborn" and chosen[-(len(chosen) // 2) :].any():
        raise RuntimeError("a newborn expert was chosen, so this is not the case that was meant")
    dist.all_reduce(chosen)
    return chosen


def make_alone(ours: Any, counts: Tensor, width: int) -> Contender:
    sizes = [int(counts[int(number)]) for number in ours.experts]

    def work(rows: Tensor) -> tuple[Tensor]:
        parts = zip(ours.experts.values(), rows.split(sizes), strict=True)
        return (torch.cat([expert(part) for expert, part in parts]),)

    rows, gradient = torch.randn(2, sum(sizes), width)
    return Contender(ours, work, rows.requires_grad_(), gradient)


def take_turn(contender: Contender) -> None:
    contender.layer.zero_grad(set_to_none=True)
    contender.tokens.grad = None
    dist.barrier()
    began, worked = time.perf_counter(), time.process_time()
    outputs = contender.work(contender.tokens)
    torch.autograd.backward(outputs, [contender.gradient, torch.tensor(BALANCE)][: len(outputs)])
    spent = torch.tensor([time.perf_counter() - began, time.process_time() - worked], dtype=torch.float64)
    slowest, total = spent.clone(), spent.clone()
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    dist.all_reduce(total)
    contender.turns.append((float(slowest[0]), float(total[1])))


def compare(plan: dict[str, Any], experts: int, k: int, routing: str) -> dict[str, Any]:
    """Milliseconds of each contender in one case."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    width, hidden = plan["width"], plan["hidden"]
    tokens, gradient = make_tokens(plan["tokens"], width, routing, rank), torch.randn(plan["tokens"], width)
    ours, dense = make_ours(width, hidden, experts, k, routing, ranks), Dense(width, hidden, k)
    refused = None
    try:
        theirs = make_deepspeed(width, hidden, experts, k, routing, ranks)
    except AssertionError as error:
        refused = str(error)
        theirs = make_deepspeed(width, hidden, experts, k, routing, 1)
    counts = check_routing(ours, theirs, tokens, routing)
    contenders = {
        DENSE: Contender(dense, lambda x: (dense(x),), tokens, gradient),
        ALONE: make_alone(ours, counts, width),
        OURS: Contender(ours, lambda x: ours(x)[:2], tokens, gradient),
        DEEPSPEED: Contender(theirs, lambda x: theirs(x)[:2], tokens, gradient),
    }
    for _ in range(plan["turns"] + 1):  # the first one is to warm up
        for contender in contenders.values():
            if sum(wall for wall, _ in contender.turns) < PATIENCE_SECONDS:  # the same on every rank
                take_turn(contender)
    found: dict[str, Any] = {"refused": refused}
    for unit, place in (("wall_ms", 0), ("processor_ms", 1)):
        turns = {who: contender.turns[1:] or contender.turns for who, contender in contenders.items()}
        least = {who: min(turn[place] for turn in taken) for who, taken in turns.items()}
        found[unit] = {who: round(seconds * 1000, 2) for who, seconds in least.items()}
    return found


def play(plan: dict[str, Any]) -> None:
    """What each rank does."""
    rank, _ = start_distributed()
    torch.manual_seed(0)
    found = [
        {"experts": experts, "k": k, "routing": routing, **compare(plan, experts, k, routing)}
        for experts in plan["experts"]
        for k in (1, 2)
        for routing in ROUTINGS
    ]
    if rank == 0:
        print(RESULT + json.dumps(found), flush=True)
    finish_distributed()


def run_ranks(script: str, ranks: int, plan: dict[str, Any]) -> Any:
    """Run ``script --play PLAN`` as so many ranks and return what rank 0 printed behind `RESULT`."""
    command = [sys.executable, script, "--play", json.dumps(plan)]
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for environment in rank_environments(ranks)
    ]
    outputs = [process.communicate()[0] for process in processes]
    lines = [line for line in outputs[0].splitlines() if line.startswith(RESULT)]
    if any(process.returncode for process in processes) or not lines:
        raise RuntimeError(f"{ranks} rank(s) failed:\n" + "\n".join(outputs))
    return json.loads(lines[-1].removeprefix(RESULT))


def show(ranks: int, cases: list[dict[str, Any]]) -> None:
    for case in cases:
        name = f"{ranks} rank{'s'[: ranks > 1]}, top-{case['k']}, {case['experts']:2d} experts, {case['routing']:9s}"
        for unit in ("processor_ms", "wall_ms")[:ranks]:
            times = case[unit]
            ratios = [f"{who}/dense {times[who] / times[DENSE]:5.2f}" for who in (ALONE, OURS, DEEPSPEED)]
            note = " (with all experts on every rank)" if case["refused"] else ""
            print(f"{name} {unit[:-3]:9s} dense {times[DENSE]:7.1f} ms  {'  '.join(ratios)}{note}", flush=True)


def summarise(results: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The worst ratios over all cases, in processor time."""
    worst: dict[str, dict[str, Any]] = {}
    for ranks, cases in results.items():
        for who, other in ((OURS, DENSE), (OURS, ALONE), (DEEPSPEED, DENSE)):
            ratios = [case["processor_ms"][who] / case["processor_ms"][other] for case in cases]
            case = cases[ratios.index(max(ratios))]
            name = f"top-{case['k']}, {case['experts']} experts, {case['routing']}"
            worst[f"{who}/{other}, ranks: {ranks}"] = {"ratio": round(max(ratios), 2), "case": name}
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="of each rank")
    parser.add_argument("--width", type=int, default=256, help="of tokens")
    parser.add_argument("--hidden", type=int, default=1024, help="of experts; in Transformers four widths")
    parser.add_argument("--experts", type=int, nargs="+", default=EXPERTS)
    parser.add_argument("--ranks", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--play", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.play is not None:
        return play(json.loads(given.play))
    settings = {word: value for word, value in vars(given).items() if word not in ("json", "play")}
    print(f"{given.tokens} tokens of {given.width} per rank, experts {given.hidden} wide, forward and backward")
    results = {}
    for ranks in given.ranks:
        results[str(ranks)] = run_ranks(__file__, ranks, settings)
        for refused in sorted({case["refused"] for case in results[str(ranks)]} - {None}):
            print(f"{ranks} ranks: DeepSpeed refuses: {refused}")
        show(ranks, results[str(ranks)])
    worst = summarise(results)
    for name, found in worst.items():
        words = ""
        if name.startswith(f"{OURS}/{DENSE}"):
            words = f", target {TARGET:.2f}: {'met' if found['ratio'] <= TARGET else 'MISSED'}"
        print(f"worst {name}: {found['ratio']:.2f} ({found['case']}){words}")
    if given.json is not None:
        everything = {"settings": settings, "worst": worst, "cases": results, "origin": describe_origin()}
        given.json.write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(run_command(main))
