"""What to submit to Slurm, in which order, and what to do about jobs that ended unfinished.

A launch submits everything that is neither done nor in the queue, and a *caretaker*: a small job that starts when one
of the others ended unfinished (failed, cancelled by preemption, out of time, lost with its node) and launches again
what is left, for a bounded number of times. So the work goes on without a human wherever a job may submit jobs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from hpc_cpd.cluster.job_record import JobRecord, read_job_record
from hpc_cpd.cluster.schedulers import slurm, slurm_scripts
from hpc_cpd.cluster.submissions import Submission, Submissions
from hpc_cpd.cluster.units import LaunchRequest, last_trace, stage_unit, teacher_unit, unit_folder
from hpc_cpd.errors import EXIT_STOPPED, StopRequested, UserError
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import write_json
from hpc_cpd.settings import ClusterSettings

Say = Callable[[str], None]
MOST_UNHEARD_SECONDS = 600.0
# Ways of ending that are nobody's fault: they are not counted against max_retries.
_INTERRUPTED = {"PREEMPTED", "NODE_FAIL", "BOOT_FAIL", "REVOKED", "REQUEUED"}


@dataclass(frozen=True)
class Plan:
    """One job to submit: its script, the unit of each element (one for a stage), and the units it waits for."""

    script: slurm_scripts.Script
    units: list[str]
    needs: list[str]
    array: Path | None = None  # the file that tells the elements of an array their tasks

    def ids(self, job: str) -> list[str]:
        """The job id of each unit."""
        return [job] if self.array is None else [f"{job}_{index}" for index in range(len(self.units))]


def submit_all(work: LaunchRequest, retry: bool, say: Say, stop: Callable[[], bool]) -> None:
    """Submit what `work` asks for and is neither done nor in the queue.

    With `retry` (the caretaker's way) only what was submitted before and ended unfinished, unless it failed too often
    or somebody cancelled it. Raises UserError when Slurm refuses, or when a single stage lacks what it needs, and
    StopRequested when `stop()` is true before all is submitted: whoever cancels a caretaker wants no more jobs of it.
    """
    ledger = Submissions.read(work.run)
    ledger.site = slurm.ask_site()
    states = slurm.job_states(ledger.jobs(), ledger.site.accounting)
    live = {unit for unit, one in ledger.units.items() if one.job in states and states[one.job].live}
    if retry:
        todo = _worth_another_try(work, ledger, states, live, say)
    else:
        require_one_stage(work, live)
        todo = {
            unit: _again(work, unit, ledger.units.get(unit), states, failures=0)
            for unit in work.todo_units()
            if unit not in live
        }
    _tell_queued(work, ledger, live, say)
    logs = slurm_logs(work.run)
    tasks = [task for task in work.todo_tasks if teacher_unit(task) in todo]
    for plan in list(plan_jobs(work, tasks, ledger.site)):  # all scripts are made, or refused, before any is submitted
        if not (set(plan.units) & todo.keys()):
            continue
        lost = [unit for unit in plan.needs if unit not in live]
        if lost and not (work.allow_missing and all(unit.startswith("teacher ") for unit in lost)):
            say(f"  {plan.script.name}: not submitted, for {', '.join(lost)} will not be done")
            continue
        _leave_if(stop)
        after = {unit: ledger.units[unit].job for unit in plan.needs if unit in live}
        avoid = sorted({node for unit in plan.units for node in todo[unit].avoid})
        if plan.array is not None:
            write_json(plan.array, {"tasks": [unit.removeprefix("teacher ") for unit in plan.units]})
        for job in _submit_links(logs, plan.script, dependency_of(work, after), avoid, work.config.cluster):
            jobs = zip(plan.units, plan.ids(job), strict=True)
            ledger.add({unit: replace(todo[unit], job=one) for unit, one in jobs})
        live |= set(plan.units)
        say(f"  {plan.script.name}: job {job}" + (f", after {', '.join(after)}" if after else ""))
    _leave_if(stop)
    _submit_caretaker(work, ledger, live, say)


def _leave_if(stop: Callable[[], bool]) -> None:
    if stop():
        raise StopRequested("not all jobs were submitted; the same command submits the others")


def plan_jobs(work: LaunchRequest, tasks: Sequence[str], site: slurm.Site) -> Iterator[Plan]:
    """The arrays that train `tasks`, no larger than the site allows, then each stage that is left, in order."""
    run, parallel = Run(work.run.folder.absolute()), work.config.cluster.array_parallelism
    chunks = [tasks[begin : begin + site.max_array_size] for begin in range(0, len(tasks), site.max_array_size)]
    first = 1 + sum(1 for _ in run.logs.glob("teachers-*.json"))
    for number, chunk in enumerate(chunks, first):
        array = run.logs / f"teachers-{number}.json"
        script = slurm_scripts.teachers_script(run, work.config, array, len(chunk), max(1, parallel // len(chunks)))
        yield Plan(script, [teacher_unit(task) for task in chunk], [], array)
    for stage in work.todo_stages:
        script = slurm_scripts.stage_script(run, work.config, stage, work.allow_missing)
        yield Plan(script, [stage_unit(stage)], work.needs(stage))


def dependency_of(work: LaunchRequest, after: Mapping[str, str]) -> str:
    """What a job of `work` waits for: success of the jobs `after` (by unit).

    With --allow-missing, the end of a teacher's chain is its last word. Anywhere else a teacher whose job ended may go
    on in another one: the stage waits for success, and the caretaker submits it again without those it gave up.
    """
    return dependency(after, work.allow_missing and work.config.cluster.continuation == "chain")


def dependency(after: Mapping[str, str], any_end: bool) -> str:
    """Success of the jobs `after` (by unit), or with `any_end` merely the end of a teacher."""
    teachers = [job for unit, job in after.items() if unit.startswith("teacher ")]
    stages = [job for unit, job in after.items() if unit.startswith("stage ")]
    groups = [("afterany", teachers), ("afterok", stages)] if any_end else [("afterok", teachers + stages)]
    return ",".join(f"{word}:{':'.join(jobs)}" for word, jobs in groups if jobs)


def slurm_logs(run: Run) -> Path:
    """Where the jobs' logs and slurm_scripts are kept."""
    return (run.logs / "slurm").absolute()


def wait_for(work: LaunchRequest, stop: Callable[[], bool], every_seconds: float = 10.0) -> None:
    """Return when all of `work` is done, when no job of it waits or runs any more, or when `stop()` is true.

    Looks twice before it says so: a caretaker that hands over is unknown for a moment. Raises UserError when Slurm does
    not answer for `MOST_UNHEARD_SECONDS`: its controller may be started again meanwhile.
    """
    silent, heard = 0, time.monotonic()
    while work.todo_units() and not stop():
        ledger = Submissions.read(work.run)
        try:
            states = slurm.job_states(ledger.jobs(work.todo_units()), ledger.site.accounting)
        except UserError:
            if time.monotonic() - heard > MOST_UNHEARD_SECONDS:
                raise
        else:
            heard = time.monotonic()
            silent = 0 if any(state.live for state in states.values()) else silent + 1
        if silent == 2:
            return
        deadline = time.monotonic() + every_seconds
        while not stop() and time.monotonic() < deadline:
            time.sleep(0.2)


def require_one_stage(work: LaunchRequest, queued: set[str]) -> None:
    """Refuse a single stage whose needs are neither done nor among the `queued` units."""
    from hpc_cpd.distill.validation import refusal

    if work.asked in ("all", "teachers") or not work.todo_stages:
        return
    stage = work.stages[0]
    lost = [unit for unit in work.needs(stage) if unit not in queued]
    if work.allow_missing:
        lost = [unit for unit in lost if unit.startswith("stage ")]
    if lost:
        raise UserError(refusal(work.run, work.plan, stage))


def _tell_queued(work: LaunchRequest, ledger: Submissions, live: set[str], say: Say) -> None:
    queued = [unit for unit in work.todo_units() if unit in live]
    for unit in queued[:3]:
        say(f"  {unit}: in the queue already as job {ledger.units[unit].job}")
    if len(queued) > 3:
        say(f"  and {len(queued) - 3} more in the queue already")


# ---- jobs that ended unfinished


def _worth_another_try(
    work: LaunchRequest, ledger: Submissions, states: Mapping[str, slurm.JobState], live: set[str], say: Say
) -> dict[str, Submission]:
    """The units to submit again, with their count of failures; what is given up is told."""
    todo: dict[str, Submission] = {}
    for unit in work.todo_units():
        if unit in live or unit not in ledger.units:
            continue
        last = ledger.units[unit]
        verdict, why = judge(work.run, unit, last, states.get(last.job), read_job_record(unit_folder(work.run, unit)))
        failures = last.failures + (verdict == "failed")
        if verdict == "cancelled":
            say(f"  {unit}: {why}; it is left alone")
        elif failures > work.config.cluster.max_retries:
            say(f"  {unit}: given up after {failures} failures (cluster.max_retries): {why}")
            ledger.add({unit: replace(last, failures=failures)})
        else:
            say(f"  {unit}: {why}; submitted again")
            todo[unit] = _again(work, unit, last, states, failures)
    return todo


def judge(
    run: Run, unit: str, last: Submission, state: slurm.JobState | None, attempt: JobRecord | None
) -> tuple[Literal["interrupted", "failed", "cancelled"], str]:
    """Why the job of a unit ended without finishing it, with a sentence."""
    ran = attempt is not None and attempt.job == last.job
    name = "UNKNOWN" if state is None else state.state
    if name == "CANCELLED":
        if state is not None and state.reason == "DependencyNeverSatisfied":
            return "interrupted", "what it waited for had failed"
        return "cancelled", f"job {last.job} was cancelled"
    if name in _INTERRUPTED or (ran and attempt is not None and attempt.code == EXIT_STOPPED):
        return "interrupted", f"job {last.job} was stopped early ({name})"
    if name in ("TIMEOUT", "DEADLINE") and ran and attempt is not None:
        if last_trace(run, unit) > attempt.started:
            return "interrupted", f"job {last.job} ran out of time"
        return "failed", f"job {last.job} ran out of time before its first checkpoint (cluster.time_limit_minutes)"
    said = attempt.sentence if ran and attempt is not None else "it left no word"
    return "failed", f"job {last.job} failed ({name}): {said or 'it was killed without a word'}"


def _again(
    work: LaunchRequest, unit: str, last: Submission | None, states: Mapping[str, slurm.JobState], failures: int
) -> Submission:
    """What the next job of `unit` must know of `last`: above all, a node on which it died before it could speak."""
    if last is None:
        return Submission("")
    state, attempt = states.get(last.job), read_job_record(unit_folder(work.run, unit))
    silent = state is not None and state.state == "FAILED" and (attempt is None or attempt.job != last.job)
    eaten = {state.nodes} if silent and state is not None and state.nodes else set()
    return Submission("", failures, tuple(sorted({*last.avoid, *eaten})))


# ---- submitting


def _submit_links(
    logs: Path, script: slurm_scripts.Script, after: str, avoid: Sequence[str], cluster: ClusterSettings
) -> Iterator[str]:
    """Submit the job, or the chain of them, and give the id of each; every other job waits for the last."""
    for _ in range(cluster.chain_length if cluster.continuation == "chain" else 1):
        job = _submit(logs, script, after, avoid)
        yield job
        after = f"afterany:{job}"


def _submit(logs: Path, script: slurm_scripts.Script, after: str, avoid: Sequence[str]) -> str:
    try:
        return slurm.submit(logs, script.name, script.text(logs, after, avoid))
    except UserError as error:
        if not avoid or "node configuration is not available" not in str(error):
            raise
        return slurm.submit(logs, script.name, script.text(logs, after))  # every node is avoided: then none


def _submit_caretaker(work: LaunchRequest, ledger: Submissions, live: Iterable[str], say: Say) -> None:
    """Replace the caretaker by one that watches all that is in the queue now."""
    old, jobs = ledger.caretaker, sorted({ledger.units[unit].job for unit in live})
    if work.config.cluster.continuation == "chain" or not jobs:
        return
    script = slurm_scripts.caretaker_script(Run(work.run.folder.absolute()), work.config, work.allow_missing)
    ledger.caretaker = slurm.submit(
        slurm_logs(work.run), script.name, script.text(slurm_logs(work.run), "?".join(f"afternotok:{j}" for j in jobs))
    )
    ledger.write()
    if old is not None and old != os.environ.get("SLURM_JOB_ID"):
        slurm.cancel([old])
    say(f"  caretaker: job {ledger.caretaker}, starts if one of them ends unfinished")
