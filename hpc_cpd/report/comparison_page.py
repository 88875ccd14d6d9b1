"""One HTML page that compares runs, with its pictures and numbers beside it."""

from __future__ import annotations

import html
import os
from pathlib import Path
from typing import Any

from hpc_cpd.report.comparison import Comparison, Group
from hpc_cpd.report.comparison_figures import COMPARISON_FIGURES
from hpc_cpd.report.comparison_table import cells, headings
from hpc_cpd.report.style import THEMES, png
from hpc_cpd.report.template import PAGE, STYLE, picture
from hpc_cpd.run.publish import write_bytes, write_json

SCHEMA_VERSION = 1
ABOUT_INTERVALS = (
    "With two or three seeds an interval shows how far apart these are: a new one falls outside more often than in 5% "
    "of cases. Where every episode ended alike it has no width."
)

CAPTIONS = {
    "success_by_stage": (
        "Success as tasks arrive",
        "Mean success over the tasks learnt so far, after each stage. Faint lines are single seeds.",
    ),
    "forgetting": (
        "Forgetting",
        "Success lost between a task's own stage and the last one: mean over the tasks of all stages but the last.",
    ),
    "final_success": (
        "Every task of every run",
        "Success in percent after the last finished stage; an empty place: the run does not have the task.",
    ),
}


def build_comparison(comparison: Comparison, folder: Path) -> Path:
    """Write ``metrics.json``, the pictures (light and dark) and ``index.html`` into `folder`; return the page."""
    drawn = []
    for name, draw in COMPARISON_FIGURES.items():
        for theme in THEMES:
            figure, path = draw(comparison, theme), folder / f"{name}{theme.suffix}.png"
            if figure is None:
                path.unlink(missing_ok=True)
            else:
                write_bytes(path, png(figure))
                drawn.append(name)
    write_json(folder / "metrics.json", comparison_numbers(comparison))
    body = _body(comparison, list(dict.fromkeys(drawn)), folder)
    page = PAGE.format(title=_text(f"{comparison.name}: comparison"), style=STYLE, body=body)
    write_bytes(folder / "index.html", page.encode())
    return folder / "index.html"


def comparison_numbers(comparison: Comparison) -> dict[str, Any]:
    """What ``metrics.json`` of a comparison holds (docs/metrics.md)."""
    return {
        "schema_version": SCHEMA_VERSION,
        "name": comparison.name,
        "rows": [
            {
                "name": group.name,
                "title": group.title,
                "teaches": group.teaches,
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


def _body(comparison: Comparison, drawn: list[str], folder: Path) -> str:
    runs = len(comparison.runs)
    lead = (
        f"{len(comparison.groups)} rows, {runs} runs, {len(comparison.tasks)} tasks. Small numbers are 95% intervals."
    )
    parts = [
        f'<header><h1>{_text(comparison.name)}</h1><p class="lead">{_text(lead)}</p></header>',
        '<nav><a href="#numbers">Numbers</a><a href="#pictures">Pictures</a><a href="#settings">Settings</a>'
        '<a href="#again">Run it again</a><a href="#files">Files</a></nav>',
    ]
    if comparison.notes:
        notes = "".join(f"<li>{_text(note)}</li>" for note in comparison.notes)
        parts.append(f'<div class="notes" role="note"><ul>{notes}</ul></div>')
    pictures = [picture(name, *CAPTIONS[name]) for name in drawn]
    parts += [_table(comparison), '<div id="pictures">', *pictures, "</div>"]
    parts += [_settings(comparison), _again(comparison), _files(comparison, folder)]
    return "\n".join(part for part in parts if part)


def _table(comparison: Comparison) -> str:
    head = "".join(f"<th>{_text(heading)}</th>" for heading in headings(comparison))
    rows = []
    for group in comparison.begun:
        row = (f"<td>{_text(v)}{f'<small>{_text(m)}</small>' if m else ''}</td>" for v, m in cells(comparison, group))
        rows.append(f"<tr>{''.join(row)}</tr>")
    teaches = "".join(f"<li><b>{_text(g.name)}</b>: {_text(g.teaches)}</li>" for g in comparison.begun if g.teaches)
    return (
        f'<section id="numbers"><h2>Every row</h2><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
        '<p class="small">Only finished runs count. Means over tasks have a stratified bootstrap over episodes, '
        f"and over seeds where there are several. {ABOUT_INTERVALS} Stages: the wall-clock of all stages of one run, "
        "evaluations included, the mean over its seeds, on whatever machine and beside whatever else ran there.</p>"
        + (f"<ul>{teaches}</ul>" if teaches else "")
        + "</section>"
    )


def _settings(comparison: Comparison) -> str:
    settings = comparison.settings()
    groups = comparison.begun
    if not settings:
        return '<section id="settings"><h2>Settings that differ</h2><p>None.</p></section>'
    head = "".join(f"<th>{_text(group.name)}</th>" for group in groups)
    shown = {
        key: [_text(plain(values[g.name])) if g.name in values else "" for g in groups]
        for key, values in settings.items()
    }
    rows = "".join(
        f"<tr><td>{_text(key)}</td>{''.join(f'<td>{value}</td>' for value in values)}</tr>"
        for key, values in shown.items()
    )
    return (
        '<section id="settings"><h2>Settings that differ</h2><div class="scroll"><table><thead><tr><th>Setting</th>'
        f"{head}</tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def _again(comparison: Comparison) -> str:
    commands = [f"# {group.name}\n{_command(group)}" for group in comparison.groups if group.runs or group.command]
    return (
        '<section id="again"><h2>Run it again</h2><p>From the root of the repository:</p><pre>'
        + _text("\n".join(commands))
        + "</pre></section>"
    )


def _command(group: Group) -> str:
    if group.command:
        return group.command
    folder = group.runs[0].run.folder
    return f"python -m hpc_cpd.launch --stage all --config {folder}/config.yaml --run {folder}-again"


def _files(comparison: Comparison, folder: Path) -> str:
    links = []
    for group, facts in comparison.runs:
        page = facts.run.report / "index.html"
        path = os.path.relpath(page if page.is_file() else facts.run.config_file, folder)
        links.append(f'<li><a href="{_text(path)}">{_text(group.name)}, seed {facts.config.seed}</a></li>')
    return (
        '<section id="files"><h2>Files</h2><p>The numbers of this page are in <a href="metrics.json">metrics.json</a>; '
        f'the runs have pages of their own.</p><ul class="files">{"".join(links)}</ul></section>'
    )


def plain(value: Any) -> str:
    """A setting's value as YAML would have it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{', '.join(map(plain, value))}]" if isinstance(value, list) else str(value)


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)
