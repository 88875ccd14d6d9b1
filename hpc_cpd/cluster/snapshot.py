"""What the folders of a teacher or a stage tell: is it done, who works on it, how far it is, what it said last.

Whatever cannot be read counts as not there: these are news, and the work itself checks its files.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hpc_cpd.cluster.job_record import FILE as ATTEMPT
from hpc_cpd.cluster.job_record import JobRecord, read_job_record
from hpc_cpd.cluster.units import stage_unit, teacher_unit
from hpc_cpd.report.status_table import UnitProgress
from hpc_cpd.run.lock import STALE_SECONDS, lives_here
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import DONE
from hpc_cpd.settings import Config

_TAIL_BYTES = 8192
_RATE = re.compile(r"([\d.]+) steps/s")
_COUNTS = re.compile(r"\d+/\d+|goes on after|published")


@dataclass(frozen=True)
class Owner:
    """Who holds a lock. `job`: its Slurm job, None for one of this machine."""

    pid: int
    host: str
    job: str | None


@dataclass(frozen=True)
class UnitSnapshot:
    """What the folders of a unit tell. `parts`: whether each of its folders is published.

    `at`: the time of the last metrics, by the clock of the file system.
    """

    unit: str
    folder: Path
    parts: tuple[bool, ...]
    begun: bool = False
    attempt: JobRecord | None = None
    owner: Owner | None = None
    success: float | None = None
    progress: UnitProgress | None = None
    at: float = 0.0

    @property
    def done(self) -> bool:
        return all(self.parts)


def snapshot_of(run: Run, unit: str, config: Config) -> UnitSnapshot:
    kind, _, name = unit.partition(" ")
    return _stage(run, int(name), config) if kind == "stage" else _teacher(run, name, config)


def _teacher(run: Run, task: str, config: Config) -> UnitSnapshot:
    folder, recorded = run.teacher(task), _names(run.trajectories(task))
    names = _names(folder)
    parts = (DONE in names, DONE in recorded)
    place = _place(teacher_unit(task), folder, names, parts)
    if parts[0]:
        place = replace(place, begun=True, success=_number(_read(folder / DONE).get("success")))
    if place.done:
        return place
    shards = sum(name.startswith("shard-") and name.endswith(".h5") for name in recorded)
    if parts[0] or shards:
        return replace(place, begun=True, progress=UnitProgress("shards of trajectories", shards))
    record, success, at = _metrics(folder, names)
    return replace(place, success=success, progress=_teacher_progress(record, config), at=at)


def _stage(run: Run, stage: int, config: Config) -> UnitSnapshot:
    folder = run.stage(stage)
    names = _names(folder)
    place = _place(stage_unit(stage), folder, names, (DONE in names,))
    if place.done:
        tasks = _read(folder / "evaluation.json").get("tasks")
        return replace(place, success=_mean_success(tasks) if isinstance(tasks, dict) else None)
    record, _, at = _metrics(folder, names)
    begun = place.begun or not names.isdisjoint(("start", "student"))
    return replace(place, begun=begun, progress=_stage_progress(record, config), at=at)


def _place(unit: str, folder: Path, names: set[str], parts: tuple[bool, ...]) -> UnitSnapshot:
    attempt = read_job_record(folder) if ATTEMPT in names else None
    if all(parts):
        return UnitSnapshot(unit, folder, parts, begun=True, attempt=attempt)
    begun = attempt is not None or ("checkpoints" in names and bool(_names(folder / "checkpoints")))
    return UnitSnapshot(unit, folder, parts, begun, attempt, live_owner(folder) if "lock.json" in names else None)


def live_owner(folder: Path) -> Owner | None:
    """Who holds the lock of `folder`, if it seems to be alive."""
    path = folder / "lock.json"
    try:
        owner = json.loads(path.read_text())
        age = time.time() - path.stat().st_mtime
        pid, host, job = int(owner["pid"]), str(owner["host"]), owner.get("job")
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    if lives_here(owner) is False or age >= STALE_SECONDS:
        return None
    return Owner(pid, host, None if job is None else str(job))


def _names(folder: Path) -> set[str]:
    """What a folder holds, in one request: asking for each file would cost a network file system many."""
    try:
        return set(os.listdir(folder))
    except OSError:
        return set()


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none, for this is news and not the work itself."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _mean_success(tasks: Mapping[str, Any]) -> float | None:
    try:
        rates = [task["successes"] / task["episodes"] for task in tasks.values()]
    except (TypeError, KeyError, ZeroDivisionError):
        return None
    return sum(rates) / len(rates) if rates else None


def tail(path: Path) -> tuple[list[str], float]:
    """The last lines of a file, newest first, and its time."""
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            file.seek(max(0, status.st_size - _TAIL_BYTES))
            return file.read().decode(errors="replace").splitlines()[::-1], status.st_mtime
    except OSError:
        return [], 0.0


def _metrics(folder: Path, names: set[str]) -> tuple[dict[str, Any] | None, float | None, float]:
    """The last whole line of the metrics, the last success among them, and when they were written."""
    lines, at = tail(folder / "metrics.jsonl") if "metrics.jsonl" in names else ([], 0.0)
    newest: dict[str, Any] | None = None
    for line in lines:
        if newest is not None and '"success"' not in line:
            continue
        try:
            record = json.loads(line)
            record["step"], record["phase"]
        except (ValueError, TypeError, KeyError):
            continue  # cut short by a kill, or by the beginning of the tail
        newest = newest or record
        if "success" in record:
            return newest, _number(record["success"]), at
    return newest, None, at


def _teacher_progress(record: Mapping[str, Any] | None, config: Config) -> UnitProgress | None:
    if record is None:
        return None
    settings = config.teachers
    cloned = getattr(settings.start, "gradient_steps", 0)
    if record["step"] <= cloned:
        return UnitProgress("cloning", record["step"], cloned, _number(record.get("loss")))
    return UnitProgress("PPO", record["step"] - cloned, getattr(settings.algorithm, "iterations", 0))


def _stage_progress(record: Mapping[str, Any] | None, config: Config) -> UnitProgress | None:
    if record is None:
        return None
    settings = config.distill
    steps = (settings.phase1_steps, settings.phase2_steps, settings.phase2_steps)
    before, total = sum(steps[: record["phase"] - 1]), steps[record["phase"] - 1]
    return UnitProgress(f"phase {record['phase']}", record["step"] - before, total, _number(record.get("loss")))


def said_last(place: UnitSnapshot) -> tuple[str | None, float | None]:
    """What the log of a unit at work says last: what it does where it counts no steps, and how fast it is."""
    if place.attempt is None:
        return None, None
    name = place.unit.removeprefix("teacher ")
    starts = (f"{place.unit}: ", f"trajectories {name}: ")
    line = next((line for line in tail(Path(place.attempt.log))[0] if line.startswith(starts)), "")
    text = line.removeprefix(starts[0]).removeprefix(starts[1])
    if text and _COUNTS.search(text) is None:
        return text, None
    rate = _RATE.search(text)
    return None, float(rate[1]) if rate else None


class Rates:
    """Steps a second, from one look to the next: the metrics hold no times, but their file has one."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[str, int, float, float | None]] = {}

    def of(self, place: UnitSnapshot) -> float | None:
        """The rate since the metrics last grew; None before they have grown once within this phase."""
        if place.progress is None or place.progress.step is None:
            return None
        now = (place.progress.phase, place.progress.step, place.at)
        phase, step, at, rate = self._seen.get(place.unit, (*now, None))
        if now[0] == phase and now[1] > step and now[2] > at:
            rate = (now[1] - step) / (now[2] - at)
        elif now[0] == phase and now[1] == step:
            now = (phase, step, at)
        else:
            rate = None
        self._seen[place.unit] = (*now, rate)
        return rate


def foreign(host: str, job: str | None) -> str | None:
    """The name of a node where it is worth telling: one of a cluster, or another machine than this."""
    return None if job is None and host == socket.gethostname() else host
