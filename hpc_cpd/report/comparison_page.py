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
from hpc_cpd.report.style import LIGHT, again, draw, opening, picture, section, small, table, text, tr, write_page
from hpc_cpd.run.publish import write_bytes, write_json

SCHEMA_VERSION = 1
NOTES = "notes.md"  # in the folder: what a reader must know about all its sweeps
PICTURES = ("success_by_stage", "final_success")

ABOUT_INTERVALS = (
    "With two or three seeds an interval shows how far apart these are: a new one falls outside more often than in 5% "
    "of cases. Where every episode ended alike it has no width."
)

CAPTIONS = {
    "success_by_stage": (
        "Success as tasks arrive",
        "Mean success over the tasks learnt so far, after each stage. Faint lines are single seeds. Hollow marks are "
        "estimates: a random draw of the old tasks stands for all of them; bars are two standard errors of that draw, "
        "where more than one task was drawn.",
    ),
    "forgetting": (
        "Forgetting",
        "Success lost between a task's own stage and the last one: mean over the tasks of all stages but the last.",
    ),
    "final_success": (
        "Every task of every run",
        "Success in percent after the last finished stage; an empty place: the run does not have the task, "
        "or did not evaluate it then.",
    ),
}


def build_comparison(comparison: Comparison, folder: Path) -> Path:
    """Write ``metrics.json``, the pictures (light and dark) and ``index.html`` into `folder`; return the page."""
    drawn = draw(COMPARISON_FIGURES, comparison, folder)
    write_json(folder / "metrics.json", comparison_numbers(comparison))
    return write_page(folder, f"{comparison.name}: comparison", _parts(comparison, drawn, folder))


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


def _parts(comparison: Comparison, drawn: list[str], folder: Path) -> list[str]:
    rows, runs, tasks = (len(part) for part in (comparison.groups, comparison.runs, comparison.tasks))
    lead = f"{rows} rows, {runs} runs, {tasks} tasks. Small numbers are 95% intervals."
    anchors = {"numbers": "Numbers", "pictures": "Pictures", "settings": "Settings"}
    anchors |= {"again": "Run it again", "files": "Files"}
    return [
        *opening(comparison.name, lead, anchors, comparison.notes),
        _table(comparison),
        '<div id="pictures">',
        *(picture(name, *CAPTIONS[name]) for name in drawn),
        "</div>",
        *(_settings(comparison), _again(comparison), _files(comparison, folder)),
    ]


def _table(comparison: Comparison) -> str:
    rows = [tr(text(value) + small(more) for value, more in cells(comparison, group)) for group in comparison.begun]
    teaches = "".join(f"<li><b>{text(g.name)}</b>: {text(g.teaches)}</li>" for g in comparison.begun if g.teaches)
    about = (
        "Only finished runs count. Means over tasks have a stratified bootstrap over episodes, and over seeds where "
        f"there are several. {ABOUT_INTERVALS} Stages: the wall-clock of all stages of one run, evaluations included, "
        "the mean over its seeds, on whatever machine and beside whatever else ran there."
    )
    list_ = f"<ul>{teaches}</ul>" if teaches else ""
    content = f'{table(headings(comparison), rows)}<p class="small">{about}</p>{list_}'
    return section("numbers", "Every row", content)


def _settings(comparison: Comparison) -> str:
    names = [group.name for group in comparison.begun]
    rows = []
    for key, values in comparison.settings().items():
        rows.append(tr(map(text, (key, *(plain(values[name]) if name in values else "" for name in names)))))
    return section("settings", "Settings that differ", table(("Setting", *names), rows) if rows else "<p>None.</p>")


def _again(comparison: Comparison) -> str:
    commands = []
    for group in comparison.groups:
        folder = group.runs[0].run.folder if group.runs else ""
        launch = f"python -m hpc_cpd.launch --stage all --config {folder}/config.yaml --run {folder}-again"
        if group.command or group.runs:
            commands.append(f"# {group.name}\n{group.command or launch}")
    return again("\n".join(commands))


def _files(comparison: Comparison, folder: Path) -> str:
    links = []
    for group, facts in comparison.runs:
        page = facts.run.report / "index.html"
        path = os.path.relpath(page if page.is_file() else facts.run.config_file, folder)
        links.append(f'<li><a href="{text(path)}">{text(group.name)}, seed {facts.config.seed}</a></li>')
    about = 'The numbers of this page are in <a href="metrics.json">metrics.json</a>; the runs have pages of their own.'
    return section("files", "Files", f'<p>{about}</p><ul class="files">{"".join(links)}</ul>')


