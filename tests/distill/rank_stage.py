"""One rank of a stage, started by the tests: ``rank_stage.py RUN STAGE [STOP_AFTER_STEPS] [-- RUN STAGE ...]``.

Several are learnt one after the other by the same processes, because to start one takes longer than a small stage; the
exit code is the greatest. The evaluation is a constant (a student that is not told its task never succeeds), because
these tests are about learning; real ones are in tests/evaluate.
"""

from __future__ import annotations

import sys
from functools import partial
from itertools import groupby
from pathlib import Path

from hpc_cpd.distill import evaluate as distill_evaluate
from hpc_cpd.distill import stage as distill_stage
from hpc_cpd.distributed.torch import finish_distributed
from hpc_cpd.errors import EXIT_DONE, run_command
from hpc_cpd.evaluation.rollouts import EpisodeResult
from hpc_cpd.run.paths import Run
from hpc_cpd.student.policy import StudentPolicy, TaskAgnosticPolicy
from hpc_cpd.worker import leave


def evaluate(
    policy: StudentPolicy | TaskAgnosticPolicy, task_id: str, episodes: int, seed: int, indices: list[int]
) -> list[EpisodeResult]:
    return [EpisodeResult(i, i, not isinstance(policy, TaskAgnosticPolicy), 1.0, 1, 1) for i in indices]


def learn(folder: str, stage: str, stop_after: str = "-1") -> int:
    left = int(stop_after)

    def stop() -> bool:
        nonlocal left
        left -= 1
        return left == 0

    distill_stage.run_stage(Run(Path(folder)), int(stage), stop)
    return EXIT_DONE


def main() -> int:
    # DeepSpeed keeps its groups for the life of the process, so the ranks must not part between two stages
    distill_stage.finish_distributed = lambda: None
    distill_evaluate.evaluate_policy = evaluate
    if "--forget" in sys.argv:
        sys.argv.remove("--forget")
    else:  # tests compare what a stage began with
        distill_stage.forget_beginning = lambda stage: None
    wishes = [list(words) for dashes, words in groupby(sys.argv[1:], "--".__eq__) if not dashes]
    code = max(run_command(partial(learn, *wish)) for wish in wishes)
    if code == EXIT_DONE:
        finish_distributed()
    return code


if __name__ == "__main__":
    leave(main())
