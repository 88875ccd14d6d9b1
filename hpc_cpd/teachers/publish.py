"""The end of making a teacher: its policy, its evaluation on the goals of the final comparison, and DONE."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hpc_cpd.evaluation.rollouts import EpisodeResult, evaluate_policy, evaluation_json, task_record
from hpc_cpd.progress import Progress
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import mark_done, write_json
from hpc_cpd.tasks.policy import Policy
from hpc_cpd.teachers.algorithms.base import TeacherContext


def evaluate_on_all_ranks(policy: Policy, context: TeacherContext, episodes: int, seed: int) -> list[EpisodeResult]:
    """The results of all episodes in order, on every rank; the ranks share the playing."""
    communicator = context.communicator
    mine = range(communicator.rank, episodes, communicator.size)
    gathered = communicator.gather(evaluate_policy(policy, context.task.task_id, episodes, seed, mine))
    return sorted((result for of_rank in gathered for result in of_rank), key=lambda result: result.episode)


def publish_teacher(
    run: Run,
    policy: Policy,
    context: TeacherContext,
    write_policy: Callable[[Path], None] | None,
    how: str,
    began: float,
    while_training: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Evaluate `policy` and write its folder in `run`, DONE last; all ranks call it together.

    `write_policy` writes it into the folder, on rank 0; None: it stands there already. `how` it came about is told
    (such as ``published``), `began` when (by `time.monotonic`). `while_training`: its evaluations on the way, the last
    one after its last environment step.
    """
    task_id, settings = context.task.task_id, run.config().evaluation
    folder = run.teacher(task_id)
    record = task_record(evaluate_on_all_ranks(policy, context, settings.episodes, settings.seed))
    successes, episodes = record["successes"], record["episodes"]

    def write() -> None:
        if write_policy is not None:
            write_policy(folder)
        evaluation = evaluation_json(0, settings, {task_id: record})
        write_json(folder / "evaluation.json", {**evaluation, "while_training": list(while_training)})
        seconds = time.monotonic() - began
        steps = while_training[-1]["environment_steps"] if while_training else 0
        cost = {"environment_steps": steps, "seconds": round(seconds, 1)}
        mark_done(folder, {"task_id": task_id, "success": successes / episodes, **cost})
        said = f"{how}, success {successes}/{episodes} after {seconds:.0f} s"
        Progress(f"teacher {task_id}", folder=folder).update(said, last=True)

    context.communicator.on_root(write)
