"""Time of a whole training step of the student: our engine against the same student in plain torch.

    python benchmarks/student_step.py [--json OUT.json]

A step is forward, backward, averaging of gradients, clipping of their norm and AdamW, on made-up windows of which one
position counts, as in training; everything learns. Ours is hpc_cpd.distill.engine.PhaseEngine (DeepSpeed) with experts
spread over the ranks, as is the default, and with all experts on every rank. The peers hold all experts on every rank:

DDP     torch's DistributedDataParallel, which averages gradients while backward still runs
flat    all gradients copied into one vector, one all-reduce, copied back

Both clip with torch's clip_grad_norm_ and step torch's AdamW, with our settings; their load-balancing loss is that of
each rank, so they exchange less than ours. All begin with the same weights and see the same batches, and their losses
must agree. The contenders take turns of a few steps. One rank is timed in processor time (neighbours do not count); of
two ranks processor time is their sum, and wall-clock has the waiting for each other too. Figures are medians over the
turns; a ratio is the median of the ratios within a turn.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from mixture import RESULT, run_ranks
from torch import distributed as dist

from hpc_cpd.cluster.provenance import describe_origin
from hpc_cpd.distill.batches import Batch
from hpc_cpd.distill.engine import PhaseEngine, learning_rate
from hpc_cpd.distill.train import batch_loss
from hpc_cpd.distributed.torch import finish_distributed, start_distributed
from hpc_cpd.errors import run_command
from hpc_cpd.losses import action_mean_error
from hpc_cpd.methods.base import method_of
from hpc_cpd.settings import Config, DistillSettings, StudentSettings
from hpc_cpd.student.backbones.transformer import TransformerSettings
from hpc_cpd.student.network import Student, StudentShape

OBSERVATION, ACTION, VECTOR, EXPERTS = 39, 4, 32, 10
DIMENSIONS = {
    "observation_size": OBSERVATION,
    "action_size": ACTION,
    "task_vector_size": VECTOR,
    "initial_gate_bias": -5.0,
}
SIZES = {
    "default": StudentSettings(),
    "default, top-2": StudentSettings(top_k=2),
    "large": StudentSettings(width=256, backbone=TransformerSettings(layers=4, heads=8), expert_hidden=1024, top_k=2),
}
SETTINGS = DistillSettings()
OURS, REPLICATED, DDP, FLAT = "ours", "ours, experts on every rank", "DDP", "flat"
TOTAL_STEPS = 10_000  # of the schedule of the step size
TARGET = 1.10


@dataclass
class Contender:
    step: Callable[[int], float]
    """(number of the step) -> this rank's share of the squared error"""
    losses: list[float] = field(default_factory=list)
    turns: list[tuple[float, float]] = field(default_factory=list)
    """milliseconds per step: (wall-clock of the slowest rank, processor time of all ranks)"""


def shape_of(settings: StudentSettings) -> StudentShape:
    return StudentShape.from_settings(settings, **DIMENSIONS)


def make_batches(settings: StudentSettings, rank: int, world_size: int, count: int) -> list[Batch]:
    """This rank's rows, as StageBatches would give them."""
    generator = torch.Generator().manual_seed(0)
    rows, length = SETTINGS.batch_size, settings.history
    batches = []
    for _ in range(count):
        observations = torch.randn(rows, length, OBSERVATION, generator=generator)
        means = torch.randn(rows, length, ACTION, generator=generator)
        vectors = torch.randn(rows, VECTOR, generator=generator)
        valid = torch.zeros(rows, length, dtype=torch.bool)
        valid[:, -1] = True
        mine = [part[rank::world_size].contiguous() for part in (observations, means, valid, vectors)]
        everyone = torch.ones(len(mine[0]), dtype=torch.bool)
        batches.append(Batch(*mine, everyone, None, rows, rows, []))  # type: ignore[call-arg, arg-type]
    return batches


def make_ours(settings: StudentSettings, expert_parallel_size: int, batches: list[Batch]) -> Contender:
    student = Student(shape_of(settings), [list(range(EXPERTS))], expert_parallel_size)
    engine = PhaseEngine(student.train(), SETTINGS, TOTAL_STEPS, method_of(Config()))

    def step(number: int) -> float:
        batch = batches[number % len(batches)]
        loss, errors, *_ = batch_loss(engine, batch, SETTINGS.load_balancing_coefficient)
        engine.step(loss, number)
        return float(errors.sum())

    return Contender(step)


def make_plain(settings: StudentSettings, with_ddp: bool, batches: list[Batch]) -> Contender:
    student = Student(shape_of(settings), [list(range(EXPERTS))], for_training=False).train()
    student.mixtures.get_submodule("0").anchor.requires_grad_(False)  # takes no part outside DeepSpeed's groups
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=SETTINGS.learning_rate, weight_decay=SETTINGS.weight_decay, foreach=True
    )
    model: Any = torch.nn.parallel.DistributedDataParallel(student) if with_ddp else student
    world_size = dist.get_world_size()

    def average() -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        vector = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(vector)
        vector /= world_size
        parts = zip(vector.split([gradient.numel() for gradient in gradients]), gradients, strict=True)
        torch._foreach_copy_(gradients, [part.view_as(gradient) for part, gradient in parts])

    def step(number: int) -> float:
        batch = batches[number % len(batches)]
        actions, balance, _ = model(batch.observations, batch.task_vectors, batch.valid, batch.override)
        errors = action_mean_error(actions, batch.target, batch.valid)
        loss = errors.sum() * world_size / batch.rows_of_all_ranks + SETTINGS.load_balancing_coefficient * balance
        optimizer.zero_grad()
        loss.backward()
        if not with_ddp and world_size > 1:
            average()
        torch.nn.utils.clip_grad_norm_(parameters, SETTINGS.max_gradient_norm, foreach=True)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(SETTINGS, number, TOTAL_STEPS)
        optimizer.step()
        return float(errors.detach().sum())

    return Contender(step)


