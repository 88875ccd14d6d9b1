"""Playing the tasks of a stage with its students, shared out over the ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch

from hpc_cpd.distill.initialize import untrained
from hpc_cpd.distributed.torch import device_of_rank, gather, run_on_rank, stop_together, taken_in_turn
from hpc_cpd.evaluation.rollouts import MOST_ROWS, EpisodeResult, evaluate_policy, evaluation_json, task_record
from hpc_cpd.evaluation.schedule import tasks_after
from hpc_cpd.methods.base import Stage
from hpc_cpd.run.publish import write_json
from hpc_cpd.student.policy import StudentPolicy, load_student_parts
from hpc_cpd.tasks.policy import Policy


def evaluate_before(stage: Stage) -> None:
    """Write the zero-shot success of the student so far, and of one that never learnt: what forward transfer compares.

    A collective. Raises StopRequested; what was played is then played again.
    """
    folder = stage.run.stage(stage.number)
    start = load_student_parts(folder / "start")
    never = untrained(start, load_student_parts(stage.run.stage(1) / "start"))
    students = [never] if stage.number == 1 else [never, start]
    policies = [StudentPolicy(student, device_of_rank()) for student in students]
    zero, *others = _records(stage, policies, stage.tasks)
    answer = {"stage": stage.number - 1, "untrained": zero, "before": others[0] if others else zero}
    run_on_rank(lambda: write_json(folder / "evaluation_before.json", answer))


def evaluate(stage: Stage, policy: Policy, name: str) -> None:
    """Write the file `name` with the record of every task that is due after this stage. As `evaluate_before`."""
    [records] = _records(stage, [policy], tasks_after(stage.config, stage.plan, stage.number))
    answer = evaluation_json(stage.number, stage.config.evaluation, records)
    answer |= {"new_tasks": stage.tasks, "tasks_learnt": len(stage.seen)}  # what the records stand for
    run_on_rank(lambda: write_json(stage.run.stage(stage.number) / name, answer))


def _records(stage: Stage, policies: Sequence[Policy], tasks: Sequence[str]) -> list[dict[str, dict[str, Any]]]:
    settings = stage.config.evaluation
    return records_of(policies, tasks, settings.episodes, settings.seed, stage.stop)


def records_of(
    policies: Sequence[Policy], tasks: Sequence[str], episodes: int, seed: int, stop: Callable[[], bool]
) -> list[dict[str, dict[str, Any]]]:
    """For each of `policies` the record of every task. A collective; raises StopRequested.

    Whoever is free takes the next piece: as many episodes of a task as a policy answers at once, so that no rank
    computes rows that another one plays, or a share of them where there are fewer pieces than ranks.
    """
    waves = [range(first, min(first + MOST_ROWS, episodes)) for first in range(0, episodes, MOST_ROWS)]
    places = [(number, task, wave) for number in range(len(policies)) for task in tasks for wave in waves]
    shares = -(-torch.distributed.get_world_size() // max(1, len(places)))
    pieces = [(number, task, wave[n::shares]) for number, task, wave in places for n in range(shares)]
    mine: list[tuple[int, str, list[EpisodeResult]]] = []
    for number, task, indices in taken_in_turn(pieces, stop):
        mine.append((number, task, evaluate_policy(policies[number], task, episodes, seed, indices)))
    stop_together(stop, "an evaluation stops and will be played again")
    results: dict[tuple[int, str], list[EpisodeResult]] = defaultdict(list)
    for number, task, played in chain(*gather(mine)):
        results[number, task] += played

    def record(number: int, task: str) -> dict[str, Any]:
        return task_record(sorted(results[number, task], key=lambda result: result.episode))

    return [{task: record(number, task) for task in tasks} for number in range(len(policies))]
