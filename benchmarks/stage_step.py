"""Processor time of a gradient step of a stage, against the matrix products that it is made of.

    python benchmarks/stage_step.py [--json OUT.json]

The default student with two experts of 25 per token and 256 windows, on one core, everything from the batch on:
forward, backward, clipping, AdamW, and the answers of the student before the stage. In "old parts frozen" the
backbone, 20 experts and their gate rows stand still, as under the method `ours` after stage 1: what is frozen is known
of three quarters of the windows from a table; the others are computed, eight steps at once. In "all learns" every
parameter does.

Beside each stands the time of its own bare matrix products: those that torch was asked for in one step, called again
with the same operands and nothing between them; and one product of two 1024 x 1024 float32 matrices, which says how
fast this core is today. They take turns; figures are medians of the turns, ratios medians of the ratios within a turn.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hpc_cpd.cluster.provenance import describe_origin
from hpc_cpd.config import load_config
from hpc_cpd.distill.batches import STEPS_AT_ONCE, Batch
from hpc_cpd.distill.engine import PhaseEngine
from hpc_cpd.distill.train import batch_loss
from hpc_cpd.distributed.torch import finish_distributed, start_distributed
from hpc_cpd.errors import run_command
from hpc_cpd.methods.base import Phase, method_of
from hpc_cpd.settings import DistillSettings
from hpc_cpd.student.network import Student, StudentShape, grown

WINDOWS, HISTORY, NEW, ASKED, KNOWN = 256, 4, 128, 64, 8192
OLD, BORN = [list(range(first, first + 5)) for first in range(0, 20, 5)], list(range(20, 25))
TARGETS = {"old parts frozen": 0.36, "all learns": 1.25}
"""Of the time of one product of two 1024 x 1024 matrices."""
PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}


class Recorded(TorchDispatchMode):
    """Notes the matrix products that torch is asked for, and calls them again."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS:
            self.calls.append((func, [operand.detach() for operand in args if isinstance(operand, Tensor)]))
        return func(*args, **(kwargs or {}))

    def again(self) -> None:
        for func, operands in self.calls:
            func(*operands)


def stage_step(frozen: bool) -> Callable[[int], None]:
    """(number of the step) -> makes it."""
    config = load_config(None, ["student.top_k=2"])
    sizes = {"observation_size": 39, "action_size": 4, "task_vector_size": 32, "initial_gate_bias": -5.0}
    shape, method = StudentShape.from_settings(config.student, **sizes), method_of(config)
    past = Student(shape, OLD, seed=1, executor="stacked", for_training=False).requires_grad_(False)
    if frozen:
        student = grown(past.state_dict(), shape, OLD, BORN, seed=1)
        method.freeze(student, Phase(1, 1, False, True, False, False), BORN)
    else:
        student = Student(shape, [list(range(25))], seed=1)
    engine = PhaseEngine(student, DistillSettings(), 10_000, method)
    draw = torch.Generator().manual_seed(0)
    valid = torch.arange(HISTORY).expand(KNOWN, -1) == HISTORY - 1
    windows = torch.randn(KNOWN, HISTORY, 39, generator=draw), torch.randn(KNOWN, 32, generator=draw), valid
    target = torch.rand(KNOWN, HISTORY, 4, generator=draw) - 0.5
    is_new = torch.arange(WINDOWS) < NEW
    table = past.precompute(*windows)[0] if frozen else None
    asked: list[Tensor] = []

    def step(number: int) -> None:
        rows, known = torch.randint(KNOWN, (WINDOWS,), generator=draw), None
        observations, told, valid = (column[rows] for column in windows)
        if table is not None:
            if number % STEPS_AT_ONCE == 0 or not asked:
                drawn = torch.randint(KNOWN, (ASKED * STEPS_AT_ONCE,), generator=draw)
                asked[:] = past.precompute(*(column[drawn] for column in windows))[0].rows.split(ASKED)
            known = table.with_rows(torch.cat([table.rows[rows[ASKED:]], asked[number % STEPS_AT_ONCE]]))
        override = is_new if frozen else None
        batch = Batch(observations, target[rows], valid, told, is_new, override, WINDOWS, NEW, [], known)
        loss, _, _, gate, share = batch_loss(engine, batch, config.distill.load_balancing_coefficient)
        extra = method.extra_loss(student, batch, gate, share) if frozen else None
        engine.step(loss if extra is None else loss + extra, number)

    return step


def milliseconds(work: Callable[[int], object], times: int) -> float:
    begin = time.process_time()
    for number in range(times):
        work(number)
    return 1000.0 * (time.process_time() - begin) / times


def compare(name: str, turns: int, steps: int) -> dict[str, Any]:
    step = stage_step(name == "old parts frozen")
    for number in range(STEPS_AT_ONCE):
        step(number)
    with Recorded() as recorded:
        for number in range(STEPS_AT_ONCE):
            step(number)
    square = torch.randn(1024, 1024), torch.randn(1024, 1024)
    found = []
    for _ in range(turns):
        product = milliseconds(lambda _: torch.mm(*square), 10)
        bare = milliseconds(lambda _: recorded.again(), max(1, steps // STEPS_AT_ONCE)) / STEPS_AT_ONCE
        found.append((milliseconds(step, steps), bare, product))
    ratios = [median(whole / other for whole, *others in found for other in [others[n]]) for n in range(2)]
    whole, bare, product = (median(column) for column in zip(*found, strict=True))
    return {
        "case": name,
        "step_ms": whole,
        "its_matrix_products_ms": bare,
        "product_1024_ms": product,
        "step_over_its_products": ratios[0],
        "step_over_product_1024": ratios[1],
        "target": TARGETS[name],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start_distributed()
    rows = [compare(name, arguments.turns, arguments.steps) for name in TARGETS]
    for row in rows:
        print(f"{row['case']}: {row['step_ms']:.1f} ms a step")
        print(
            f"  {row['step_over_its_products']:.2f} times its matrix products, {row['its_matrix_products_ms']:.1f} ms"
        )
        print(f"  {row['step_over_product_1024']:.2f} times a product of 1024 x 1024, {row['product_1024_ms']:.1f} ms")
        print(f"  wanted: at most {row['target']} times that product")
    if arguments.json:
        document = {"origin": describe_origin(), "torch": torch.__version__, "results": rows}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    finish_distributed()


if __name__ == "__main__":
    sys.exit(run_command(main))
