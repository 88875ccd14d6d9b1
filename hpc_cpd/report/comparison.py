"""Several runs side by side: rows of runs that differ in their seed alone, their numbers, and the one table of them.

The table is for the terminal, the HTML page and Markdown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from hpc_cpd.config import flat_settings
from hpc_cpd.errors import UserError
from hpc_cpd.evaluation.metrics import continual_metrics
from hpc_cpd.report.run_results import UNCOMMITTED, RunResults, name_tasks, read_results, short_names
from hpc_cpd.report.table import interval, percent, points
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import read_json, write_json

SWEEP_FILE = "sweep.json"
SCHEMA_VERSION = 1
Cell = tuple[str, str]
"""A number, and its 95% interval or what else there is to say about it."""


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
        """key -> {row: value} where rows differ. A row whose plug-ins have no such setting is left out."""
        flat = {group.name: flat_settings(group.runs[0].config) for group in self.begun}
        keys = dict.fromkeys(key for one in flat.values() for key in one if key not in ("seed", "name"))
        values = {key: {name: one[key] for name, one in flat.items() if key in one} for key in keys}
        # alike: every row has the setting, with the value of the first
        alike = {key for key, v in values.items() if [*v.values()].count(next(iter(v.values()))) == len(flat)}
        return {key: found for key, found in values.items() if key not in alike}


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
    comparison = Comparison("comparison", groups)
    if len(folders) == 1:
        (folder,) = folders
        comparison.name = read_sweep_file(folder)["name"] if is_sweep(folder) else folder.resolve().name
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
    if again := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{again[0]} is named twice; name every run once")


def _numbers(group: Group) -> dict[str, Any] | None:
    finished = group.finished
    if not finished:
        return None
    first = finished[0]
    if others := [facts for facts in finished if facts.stages != first.stages]:
        raise UserError(
            f"{first.run.folder} and {others[0].run.folder} are seeds of one row but learnt different tasks; "
            "compare them as runs: hpc-cpd report RUN RUN"
        )
    rates: dict[str, Any] = {name: np.stack([facts.rates()[name] for facts in finished]) for name in first.rates()}
    folders, teachers = ({(f.run.folder / part).resolve() for f in finished} for part in ("", "teachers"))
    if len(folders) > len(teachers):
        # the seeds have the same teachers, whose episodes must not be counted once for each of them
        rates["teacher_episodes"] = np.maximum(1, rates["teacher_episodes"] // len(finished))
    counted = np.max([facts.counted for facts in finished], axis=0)
    metrics = continual_metrics(stages=counted, **rates)
    name_tasks(metrics, first.tasks)
    return metrics


def _untold(group: Group) -> dict[str, Any] | None:
    rates = [facts.untold_rates() for facts in group.finished]
    known = [one for one in rates if one is not None]
    if not known or len(known) < len(rates):
        return None
    success, episodes = (np.stack([one[name] for one in known]) for name in ("success", "episodes"))
    tasks = success.shape[2]
    return continual_metrics(success, np.ones(tasks, np.int64), np.full(tasks, np.nan), episodes=episodes)


def _notes(comparison: Comparison) -> list[str]:
    notes = []
    for group in comparison.begun:
        have, wanted = len(group.finished), len(group.seeds)
        open_runs = [facts for facts in group.runs if not facts.finished]
        come = (f"seed {f.config.seed}: {len(f.evaluations)} of {len(f.stages)} stages" for f in open_runs)
        if have < wanted:
            far = f" ({', '.join(come)})" if open_runs else ""
            notes.append(f"{group.name}: {have} of {wanted} runs are finished{far}.")
    if waiting := [group.name for group in comparison.groups if not group.runs]:
        notes.append(f"No results yet: {', '.join(waiting)}.")
    for group in comparison.begun:
        of_row = dict.fromkeys(note for one in group.finished for note in one.notes if note != UNCOMMITTED)
        notes += [f"{group.name}: {note}" for note in of_row]
    facts = [one for _, one in comparison.runs]
    if len({frozenset(one.tasks) for one in facts}) > 1:
        notes.append("The rows have different tasks, so their means are over different tasks.")
    if len({(one.config.evaluation.seed, one.config.evaluation.episodes) for one in facts}) > 1:
        notes.append("The rows were evaluated on different goals or numbers of episodes (evaluation.seed, .episodes).")
    if len({one.config.evaluation.old_tasks_per_stage for one in facts}) > 1:
        differ = "After each stage the rows were evaluated on more or fewer old tasks"
        notes.append(f"{differ} (evaluation.old_tasks_per_stage), which their wall-clock includes.")
    if any(one.provenance.get("uncommitted_changes") for one in facts):
        notes.append("Some runs were made with changes that are in no commit.")
    if len({one.provenance.get("commit") for one in facts}) > 1:
        notes.append("The runs were made with different commits of this package.")
    return notes


def headings(comparison: Comparison) -> list[str]:
    groups = comparison.groups
    untold = any(group.untold for group in groups)
    forward = any(group.metrics and group.metrics["forward_transfer"] is not None for group in groups)
    numbers = ["Success at the end", "Recovery", "Recovery of means", "Mean forgetting", "Worst forgetting"]
    return ["Row", "Seeds", *numbers, *["Task not told"] * untold, *["Forward transfer"] * forward, "Stages"]


def cells(comparison: Comparison, group: Group) -> list[Cell]:
    """The cells of one row, as `headings` names them; the last is the wall-clock of a run's stages."""
    wanted, have = len(group.seeds), len(group.finished)
    m: dict[str, Any] = group.metrics or {}
    worst = m["forgetting_worst_task"] if (m.get("forgetting_worst") or 0) > 0 else None
    name = "" if worst is None else dict(zip(comparison.tasks, short_names(comparison.tasks), strict=True))[worst]
    row = {
        "Row": (group.name, group.title),
        "Seeds": (str(have) if have == wanted else f"{have} of {wanted}", ""),
        "Success at the end": _rate(m, "average_success"),
        "Recovery": _rate(m, "recovery"),
        "Recovery of means": _rate(m, "recovery_of_means"),
        "Mean forgetting": _difference(m, "forgetting_mean"),
        "Worst forgetting": (points(m.get("forgetting_worst")), name),
        "Task not told": _rate(group.untold or {}, "average_success"),
        "Forward transfer": _difference(m, "forward_transfer", signed=True),
        "Stages": (duration(group.seconds), ""),
    }
    return [row[heading] for heading in headings(comparison)]


def _rate(numbers: dict[str, Any], key: str) -> Cell:
    return percent(numbers.get(key)), interval(numbers.get("intervals", {}).get(key), "%", 1)


def _difference(numbers: dict[str, Any], key: str, signed: bool = False) -> Cell:
    return points(numbers.get(key), signed), interval(numbers.get("intervals", {}).get(key), " pp", 1)


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print the table; beside each mean its 95% interval."""
    table = Table(title=comparison.name, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in headings(comparison):
        table.add_column(heading, justify="left" if heading == "Row" else "right", overflow="fold")
    for group in comparison.begun:
        row = cells(comparison, group)
        table.add_row(group.name, *(f"{value}\n[dim]{more}[/dim]" if more else value for value, more in row[1:]))
    (console or Console()).print(table)


def duration(seconds: float | None) -> str:
    """As hours and minutes; a dash where it is not known."""
    if seconds is None:
        return "-"
    minutes = round(seconds / 60)
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
