"""Several runs side by side: rows of runs that differ in their seed alone, and the numbers of each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hpc_cpd.errors import UserError
from hpc_cpd.evaluation.metrics import continual_metrics
from hpc_cpd.report.differences import differing
from hpc_cpd.report.run_results import UNCOMMITTED, RunResults, name_tasks, read_results
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import read_json, write_json

SWEEP_FILE = "sweep.json"
SCHEMA_VERSION = 1


@dataclass
class Group:
    """One row of a comparison. `runs`: those that exist; `seeds`: those that were asked for.

    `metrics`: as `continual_metrics` gives them over the finished runs, with ``per_task``; None: none is finished.
    `untold`: the same of the last students where they are not told their task; None: not all were evaluated so.
    """

    name: str
    seeds: list[int]
    runs: list[RunResults]
    title: str = ""
    teaches: str = ""
    command: str = ""
    metrics: dict[str, Any] | None = None
    untold: dict[str, Any] | None = None

    @property
    def finished(self) -> list[RunResults]:
        return [facts for facts in self.runs if facts.finished]

    @property
    def seconds(self) -> float | None:
        """Wall-clock of the stages of one run, the mean over the finished ones; None: not known of all."""
        stages = [list(facts.wall_clock().values()) for facts in self.finished]
        known = [sum(s for s in one if s is not None) for one in stages if None not in one]
        return sum(known) / len(known) if known and len(known) == len(stages) else None


@dataclass
class Comparison:
    """Rows in the order in which they were asked for. `name`: of the sweep, or of nothing in particular."""

    name: str
    groups: list[Group]
    notes: list[str] = field(default_factory=list)

    @property
    def begun(self) -> list[Group]:
        """The rows that have a run."""
        return [group for group in self.groups if group.runs]

    @property
    def runs(self) -> list[tuple[Group, RunResults]]:
        return [(group, facts) for group in self.groups for facts in group.runs]

    @property
    def tasks(self) -> list[str]:
        """The tasks of all runs, in the order in which the first that has them learnt them."""
        return list(dict.fromkeys(task for _, facts in self.runs for task in facts.tasks))

    def settings(self) -> dict[str, dict[str, Any]]:
        """key -> {row: value} where rows differ."""
        return differing({group.name: group.runs[0].config for group in self.groups if group.runs})


def is_sweep(folder: Path) -> bool:
    return (folder / SWEEP_FILE).is_file()


def compare(folders: Sequence[Path]) -> Comparison:
    """Compare runs and sweeps. A sweep's runs are grouped by row; any other run is a row of its own.

    Raises UserError: a folder that is neither, a damaged file, or two seeds of a row that learnt different tasks.
    """
    groups: list[Group] = []
    for folder in folders:
        groups += _rows_of_sweep(folder) if is_sweep(folder) else [_row_of_run(folder)]
    _tell_apart(groups)
    for group in groups:
        group.metrics, group.untold = _numbers(group), _untold(group)
    name = folders[0].resolve().name if len(folders) == 1 else "comparison"
    if len(folders) == 1 and is_sweep(folders[0]):
        name = read_sweep_file(folders[0])["name"]
    comparison = Comparison(name, groups)
    comparison.notes = _notes(comparison)
    return comparison


def read_sweep_file(folder: Path) -> dict[str, Any]:
    """What `write_sweep_file` wrote. Raises UserError when it is damaged."""
    path = folder / SWEEP_FILE
    values = read_json(path)
    rows = values.get("rows") if isinstance(values, dict) else None
    keys = ("seeds", "title", "teaches", "command")
    if not isinstance(rows, dict) or not all(isinstance(r, dict) and all(k in r for k in keys) for r in rows.values()):
        raise UserError(f"{path} is damaged; delete it and run the sweep's command again")
    return dict(values)


def write_sweep_file(folder: Path, name: str, rows: dict[str, dict[str, Any]]) -> None:
    """Note the rows of a sweep beside its runs, for the pages; nothing when they stand there already."""
    values = {"schema_version": SCHEMA_VERSION, "name": name, "rows": rows}
    if not is_sweep(folder) or read_json(folder / SWEEP_FILE) != values:
        write_json(folder / SWEEP_FILE, values)


def _rows_of_sweep(folder: Path) -> list[Group]:
    groups = []
    for name, row in read_sweep_file(folder)["rows"].items():
        runs = [Run(folder / name / f"seed-{seed}") for seed in row["seeds"]]
        facts = [read_results(run) for run in runs if run.config_file.is_file()]
        groups.append(Group(name, row["seeds"], facts, row["title"], row["teaches"], row["command"]))
    return groups


def _row_of_run(folder: Path) -> Group:
    facts = read_results(Run(folder))
    return Group(folder.resolve().name, [facts.config.seed], [facts], title=facts.config.name)


def _tell_apart(groups: list[Group]) -> None:
    """Rows of the same name get their folders' names in front, as many as it takes."""
    parts = {id(group): group.runs[0].run.folder.resolve().parts for group in groups if group.runs}
    for depth in range(2, 2 + max((len(part) for part in parts.values()), default=0)):
        names = [group.name for group in groups]
        twice = [group for group in groups if names.count(group.name) > 1 and id(group) in parts]
        for group in twice:
            group.name = "/".join(parts[id(group)][-depth:])
    names = [group.name for group in groups if group.runs]  # rows without a run are only listed
    again = next((name for name in names if names.count(name) > 1), None)
    if again is not None:
        raise UserError(f"{again} is named twice; name every run once")


