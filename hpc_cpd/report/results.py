"""The page of published results, FOLDER.md, from the small files under FOLDER; the same files give the same bytes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpc_cpd.errors import UserError
from hpc_cpd.report.comparison import Comparison, compare, is_sweep
from hpc_cpd.report.comparison_figures import COMPARISON_FIGURES
from hpc_cpd.report.comparison_page import ABOUT_INTERVALS, CAPTIONS
from hpc_cpd.report.comparison_table import cells, headings
from hpc_cpd.report.style import LIGHT, png
from hpc_cpd.run.publish import write_bytes

NOTES = "notes.md"  # in the folder: what a reader must know about all its sweeps
PICTURES = ("success_by_stage", "final_success")
_CHECK = {"episodes": 50, "seed": 123}


def results_page(folder: Path) -> str:
    """The text of the page. Raises UserError when there is no published sweep under `folder`."""
    sweeps = _sweeps(folder)
    parts = [
        "# Results\n\nWritten by `hpc-cpd results`; every number in the tables is computed from the files beside this "
        "page, which `hpc-cpd sweep FILE --publish` copied from the runs; the sentences under a table were written by "
        "hand. In brackets: 95% intervals, a stratified bootstrap over tasks' episodes, and over seeds where there are "
        f"several. {ABOUT_INTERVALS} Success is Meta-World's flag at any step; [metrics.md](metrics.md) explains every "
        "column.\n"
    ]
    notes = folder / NOTES
    parts += [notes.read_text()] if notes.is_file() else []
    parts += [_section(compare([sweep]), sweep, folder) for sweep in sweeps]
    return "\n".join(parts)


def write_results(folder: Path) -> Path:
    """Write FOLDER.md and its pictures (beside the files of each sweep); return the page."""
    text = results_page(folder)
    for sweep in _sweeps(folder):
        comparison = compare([sweep])
        for name in PICTURES:
            figure = COMPARISON_FIGURES[name](comparison, LIGHT)
            if figure is not None:
                write_bytes(sweep / f"{name}.png", png(figure))
    page = folder.with_name(f"{folder.name}.md")
    write_bytes(page, text.encode())
    return page


def _sweeps(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.glob("*") if is_sweep(path))
    if not found:
        raise UserError(f"there is no published sweep in {folder}; publish one: hpc-cpd sweep FILE --publish {folder}")
    return found


def _section(comparison: Comparison, sweep: Path, folder: Path) -> str:
    lines = [f"## {comparison.name}", "", _about(comparison), ""]
    lines += [f"> {note}\n" for note in comparison.notes]
    lines.append("| " + " | ".join(headings(comparison)) + " |")
    lines.append("|---|" + "---:|" * (len(headings(comparison)) - 1))
    for group in comparison.begun:
        row = [f"{value} ({more})" if more else value for value, more in cells(comparison, group)]
        lines.append("| " + " | ".join(map(_cell, row)) + " |")
    about = "Stages: wall-clock of all stages of one run, evaluations included, the mean over its seeds. "
    about += 'Rows with "Task not told" are evaluated twice. ' if "Task not told" in headings(comparison) else ""
    lines += ["", about + _machines(comparison), ""]
    for group in comparison.begun:
        if group.teaches:
            lines.append(f"- **{group.name}**: {group.teaches}")
    at = os.path.relpath(sweep, folder.parent)
    for name in PICTURES:
        if any(facts.evaluations for _, facts in comparison.runs):
            lines += ["", f"![{CAPTIONS[name][0]}]({at}/{name}.png)"]
    commands = [group.command for group in comparison.begun if group.command]
    lines += ["", "The same rows again:", "", "```", *commands, "```", "", "A number checked with other goals:", ""]
    return "\n".join([*lines, "```", _check(comparison), "```", ""])


def _about(comparison: Comparison) -> str:
    configs = {facts.config.evaluation.episodes for _, facts in comparison.runs}
    stages = {len(facts.stages) for _, facts in comparison.runs}
    tasks = {len(facts.tasks) for _, facts in comparison.runs}
    runs = sum(len(group.finished) for group in comparison.groups)
    return (
        f"{_some(tasks)} tasks in {_some(stages)} stage{'s' * (stages != {1})}, {_some(configs)} episodes per "
        f"task, {runs} finished runs. Runs that ask for the same teachers and trajectories share them."
    )


def _machines(comparison: Comparison) -> str:
    machines: dict[str, None] = {}
    commits: dict[str, None] = {}
    for _, facts in comparison.runs:
        host: Mapping[str, Any] = facts.provenance.get("host") or {}
        gpus = len(host.get("gpus") or [])
        cores = f"{host.get('processor') or 'unknown processor'}, {host.get('cores') or '?'} cores"
        machines[cores + (f", {gpus} GPUs" if gpus else "")] = None
        commit = str(facts.provenance.get("commit") or "unknown")[:12]
        dirty = " with changes that are in no commit" if facts.provenance.get("uncommitted_changes") else ""
        commits[f"`{commit}`{dirty}"] = None
    return f"Machine: {'; '.join(machines)}. Commit: {', '.join(commits)}."


def _check(comparison: Comparison) -> str:
    group, facts = next(((g, f) for g, f in comparison.runs if f.finished), (None, None))
    if group is None or facts is None:
        return "# no run is finished yet"
    run = f"runs/{comparison.name}/{group.name}/seed-{facts.config.seed}"
    stage = len(facts.stages)
    return f"hpc-cpd evaluate {run} --stage {stage} --episodes {_CHECK['episodes']} --seed {_CHECK['seed']}"


def _some(numbers: set[int]) -> str:
    return " or ".join(map(str, sorted(numbers))) or "0"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
