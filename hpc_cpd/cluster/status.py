"""How every teacher and stage of a run stands: from the files of the run, and one question to the scheduler.

The files are the truth about what is done. The scheduler is asked only about jobs of units that are not, so a finished
run, or one of this machine alone, asks nobody; and where it does not answer, or has forgotten a job, the files must do.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hpc_cpd.cluster.job_record import JobRecord
from hpc_cpd.cluster.schedulers.base import JobState, Scheduler, scheduler_of
from hpc_cpd.cluster.snapshot import UnitSnapshot, foreign, live_owner, snapshot_of, tail
from hpc_cpd.cluster.status_model import RunStatus, UnitStatus
from hpc_cpd.cluster.submissions import Submission, Submissions
from hpc_cpd.cluster.submit import classify_exit
from hpc_cpd.cluster.units import StageUnit, TeacherUnit, Unit
from hpc_cpd.errors import EXIT_FAULT, EXIT_USER_ERROR, UserError
from hpc_cpd.run.paths import Run
from hpc_cpd.settings import Config
from hpc_cpd.tasks.registry import run_plan


@dataclass(frozen=True)
class Queue:
    """What the scheduler said. `answered`: whether it was asked and did; `written`: when a job was last submitted."""

    scheduler: Scheduler
    submissions: Submissions
    states: Mapping[str, JobState]
    answered: bool
    written: float

    def last(self, seen: UnitSnapshot) -> Submission | None:
        """The newest job of a unit; None where something that was started here is newer."""
        last, record = self.submissions.units.get(seen.unit.name), seen.record
        newer = record is not None and record.job is None and record.started > self.written
        return None if newer else last

    def over(self, seen: UnitSnapshot) -> bool:
        """Whether the scheduler knows the job of an unfinished unit, and that it has ended."""
        last = self.submissions.units.get(seen.unit.name)
        state = None if last is None or seen.done else self.states.get(last.job)
        return state is not None and not state.live

    @property
    def watched(self) -> bool:
        """Whether a resubmitter waits or runs."""
        state = self.states.get(self.submissions.resubmitter or "")
        return state is not None and state.live


def snapshot(run: Run) -> RunStatus:
    """How `run` stands now. Raises UserError when it is no run."""
    config = run.config()
    seen = [snapshot_of(unit) for unit in _units_of(run, config)]
    notes: list[str] = []
    queue, asked = _ask(run, config, seen, notes)
    # a job may have ended between the look at its folder and the question
    seen = [snapshot_of(one.unit) if queue.over(one) else one for one in seen]
    units = [_unit(one, queue, config) for one in seen]
    tasks = [one for one in seen if isinstance(one.unit, TeacherUnit)]
    stages = [one for one in seen if isinstance(one.unit, StageUnit)]
    done = {
        "teachers": sum(one.parts[0] for one in tasks),
        "trajectories": sum(one.parts[1] for one in tasks),
        "stages": sum(one.done for one in stages),
    }
    total = {"teachers": len(tasks), "trajectories": len(tasks), "stages": len(stages)}
    if run.stop_file.exists():
        notes.append(f"{run.stop_file} asks every job of this run to stop; delete it before going on")
    return RunStatus(str(run.folder), asked, units, done, total, _next(run, units, queue), notes)


def _units_of(run: Run, config: Config) -> list[Unit]:
    """All units in the order of work: each stage after its tasks."""
    units: list[Unit] = []
    for stage, tasks in enumerate(run_plan(run, config), 1):
        units += [*(TeacherUnit(run, task) for task in tasks), StageUnit(run, stage)]
    return units


def _ask(run: Run, config: Config, seen: Sequence[UnitSnapshot], notes: list[str]) -> tuple[Queue, str | None]:
    """The states of the jobs that matter, and who was asked. What went wrong becomes a note."""
    submissions, written, scheduler = Submissions(run), 0.0, scheduler_of(config)
    try:
        submissions = Submissions.read(run)
        if submissions.scheduler is not None:
            scheduler = scheduler_of(config, submissions.scheduler)
            written = (run.logs / "submitted.json").stat().st_mtime
    except (UserError, OSError) as error:
        notes.append(str(error))
        return Queue(scheduler, Submissions(run), {}, False, 0.0), None
    left = [one.unit for one in seen if not one.done and one.unit.name in submissions.units]
    if not left:
        return Queue(scheduler, submissions, {}, False, written), None
    try:
        states = scheduler.states(submissions.jobs(left))
        return Queue(scheduler, submissions, states, True, written), scheduler.source
    except UserError as error:
        message = " ".join(str(error).split()).partition("; try again")[0]
        notes.append(f"{message}; what is told here is from the files alone")
        return Queue(scheduler, submissions, {}, False, written), "not answering"


def _unit(seen: UnitSnapshot, queue: Queue, config: Config) -> UnitStatus:
    """Put the two together. What the scheduler says about a job outweighs the lock that the job left behind."""
    last, record, owner = queue.last(seen), seen.record, seen.owner
    unit = UnitStatus(
        seen.unit,
        "done",
        job=last.job if last is not None else record.job if record is not None else None,
        node=None if record is None else foreign(record.host, record.job),
        restarts=0 if record is None else record.number - 1,
        failures=0 if last is None else last.failures,
        progress=seen.progress,
        success=seen.success,
        log=None if record is None else str(_log_of(seen, record)),
    )
    if seen.done:
        return unit
    state = None if last is None else queue.states.get(last.job)
    rate = None if seen.news is None else seen.news.steps_per_second
    running = replace(unit, state="running", steps_per_second=rate)
    if owner is not None and (state is None or last is None or owner.job != last.job):
        return replace(running, job=owner.job, node=foreign(owner.host, owner.job))
    if state is not None and state.phase == "waiting":
        return replace(unit, state="waiting", node=None, reason=state.reason or state.word)
    if state is not None and state.phase == "running":
        return replace(running, node=state.nodes or unit.node, seconds_left=state.seconds_left)
    unit = replace(unit, state="stopped" if seen.begun else "not started")
    if last is None or not queue.answered:
        return _ended_alone(unit, seen, queue, last, config)
    return _ended(unit, seen, queue, last, state, config)


def _ended(
    unit: UnitStatus, seen: UnitSnapshot, queue: Queue, last: Submission, state: JobState | None, config: Config
) -> UnitStatus:
    """A unit whose job is over; a job that the scheduler forgot may never have started."""
    record = seen.record if seen.record is not None and seen.record.job == last.job else None
    log = _log_of(seen, record) if record is not None else queue.scheduler.log(seen.unit.run, last.job)
    began = record is not None or log.is_file()
    if state is None and not began:
        return replace(unit, reason=f"forgotten by {queue.scheduler.name}")
    known = state or JobState("FAILED", "failed")
    unit = replace(unit, reason=known.word, log=str(log) if began else None, node=known.nodes or unit.node)
    end, _ = classify_exit(seen.unit, last, state, seen.record)
    if end == "failed" and known.phase != "done":  # done without a result: somebody deleted what it had made
        return _failed(replace(unit, error=_error(queue, known, record, log)), last, config)
    if known.phase == "unmet":
        return replace(unit, reason=known.reason or known.word)
    if record is not None and known.phase in ("cancelled", "interrupted") and queue.scheduler.explain(known, ()):
        return replace(unit, error=_error(queue, known, record, log))  # no failure, but its owner will want to know
    return replace(unit, reason=None) if known.word == "FAILED" else unit  # it saved and left


def _ended_alone(
    unit: UnitStatus, seen: UnitSnapshot, queue: Queue, last: Submission | None, config: Config
) -> UnitStatus:
    """A unit nobody works on, as its own last words tell."""
    record = seen.record
    if record is None or record.code not in (EXIT_FAULT, EXIT_USER_ERROR):
        return unit
    error = _error(queue, JobState("FAILED", "failed"), record, _log_of(seen, record))
    return _failed(replace(unit, error=error), last, config)


def _failed(unit: UnitStatus, last: Submission | None, config: Config) -> UnitStatus:
    failures = unit.failures + 1
    gave_up = last is not None and failures > config.cluster.max_retries
    return replace(unit, state="given up" if gave_up else "failed", failures=failures)


def _error(queue: Queue, state: JobState, record: JobRecord | None, log: Path) -> str:
    """One line: what only the scheduler knows comes first, then what the job itself said."""
    spoke = record is not None and record.code in (EXIT_FAULT, EXIT_USER_ERROR)
    said = (record.sentence.strip().splitlines() or [""])[-1].strip() if record is not None and spoke else ""
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
    folder = shlex.quote(str(run.folder))
    launcher = live_owner(run.folder) is not None
    if all(_in_hand(unit, queue, launcher) for unit in units):
        return f"hpc-cpd status {folder} --watch"
    return f"python -m hpc_cpd.launch --stage all --run {folder}"


def _in_hand(unit: UnitStatus, queue: Queue, launcher: bool) -> bool:
    if unit.state in ("done", "running", "waiting"):
        return True
    if unit.unit.name in queue.submissions.units:
        return queue.watched and unit.state != "given up" and not _cancelled(unit, queue)
    return launcher and unit.state in ("stopped", "not started")


def _cancelled(unit: UnitStatus, queue: Queue) -> bool:
    state = queue.states.get(unit.job or "")
    return state is not None and state.phase == "cancelled"
