"""What to submit, in which order, and what to do about jobs that ended unfinished.

A launch submits everything that is neither done nor in the queue, and a *resubmitter*: a small job that starts when
one of the others ended unfinished (failed, cancelled by preemption, out of time, lost with its node) and launches again
what is left, for a bounded number of times. So the work goes on without a human wherever a job may submit jobs.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from hpc_cpd.cluster.job_record import JobRecord, read_job_record
from hpc_cpd.cluster.preemption import Stop
from hpc_cpd.cluster.schedulers.base import JobState, Phase, Scheduler
from hpc_cpd.cluster.units import LaunchRequest, TeacherUnit, Unit
from hpc_cpd.errors import EXIT_STOPPED, StopRequested, UserError
from hpc_cpd.progress import say
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import read_json, write_json

MOST_UNHEARD_SECONDS = 600.0


@dataclass(frozen=True)
class Submission:
    """The newest job of a unit. `failures`: how many before it failed in a row; `avoid`: nodes on which they died."""

    job: str
    failures: int = 0
    avoid: tuple[str, ...] = ()


@dataclass
class Submissions:
    """What was submitted for `run`, by the names of units: ``logs/submitted.json``.

    Every change is on disk before the next job is submitted. `scheduler`: whose jobs they are; `resubmitter`: the job
    that launches again what ends unfinished.
    """

    run: Run
    scheduler: str | None = None
    units: dict[str, Submission] = field(default_factory=dict)
    resubmitter: str | None = None

    @classmethod
    def read(cls, run: Run, scheduler: str | None = None) -> Submissions:
        """Those of `run`, empty if nothing was submitted yet; only if `scheduler` knows them, where that is given.

        Raises UserError when the file is damaged.
        """
        path = run.logs / "submitted.json"
        if not path.is_file():
            return cls(run, scheduler)
        values: dict[str, Any] = read_json(path)
        try:
            units = {name: Submission(**one | {"avoid": tuple(one["avoid"])}) for name, one in values["units"].items()}
            found = cls(run, values["scheduler"], units, values["resubmitter"])
        except (AttributeError, KeyError, TypeError):
            raise UserError(f"{path} is damaged; delete it when no job of the run is in the queue") from None
        return found if scheduler in (None, found.scheduler) else cls(run, scheduler)

    def write(self) -> None:
        """Replace the file."""
        values = {name: value for name, value in asdict(self).items() if name != "run"}
        write_json(self.run.logs / "submitted.json", values)

    def add(self, units: Mapping[str, Submission]) -> None:
        """Note `units` and write."""
        self.units |= units
        self.write()

    def jobs(self, units: Iterable[Unit] | None = None) -> list[str]:
        """The jobs of `units` (all), and the resubmitter."""
        names = self.units if units is None else [unit.name for unit in units if unit.name in self.units]
        return [self.units[name].job for name in names] + ([self.resubmitter] if self.resubmitter else [])

    def live(self, states: Mapping[str, JobState]) -> set[str]:
        """The names of the units whose jobs wait or run."""
        return {name for name, one in self.units.items() if one.job in states and states[one.job].live}


def submit_all(request: LaunchRequest, scheduler: Scheduler, retry: bool, stop: Stop) -> None:
    """Submit what `request` asks for and is neither done nor in the queue.

    With `retry` (the resubmitter's way) only what was submitted before and ended unfinished, unless it failed too often
    or somebody cancelled it. Raises UserError when the scheduler refuses, or when a single stage lacks what it needs,
    and StopRequested when `stop()` is true before all is submitted: whoever cancels a resubmitter wants no more jobs.
    """
    submissions = Submissions.read(request.run, scheduler.name)
    states = scheduler.states(submissions.jobs())
    live = submissions.live(states)
    watcher = submissions.resubmitter
    if retry and watcher in states and states[watcher].live and watcher != scheduler.this_job():
        # this job was running when that launch wanted to cancel it, and has the options of an earlier one
        say(f"  nothing is submitted: a later launch is watched over by job {watcher}")
        return
    if retry:
        todo = _worth_another_try(request, submissions, states, live)
    else:
        require_one_stage(request, live)
        todo = {
            unit.name: _again(unit, submissions.units.get(unit.name, Submission("")), states, failures=0)
            for unit in request.todo
            if unit.name not in live
        }
    there = [unit.name for unit in request.todo if unit.name in live]
    for name in there[:3]:
        say(f"  {name}: in the queue already as job {submissions.units[name].job}")
    if len(there) > 3:
        say(f"  and {len(there) - 3} more in the queue already")
    # all jobs are planned, or refused, before any is submitted
    for job in scheduler.jobs(request, [unit for unit in request.todo if unit.name in todo]):
        lost = [unit for unit in job.needs if unit.name not in live]
        if lost and not (request.allow_missing and all(isinstance(unit, TeacherUnit) for unit in lost)):
            say(f"  {job.name}: not submitted, for {', '.join(unit.name for unit in lost)} will not be done")
            continue
        _leave_if(stop)
        after = {unit: submissions.units[unit.name].job for unit in job.needs if unit.name in live}
        avoid = sorted({node for unit in job.units for node in todo[unit.name].avoid})
        ids: list[str] = []
        for made in scheduler.submit(job, after, avoid):
            ids = list(made)
            pairs = zip(job.units, ids, strict=True)
            submissions.add({unit.name: replace(todo[unit.name], job=one) for unit, one in pairs})
        live |= {unit.name for unit in job.units}
        text = ids[0] if len(ids) == 1 else f"{ids[0]} to {ids[-1]}"
        say(f"  {job.name}: job {text}" + (f", after {', '.join(unit.name for unit in after)}" if after else ""))
    _leave_if(stop)
    jobs = sorted({submissions.units[name].job for name in live})
    made_to_watch = scheduler.watch(request, jobs) if jobs else None
    if made_to_watch is not None:
        old, submissions.resubmitter = submissions.resubmitter, made_to_watch
        submissions.write()
        if old is not None:
            scheduler.cancel([old])
        say(f"  resubmitter: job {made_to_watch}, starts if one of them ends unfinished")


def queued(request: LaunchRequest, scheduler: Scheduler) -> set[str]:
    """The names of the units of the run that wait or run now. Raises UserError: the scheduler does not answer."""
    submissions = Submissions.read(request.run, scheduler.name)
    return submissions.live(scheduler.states(submissions.jobs())) if submissions.units else set()


def _leave_if(stop: Stop) -> None:
    if stop():
        raise StopRequested("not all jobs were submitted; the same command submits the others")


def wait_for(request: LaunchRequest, scheduler: Scheduler, stop: Stop, every_seconds: float = 10.0) -> None:
    """Return when all of `request` is done, when no job of it waits or runs any more, or when `stop()` is true.

    Looks twice before it says so: a resubmitter that hands over is unknown for a moment. Raises UserError when the
    scheduler does not answer for `MOST_UNHEARD_SECONDS`: it may be started again meanwhile.
    """
    silent, heard = 0, time.monotonic()
    while request.todo and not stop():
        submissions = Submissions.read(request.run, scheduler.name)
        try:
            states = scheduler.states(submissions.jobs(request.todo))
            heard = time.monotonic()
            silent = 0 if any(state.live for state in states.values()) else silent + 1
        except UserError:
            if time.monotonic() - heard > MOST_UNHEARD_SECONDS:
                raise
        if silent == 2:
            return
        deadline = time.monotonic() + every_seconds
        while not stop() and time.monotonic() < deadline:
            time.sleep(0.2)


def require_one_stage(request: LaunchRequest, in_queue: set[str]) -> None:
    """Raise UserError for a single stage whose needs are neither done nor among the units `in_queue`."""
    from hpc_cpd.distill.validation import refusal

    if request.asked in ("all", "teachers") or not request.todo:
        return
    (stage,) = request.stages
    lost = [unit for unit in stage.needs(request.plan) if unit.name not in in_queue]
    if request.allow_missing:
        lost = [unit for unit in lost if not isinstance(unit, TeacherUnit)]
    sentence = refusal(request.run, request.plan, stage.stage) if lost else None
    if sentence is not None:  # None: published since we looked
        raise UserError(sentence)


# ---- jobs that ended unfinished


def _worth_another_try(
    request: LaunchRequest, submissions: Submissions, states: Mapping[str, JobState], live: set[str]
) -> dict[str, Submission]:
    """The units to submit again, with their count of failures; what is given up is told."""
    todo: dict[str, Submission] = {}
    for unit in request.todo:
        if unit.name in live or unit.name not in submissions.units:
            continue
        last = submissions.units[unit.name]
        end, why = classify_exit(unit, last, states.get(last.job), read_job_record(unit.folder))
        failures = last.failures + (end == "failed")
        if end == "cancelled":
            say(f"  {unit.name}: {why}; it is left alone")
        elif failures > request.config.cluster.max_retries:
            say(f"  {unit.name}: given up after {failures} failures (cluster.max_retries): {why}")
            submissions.add({unit.name: replace(last, failures=failures)})
        else:
            say(f"  {unit.name}: {why}; submitted again")
            todo[unit.name] = _again(unit, last, states, failures)
    return todo


def classify_exit(unit: Unit, last: Submission, state: JobState | None, record: JobRecord | None) -> tuple[Phase, str]:
    """Why the job of a unit ended without finishing it (interrupted, failed, cancelled), with a sentence.

    Only failures are counted. `record`: of the unit's last start, whichever job that was.
    """
    own = record if record is not None and record.job == last.job else None
    phase, word = ("failed", "UNKNOWN") if state is None else (state.phase, state.word)
    if phase == "unmet":
        return "interrupted", "what it waited for had failed"
    if phase == "cancelled":
        return "cancelled", f"job {last.job} was cancelled"
    if phase == "interrupted" or (own is not None and own.code == EXIT_STOPPED):
        return "interrupted", f"job {last.job} was stopped early ({word})"
    if phase == "timeout" and own is not None:
        if unit.last_trace() > own.started:
            return "interrupted", f"job {last.job} ran out of time"
        return "failed", f"job {last.job} ran out of time before its first checkpoint; give it more"
    said = "it left no word" if own is None else own.sentence
    return "failed", f"job {last.job} failed ({word}): {said or 'it was killed without a word'}"


def _again(unit: Unit, last: Submission, states: Mapping[str, JobState], failures: int) -> Submission:
    """What the next job of `unit` must know of `last`: above all, a node on which it died before it could speak."""
    state, record = states.get(last.job), read_job_record(unit.folder)
    died = state is not None and state.word == "FAILED" and state.nodes and (record is None or record.job != last.job)
    return Submission("", failures, tuple(sorted({*last.avoid, state.nodes} if died and state else last.avoid)))
