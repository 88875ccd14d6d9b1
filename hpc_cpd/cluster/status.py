"""How every teacher and stage of a run stands: from the files of the run, and one question to the scheduler.

The files are the truth about what is done. The scheduler is asked only about jobs of units that are not, so a finished
run, or one of this machine alone, asks nobody; and where it does not answer, or has forgotten a job, the files must do.
What is found out is drawn elsewhere.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from hpc_cpd.cluster.job_record import JobRecord
from hpc_cpd.cluster.schedulers.base import JobState, Phase, Scheduler, scheduler_of
from hpc_cpd.cluster.snapshot import UnitSnapshot, foreign, live_owner, snapshot_of, tail
from hpc_cpd.cluster.submit import Submission, Submissions, classify_exit
from hpc_cpd.cluster.units import StageUnit, TeacherUnit, Unit
from hpc_cpd.errors import EXIT_FAULT, EXIT_USER_ERROR, UserError
from hpc_cpd.progress import News
from hpc_cpd.run.paths import Run
from hpc_cpd.settings import Config
from hpc_cpd.tasks.registry import run_plan

State = Literal["done", "running", "waiting", "stopped", "failed", "given up", "not started"]
_DIED = JobState("FAILED", "failed")


@dataclass(frozen=True)
class UnitStatus:
    """One line of the table; ``hpc-cpd status --help`` tells what the fields mean."""

    unit: Unit
    state: State
    job: str | None = None
    reason: str | None = None
    node: str | None = None
    restarts: int = 0
    failures: int = 0
    progress: News | None = None
    steps_per_second: float | None = None
    success: float | None = None
    success_estimated: bool = False
    seconds_left: float | None = None
    error: str | None = None
    log: str | None = None

    def document(self) -> dict[str, Any]:
        """Plain values for JSON, which has no NaN."""
        news = self.progress
        loss = news.loss if news is not None and news.loss is not None and math.isfinite(news.loss) else None
        progress = news and {"phase": news.phase, "step": news.step, "total": news.total, "loss": loss}
        return vars(self) | {"unit": self.unit.name, "progress": progress}


@dataclass(frozen=True)
class RunStatus:
    """A run at one moment. `scheduler`: who was asked about jobs; `notes`: sentences for below the table."""

    run: str
    scheduler: str | None
    units: list[UnitStatus]
    done: dict[str, int]
    total: dict[str, int]
    next: str | None
    notes: list[str]

    @property
    def finished(self) -> bool:
        return all(unit.state == "done" for unit in self.units)

    def document(self) -> dict[str, Any]:
        """What ``hpc-cpd status --json`` prints; ``hpc-cpd status --help`` tells what the keys mean."""
        return vars(self) | {"units": [unit.document() for unit in self.units]}


@dataclass
class Queue:
    """What the scheduler said. `asked`: who, None: nobody; `written`: when a job was last submitted."""

    config: Config
    scheduler: Scheduler
    submissions: Submissions
    states: Mapping[str, JobState] = field(default_factory=dict)
    asked: str | None = None
    answered: bool = False
    written: float = 0.0

    def last(self, seen: UnitSnapshot) -> Submission | None:
        """The newest job of a unit; None where something that was started here is newer."""
        record = seen.record
        newer = record is not None and record.job is None and record.started > self.written
        return None if newer else self.submissions.units.get(seen.unit.name)

    def phase(self, job: str | None) -> Phase | None:
        """Where `job` stands, if the scheduler knows it."""
        state = self.states.get(job or "")
        return None if state is None else state.phase

    def over(self, seen: UnitSnapshot) -> bool:
        """Whether the scheduler knows the job of an unfinished unit, and that it has ended."""
        last = self.submissions.units.get(seen.unit.name)
        return last is not None and not seen.done and self.phase(last.job) not in (None, "waiting", "running")


def snapshot(run: Run) -> RunStatus:
    """How `run` stands now. Raises UserError when it is no run."""
    config = run.config()
    seen: list[UnitSnapshot] = []  # in the order of work: each stage after its tasks
    for stage, tasks in enumerate(run_plan(run, config), 1):
        seen += map(snapshot_of, [*(TeacherUnit(run, task) for task in tasks), StageUnit(run, stage)])
    notes: list[str] = []
    queue = _ask(run, config, seen, notes)
    # a job may have ended between the look at its folder and the question
    seen = [snapshot_of(one.unit) if queue.over(one) else one for one in seen]
    units = [_unit(one, queue) for one in seen]
    parts = {
        "teachers": [one.parts[0] for one in seen if isinstance(one.unit, TeacherUnit)],
        "trajectories": [one.parts[1] for one in seen if isinstance(one.unit, TeacherUnit)],
        "stages": [one.done for one in seen if isinstance(one.unit, StageUnit)],
    }
    done, total = ({what: count(part) for what, part in parts.items()} for count in (sum, len))
    if run.stop_file.exists():
        notes.append(f"{run.stop_file} asks every job of this run to stop; delete it before going on")
    return RunStatus(str(run.folder), queue.asked, units, done, total, _next(run, units, queue), notes)


def _ask(run: Run, config: Config, seen: Sequence[UnitSnapshot], notes: list[str]) -> Queue:
    """The states of the jobs that matter. What went wrong becomes a note."""
    queue = Queue(config, scheduler_of(config), Submissions(run))
    try:
        submissions = Submissions.read(run)
        if submissions.scheduler is not None:
            queue.scheduler = scheduler_of(config, submissions.scheduler)
            queue.written = (run.logs / "submitted.json").stat().st_mtime
        queue.submissions = submissions
    except (UserError, OSError) as error:
        notes.append(str(error))
    left = [one.unit for one in seen if not one.done and one.unit.name in queue.submissions.units]
    try:
        if left:
            queue.states = queue.scheduler.states(queue.submissions.jobs(left))
            queue.asked, queue.answered = queue.scheduler.source, True
    except UserError as error:
        queue.asked = "not answering"
        message = " ".join(str(error).split()).partition("; try again")[0]
        notes.append(f"{message}; what is told here is from the files alone")
    return queue


def _unit(seen: UnitSnapshot, queue: Queue) -> UnitStatus:
    """Put the two together. What the scheduler says about a job outweighs the lock that the job left behind."""
    last, record, owner = queue.last(seen), seen.record, seen.owner
    unit = UnitStatus(
        seen.unit,
        "done",
        job=last.job if last is not None else record.job if record is not None else None,
        node=None if record is None else foreign(record.host, record.job),
        restarts=0 if record is None else record.number - 1,
        failures=0 if last is None else last.failures,
        progress=seen.news,
        success=seen.success,
        success_estimated=seen.success_estimated,
        log=None if record is None else str(_log_of(seen, record)),
    )
    if seen.done:
        return unit
    state = None if last is None else queue.states.get(last.job)
    rate = None if seen.news is None else seen.news.steps_per_second
    running = replace(unit, state="running", steps_per_second=rate)
    if owner is not None and (state is None or owner.job != unit.job):
        return replace(running, job=owner.job, node=foreign(owner.host, owner.job))
    if state is not None and state.phase == "waiting":
        return replace(unit, state="waiting", node=None, reason=state.reason or state.word)
    if state is not None and state.phase == "running":
        return replace(running, node=state.nodes or unit.node, seconds_left=state.seconds_left)
    unit = replace(unit, state="stopped" if seen.begun else "not started")
    if last is not None and queue.answered:
        return _ended(unit, seen, queue, last, state)
    if record is None or record.code not in (EXIT_FAULT, EXIT_USER_ERROR):
        return unit
    return _failed(unit, queue, last, _error(queue, _DIED, record, _log_of(seen, record)))


def _ended(unit: UnitStatus, seen: UnitSnapshot, queue: Queue, last: Submission, state: JobState | None) -> UnitStatus:
    """A unit whose job is over; a job that the scheduler forgot may never have started."""
    record = seen.record if seen.record is not None and seen.record.job == last.job else None
    log = _log_of(seen, record) if record is not None else queue.scheduler.log(seen.unit.run, last.job)
    began = record is not None or log.is_file()
    if state is None and not began:
        return replace(unit, reason=f"forgotten by {queue.scheduler.name}")
    known = state or _DIED
    unit = replace(unit, reason=known.word, log=str(log) if began else None, node=known.nodes or unit.node)
    end, _ = classify_exit(seen.unit, last, state, seen.record)
    if end == "failed" and known.phase != "done":  # done without a result: somebody deleted what it had made
        return _failed(unit, queue, last, _error(queue, known, record, log))
    if known.phase == "unmet":
        return replace(unit, reason=known.reason or known.word)
    if record is not None and known.phase in ("cancelled", "interrupted") and queue.scheduler.explain(known, ()):
        return replace(unit, error=_error(queue, known, record, log))  # no failure, but its owner will want to know
    return replace(unit, reason=None) if known.word == "FAILED" else unit  # it saved and left


def _failed(unit: UnitStatus, queue: Queue, last: Submission | None, error: str) -> UnitStatus:
    failures = unit.failures + 1
    gave_up = last is not None and failures > queue.config.cluster.max_retries
    return replace(unit, state="given up" if gave_up else "failed", failures=failures, error=error)


def _error(queue: Queue, state: JobState, record: JobRecord | None, log: Path) -> str:
    """One line: what only the scheduler knows comes first, then what the job itself said."""
    said = ""
    if record is not None and record.code in (EXIT_FAULT, EXIT_USER_ERROR):
        said = record.sentence.strip().rpartition("\n")[2].strip()
    ends = [line.strip() for line in tail(log) if line.strip()]
    advice = queue.scheduler.explain(state, ends)
    if advice:
        return advice + (f" (it said: {said})" if said else "")
    end = f"ends with: {ends[0]}" if ends else "is empty or missing"
    return said or f"{state.word}: killed without a word; its log {end}"


def _log_of(seen: UnitSnapshot, record: JobRecord) -> Path:
    """The log of the unit's last start, wherever the run folder is now."""
    return seen.unit.run.folder / record.log


def _next(run: Run, units: Sequence[UnitStatus], queue: Queue) -> str | None:
    """The next command: a launch, unless all that is left is in hand already, by jobs or by a launcher."""
    if all(unit.state == "done" for unit in units):
        return None
    folder, launcher = shlex.quote(str(run.folder)), live_owner(run.folder) is not None
    watched = queue.phase(queue.submissions.resubmitter) in ("waiting", "running")

    def in_hand(unit: UnitStatus) -> bool:
        if unit.state in ("done", "running", "waiting"):
            return True
        if unit.unit.name in queue.submissions.units:
            return watched and unit.state != "given up" and queue.phase(unit.job) != "cancelled"
        return launcher and unit.state in ("stopped", "not started")

    if all(map(in_hand, units)):
        return f"hpc-cpd status {folder} --watch"
    return f"python -m hpc_cpd.launch --stage all --run {folder}"
