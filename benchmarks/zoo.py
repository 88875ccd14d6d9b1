"""Make the zoo and docs/teachers.md from runs: the best teacher of each task, and what every teacher cost.

    python benchmarks/zoo.py RUN [RUN ...]

What earlier runs left in docs/teachers/*.json and in the zoo stays, unless a run has a newer teacher of the same task
and start (for the table) or a better one (for the zoo). Nothing here is typed in: every number comes from the runs'
files, or is played now (the scripted policies, and the small form of each teacher of the zoo).
"""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from hpc_cpd.evaluation.rollouts import EpisodeResult, evaluate_policy
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import is_done, read_json
from hpc_cpd.tasks.families.metaworld import NAMES
from hpc_cpd.tasks.registry import resolve_tasks, run_plan
from hpc_cpd.teachers.policy import load_teacher
from hpc_cpd.teachers.sources.zoo import ZOO, add_to_zoo
from hpc_cpd.teachers.starts._cloning import ScriptedPolicy

DOCS = Path(__file__).parents[1] / "docs"
EPISODES, SEED = 50, 10_000
"""The goals on which all are compared: never those they learnt on."""
SOLVED, WARM_AIM, WORTH_SHIPPING = 0.90, 0.85, 0.80
TASKS = [f"metaworld/{name}" for name in NAMES]
STARTS = {"scratch": "from scratch", "demonstrations": "warm-started"}


def main() -> None:
    records = {start: _read(DOCS / "teachers" / f"{start}.json") for start in [*STARTS, "scripted", "elsewhere"]}
    for folder in sys.argv[1:]:
        run = Run(Path(folder))
        start = run.config().teachers.start.name
        for task in [task for tasks in run_plan(run) for task in tasks]:
            if is_done(run.teacher(task)):
                kind = start if task in TASKS else "elsewhere"
                records[kind][task] = _record(run, task)
                if task in TASKS:
                    _enter(run.teacher(task), records[start][task])
    for task in TASKS:
        if task not in records["scripted"]:
            records["scripted"][task] = _score(_play(ScriptedPolicy(task), task))
            print(f"scripted policy of {task}: {records['scripted'][task]['success']:.2f}", flush=True)
    order = {task: number for number, task in enumerate(TASKS)}
    records = {
        name: dict(sorted(record.items(), key=lambda one: order.get(one[0], len(order))))
        for name, record in records.items()
    }
    for name, record in records.items():
        if record:
            _write(DOCS / "teachers" / f"{name}.json", record)
    page = DOCS / "teachers.md"
    page.write_text(_page(records))
    curves(records["scratch"], DOCS / "teachers" / "scratch.png")
    if records["elsewhere"]:
        curves(records["elsewhere"], DOCS / "teachers" / "elsewhere.png")
    size = sum(path.stat().st_size for path in ZOO.rglob("*") if path.is_file())
    print(f"{len(list(ZOO.glob('*/*/DONE')))} teachers, {size / 1e6:.1f} MB, in {ZOO}; the table is in {page}")


def _record(run: Run, task: str) -> dict[str, Any]:
    """What a run's teacher cost and reached, with where it comes from."""
    folder = run.teacher(task)
    evaluation, done = read_json(folder / "evaluation.json"), read_json(folder / "DONE")
    if task in TASKS and (evaluation["episodes_per_task"], evaluation["seed"]) != (EPISODES, SEED):
        raise SystemExit(f"{folder} was evaluated on other goals; set evaluation.episodes={EPISODES}")
    origin = read_json(run.provenance_file)
    score = evaluation["tasks"][task]
    return {
        "success": score["successes"] / score["episodes"],
        "steps_to_success": score["mean_steps_to_success"],
        "mean_return": score["mean_return"],
        "environment_steps": done["environment_steps"],
        "minutes": round(done["seconds"] / 60, 1),
        "curve": [
            [one["environment_steps"], one["successes"] / one["episodes"], round(one["mean_return"], 1)]
            for one in evaluation["while_training"]
        ],
        "command": f"python -m hpc_cpd.launch {origin['command'].partition(' ')[2]}",
        "seed": origin["seed"],
        "commit": origin["commit"],
        "machine": f"{origin['host']['processor']}, {origin['host']['cores']} cores",
    }


