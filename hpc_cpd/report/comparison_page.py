"""Pages about comparisons: an HTML page, with its pictures and numbers beside it, and that of all published results.

The latter is FOLDER.md, made from the small files under FOLDER; the same files give the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpc_cpd.errors import UserError
from hpc_cpd.report.comparison import Comparison, cells, compare, headings, is_sweep
from hpc_cpd.report.figures import COMPARISON_FIGURES
from hpc_cpd.report.render import render, write_page
from hpc_cpd.report.style import LIGHT, draw
from hpc_cpd.run.publish import write_bytes, write_json

SCHEMA_VERSION = 1
NOTES = "notes.md"  # in the folder: what a reader must know about all its sweeps
PICTURES = {"success_by_stage": "Success as tasks arrive", "final_success": "Every task of every run"}
"""Those of the page of results."""


def build_comparison(comparison: Comparison, folder: Path) -> Path:
    """Write ``metrics.json``, the pictures (light and dark) and ``index.html`` into `folder`; return the page."""
    drawn = draw(COMPARISON_FIGURES, comparison, folder)
    write_json(folder / "metrics.json", comparison_numbers(comparison))
    settings = {
        key: [plain(values[group.name]) if group.name in values else "" for group in comparison.begun]
        for key, values in comparison.settings().items()
    }
    return write_page(
        folder,
        "comparison.html",
        name=comparison.name,
        notes=comparison.notes,
        comparison=comparison,
        drawn=drawn,
        headings=headings(comparison),
        rows=[cells(comparison, group) for group in comparison.begun],
        settings=settings,
        files=_files(comparison, folder),
    )


def comparison_numbers(comparison: Comparison) -> dict[str, Any]:
    """What ``metrics.json`` of a comparison holds (docs/metrics.md)."""
    return {
        "schema_version": SCHEMA_VERSION,
        "name": comparison.name,
        "rows": [
            {
                **{"name": group.name, "title": group.title, "teaches": group.teaches},
                "command": group.command or None,
                "seeds": group.seeds,
                "seeds_finished": [facts.config.seed for facts in group.finished],
                "wall_clock_seconds": group.seconds,
                "metrics": group.metrics,
                "untold": group.untold and {key: group.untold[key] for key in ("average_success", "intervals")},
            }
            for group in comparison.groups
        ],
        "settings": comparison.settings(),
        "notes": comparison.notes,
    }


def _files(comparison: Comparison, folder: Path) -> list[tuple[str, str]]:
    """The path of each run's page, or else its settings, from `folder`, and what the run is called."""
    files = []
    for group, facts in comparison.runs:
        page = facts.run.report / "index.html"
        path = os.path.relpath(page if page.is_file() else facts.run.config_file, folder)
        files.append((path, f"{group.name}, seed {facts.config.seed}"))
    return files


def plain(value: Any) -> str:
    """A setting's value as YAML would have it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{', '.join(map(plain, value))}]" if isinstance(value, list) else str(value)


def results_page(folder: Path) -> str:
    """The text of the page. Raises UserError when there is no published sweep under `folder`."""
    notes = folder / NOTES
    return render(
        "results.md",
        notes=notes.read_text() if notes.is_file() else "",
        sweeps=[_published(compare([sweep]), os.path.relpath(sweep, folder.parent)) for sweep in _sweeps(folder)],
    )


def write_results(folder: Path) -> Path:
    """Write FOLDER.md and its pictures (beside the files of each sweep); return the page."""
    text = results_page(folder)
    for sweep in _sweeps(folder):
        draw({name: COMPARISON_FIGURES[name] for name in PICTURES}, compare([sweep]), sweep, themes=(LIGHT,))
    page = folder.with_name(f"{folder.name}.md")
    write_bytes(page, text.encode())
    return page


def _sweeps(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.glob("*") if is_sweep(path))
    if not found:
        raise UserError(f"there is no published sweep in {folder}; publish one: hpc-cpd sweep FILE --publish {folder}")
    return found


def _published(comparison: Comparison, at: str) -> dict[str, Any]:
    """What the page of results says of one sweep, whose pictures are in the folder `at`."""
    machines, commits = dict[str, None](), dict[str, None]()
    for _, facts in comparison.runs:
        host: Mapping[str, Any] = facts.provenance.get("host") or {}
        gpus = f", {len(host['gpus'])} GPUs" if host.get("gpus") else ""
        machines[f"{host.get('processor') or 'unknown processor'}, {host.get('cores') or '?'} cores{gpus}"] = None
        dirty = " with changes that are in no commit" if facts.provenance.get("uncommitted_changes") else ""
        commits[f"`{str(facts.provenance.get('commit') or 'unknown')[:12]}`{dirty}"] = None
    seen = [facts for _, facts in comparison.runs]
    return {
        "comparison": comparison,
        "headings": headings(comparison),
        "rows": [cells(comparison, group) for group in comparison.begun],
        "tasks": sorted({len(facts.tasks) for facts in seen}),
        "stages": sorted({len(facts.stages) for facts in seen}),
        "episodes": sorted({facts.config.evaluation.episodes for facts in seen}),
        "finished": [(group.name, facts) for group, facts in comparison.runs if facts.finished],
        "machines": machines,
        "commits": commits,
        "pictures": PICTURES if any(facts.evaluations for facts in seen) else {},
        "at": at,
    }
