"""One HTML page about a run, with its pictures and numbers beside it; opens from disk without a network."""

from __future__ import annotations

import html
import json
import os
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hpc_cpd.config import config_as_yaml
from hpc_cpd.report.figures import FIGURES
from hpc_cpd.report.run_results import Row, RunResults, read_results
from hpc_cpd.report.style import THEMES, png
from hpc_cpd.report.table import HEADINGS, percent, points, print_table
from hpc_cpd.report.template import PAGE, STYLE, picture
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import write_bytes, write_json

__all__ = ["build_report", "print_table"]

SCHEMA_VERSION = 1

_CAPTIONS = {
    "success_matrix": (
        "Success of every task after every stage",
        "Read a row from left to right: what becomes of a task once it has been learnt. The outlined tiles are a "
        "stage's own tasks; what fades to their right was forgotten.",
    ),
    "teacher_and_student": (
        "Teacher and student",
        "The line runs from the success after the task's own stage to the success at the end.",
    ),
    "forgetting": (
        "Forgetting",
        "Bars to the right of zero were forgotten, to the left improved by later stages. Tasks of the last stage "
        "cannot have been forgotten yet and are not shown.",
    ),
    "routing": (
        "Who does what: routing",
        "How the gate spreads each task over the experts. The outlined tiles are the experts born with the task.",
    ),
    "stage_curves": (
        "Learning of the student",
        "Loss per gradient step, faint as logged and bold as a moving average; stages stand side by side.",
    ),
    "teacher_curves": (
        "Learning of the teachers",
        "Success of each teacher over its own training; its mean return where it never succeeded.",
    ),
}


def build_report(run: Run) -> Path:
    """Write ``report/metrics.json``, the pictures (light and dark) and ``report/index.html``; return the page.

    Works on a partly finished run: what is missing is left out and named on the page. Raises UserError
    when `run` is not a run folder or one of its files is damaged.
    """
    facts = read_results(run)
    drawn = _pictures(facts, run.report)
    write_json(run.report / "metrics.json", report_numbers(facts))
    page = PAGE.format(title=_text(f"{facts.config.name}: report"), style=STYLE, body=_body(facts, drawn))
    write_bytes(run.report / "index.html", page.encode())
    return run.report / "index.html"


def _pictures(facts: RunResults, folder: Path) -> list[str]:
    drawn = []
    for name, draw in FIGURES.items():
        for theme in THEMES:
            figure = draw(facts, theme)
            path = folder / f"{name}{theme.suffix}.png"
            if figure is None:
                path.unlink(missing_ok=True)
            else:
                write_bytes(path, png(figure))
                drawn.append(name)
    return list(dict.fromkeys(drawn))


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


def _body(facts: RunResults, drawn: list[str]) -> str:
    finished, total = len(facts.evaluations), len(facts.stages)
    state = "finished" if finished == total else f"{finished} of {total} finished"
    stages = "1 stage" if total == 1 else f"{total} stages"
    lead = (
        f"Continual policy distillation of {len(facts.tasks)} tasks in {stages} ({state}). Success counts an episode "
        f"in which the task's success flag is on at any step; {facts.config.evaluation.episodes} episodes per task, "
        f"on goals drawn with a seed of their own ({facts.config.evaluation.seed})."
    )
    parts = [
        f'<header><h1>{_text(facts.config.name)}</h1><p class="lead">{_text(lead)}</p></header>',
        '<nav><a href="#numbers">Numbers</a><a href="#tasks">Tasks</a><a href="#pictures">Pictures</a>'
        '<a href="#settings">What was run</a><a href="#again">Run it again</a><a href="#files">Files</a></nav>',
    ]
    if facts.notes:
        parts.append('<div class="notes" role="note"><ul>' + _items(facts.notes) + "</ul></div>")
    parts.append(f'<div class="cards" id="numbers">{_cards(facts)}</div>' if facts.metrics else "")
    first = [name for name in drawn if name == "success_matrix"]
    parts += [picture(name, *_CAPTIONS[name]) for name in first]
    parts.append(_table(facts))
    parts.append('<div id="pictures">')
    parts += [picture(name, *_CAPTIONS[name]) for name in drawn if name not in first]
    parts += ["</div>", _memories(facts), _settings(facts), _again(facts), _files(facts)]
    return "\n".join(part for part in parts if part)


