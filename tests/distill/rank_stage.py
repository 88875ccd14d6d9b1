"""One rank of a stage, started by the tests: ``rank_stage.py RUN STAGE [STOP_AFTER_STEPS]``.

The evaluation is a constant (a student that is not told its task never succeeds), because these tests are about
learning; real ones are in tests/evaluate.
"""

from __future__ import annotations

import sys
from pathlib import Path

from hpc_cpd.distill.stage import run_stage
from hpc_cpd.errors import run_command
from hpc_cpd.run import Run
from hpc_cpd.student.policy import StudentPolicy, Untold
from hpc_cpd.tasks.episodes import EpisodeResult
from hpc_cpd.worker import leave


def evaluate(
    policy: StudentPolicy | Untold, task_id: str, episodes: int, seed: int, indices: list[int]
) -> list[EpisodeResult]:
    return [EpisodeResult(i, i, not isinstance(policy, Untold), 1.0, 1, 1) for i in indices]


def main() -> int:
    run, stage = Run(Path(sys.argv[1])), int(sys.argv[2])
    left = int(sys.argv[3]) if len(sys.argv) > 3 else -1

    def stop() -> bool:
        nonlocal left
        left -= 1
        return left == 0

    run_stage(run, stage, evaluate, stop)
    return 0


if __name__ == "__main__":
    leave(run_command(main))
