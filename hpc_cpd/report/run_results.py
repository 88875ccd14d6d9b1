"""What the files of a run say, in one object. Unfinished folders are skipped, and every gap becomes a note."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from hpc_cpd.errors import UserError
from hpc_cpd.evaluation.metrics import STUDENT_FIELDS, continual_metrics, wilson
from hpc_cpd.evaluation.schedule import tasks_after
from hpc_cpd.run.metrics_log import read_metrics
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import DONE, is_done, read_json
from hpc_cpd.settings import Config
from hpc_cpd.tasks.registry import run_plan

UNCOMMITTED = "The source had changes that are in no commit, so the commit alone does not repeat this run."
Record = dict[str, Any]
Row = dict[str, Any]
K = TypeVar("K")


@dataclass
class RunResults:
    """A run as far as it has come.

    `stages` is the plan (task ids per stage); `evaluations` has one entry per finished stage; `rows` one
    per task of the plan, in the order of learning, as `continual_metrics` gives them, plus ``task``. `counted` is the
    stage that taught each task, or one past the last where an evaluation of the task that was due is missing.
    """

    run: Run
    config: Config
    provenance: dict[str, Any]
    stages: list[list[str]]
    teachers: dict[str, Record] = field(default_factory=dict)
    evaluations: list[dict[str, Record]] = field(default_factory=list)
    before: dict[str, Record] = field(default_factory=dict)
    untrained: dict[str, Record] = field(default_factory=dict)
    metrics: dict[str, Any] | None = None
    rows: list[Row] = field(default_factory=list)
    counted: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def tasks(self) -> list[str]:
        return [task for stage in self.stages for task in stage]

    def matrix(self) -> np.ndarray:
        """Success rates [finished stages, tasks], NaN where not evaluated."""
        return np.array([[_rate(stage.get(task)) for task in self.tasks] for stage in self.evaluations])

    @property
    def finished(self) -> bool:
        """Whether every stage is published and evaluated."""
        return len(self.evaluations) == len(self.stages)

    @property
    def partly(self) -> list[bool]:
        """Of every finished stage, whether only some of the tasks learnt (and counted) were evaluated after it."""
        some = self.metrics["evaluated_by_stage"] if self.metrics else []
        every = (sum(number <= stage for number in self.counted) for stage in range(1, len(some) + 1))
        return [one < all_ for one, all_ in zip(some, every, strict=True)]

    @property
    def finished_stages(self) -> dict[int, Path]:
        """The folders of the finished stages, by number."""
        return {stage: self.run.stage(stage) for stage in range(1, len(self.evaluations) + 1)}

    def rates(self) -> dict[str, Any]:
        """The arguments of `continual_metrics` that come from the files, as arrays: rates and their episodes."""
        once = {"teacher": self.teachers, "before": self.before, "untrained": self.untrained}
        return {
            "success": self.matrix(),
            **{name: np.array([_rate(found.get(task)) for task in self.tasks]) for name, found in once.items()},
            "episodes": np.array([[_episodes(stage.get(task)) for task in self.tasks] for stage in self.evaluations]),
            "teacher_episodes": np.array([_episodes(self.teachers.get(task)) for task in self.tasks]),
        }

    def untold_rates(self) -> dict[str, np.ndarray] | None:
        """`success` and `episodes` [1, tasks] of the last student when it is not told its task; None: unknown."""
        path = self.run.stage(len(self.evaluations)) / "evaluation_inferred.json"
        if not self.finished or not path.is_file():
            return None
        answer = _records(_object(path), "tasks", path)
        records = [_record(answer.get(task), path) for task in self.tasks]
        return {"success": np.array([list(map(_rate, records))]), "episodes": np.array([list(map(_episodes, records))])}

    def wall_clock(self) -> dict[int, float | None]:
        """Seconds that each finished stage took, all its attempts together; None: not known."""
        return {stage: _wall_clock(folder) for stage, folder in self.finished_stages.items()}

    def teacher_curves(self) -> dict[str, list[Record]]:
        """The metrics of the published teachers that have any."""
        return _curves({task: self.run.teacher(task) for task in self.tasks})

    def stage_curves(self) -> dict[int, list[Record]]:
        """The metrics of the finished stages that have any."""
        return _curves(self.finished_stages)

    def routing(self) -> Record:
        """The routing of the last finished stage; empty: it has none."""
        path = self.run.stage(len(self.evaluations)) / "routing.json"
        return _object(path) if self.evaluations and path.is_file() else {}

    def memories(self) -> dict[int, Record]:
        """What each finished stage put into the replay memory."""
        paths = {stage: folder / "memory" / "selection.json" for stage, folder in self.finished_stages.items()}
        return {stage: _selection(path) for stage, path in paths.items() if path.is_file()}


def read_results(run: Run) -> RunResults:
    """Read the finished parts of `run`. Raises UserError: not a run folder, or a damaged file."""
    config = run.config()
    provenance = _object(run.provenance_file) if run.provenance_file.is_file() else {}
    facts = RunResults(run, config, provenance, run_plan(run, config))
    if not provenance:
        facts.notes.append("provenance.json is missing, so versions and commit are unknown.")
    if provenance.get("uncommitted_changes"):
        facts.notes.append(UNCOMMITTED)
    _teachers(facts)
    _stages(facts)
    _numbers(facts)
    return facts


def name_tasks(metrics: dict[str, Any], tasks: Sequence[str]) -> None:
    """Put task ids in the place of the indices that `continual_metrics` gives."""
    for row in metrics["per_task"]:
        row["task"] = tasks[row.pop("index")]
    for name in ("not_learnt", "recovery_excluded", "teacher_unknown"):
        metrics[name] = [tasks[index] for index in metrics[name]]
    for name in ("forgetting_worst_task", "forgetting_from_best_worst_task"):
        metrics[name] = None if metrics[name] is None else tasks[metrics[name]]


def short_names(tasks: Sequence[str]) -> list[str]:
    """Task ids without their family where all share one: ``reach-v3`` for ``metaworld/reach-v3``."""
    families = {task.partition("/")[0] for task in tasks}
    return [task.partition("/")[2] if len(families) == 1 and "/" in task else task for task in tasks]


def shown(folder: Path) -> str:
    """The path as one would type it in the working directory."""
    absolute = Path(os.path.abspath(folder))
    return str(absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else absolute)


def _teachers(facts: RunResults) -> None:
    strange = []
    for task in facts.tasks:
        path = facts.run.teacher(task) / "evaluation.json"
        evaluation = _object(path) if is_done(path.parent) and path.is_file() else {}
        records = _records(evaluation, "tasks", path)
        if task in records:
            facts.teachers[task] = records[task]
            if evaluation.get("seed") != facts.config.evaluation.seed:
                strange.append(task)
    if waiting := [task for task in facts.tasks if task not in facts.teachers]:
        facts.notes.append(f"No finished teacher with an evaluation yet for {_names(waiting)}.")
    if strange:
        facts.notes.append(
            f"The teachers of {_names(strange)} were evaluated on other goals than the student, "
            "so their recovery compares different episodes."
        )


def _stages(facts: RunResults) -> None:
    total = len(facts.stages)
    for stage in range(1, total + 1):
        folder = facts.run.stage(stage)
        path = folder / "evaluation.json"
        if not is_done(folder):
            so = f"everything below is as of stage {stage - 1}."
            note = f"Stage {stage} of {total} is not finished (it has no {DONE} file); {so}"
            facts.notes.append(note if stage > 1 else f"No stage is finished yet (of {total}).")
            return
        if not path.is_file():
            facts.notes.append(f"Stage {stage} is finished but was not evaluated ({path.name} is missing).")
            return
        facts.evaluations.append(_records(_object(path), "tasks", path))
        zero_shot = folder / "evaluation_before.json"
        if zero_shot.is_file():
            answer = _object(zero_shot)
            facts.before |= _records(answer, "before", zero_shot)
            facts.untrained |= _records(answer, "untrained", zero_shot)
        elif facts.config.evaluation.forward_transfer:
            absent = f"Stage {stage} has no {zero_shot.name}"
            facts.notes.append(f"{absent}, so its tasks do not count for forward transfer.")


def _numbers(facts: RunResults) -> None:
    tasks, finished = facts.tasks, len(facts.evaluations)
    taught = {task: k for k, stage in enumerate(facts.stages, 1) for task in stage}
    due = tasks_after(facts.config, facts.stages, finished) if finished else []
    for task in tasks:
        asked = {taught[task], *([finished] if task in due else [])} if taught[task] <= finished else set()
        complete = all(task in facts.evaluations[stage - 1] for stage in asked)
        if not complete:
            facts.notes.append(f"{task} lacks an evaluation after its own or the last stage and is left out.")
        facts.counted.append(taught[task] if complete else len(facts.stages) + 1)
    if finished:
        facts.metrics = continual_metrics(stages=facts.counted, **facts.rates())
        name_tasks(facts.metrics, tasks)
        found = facts.metrics.pop("per_task")
        if never := facts.metrics["recovery_excluded"]:
            facts.notes.append(f"The teachers of {_names(never)} never succeed, so the mean recovery leaves them out.")
        facts.notes += _about_sample(facts, facts.metrics)
    else:
        teachers = [facts.teachers.get(task) for task in tasks]
        sure = [one and [float(bound) for bound in wilson(_rate(one), _episodes(one))] for one in teachers]
        rates = [{"teacher": one and _rate(one), "teacher_interval": s} for one, s in zip(teachers, sure, strict=True)]
        found = [rate | dict.fromkeys(STUDENT_FIELDS) for rate in rates]
    for task, row in zip(tasks, found, strict=True):
        first = {"task": task, "episodes": facts.config.evaluation.episodes}
        facts.rows.append({**first, **row, "stage": taught[task]})


def _about_sample(facts: RunResults, m: Mapping[str, Any]) -> list[str]:
    """What cannot be said, or stands on some tasks alone, because not all old ones were evaluated after every stage."""
    drawn, finished, partly = facts.config.evaluation.old_tasks_per_stage, len(facts.evaluations), facts.partly
    if not any(partly):
        return []
    if drawn is None:
        how = "though evaluation.old_tasks_per_stage asks for all; the mean success after them is of the others"
    elif drawn == 0:
        how = "(evaluation.old_tasks_per_stage=0), so there is no mean success after them"
    else:
        how = f"(evaluation.old_tasks_per_stage={drawn}), so the mean success after them is estimated from a draw"
    notes = [
        f"After {sum(partly)} of {finished} finished stages not all old tasks were evaluated {how}, "
        "and forgetting from the best is not known."
    ]
    if partly[-1]:
        mean, error = m["success_by_stage"][-1], m["success_by_stage_error"][-1]
        guess = "" if mean is None else f"; the mean success is estimated at {100 * mean:.1f}%"
        guess += "" if error is None else f", standard error of the draw {100 * error:.1f} pp"
        some = f"{m['evaluated_by_stage'][-1]} of {m['tasks']} tasks learnt"
        notes.append(f"After stage {finished}, {some} were evaluated, so means over all are not known yet{guess}.")
    return notes


def _damaged(path: Path, how: str) -> UserError:
    return UserError(f"{path} is damaged: {how}; delete it and run the command that makes it again")


def _object(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise _damaged(path, "expected a JSON object")
    return value


def _records(value: dict[str, Any], key: str, path: Path) -> dict[str, Record]:
    """The records of all tasks under `key` of what `path` holds."""
    found = value.get(key) or {}
    if not isinstance(found, dict):
        raise _damaged(path, f"'{key}' is no list of tasks by name")
    return {task: _record(record, path) for task, record in found.items()}


def _record(record: Any, path: Path) -> Record:
    values: Record = dict(record) if isinstance(record, dict) else {}
    successes, episodes = values.get("successes"), values.get("episodes")
    goals = values.get("goals", episodes)  # earlier versions did not count them
    whole = all(type(number) is int for number in (successes, episodes, goals))
    if not whole or not 0 <= successes <= episodes or not 1 <= goals <= episodes:  # type: ignore[operator]
        needs = "every task needs whole numbers, successes (from 0) and goals (from 1) no more than episodes"
        raise _damaged(path, needs)
    return values | {"goals": goals}


def _rate(record: Record | None) -> float:
    return record["successes"] / record["episodes"] if record else float("nan")


def _episodes(record: Record | None) -> int:
    """The episodes that say something: on a goal played before, a policy that acts by its mean does the same again."""
    return int(record["goals"]) if record else 1


def _selection(path: Path) -> Record:
    value = _object(path)
    memories, selection = value.get("memories"), value.get("selection")
    names = ("budget_steps", "kept_steps", "total_steps")
    if not isinstance(memories, list) or not all(
        isinstance(memory, dict) and all(type(memory.get(name)) is int for name in names) for memory in memories
    ):
        raise _damaged(path, f"every memory needs whole numbers {', '.join(names)}")
    named = isinstance(selection, dict) and "name" in selection
    if not named or not isinstance(value.get("budget_fraction"), int | float):
        raise _damaged(path, "it needs a selection with a name, and a budget_fraction")
    return value


def _curves(folders: Mapping[K, Path]) -> dict[K, list[Record]]:
    found = {key: read_metrics(folder / "metrics.jsonl") for key, folder in folders.items() if is_done(folder)}
    return {key: lines for key, lines in found.items() if lines}


def _wall_clock(folder: Path) -> float | None:
    """From ``attempt.json``; DONE is the end of a job that was killed between its last two words."""
    path = folder / "attempt.json"
    if not path.is_file():
        return None
    attempt = _object(path)
    before = 0.0 if attempt.get("number") == 1 else attempt.get("seconds_before")
    started, ended = attempt.get("started"), attempt.get("ended")
    ended = (folder / DONE).stat().st_mtime if ended is None else ended
    known = [float(number) for number in (before, started, ended) if isinstance(number, int | float)]
    return known[0] + max(0.0, known[2] - known[1]) if len(known) == 3 else None


def _names(tasks: list[str]) -> str:
    return ", ".join(tasks[:6]) + (f" and {len(tasks) - 6} more" if len(tasks) > 6 else "")