def _numbers(group: Group) -> dict[str, Any] | None:
    finished = group.finished
    if not finished:
        return None
    first = finished[0]
    other = next((facts for facts in finished if facts.stages != first.stages), None)
    if other is not None:
        raise UserError(
            f"{first.run.folder} and {other.run.folder} are seeds of one row but learnt different tasks; "
            "compare them as runs: hpc-cpd report RUN RUN"
        )
    rates: dict[str, Any] = {name: np.stack([facts.rates()[name] for facts in finished]) for name in first.rates()}
    if len({facts.run.folder.resolve() for facts in finished}) > len(_teachers(finished)):
        # the seeds have the same teachers, whose episodes must not be counted once for each of them
        rates["teacher_episodes"] = np.maximum(1, rates["teacher_episodes"] // len(finished))
    counted = np.max([facts.counted for facts in finished], axis=0)
    metrics = continual_metrics(stages=counted, **rates)
    name_tasks(metrics, first.tasks)
    for row, task in zip(metrics["per_task"], first.tasks, strict=True):
        row["task"] = task
        row.pop("index")
    return metrics


def _untold(group: Group) -> dict[str, Any] | None:
    rates = [facts.untold_rates() for facts in group.finished]
    known = [one for one in rates if one is not None]
    if not known or len(known) < len(rates):
        return None
    success, episodes = (np.stack([one[name] for one in known]) for name in ("success", "episodes"))
    tasks = success.shape[2]
    return continual_metrics(success, np.ones(tasks, np.int64), np.full(tasks, np.nan), episodes=episodes)


def _teachers(runs: Sequence[RunResults]) -> set[Path]:
    return {(facts.run.folder / "teachers").resolve() for facts in runs}


def _notes(comparison: Comparison) -> list[str]:
    notes = []
    for group in comparison.begun:
        if len(group.finished) < len(group.seeds):
            stages = ", ".join(
                f"seed {facts.config.seed}: {len(facts.evaluations)} of {len(facts.stages)} stages"
                for facts in group.runs
                if not facts.finished
            )
            notes.append(
                f"{group.name}: {len(group.finished)} of {len(group.seeds)} runs are finished"
                + (f" ({stages})." if stages else ".")
            )
    waiting = [group.name for group in comparison.groups if not group.runs]
    if waiting:
        notes.append(f"No results yet: {', '.join(waiting)}.")
    for group in comparison.begun:
        of_row = dict.fromkeys(note for one in group.finished for note in one.notes if note != UNCOMMITTED)
        notes += [f"{group.name}: {note}" for note in of_row]
    facts = [one for _, one in comparison.runs]
    if len({frozenset(one.tasks) for one in facts}) > 1:
        notes.append("The rows have different tasks, so their means are over different tasks.")
    if len({(one.config.evaluation.seed, one.config.evaluation.episodes) for one in facts}) > 1:
        notes.append("The rows were evaluated on different goals or numbers of episodes (evaluation.seed, .episodes).")
    if any(one.provenance.get("uncommitted_changes") for one in facts):
        notes.append("Some runs were made with changes that are in no commit.")
    if len({one.provenance.get("commit") for one in facts}) > 1:
        notes.append("The runs were made with different commits of this package.")
    return notes
