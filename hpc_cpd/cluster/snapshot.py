"""What the folders of a teacher or a stage tell: is it done, who works on it, how far it is, what it said last.

Whatever cannot be read counts as not there: these are news, and the work itself checks its files.
"""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hpc_cpd.cluster.job_record import RECORD_FILE, JobRecord, read_job_record
from hpc_cpd.cluster.units import TeacherUnit, Unit
from hpc_cpd.progress import NEWS_FILE, News, latest_news
from hpc_cpd.run.lock import STALE_SECONDS, lives_here
from hpc_cpd.run.publish import DONE


@dataclass(frozen=True)
class Owner:
    """Who holds a lock. `job`: its scheduler's job, None for one of this machine."""

    host: str
    job: str | None


@dataclass(frozen=True)
class UnitSnapshot:
    """What the folders of a unit tell. `parts`: whether each of its folders is published; `news`: how far it is.

    `success_estimated`: not all tasks that `success` speaks of were evaluated.
    """

    unit: Unit
    parts: tuple[bool, ...]
    begun: bool = False
    record: JobRecord | None = None
    owner: Owner | None = None
    success: float | None = None
    success_estimated: bool = False
    news: News | None = None

    @property
    def done(self) -> bool:
        return all(self.parts)


def snapshot_of(unit: Unit) -> UnitSnapshot:
    """What is there now, in one look at each folder."""
    folder, names = unit.folder, [_names(folder) for folder in unit.folders]
    own, parts = names[0], tuple(DONE in found for found in names)
    record = read_job_record(folder) if RECORD_FILE in own else None
    success, estimated = _success(unit, parts[0], own)
    if all(parts):
        return UnitSnapshot(unit, parts, True, record, success=success, success_estimated=estimated)
    begun = record is not None or any(parts) or not own.isdisjoint(("start", "student"))
    begun = begun or ("checkpoints" in own and bool(_names(folder / "checkpoints")))
    owner = live_owner(folder) if "lock.json" in own else None
    news = latest_news(folder) if NEWS_FILE in own else None
    return UnitSnapshot(unit, parts, begun, record, owner, success, estimated, news)


def _success(unit: Unit, published: bool, names: set[str]) -> tuple[float | None, bool]:
    """The success rate of what is published, or of a teacher's last evaluation on the way; is it an estimate?"""
    teaches = isinstance(unit, TeacherUnit)
    if published:
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError):
            if teaches:
                return float(json.loads((unit.folder / DONE).read_bytes())["success"]), False
            from hpc_cpd.evaluation.schedule import stage_success  # numpy takes a launcher too long

            return stage_success(json.loads((unit.folder / "evaluation.json").read_bytes()))
    elif teaches and "metrics.jsonl" in names:
        for line in tail(unit.folder / "metrics.jsonl"):  # one may be cut short by a kill, or as the tail begins
            with suppress(ValueError, TypeError, KeyError):
                return float(json.loads(line)["success"]), False
    return None, False


def live_owner(folder: Path) -> Owner | None:
    """Who holds the lock of `folder`, if it seems to be alive."""
    path = folder / "lock.json"
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        owner = json.loads(path.read_text())
        if lives_here(owner) is not False and time.time() - path.stat().st_mtime < STALE_SECONDS:
            return Owner(owner["host"], owner.get("job"))
    return None


def _names(folder: Path) -> set[str]:
    """What a folder holds, in one request: asking for each file would cost a network file system many."""
    with suppress(OSError):
        return set(os.listdir(folder))
    return set()


def tail(path: Path) -> list[str]:
    """The last lines of a file, newest first."""
    with suppress(OSError), open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 8192))
        return file.read().decode(errors="replace").splitlines()[::-1]
    return []


def foreign(host: str, job: str | None) -> str | None:
    """The name of a node where it is worth telling: one of a cluster, or another machine than this."""
    return None if job is None and host == socket.gethostname() else host
