"""Slurm's commands: submit a script, what the jobs are doing, how much time is left, requeue, cancel.

Nothing else in the package runs a Slurm command. Each is given the environment that it is to run in.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hpc_cpd.cluster.schedulers.base import JobState, Phase
from hpc_cpd.errors import UserError

SUBMIT_ATTEMPTS = 4
_WORDS: dict[Phase, str] = {  # any other word: failed
    "waiting": "PENDING CONFIGURING SUSPENDED STOPPED REQUEUED REQUEUE_FED REQUEUE_HOLD SPECIAL_EXIT RESV_DEL_HOLD",
    "running": "RUNNING COMPLETING SIGNALING STAGE_OUT RESIZING",
    "done": "COMPLETED",
    "interrupted": "PREEMPTED NODE_FAIL BOOT_FAIL REVOKED",
    "cancelled": "CANCELLED",
    "timeout": "TIMEOUT DEADLINE",
}
_PHASES = {word: phase for phase, words in _WORDS.items() for word in words.split()}
# "--states=all" or jobs that have ended are not told
_SQUEUE = ("squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%r|%N|%L")
_SACCT = ("sacct", "--noheader", "--parsable2", "--allocations", "-oJobID,State,Reason,NodeList,Timelimit,Elapsed")
_ERRORS = (OSError, subprocess.SubprocessError)  # of a command that is not there, fails, or does not answer


@dataclass(frozen=True)
class Site:
    """What the controller's settings mean for us: the largest array, and whether old jobs are remembered."""

    max_array_size: int = 1001
    accounting: bool = False


def slurm_answers() -> bool:
    """Whether sbatch can be run here."""
    with suppress(*_ERRORS):
        _ask(["sbatch", "--version"])
        return True
    return False


def ask_site() -> Site:
    """Read the controller's settings. Raises UserError when Slurm does not answer."""
    told = _ask_or_say(["scontrol", "show", "config"])
    values = dict(re.findall(r"^(\w+) *= *(.*?) *$", told, re.MULTILINE))
    storage = values.get("AccountingStorageType", "")
    return Site(int(values.get("MaxArraySize", Site.max_array_size)), storage.endswith("slurmdbd"))


def job_states(jobs: Iterable[str], accounting: bool = False) -> dict[str, JobState]:
    """The state of each of `jobs` (``ID`` or ``ID_INDEX``) that Slurm still knows, in one query, or two.

    The controller is asked first: it alone knows a job from the moment of its submission. It forgets jobs a while after
    their end (MinJobAge); those the database is asked about, with `accounting`, which lags behind. Elements of an array
    that never began may be told as one, under the array's id: once they are cancelled those are called ``7``; while
    they wait, sacct says ``7_[0-2]``. Raises UserError when Slurm does not answer.
    """
    found: dict[str, JobState] = {}
    for command, read in ((_SQUEUE, _from_squeue), (_SACCT, _from_sacct))[: 1 + accounting]:
        left = set(jobs) - found.keys()
        if left:
            ids = ",".join(sorted({job.partition("_")[0] for job in left}))
            states = dict(map(read, _ask_or_say([*command, f"--jobs={ids}"]).splitlines()))
            unbegun = {job.partition("_")[0]: state for job, state in states.items() if "_" not in job or "[" in job}
            told = {job: states.get(job) or unbegun.get(job.partition("_")[0]) for job in left}
            found |= {job: state for job, state in told.items() if state is not None}
    return found


def _from_squeue(line: str) -> tuple[str, JobState]:
    job, word, reason, nodes, left = (line.strip().split("|") + [""] * 5)[:5]
    return job, _state(word, reason, nodes, parse_duration(left))


def _from_sacct(line: str) -> tuple[str, JobState]:
    job, word, reason, nodes, limit, elapsed = (line.strip().split("|") + [""] * 6)[:6]
    total, passed = parse_duration(limit), parse_duration(elapsed)
    left = None if total is None or passed is None else total - passed
    word = word.split(" ")[0]  # "CANCELLED by 1000"
    return job, _state(word, reason, "" if nodes.startswith("None") else nodes, left)


def _state(word: str, reason: str, nodes: str, left: float | None) -> JobState:
    phase = _PHASES.get(word, "failed")
    if phase == "cancelled" and reason == "DependencyNeverSatisfied":
        phase = "unmet"
    return JobState(word, phase, "" if reason == "None" else reason, nodes, left)


def parse_duration(text: str) -> float | None:
    """Seconds of Slurm's ``[D-][HH:]MM:SS``; None for UNLIMITED, INVALID and whatever else is no duration."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return float(((24 * days + hours) * 60 + minutes) * 60 + seconds)


def seconds_left(job: str) -> float | None:
    """How long `job` may still run; None where it has no end, or Slurm does not answer now."""
    with suppress(*_ERRORS):
        return parse_duration(_ask(["squeue", "--noheader", f"--jobs={job}", "--format=%L"]).strip())
    return None


def requeue(job: str) -> str:
    """Put a running job back into the queue; what went wrong, or "".

    Only while Slurm calls it running: a job that is being evicted or cancelled is not ours to requeue.
    """
    try:
        if _ask(["squeue", "--noheader", f"--jobs={job}", "--format=%T"]).strip() == "RUNNING":
            _ask(["scontrol", "requeue", job])
        return ""
    except _ERRORS as error:
        return _message(error)


def cancel(jobs: Sequence[str], environment: Mapping[str, str]) -> None:
    """Cancel jobs that wait; those that run or have ended are left alone."""
    if jobs:
        command = ["scancel", "--state=PENDING", *jobs]
        subprocess.run(command, env=environment, capture_output=True, timeout=60, check=False)


def submit(folder: Path, name: str, text: str, environment: Mapping[str, str]) -> str:
    """Hand the script `text` to sbatch and return the job's id; the script is kept in `folder`, under that id.

    Tries again while the controller restarts. Raises UserError with Slurm's own words when it refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / f".{time.time_ns()}.sh"
    script.write_text(text)
    try:
        for attempt in range(1, SUBMIT_ATTEMPTS + 1):
            try:
                job = _ask(["sbatch", "--parsable", str(script)], environment).strip().partition(";")[0]
                script.rename(folder / f"{job}_submission.sh")
                return job
            except _ERRORS as error:
                message = " ".join(_message(error).split())
                if "contact" not in message.lower() or attempt == SUBMIT_ATTEMPTS:
                    raise UserError(f"Slurm refused the job '{name}': {message[-600:]}") from None
                time.sleep(5 * attempt)
    finally:
        script.unlink(missing_ok=True)
    raise AssertionError("unreachable")


def _ask(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60).stdout


def _ask_or_say(command: Sequence[str]) -> str:
    """The answer, or UserError with Slurm's message."""
    try:
        return _ask(command)
    except _ERRORS as error:
        message = _message(error)
        if "Invalid job id" in message:  # of several unknown ids squeue says nothing, of one it fails
            return ""
        raise UserError(f"Slurm does not answer ({command[0]}: {message}); try again, or use --cluster local") from None


def _message(error: Exception) -> str:
    return (getattr(error, "stderr", "") or str(error)).strip()