def _cards(facts: RunResults) -> str:
    m = facts.metrics or {}
    one_stage = "nothing to forget after one stage"
    old = m["forgetting_worst_task"] is not None
    worst = points(m["forgetting_worst"])
    if old and m["forgetting_worst"] > 0:
        worst += f" on {m['forgetting_worst_task']}"
    later = m["forward_transfer_later_stages"]
    cards = (
        ("Average success", "average_success", f"teachers: {percent(m['teacher_success'])}"),
        ("Recovery of the teachers", "recovery", f"ratio of the means: {percent(m['recovery_of_means'])}"),
        ("Mean forgetting", "forgetting_mean", f"worst: {worst}" if old else one_stage),
        ("Forgetting from the best", "forgetting_from_best_mean", "" if old else one_stage),
        ("Backward transfer", "backward_transfer", "minus the mean forgetting" if old else one_stage),
        (
            "Forward transfer",
            "forward_transfer",
            f"later stages alone: {points(later, signed=True)}" if later is not None else "not measured",
        ),
    )
    cells = []
    for label, name, more in cards:
        rate = name in ("average_success", "recovery")
        value = percent(m[name]) if rate else points(m[name], signed=name.endswith("transfer"))
        interval = _interval(m["intervals"].get(name), "%" if rate else " pp")
        lines = [f"95%: {interval}"] if interval and m[name] is not None else []
        small = "".join(f"<small>{_text(line)}</small>" for line in [*lines, *([more] if more else [])])
        cells.append(f'<div class="card"><span>{label}</span><b>{value}</b>{small}</div>')
    return "".join(cells)


def _table(facts: RunResults) -> str:
    finished, total = len(facts.evaluations), len(facts.stages)
    headings = [h if h != "At the end" or finished in (0, total) else f"After stage {finished}" for h in HEADINGS]
    rows, stage = [], 0
    for row in facts.rows:
        opening = '<tr class="first">' if row["stage"] != stage else "<tr>"
        stage = row["stage"]
        cells = [f"<td>{_text(row['task'])}</td><td>{stage}</td>"]
        cells += [_rate(row, name) for name in ("teacher", "after_own_stage", "final")]
        lost = _small(row.get("forgetting_interval"), " pp")
        cells.append(f"<td>{points(row.get('forgetting'))}{lost}</td>")
        rows.append(f"{opening}{''.join(cells)}</tr>")
    foot = ""
    if facts.metrics:
        m, sure = facts.metrics, facts.metrics["intervals"]
        names = ("teacher_success", "average_after_own_stage", "average_success")
        means = "".join(f"<td>{percent(m[name])}{_small(sure[name])}</td>" for name in names)
        lost = f"{points(m['forgetting_mean'])}{_small(sure['forgetting_mean'], ' pp')}"
        foot = f"<tfoot><tr><td>mean</td><td></td>{means}<td>{lost}</td></tr></tfoot>"
    return (
        '<section id="tasks"><h2>Every task</h2><div class="scroll"><table><thead><tr>'
        + "".join(f"<th>{_text(h)}</th>" for h in headings)
        + f"</tr></thead><tbody>{''.join(rows)}</tbody>{foot}</table></div>"
        '<p class="small">Small numbers are 95% intervals: Wilson and Newcombe score intervals for one task (pp: '
        "percentage points), a stratified bootstrap over each task's episodes for means. They speak of the episodes "
        "drawn, not of training again with another seed, and a bootstrap has no width where every episode "
        "ended alike.</p></section>"
    )


def _memories(facts: RunResults) -> str:
    records = {stage: _memory(record) for stage, record in facts.memories().items()}
    if not records:
        return ""
    rows = "".join(
        f"<tr><td>{stage}</td><td>{r['kept_steps']:,}</td><td>{r['total_steps']:,}</td>"
        f"<td>{percent(r['share'])}</td></tr>"
        for stage, r in records.items()
    )
    first = next(iter(facts.memories().values()))
    about = f"chosen by {first['selection']['name']}, budget {percent(first['budget_fraction'])} per task"
    return (
        f'<section><h2>Replay memory</h2><p class="small">Steps kept of each stage\'s data ({_text(about)}).</p>'
        '<div class="scroll"><table><thead><tr><th>Stage</th><th>Steps kept</th><th>Steps seen</th><th>Share</th></tr>'
        f"</thead><tbody>{rows}</tbody></table></div></section>"
    )


def _settings(facts: RunResults) -> str:
    c = facts.config
    short = {
        "seed": c.seed,
        "evaluation seed": c.evaluation.seed,
        "tasks": c.stream.tasks if isinstance(c.stream.tasks, str) else f"{len(c.stream.tasks)} in config.yaml",
        "tasks per stage": c.stream.tasks_per_stage,
    }
    return (
        f'<section id="settings"><h2>What was run</h2>{_list(short)}<h3>Provenance</h3>'
        + (_list(facts.provenance) if facts.provenance else "<p>No provenance.json in this run.</p>")
        + "<details><summary>All settings (config.yaml)</summary>"
        + f"<pre>{_text(config_as_yaml(c))}</pre></details></section>"
    )


