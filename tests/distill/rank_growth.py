"""One rank that learns the stages of a run one after the other in one process: ``rank_growth.py ARGUMENTS ANSWER``.

ARGUMENTS: JSON object with "run" (folder) and "stages" (how many). ANSWER: JSON with, for each stage, the number of
steps in which each expert received a gradient, and the memory that the process held after the stage.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from hpc_cpd.distill import evaluate as distill_evaluate
from hpc_cpd.distill import stage, train
from hpc_cpd.distill.engine import PhaseEngine
from hpc_cpd.distributed.torch import finish_distributed, start_distributed
from hpc_cpd.errors import run_command
from hpc_cpd.methods.base import Method
from hpc_cpd.run.paths import Run
from hpc_cpd.settings import DistillSettings
from hpc_cpd.student.network import Student, expert_of
from hpc_cpd.worker import leave
from tests.distill.rank_stage import evaluate

steps_with_gradient: Counter[int] = Counter()


class WatchedEngine(PhaseEngine):
    """Counts for every expert of this rank the steps in which it received a gradient that is not zero."""

    def __init__(self, student: Student, settings: DistillSettings, total_steps: int, method: Method) -> None:
        super().__init__(student, settings, total_steps, method)
        for name, parameter in student.expert_parameters():
            number = expert_of(name)
            if number is None or not name.endswith(".last.bias") or not parameter.requires_grad:
                continue

            def note(gradient: torch.Tensor, number: int = number) -> None:
                # an expert that was given no token is called with none: its gradient is there, but zero
                steps_with_gradient[number] += bool(gradient.any())

            parameter.register_hook(note)


def resident_megabytes() -> float:
    """Memory of this process, as the kernel counts it."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> int:
    arguments, answer = json.loads(sys.argv[1]), Path(sys.argv[2])
    rank, _ = start_distributed()
    train.PhaseEngine = WatchedEngine  # type: ignore[misc]
    # DeepSpeed keeps its groups for the life of the process, so the ranks must not part between two stages
    stage.finish_distributed = lambda: None
    distill_evaluate.evaluate_policy = evaluate
    stage.forget_beginning = lambda stage: None  # tests compare what a stage began with
    result: dict[str, list[Any]] = {"gradients": [], "megabytes": []}
    for number in range(1, arguments["stages"] + 1):
        steps_with_gradient.clear()
        # stages of different sizes: tasks without a teacher are left out of theirs
        stage.run_stage(Run(arguments["run"]), number, lambda: False, allow_missing=True)
        result["gradients"].append(dict(steps_with_gradient))
        result["megabytes"].append(resident_megabytes())
    if rank == 0:
        answer.write_text(json.dumps(result))
    finish_distributed()
    return 0


if __name__ == "__main__":
    leave(run_command(main))
