"""Which job of a scheduler this process belongs to. Whoever starts the work asks the scheduler, once, and says it here.

It travels in variables of our own, so what stands below the schedulers need not know which of them it was.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

_JOB, _RESTART = "HPC_CPD_JOB", "HPC_CPD_RESTART"


@dataclass(frozen=True)
class JobStart:
    """One start of a job. `id`: the scheduler's, None outside of any; `restart`: how often it was started before."""

    id: str | None = None
    restart: int = 0


def this_job() -> JobStart:
    """The job that was set in this process, or in the one that started it."""
    return JobStart(os.environ.get(_JOB), int(os.environ.get(_RESTART, "0")))


def set_this_job(job: JobStart) -> None:
    """Say which job this process and its children belong to."""
    if job.id is None:
        os.environ.pop(_JOB, None)
        os.environ.pop(_RESTART, None)
    else:
        os.environ[_JOB], os.environ[_RESTART] = job.id, str(job.restart)
