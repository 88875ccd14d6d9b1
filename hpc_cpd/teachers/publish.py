"""The end of making a teacher: its policy, its evaluation on the goals of the final comparison, and DONE."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hpc_cpd.distributed.mpi import Communicator
from hpc_cpd.evaluation.episodes import EpisodeResult, evaluation_json, task_record
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import mark_done, write_json
from hpc_cpd.teachers.policy import TeacherPolicy, save_teacher


class Teacher(Protocol):
    """What can be a teacher."""

    task_id: str

    def reset(self, task_id: str | None = None, num_envs: int = 1) -> None: ...

    def act(self, observations: NDArray[np.float32]) -> NDArray[np.float32]: ...


Evaluate = Callable[[Any, str, int, int, list[int]], Sequence[EpisodeResult]]
"""(policy, task id, number of episodes, seed, which of them) -> their results."""


def evaluate_together(
    evaluate: Evaluate, policy: Teacher, episodes: int, seed: int, communicator: Communicator
) -> list[EpisodeResult]:
    """The results of all episodes in order, on every rank; the ranks share the playing."""
    mine = list(range(communicator.rank, episodes, communicator.size))
    results = evaluate(policy, policy.task_id, episodes, seed, mine)
    gathered = [result for rank in communicator.gather(list(results)) for result in rank]
    return sorted(gathered, key=lambda result: result.episode)


def publish_teacher(
    run: Run,
    policy: Teacher,
    communicator: Communicator,
    evaluate: Evaluate,
    provenance: Mapping[str, Any] | None,
    *,
    environment_steps: int,
    seconds: Callable[[], float],
    while_training: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Evaluate `policy` and write its folder in `run`, DONE last; all ranks call it together.

    `provenance` None: the policy itself stands in the folder already.

    `environment_steps` and `seconds` (asked at the end): what it cost; `while_training`: its evaluations on the way.
    Returns the successes, such as ``49/50``.
    """
    folder, settings = run.teacher(policy.task_id), run.config().evaluation
    record = task_record(evaluate_together(evaluate, policy, settings.episodes, settings.seed, communicator))

    def write() -> None:
        if isinstance(policy, TeacherPolicy):
            save_teacher(folder, policy, provenance or {})
        evaluation = evaluation_json(0, settings, {policy.task_id: record})
        write_json(folder / "evaluation.json", {**evaluation, "while_training": list(while_training)})
        mark_done(
            folder,
            {
                "task_id": policy.task_id,
                "success": record["successes"] / record["episodes"],
                "environment_steps": environment_steps,
                "seconds": round(seconds(), 1),
            },
        )

    communicator.on_root(write)
    return f"{record['successes']}/{record['episodes']}"