def _again(facts: RunResults) -> str:
    folder = _shown(facts.run.folder)
    commit = facts.provenance.get("commit")
    lines = [f"git checkout {shlex.quote(commit)}"] if isinstance(commit, str) and commit.isalnum() else []
    lines += [
        "make setup",
        f".venv/bin/python -m hpc_cpd.launch --stage all --config {shlex.quote(f'{folder}/config.yaml')} "
        f"--run {shlex.quote(f'{folder}-again')}",
    ]
    if (facts.run.folder / "teachers").is_symlink():
        lines.append("# (its teachers and trajectories are a sweep's, which makes them with one seed for all its rows)")
    finish = f".venv/bin/python -m hpc_cpd.launch --stage all --config {shlex.quote(f'{folder}/config.yaml')} "
    finish += f"--run {shlex.quote(folder)}"
    more = f"# this page once more\n.venv/bin/hpc-cpd report {shlex.quote(folder)}"
    if len(facts.evaluations) < len(facts.stages):
        more = f"# go on where this run stopped\n{finish}\n" + more
    return (
        '<section id="again"><h2>Run it again</h2><p>From the root of the repository:</p><pre>'
        + _text("# the same experiment from the beginning\n" + "\n".join(lines) + "\n" + more)
        + "</pre></section>"
    )


def _files(facts: RunResults) -> str:
    run = facts.run
    paths = [run.report / "metrics.json", run.config_file, run.provenance_file]
    for stage in range(1, len(facts.evaluations) + 1):
        names = ("evaluation.json", "evaluation_before.json", "metrics.jsonl", "routing.json", "memory/selection.json")
        paths += [run.stage(stage) / name for name in names]
        paths += [run.stage(stage) / "student" / "student.json"]
    for task in facts.tasks:
        paths += [run.teacher(task) / name for name in ("evaluation.json", "metrics.jsonl")]
        paths.append(run.trajectories(task) / "manifest.json")
    there = [os.path.relpath(path, run.folder) for path in paths if path.is_file()]
    links = "".join(f'<li><a href="../{_text(path)}">{_text(path)}</a></li>' for path in there)
    return (
        '<section id="files"><h2>Files</h2><p>Everything on this page is computed from these; '
        'its own numbers are in <a href="metrics.json">metrics.json</a>.</p>'
        f'<details><summary>{len(there)} files</summary><ul class="files">{links}</ul></details></section>'
    )


def _memory(record: Mapping[str, Any]) -> dict[str, Any]:
    """Totals over the tasks of a ``selection.json``."""
    names = ("budget_steps", "kept_steps", "total_steps")
    totals: dict[str, Any] = {name: sum(memory[name] for memory in record["memories"]) for name in names}
    return {**totals, "share": totals["kept_steps"] / totals["total_steps"] if totals["total_steps"] else None}


def _rate(row: Row, name: str) -> str:
    value = row.get(name)
    style = f' style="--p:{100 * value:.0f}%"' if value is not None else ""
    return f'<td class="rate"{style}>{percent(value)}{_small(row.get(f"{name}_interval"))}</td>'


def _small(interval: list[float] | None, unit: str = "%") -> str:
    text = _interval(interval, unit)
    return f"<small>{text}</small>" if text else ""


def _interval(interval: list[float] | None, unit: str) -> str:
    return f"{100 * interval[0]:.0f} to {100 * interval[1]:.0f}{unit}" if interval else ""


def _list(values: Mapping[str, Any]) -> str:
    rows = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            text = ", ".join(f"{name} {_plain(inner)}" for name, inner in value.items())
        else:
            text = _plain(value)
        rows.append(f"<dt>{_text(key.replace('_', ' '))}</dt><dd>{_text(text)}</dd>")
    return f"<dl>{''.join(rows)}</dl>"


def _plain(value: Any) -> str:
    if value is None or value == []:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(_plain(inner) for inner in value)
    return value if isinstance(value, str) else json.dumps(value)


def _items(texts: Iterable[str]) -> str:
    return "".join(f"<li>{_text(text)}</li>" for text in texts)


def _shown(folder: Path) -> str:
    """The folder as one would type it in the working directory."""
    absolute = folder.resolve()
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(absolute)


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)