def plain(value: Any) -> str:
    """A setting's value as YAML would have it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{', '.join(map(plain, value))}]" if isinstance(value, list) else str(value)


def results_page(folder: Path) -> str:
    """The text of the page. Raises UserError when there is no published sweep under `folder`."""
    parts = [
        "# Results\n\nWritten by `hpc-cpd results`; every number in the tables is computed from the files beside this "
        "page, which `hpc-cpd sweep FILE --publish` copied from the runs; the sentences under a table were written by "
        "hand. In brackets: 95% intervals, a stratified bootstrap over tasks' episodes, and over seeds where there are "
        f"several. {ABOUT_INTERVALS} Success is Meta-World's flag at any step; [metrics.md](metrics.md) explains every "
        "column.\n"
    ]
    notes = folder / NOTES
    parts += [notes.read_text()] if notes.is_file() else []
    parts += [_section(compare([sweep]), sweep, folder) for sweep in _sweeps(folder)]
    return "\n".join(parts)


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


def _section(comparison: Comparison, sweep: Path, folder: Path) -> str:
    lines = [f"## {comparison.name}", "", _about(comparison), ""]
    lines += [f"> {note}\n" for note in comparison.notes]
    lines.append("| " + " | ".join(headings(comparison)) + " |")
    lines.append("|---|" + "---:|" * (len(headings(comparison)) - 1))
    for group in comparison.begun:
        row = (f"{value} ({more})" if more else value for value, more in cells(comparison, group))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    about = "Stages: wall-clock of all stages of one run, evaluations included, the mean over its seeds. "
    about += 'Rows with "Task not told" are evaluated twice. ' if "Task not told" in headings(comparison) else ""
    lines += ["", about + _machines(comparison), ""]
    lines += [f"- **{group.name}**: {group.teaches}" for group in comparison.begun if group.teaches]
    at = os.path.relpath(sweep, folder.parent)
    for name in PICTURES:
        if any(facts.evaluations for _, facts in comparison.runs):
            lines += ["", f"![{CAPTIONS[name][0]}]({at}/{name}.png)"]
    commands = [group.command for group in comparison.begun if group.command]
    lines += ["", "The same rows again:", "", "```", *commands, "```", "", "A number checked with other goals:", ""]
    return "\n".join([*lines, "```", _check(comparison), "```", ""])


def _about(comparison: Comparison) -> str:
    seen = [facts for _, facts in comparison.runs]
    stages, tasks = {len(facts.stages) for facts in seen}, {len(facts.tasks) for facts in seen}
    runs, episodes = sum(facts.finished for facts in seen), {facts.config.evaluation.episodes for facts in seen}
    return (
        f"{_some(tasks)} tasks in {_some(stages)} stage{'s' * (stages != {1})}, {_some(episodes)} episodes per "
        f"task, {runs} finished runs. Runs that ask for the same teachers and trajectories share them."
    )


def _machines(comparison: Comparison) -> str:
    machines, commits = dict[str, None](), dict[str, None]()
    for _, facts in comparison.runs:
        host: Mapping[str, Any] = facts.provenance.get("host") or {}
        gpus = f", {len(host['gpus'])} GPUs" if host.get("gpus") else ""
        machines[f"{host.get('processor') or 'unknown processor'}, {host.get('cores') or '?'} cores{gpus}"] = None
        dirty = " with changes that are in no commit" if facts.provenance.get("uncommitted_changes") else ""
        commits[f"`{str(facts.provenance.get('commit') or 'unknown')[:12]}`{dirty}"] = None
    return f"Machine: {'; '.join(machines)}. Commit: {', '.join(commits)}."


def _check(comparison: Comparison) -> str:
    for group, facts in comparison.runs:
        if facts.finished:
            run = f"runs/{comparison.name}/{group.name}/seed-{facts.config.seed}"
            return f"hpc-cpd evaluate {run} --stage {len(facts.stages)} --episodes 50 --seed 123"
    return "# no run is finished yet"


def _some(numbers: set[int]) -> str:
    return " or ".join(map(str, sorted(numbers))) or "0"