def _enter(folder: Path, record: dict[str, Any]) -> None:
    """Put a teacher into the zoo if it is worth it and better than the one that is there."""
    if record["success"] < WORTH_SHIPPING:
        return
    policy = load_teacher(folder)
    task = policy.task_id
    rank = (record["success"], -(record["steps_to_success"] or np.inf))
    if is_done(ZOO / task):
        there = load_teacher(ZOO / task).provenance["training"]
        if (there["success"], -(there["steps_to_success"] or np.inf)) >= rank:
            return
    small = {
        name: value.half().to(value.dtype) if "normaliser" not in name else value
        for name, value in policy.tensors().items()
    }
    policy.set_tensors(small)
    card = {**policy.provenance, "training": record, "evaluation": _score(_play(policy, task))}
    add_to_zoo(ZOO, policy, card)
    print(f"zoo: {task} {STARTS[policy.provenance['start']]} {card['evaluation']['success']:.2f}", flush=True)


def _play(policy: Any, task: str) -> list[EpisodeResult]:
    return evaluate_policy(policy, task, EPISODES, SEED)


def _score(results: list[EpisodeResult]) -> dict[str, Any]:
    steps = [result.steps_to_success for result in results if result.steps_to_success is not None]
    return {
        "success": sum(result.success for result in results) / len(results),
        "steps_to_success": float(np.mean(steps)) if steps else None,
        "episodes": EPISODES,
        "seed": SEED,
    }