def take_turn(contender: Contender, steps: range) -> None:
    dist.barrier()
    began, worked = time.perf_counter(), time.process_time()
    contender.losses += [contender.step(number) for number in steps]
    spent = torch.tensor([time.perf_counter() - began, time.process_time() - worked], dtype=torch.float64)
    spent *= 1000 / len(steps)
    slowest, total = spent.clone(), spent.clone()
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    dist.all_reduce(total)
    contender.turns.append((float(slowest[0]), float(total[1])))


def check_losses(contenders: dict[str, Contender], steps: int) -> None:
    """Of the first turn. The load-balancing loss is another on each rank, and rounding another everywhere."""
    losses = {who: torch.tensor(contender.losses[:steps]) for who, contender in contenders.items()}
    for who, values in losses.items():
        dist.all_reduce(values)
        if not torch.allclose(values, losses[OURS], rtol=1e-3):
            raise RuntimeError(f"{who} learns otherwise than {OURS}: {values.tolist()}, {losses[OURS].tolist()}")


def compare(settings: StudentSettings, turns: int, steps: int) -> dict[str, Any]:
    """Milliseconds per step of each contender, and ratios of ours to the peers."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    batches = make_batches(settings, rank, ranks, steps)
    contenders = {OURS: make_ours(settings, ranks, batches)}
    if ranks > 1:
        contenders[REPLICATED] = make_ours(settings, 1, batches)
    contenders |= {DDP: make_plain(settings, True, batches), FLAT: make_plain(settings, False, batches)}
    for turn in range(turns + 1):  # the first one is to warm up
        for contender in contenders.values():
            take_turn(contender, range(turn * steps, (turn + 1) * steps))
    check_losses(contenders, steps)
    found: dict[str, Any] = {}
    for unit, place in (("wall_ms", 0), ("processor_ms", 1)):
        values = {who: [turn[place] for turn in contender.turns[1:]] for who, contender in contenders.items()}
        found[unit] = {who: round(median(each), 2) for who, each in values.items()}
        found[f"{unit}_ratios"] = {
            f"{who}/{peer}": round(median(one / other for one, other in zip(each, values[peer], strict=True)), 3)
            for who, each in values.items()
            for peer in (DDP, FLAT)
            if who in (OURS, REPLICATED)
        }
    return found


def play(plan: dict[str, Any]) -> None:
    """What each rank does."""
    rank, _ = start_distributed()
    found = {size: compare(SIZES[size], plan["turns"], plan["steps"]) for size in plan["sizes"]}
    if rank == 0:
        print(RESULT + json.dumps(found), flush=True)
    finish_distributed()


def count_parameters(settings: StudentSettings) -> int:
    student = Student(shape_of(settings), [list(range(EXPERTS))], for_training=False)
    return sum(parameter.numel() for parameter in student.parameters())


def show(ranks: int, results: dict[str, Any]) -> None:
    for size, found in results.items():
        for unit in ("processor_ms", "wall_ms")[:ranks]:
            times = ", ".join(f"{who} {milliseconds:.1f} ms" for who, milliseconds in found[unit].items())
            ratios = ", ".join(f"{names} {ratio:.2f}" for names, ratio in found[f"{unit}_ratios"].items())
            print(f"{ranks} rank{'s'[: ranks > 1]}, {size}, {unit[:-3]}: {times}\n    {ratios}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="of the student")
    parser.add_argument("--ranks", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--steps", type=int, default=5, help="of a turn")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--play", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.play is not None:
        return play(json.loads(given.play))
    settings = {word: value for word, value in vars(given).items() if word not in ("json", "play")}
    for size in given.sizes:
        print(f"{size}: {count_parameters(SIZES[size]):,} parameters, {SETTINGS.batch_size} windows over all ranks")
    results = {}
    for ranks in given.ranks:
        results[str(ranks)] = run_ranks(__file__, ranks, settings)
        show(ranks, results[str(ranks)])
    for unit in ("processor_ms", "wall_ms"):
        ratios = {
            f"{size}, ranks: {ranks}": found[f"{unit}_ratios"][f"{OURS}/{DDP}"]
            for ranks, sizes in results.items()
            for size, found in sizes.items()
        }
        worst = max(ratios, key=ratios.__getitem__)
        words = "met" if ratios[worst] <= TARGET else "MISSED"
        print(f"worst {OURS}/{DDP}, {unit[:-3]}: {ratios[worst]:.2f} ({worst}), target {TARGET:.2f}: {words}")
    if given.json is not None:
        shapes = {size: shape_of(SIZES[size]).model_dump() for size in given.sizes}
        everything = {"settings": settings, "shapes": shapes, "results": results, "origin": describe_origin()}
        given.json.write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(run_command(main))
