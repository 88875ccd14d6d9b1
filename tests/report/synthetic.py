"""A run folder as a finished experiment leaves it, with made-up numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from hpc_cpd.config import parse_config
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import mark_done, write_json
from hpc_cpd.tasks.registry import stage_plan

EPISODES = 20
PROVENANCE = {
    "commit": "0123abc",
    "uncommitted_changes": False,
    "packages": {"torch": "2.13.0", "mpich": None},
    "host": {"processor": "x86-64", "cores": 2, "gpus": []},
    "seed": 0,
    "reward_versions": ["v2"],
}


def _record(successes: int) -> dict[str, Any]:
    steps = 80.0 if successes else None
    return {"successes": successes, "episodes": EPISODES, "mean_return": 500.0, "mean_steps_to_success": steps}


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def synthetic_run(folder: Path, tasks: Any = "MT10", per_stage: int = 5, finished: int | None = None) -> Run:
    """A run over `tasks` of which the first `finished` stages (None: all) and their teachers are published."""
    run, rng = Run(folder), np.random.default_rng(7)
    config = parse_config({"name": folder.name, "stream": {"tasks": tasks, "tasks_per_stage": per_stage}})
    run.open(config, PROVENANCE)
    plan = stage_plan(config.stream)
    finished = len(plan) if finished is None else finished
    seen: dict[str, float] = {}
    experts: list[dict[str, Any]] = []
    for stage, new in enumerate(plan[:finished], 1):
        for task in new:
            skill = float(rng.choice([1.0, 1.0, 1.0, 0.95, 0.9]))
            teacher, data = run.teacher(task), run.trajectories(task)
            write_json(
                teacher / "evaluation.json",
                {
                    "stage": 0,
                    "episodes_per_task": EPISODES,
                    "seed": 10_000,
                    "tasks": {task: _record(round(20 * skill))},
                },
            )
            rise = 1 / (1 + np.exp(-np.linspace(-4, 4, 12) - rng.normal()))
            _write_lines(
                teacher / "metrics.jsonl",
                [
                    {
                        "step": i + 1,
                        "environment_steps": 8000 * i,
                        "phase": phase,
                        "success": round(skill * float(s), 2),
                        "mean_return": 500 * float(s),
                    }
                    for i, s in enumerate(rise)
                    for phase in ("improve", "evaluation")
                ],
            )
            mark_done(teacher, {})
            write_json(data / "manifest.json", {"shards": []})
            mark_done(data, {})
            seen[task] = skill
            experts.append({"id": len(experts), "stage": stage, "task": task})
        path = run.stage(stage)
        before = {task: _record(int(rng.integers(0, 5))) for task in new}
        write_json(path / "evaluation_before.json", {"before": before, "untrained": {task: _record(0) for task in new}})
        if stage > 1:
            seen = {
                task: max(0.0, s - float(rng.choice([-0.05, 0, 0, 0, 0.05, 0.15])) * (task not in new))
                for task, s in seen.items()
            }
        records = {task: _record(int(np.clip(round(20 * s), 0, 20))) for task, s in seen.items()}
        write_json(
            path / "evaluation.json", {"stage": stage, "episodes_per_task": EPISODES, "seed": 10_000, "tasks": records}
        )
        lines = []
        for i in range(100):
            loss = 0.3 * np.exp(-i / 15) + 0.02 * rng.random() + 0.01
            lines.append({"step": 20 * (i + 1), "phase": 1 if i < 50 else 2, "loss": loss, "learning_rate": 1e-3})
            lines[-1]["load_balancing_loss"] = 1.0
            if stage > 1:
                lines[-1]["replay_loss"] = 0.02 + 0.02 * rng.random()
        _write_lines(path / "metrics.jsonl", lines)
        names = list(seen)
        gate = {t: rng.dirichlet([8.0 if e["task"] == t else 0.3 for e in experts]).tolist() for t in names}
        write_json(path / "routing.json", {"experts": experts, "tasks": gate})
        write_json(
            path / "memory" / "selection.json",
            {
                "tasks": len(new),
                "selection": {"name": "dpp"},
                "budget_fraction": 0.08,
                "memories": [
                    {"task_id": task, "budget_steps": 800, "kept_steps": 778, "total_steps": 10_000} for task in new
                ],
            },
        )
        mark_done(path, {})
    return run
