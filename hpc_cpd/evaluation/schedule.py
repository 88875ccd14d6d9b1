"""Which tasks are evaluated after a stage, and the mean over all tasks when some of them were not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hpc_cpd.randomness import numpy_generator
from hpc_cpd.settings import Config


def tasks_after(config: Config, plan: Sequence[Sequence[str]], number: int) -> list[str]:
    """The task ids to evaluate after stage `number` (from 1) of `plan` (task ids per stage), in the order of learning.

    All tasks learnt so far after the last stage, and where ``evaluation.old_tasks_per_stage`` is null; else the stage's
    own tasks and that many of earlier stages. The draw depends on the run's seed and on `number` alone.
    """
    old = [task for tasks in plan[: number - 1] for task in tasks]
    count = config.evaluation.old_tasks_per_stage
    if count is not None and count < len(old) and number < len(plan):
        chosen = numpy_generator(config.seed, "old tasks to evaluate", number).permutation(len(old))[:count]
        old = [old[index] for index in sorted(chosen)]
    return [*old, *plan[number - 1]]


def mean_over_learnt(new: np.ndarray, old: np.ndarray) -> tuple[float, float]:
    """The mean success rate over all tasks learnt so far, and the standard error that a draw of old tasks gives it.

    The old tasks that were evaluated stand for all old ones, which is unbiased where they were drawn at random. (A
    plain mean over whatever was evaluated would count the new tasks, which had no time to be forgotten, too much.)

    Args:
        new: rates [tasks of this stage], NaN where not evaluated.
        old: the same of earlier stages.

    Returns:
        The mean, and the error of a simple random sample without replacement: 0 where all were evaluated, NaN where
        fewer than two were drawn. Both are NaN where a new task or all old ones are missing, or there are no tasks.
    """
    drawn, total = old[~np.isnan(old)], len(new) + len(old)
    if not total or np.isnan(new).any() or len(drawn) < min(1, len(old)):
        return np.nan, np.nan
    if len(drawn) == len(old):
        return float(np.concatenate([new, old]).mean()), 0.0
    mean = (new.sum() + len(old) * drawn.mean()) / total
    if len(drawn) < 2:
        return float(mean), np.nan
    error = np.sqrt((1 - len(drawn) / len(old)) * drawn.var(ddof=1) / len(drawn))
    return float(mean), float(error * len(old) / total)


def stage_success(evaluation: Mapping[str, Any]) -> tuple[float | None, bool]:
    """The mean over all tasks learnt as an ``evaluation.json`` of a stage has it, and whether it is an estimate.

    None: it cannot be told. Raises KeyError, TypeError, AttributeError or ZeroDivisionError: no such file's content.
    """
    records = evaluation["tasks"]
    rates = {task: record["successes"] / record["episodes"] for task, record in records.items()}
    # earlier versions did not write these two, and evaluated all tasks
    fresh = evaluation.get("new_tasks", list(rates))
    missing = evaluation.get("tasks_learnt", len(rates)) - len(rates)
    new = np.array([rates.pop(task) for task in fresh], dtype=np.float64)
    mean, _ = mean_over_learnt(new, np.array([*rates.values(), *[np.nan] * missing], dtype=np.float64))
    return (None, False) if np.isnan(mean) else (mean, missing > 0)
