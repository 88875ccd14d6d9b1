"""One HTML page about a run, with its pictures and numbers beside it; opens from disk without a network."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpc_cpd.config import config_as_yaml
from hpc_cpd.report.figures import FIGURES
from hpc_cpd.report.render import write_page
from hpc_cpd.report.run_results import RunResults, read_results, shown
from hpc_cpd.report.style import draw
from hpc_cpd.report.table import headings
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import write_json

SCHEMA_VERSION = 1


def build_report(run: Run) -> Path:
    """Write ``report/metrics.json``, the pictures (light and dark) and ``report/index.html``; return the page.

    Works on a partly finished run: what is missing is left out and named on the page. Raises UserError
    when `run` is not a run folder or one of its files is damaged.
    """
    facts = read_results(run)
    drawn, numbers = draw(FIGURES, facts, run.report), report_numbers(facts)
    write_json(run.report / "metrics.json", numbers)
    commit = facts.provenance.get("commit")
    return write_page(
        run.report,
        "run.html",
        name=facts.config.name,
        notes=facts.notes,
        facts=facts,
        drawn=drawn,
        numbers=numbers,
        headings=headings(facts),
        selections=list(facts.memories().values()),
        provenance={key: _plain(value) for key, value in facts.provenance.items()},
        config_as_yaml=config_as_yaml(facts.config),
        run_folder=shown(run.folder),
        commit=commit if isinstance(commit, str) and commit.isalnum() else None,
        shares_teachers=(run.folder / "teachers").is_symlink(),
        files=_files(facts),
    )


def report_numbers(facts: RunResults) -> dict[str, Any]:
    """What ``report/metrics.json`` holds (docs/metrics.md)."""
    return {
        "schema_version": SCHEMA_VERSION,
        "name": facts.config.name,
        "seed": facts.config.seed,
        "evaluation_seed": facts.config.evaluation.seed,
        "stages_finished": len(facts.evaluations),
        "stages_planned": len(facts.stages),
        "metrics": facts.metrics,
        "rows": facts.rows,
        "wall_clock_seconds": {str(stage): seconds for stage, seconds in facts.wall_clock().items()},
        "memory": {str(stage): _memory(record) for stage, record in facts.memories().items()},
        "notes": facts.notes,
    }


def _files(facts: RunResults) -> list[str]:
    """What the page is computed from, as paths within the run."""
    run = facts.run
    paths = [run.report / "metrics.json", run.config_file, run.provenance_file]
    names = ("evaluation.json", "evaluation_before.json", "metrics.jsonl", "routing.json", "memory/selection.json")
    for folder in facts.finished_stages.values():
        paths += [folder / name for name in (*names, "student/student.json")]
    for task in facts.tasks:
        paths += [run.teacher(task) / "evaluation.json", run.teacher(task) / "metrics.jsonl"]
        paths.append(run.trajectories(task) / "manifest.json")
    return [os.path.relpath(path, run.folder) for path in paths if path.is_file()]


def _memory(record: Mapping[str, Any]) -> dict[str, Any]:
    """Totals over the tasks of a ``selection.json``."""
    names = ("budget_steps", "kept_steps", "total_steps")
    totals: dict[str, Any] = {name: sum(memory[name] for memory in record["memories"]) for name in names}
    return {**totals, "share": totals["kept_steps"] / totals["total_steps"] if totals["total_steps"] else None}


def _plain(value: Any) -> str:
    if value is None or value == []:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(inner)}" for name, inner in value.items())
    return value if isinstance(value, str) else json.dumps(value)
