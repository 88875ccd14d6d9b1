"""What the last job of a teacher or stage has to tell: ``attempt.json`` in its folder.

A scheduler forgets its jobs and does not know why they ended; this file stays.
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from hpc_cpd.cluster.units import newest
from hpc_cpd.errors import UserError
from hpc_cpd.run.job import this_job
from hpc_cpd.run.publish import read_json, write_json

RECORD_FILE = "attempt.json"


@dataclass(frozen=True)
class JobRecord:
    """One start of a job. `job`: the scheduler's id, None on this machine; `restart`: how often it was requeued before.

    `who`: the same for all ranks of this start and for no other. `log`: relative to the run folder, if it is in it.
    `code`: None while it runs, or when it was killed without a word; else an exit code of the public interface.
    `seconds_before`: what the starts before this one took; None: not known, for an earlier version did not count.
    """

    number: int
    who: str
    job: str | None
    restart: int
    host: str
    log: str
    started: float
    ended: float | None = None
    code: int | None = None
    sentence: str = ""
    seconds_before: float | None = None


def begin_job(folder: Path, log: Path) -> None:
    """Note that this process, rank 0 of its job, begins to work on the unit of `folder`; only once for each start."""
    before = read_job_record(folder)
    if before is not None and before.who == _who():
        return
    number, seconds = (1, 0.0) if before is None else (before.number + 1, _seconds(folder, before))
    who, job, restart, host = _who(), this_job().id, this_job().restart, socket.gethostname()
    record = JobRecord(number, who, job, restart, host, str(log), time.time(), seconds_before=seconds)
    write_json(folder / RECORD_FILE, asdict(record))


def end_job(folder: Path, log: Path, code: int, sentence: str) -> None:
    """Note how it ended; any rank may. The first word counts: later ones tell of ranks that were dragged down.

    A start that was replaced, or refused because another works there, writes nothing.
    """
    record = read_job_record(folder)
    if record is not None and record.code is None and record.who == _who():
        ended = replace(record, ended=time.time(), code=code, sentence=sentence[:2000], log=str(log))
        write_json(folder / RECORD_FILE, asdict(ended))


def _seconds(folder: Path, record: JobRecord) -> float | None:
    """Wall-clock of `record` and of those before it; one that was killed counts up to what it last saved."""
    earlier = 0.0 if record.number == 1 else record.seconds_before
    if earlier is None:
        return None
    results = ("start", "draft", "student", "memory", "routing.json", "policy.safetensors", "evaluation*.json")
    ended = newest([folder], ("checkpoints/*", *results)) if record.ended is None else record.ended
    return earlier + max(0.0, ended - record.started)


def _who() -> str:
    launcher = os.environ.get("HPC_CPD_LAUNCHER")
    if launcher is not None:
        return f"launcher {launcher} {os.environ.get('HPC_CPD_LOGS', '')}"  # in a container it is always process 1
    job = this_job()
    return f"process {os.getpid()}" if job.id is None else f"job {job.id} restart {job.restart}"


def read_job_record(folder: Path) -> JobRecord | None:
    """The record of the last start on the unit of `folder`; None: there is none, or it is damaged (it is only news)."""
    with suppress(UserError, TypeError):
        return JobRecord(**read_json(folder / RECORD_FILE))
    return None