def _page(records: dict[str, dict[str, Any]]) -> str:
    """docs/teachers.md."""
    lines = [
        "# Teachers",
        "",
        f"Success on {EPISODES} goals (seed {SEED}) that no teacher learnt on: mean action, flag at any step of 500.",
        "Steps are environment steps, minutes wall-clock of one teacher. Made by `python benchmarks/zoo.py RUN ...`;",
        "each number's command, seed, commit and machine stand in `docs/teachers/*.json`.",
        "",
        textwrap.fill(_about_clones(records), 120),
        "",
        "| task | from scratch | steps | minutes | warm-started | minutes | scripted | in the zoo |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for task in TASKS:
        scratch, warm = records["scratch"].get(task), records["demonstrations"].get(task)
        zoo = _shipped(load_teacher(ZOO / task).provenance) if is_done(ZOO / task) else ""
        cells = [
            task.removeprefix("metaworld/"),
            _percent(scratch),
            f"{scratch['environment_steps'] / 1e6:.2f} M" if scratch else "",
            f"{scratch['minutes']:.1f}" if scratch else "",
            _percent(warm),
            f"{warm['minutes']:.1f}" if warm else "",
            _percent(records["scripted"][task]),
            zoo,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [""]
    for start, words in STARTS.items():
        found = [records[start][task]["success"] for task in TASKS if task in records[start]]
        if found:
            solved = sum(success >= SOLVED for success in found)
            lines += [
                f"- {words}: {len(found)} tasks, mean success {np.mean(found):.3f}, {solved} at {SOLVED:.2f} or above"
            ]
    weak = [task for task in TASKS if records["demonstrations"].get(task, {"success": 1.0})["success"] < WARM_AIM]
    for task in weak:
        success = ", ".join(f"{one[1]:.2f}" for one in records["demonstrations"][task]["curve"])
        lines += [
            f"  - {task.removeprefix('metaworld/')} stays below {WARM_AIM:.2f}: the scripted policy, which "
            f"demonstrates it, reaches {records['scripted'][task]['success']:.2f}; evaluations on the way: {success}"
        ]
    left = [task for task in TASKS if records["scratch"].get(task, {"success": 1.0})["success"] < SOLVED]
    if left:
        lines += [
            "",
            f"Not solved from scratch (below {SOLVED:.2f}), with the best success of the evaluations on the way,",
            "and the mean return of a dozen of them, from the first to the last:",
            "",
        ]
        for task in left:
            _, reached, returns = zip(*records["scratch"][task]["curve"], strict=True)
            shown = [f"{value:.0f}" for value in returns[:: max(1, len(returns) // 12)]]
            lines += [f"- {task.removeprefix('metaworld/')}: {max(reached):.2f}; {', '.join(shown)}"]
    lines += ["", "![success while training from scratch](teachers/scratch.png)", ""]
    if records["elsewhere"]:
        lines += ["## Other environments", ""]
        for task, one in records["elsewhere"].items():
            lines += [
                f"- {task}: mean return {one['mean_return']:.0f} after {one['environment_steps'] / 1e6:.1f} M steps, "
                f"{one['minutes']:.1f} minutes: `{one['command']}`"
            ]
        lines += ["", "![learning on other environments](teachers/elsewhere.png)", ""]
    return "\n".join(lines)


def _about_clones(records: dict[str, dict[str, Any]]) -> str:
    warm, zoo = [], []
    for tasks in ("MT25", "MT50"):
        made = [records["demonstrations"][task] for task in resolve_tasks(tasks) if task in records["demonstrations"]]
        warm.append(f"{sum(one['environment_steps'] == 0 for one in made)} of {tasks}'s {len(made)}")
        there = [load_teacher(ZOO / task).provenance for task in resolve_tasks(tasks) if is_done(ZOO / task)]
        zoo.append(f"{sum(map(_is_clone, there))} of {tasks}'s {len(there)}")
    return (
        "A warm-started teacher first imitates Meta-World's scripted policy (it is cloned); PPO goes on only where "
        "that is not good enough. It was good enough, so that PPO made no step, for "
        f"{' and '.join(warm)} warm-started teachers. "
        "*Clone* in the last column: no step of PPO went into the weights, so the teacher copies the scripted policy. "
        f"Of the teachers in the zoo these are {' and '.join(zoo)}. The zoo has, of both starts, the teacher that did "
        "better on these very goals; the last column also has its success as it is shipped, with weights in float16."
    )


def _is_clone(provenance: dict[str, Any]) -> bool:
    return provenance["start"] == "demonstrations" and provenance["best"]["environment_steps"] == 0


def _shipped(provenance: dict[str, Any]) -> str:
    kind = "clone" if _is_clone(provenance) else STARTS[provenance["start"]]
    return f"{kind}, {_percent(provenance['evaluation'])}"


def _percent(record: dict[str, Any] | None) -> str:
    return "" if record is None else f"{100 * record['success']:.0f}%"


def curves(records: dict[str, Any], path: Path) -> None:
    """One small picture per task: evaluated success against environment steps; the return where none succeeded."""
    from matplotlib.figure import Figure

    rows = -(-len(records) // 5)
    figure = Figure(figsize=(2.4 * min(5, max(2, len(records))), 1.9 * rows), layout="constrained")
    axes = figure.subplots(rows, min(5, len(records)), squeeze=False).ravel()
    for axis in axes[len(records) :]:
        axis.set_visible(False)
    for axis, (task, record) in zip(axes, records.items(), strict=False):
        steps, success, returns = zip(*record["curve"], strict=True)
        solved = any(success)
        axis.plot(np.array(steps) / 1e6, success if solved else returns, color="#2563a8" if solved else "#a85a25")
        axis.set_title(f"{task.partition('/')[2]}{'' if solved else ': return'}", fontsize=9)
        axis.tick_params(labelsize=7)
        if solved:
            axis.set_ylim(-0.04, 1.04)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("environment steps (millions)", fontsize=9)
    figure.supylabel("success (blue) or mean return (brown)", fontsize=9)
    figure.savefig(path, dpi=100)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def _write(path: Path, records: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
