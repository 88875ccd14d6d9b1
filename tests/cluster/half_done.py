"""Runs whose folders were filled by hand, in whatever state a test of their status wants."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from hpc_cpd.cluster.status import UnitStatus, snapshot
from hpc_cpd.cluster.submit import Submission, Submissions
from hpc_cpd.config import config_as_yaml, load_config
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import mark_done, write_json

ONE, TWO, THREE = (f"metaworld/{name}-v3" for name in ("reach", "push", "button-press-topdown"))


def new_run(folder: Path) -> Run:
    """Three tasks in two stages, of which nothing is begun."""
    made = Run(folder)
    made.folder.mkdir()
    config = load_config(None, [f"stream.tasks=[{ONE},{TWO},{THREE}]", "stream.tasks_per_stage=2"])
    made.config_file.write_text(config_as_yaml(config))
    return made


def units(run: Run) -> dict[str, UnitStatus]:
    return {unit.unit.name: unit for unit in snapshot(run).units}


def publish(folder: Path, **summary: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    mark_done(folder, summary)


def publish_task(run: Run, task: str, success: float = 0.9) -> None:
    publish(run.teacher(task), success=success)
    publish(run.trajectories(task))


def publish_all(run: Run) -> None:
    for task in (ONE, TWO, THREE):
        publish_task(run, task)
    for stage in (1, 2):
        publish(run.stage(stage))


def write_news(folder: Path, phase: str, step: int | None = None, total: int | None = None, **more: Any) -> None:
    """What a unit at work last told."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"name": "it", "text": "", "loss": None, "steps_per_second": None, "seconds": time.time(), **more}
    (folder / "progress.json").write_text(json.dumps(values | {"phase": phase, "step": step, "total": total}))


def write_metrics(folder: Path, *records: dict[str, Any], end: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + end)


def write_attempt(folder: Path, **values: Any) -> None:
    usual = {
        "number": 1,
        "who": "somebody",
        "job": None,
        "restart": 0,
        "host": socket.gethostname(),
        "log": "/nowhere/rank-0.log",
    }
    write_json(folder / "attempt.json", usual | {"started": time.time(), **values})


def submitted(run: Run, resubmitter: str | None = None, **jobs: str | Submission) -> None:
    """Submissions to Slurm that name `jobs`: one, two, three for the teachers, stage_1, stage_2."""
    names = {"one": f"teacher {ONE}", "two": f"teacher {TWO}", "three": f"teacher {THREE}"}
    names |= {"stage_1": "stage 1", "stage_2": "stage 2"}
    units = {names[key]: job if isinstance(job, Submission) else Submission(job) for key, job in jobs.items()}
    Submissions(run, "slurm", units, resubmitter).write()


def lock_of_another(folder: Path, job: str | None, host: str = "node7") -> None:
    """A lock whose heart beats on another machine."""
    folder.mkdir(parents=True, exist_ok=True)
    owner = {"host": host, "pid": 1, "born": 1, "token": "x", "job": job, "restart": 0}
    (folder / "lock.json").write_text(json.dumps(owner))


def status_command(*words: object, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hpc_cpd.cli", "status", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **more)
