"""One HTML page about a run, with its pictures and numbers beside it; opens from disk without a network."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpc_cpd.config import config_as_yaml
from hpc_cpd.report.figures import FIGURES
from hpc_cpd.report.run_results import Row, RunResults, read_results, shown
from hpc_cpd.report.style import again, draw, opening, picture, section, small, table, text, tr, write_page
from hpc_cpd.report.table import headings, interval, percent, points
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import write_json

SCHEMA_VERSION = 1

_CAPTIONS = {
    "success_matrix": (
        "Success of every task after every stage",
        "Read a row from left to right: what becomes of a task once it has been learnt. The outlined tiles are a "
        "stage's own tasks; what fades to their right was forgotten. Empty places were not evaluated.",
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
    drawn = draw(FIGURES, facts, run.report)
    write_json(run.report / "metrics.json", report_numbers(facts))
    return write_page(run.report, f"{facts.config.name}: report", _parts(facts, drawn))


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


def _parts(facts: RunResults, drawn: list[str]) -> list[str]:
    total = len(facts.stages)
    state = "finished" if facts.finished else f"{len(facts.evaluations)} of {total} finished"
    stages = "1 stage" if total == 1 else f"{total} stages"
    lead = (
        f"Continual policy distillation of {len(facts.tasks)} tasks in {stages} ({state}). Success counts an episode "
        f"in which the task's success flag is on at any step; {facts.config.evaluation.episodes} episodes per task, "
        f"on goals drawn with a seed of their own ({facts.config.evaluation.seed})."
    )
    anchors = {"numbers": "Numbers", "tasks": "Tasks", "pictures": "Pictures"}
    anchors |= {"settings": "What was run", "again": "Run it again", "files": "Files"}
    pictures = {name: picture(name, *_CAPTIONS[name]) for name in drawn}
    return [
        *opening(facts.config.name, lead, anchors, facts.notes),
        f'<div class="cards" id="numbers">{_cards(facts.metrics)}</div>' if facts.metrics else "",
        pictures.pop("success_matrix", ""),
        _table(facts),
        '<div id="pictures">',
        *pictures.values(),
        "</div>",
        *(_memories(facts), _settings(facts), _again(facts), _files(facts)),
    ]


def _cards(m: Mapping[str, Any]) -> str:
    on = f" on {m['forgetting_worst_task']}" if (m["forgetting_worst"] or 0) > 0 else ""
    later = m["forward_transfer_later_stages"]
    alone = "not measured" if later is None else f"later stages alone: {points(later, signed=True)}"
    cards = {  # name of the number -> its label, what else there is to say, and whether only old tasks have it
        "average_success": ("Average success", f"teachers: {percent(m['teacher_success'])}", False),
        "recovery": ("Recovery of the teachers", f"ratio of the means: {percent(m['recovery_of_means'])}", False),
        "forgetting_mean": ("Mean forgetting", f"worst: {points(m['forgetting_worst'])}{on}", True),
        "forgetting_from_best_mean": ("Forgetting from the best", "", True),
        "backward_transfer": ("Backward transfer", "minus the mean forgetting", True),
        "forward_transfer": ("Forward transfer", alone, False),
    }
    cells = []
    for name, (label, more, of_old) in cards.items():
        rate = name in ("average_success", "recovery")
        value = percent(m[name]) if rate else points(m[name], signed=name.endswith("transfer"))
        sure = interval(m["intervals"].get(name), "%" if rate else " pp", 0)
        about = "nothing to forget after one stage" if of_old and m["stages"] == 1 else more
        if m[name] is None and name == "forgetting_from_best_mean" and m["stages"] > 1:
            about = "not all tasks were evaluated after every stage"
        elif m[name] is None and name != "forward_transfer" and m["evaluated_by_stage"][-1] < m["tasks"]:
            about = "not all tasks were evaluated yet"
        lines = (f"95%: {sure}" if sure and m[name] is not None else "", about)
        cells.append(f'<div class="card"><span>{label}</span><b>{value}</b>{"".join(map(small, lines))}</div>')
    return "".join(cells)


def _table(facts: RunResults) -> str:
    rows, stage = [], 0
    for row in facts.rows:
        opening_tag = '<tr class="first">' if row["stage"] != stage else "<tr>"
        stage = row["stage"]
        rates = "".join(_rate(row, name) for name in ("teacher", "after_own_stage", "final"))
        lost = f"{points(row.get('forgetting'))}{_sure(row.get('forgetting_interval'), ' pp')}"
        rows.append(f"{opening_tag}<td>{text(row['task'])}</td><td>{stage}</td>{rates}<td>{lost}</td></tr>")
    foot = ""
    if facts.metrics:
        m, sure = facts.metrics, facts.metrics["intervals"]
        names = ("teacher_success", "average_after_own_stage", "average_success")
        means = "".join(f"<td>{percent(m[name])}{_sure(sure[name])}</td>" for name in names)
        lost = f"{points(m['forgetting_mean'])}{_sure(sure['forgetting_mean'], ' pp')}"
        foot = f"<tfoot><tr><td>mean</td><td></td>{means}<td>{lost}</td></tr></tfoot>"
    about = (
        "Small numbers are 95% intervals: Wilson and Newcombe score intervals for one task (pp: percentage points), a "
        "stratified bootstrap over each task's episodes for means. They speak of the episodes drawn, not of training "
        "again with another seed, and a bootstrap has no width where every episode ended alike."
    )
    return section("tasks", "Every task", f'{table(headings(facts), rows, foot)}<p class="small">{about}</p>')


def _memories(facts: RunResults) -> str:
    records = facts.memories()
    if not records:
        return ""
    rows = []
    for stage, r in ((stage, _memory(record)) for stage, record in records.items()):
        rows.append(tr((str(stage), f"{r['kept_steps']:,}", f"{r['total_steps']:,}", percent(r["share"]))))
    first = next(iter(records.values()))
    about = f"chosen by {first['selection']['name']}, budget {percent(first['budget_fraction'])} per task"
    about = f'<p class="small">Steps kept of each stage\'s data ({text(about)}).</p>'
    return section("", "Replay memory", about + table(("Stage", "Steps kept", "Steps seen", "Share"), rows))


def _settings(facts: RunResults) -> str:
    c = facts.config
    short = {
        "seed": c.seed,
        "evaluation seed": c.evaluation.seed,
        "tasks": c.stream.tasks if isinstance(c.stream.tasks, str) else f"{len(c.stream.tasks)} in config.yaml",
        "tasks per stage": c.stream.tasks_per_stage,
    }
    origin = _list(facts.provenance) if facts.provenance else "<p>No provenance.json in this run.</p>"
    everything = f"<summary>All settings (config.yaml)</summary><pre>{text(config_as_yaml(c))}</pre>"
    content = f"{_list(short)}<h3>Provenance</h3>{origin}<details>{everything}</details>"
    return section("settings", "What was run", content)


def _again(facts: RunResults) -> str:
    folder, commit = shown(facts.run.folder), facts.provenance.get("commit")
    launch = f".venv/bin/python -m hpc_cpd.launch --stage all --config {shlex.quote(f'{folder}/config.yaml')} --run"
    lines = ["# the same experiment from the beginning"]
    if isinstance(commit, str) and commit.isalnum():
        lines.append(f"git checkout {shlex.quote(commit)}")
    lines += ["make setup", f"{launch} {shlex.quote(f'{folder}-again')}"]
    if (facts.run.folder / "teachers").is_symlink():
        lines.append("# (its teachers and trajectories are a sweep's, which makes them with one seed for all its rows)")
    if not facts.finished:
        lines += ["# go on where this run stopped", f"{launch} {shlex.quote(folder)}"]
    return again("\n".join([*lines, "# this page once more", f".venv/bin/hpc-cpd report {shlex.quote(folder)}"]))


def _files(facts: RunResults) -> str:
    run = facts.run
    paths = [run.report / "metrics.json", run.config_file, run.provenance_file]
    names = ("evaluation.json", "evaluation_before.json", "metrics.jsonl", "routing.json", "memory/selection.json")
    for folder in facts.finished_stages.values():
        paths += [folder / name for name in (*names, "student/student.json")]
    for task in facts.tasks:
        paths += [run.teacher(task) / "evaluation.json", run.teacher(task) / "metrics.jsonl"]
        paths.append(run.trajectories(task) / "manifest.json")
    there = [os.path.relpath(path, run.folder) for path in paths if path.is_file()]
    links = "".join(f'<li><a href="../{text(path)}">{text(path)}</a></li>' for path in there)
    about = "Everything on this page is computed from these; its own numbers are in"
    return section(
        *("files", "Files"),
        f'<p>{about} <a href="metrics.json">metrics.json</a>.</p>'
        f'<details><summary>{len(there)} files</summary><ul class="files">{links}</ul></details>',
    )


def _memory(record: Mapping[str, Any]) -> dict[str, Any]:
    """Totals over the tasks of a ``selection.json``."""
    names = ("budget_steps", "kept_steps", "total_steps")
    totals: dict[str, Any] = {name: sum(memory[name] for memory in record["memories"]) for name in names}
    return {**totals, "share": totals["kept_steps"] / totals["total_steps"] if totals["total_steps"] else None}


def _rate(row: Row, name: str) -> str:
    value = row.get(name)
    style = f' style="--p:{100 * value:.0f}%"' if value is not None else ""
    return f'<td class="rate"{style}>{percent(value)}{_sure(row.get(f"{name}_interval"))}</td>'


def _sure(bounds: list[float] | None, unit: str = "%") -> str:
    return small(interval(bounds, unit, 0))


def _list(values: Mapping[str, Any]) -> str:
    rows = (f"<dt>{text(key.replace('_', ' '))}</dt><dd>{text(_plain(value))}</dd>" for key, value in values.items())
    return f"<dl>{''.join(rows)}</dl>"


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
