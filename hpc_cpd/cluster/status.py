"""How every teacher and stage of a run stands: from the files of the run, and one question to Slurm.

The files are the truth about what is done. Slurm is asked only about jobs of units that are not, so a finished run, or
one of this machine alone, asks nobody; and where Slurm does not answer, or has forgotten a job, the files must do.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hpc_cpd.cluster.job_record import JobRecord
from hpc_cpd.cluster.schedulers.slurm import JobState, job_states
from hpc_cpd.cluster.snapshot import Rates, UnitSnapshot, foreign, live_owner, said_last, snapshot_of, tail
from hpc_cpd.cluster.submissions import Submission, Submissions
from hpc_cpd.cluster.submit import judge, slurm_logs
from hpc_cpd.cluster.units import stage_unit, teacher_unit
from hpc_cpd.errors import EXIT_FAULT, EXIT_USER_ERROR, UserError
from hpc_cpd.report.status_table import RunStatus, UnitProgress, UnitStatus
from hpc_cpd.run.paths import Run
from hpc_cpd.settings import Config
from hpc_cpd.tasks.registry import run_plan

_AT_WORK = {"RUNNING", "COMPLETING", "SIGNALING", "STAGE_OUT", "RESIZING"}
_MEMORY = re.compile(r"(?i:oom[-_ ]kill|exceeded (job )?memory limit)|: Out Of Memory")  # not: CUDA out of memory
# What Slurm alone knows about the end of a job, and what to do about it.
_ADVICE = {
    "OUT_OF_MEMORY": "raise cluster.memory_per_cpu",
    "TIMEOUT": "raise cluster.time_limit_minutes",
    "DEADLINE": "raise cluster.time_limit_minutes",
    "NODE_FAIL": "its node was lost; launch again",
    "BOOT_FAIL": "its node did not start; launch again",
    "CANCELLED": "somebody cancelled it; launch again when it is wanted",
}

_TOLD = {"CANCELLED", "NODE_FAIL", "BOOT_FAIL"}  # no failures of the work, but its owner will want to know


@dataclass(frozen=True)
class Queue:
    """What Slurm said. `answered`: whether it was asked and did; `written`: when the ledger last changed."""

    ledger: Submissions
    states: Mapping[str, JobState]
    answered: bool
    written: float

    def last(self, place: UnitSnapshot) -> Submission | None:
        """The newest job of a unit; None where something that was started here is newer."""
        last, attempt = self.ledger.units.get(place.unit), place.attempt
        newer = attempt is not None and attempt.job is None and attempt.started > self.written
        return None if newer else last

    def over(self, place: UnitSnapshot) -> bool:
        """Whether Slurm knows the job of an unfinished unit, and that it has ended."""
        last = self.ledger.units.get(place.unit)
        state = None if last is None or place.done else self.states.get(last.job)
        return state is not None and not state.live

    @property
    def caretaker(self) -> bool:
        """Whether a caretaker waits or runs."""
        state = self.states.get(self.ledger.caretaker or "")
        return state is not None and state.live


def look(run: Run, rates: Rates | None = None) -> RunStatus:
    """How `run` stands now. Raises UserError when it is no run."""
    config = run.config()
    plan = run_plan(run, config)
    names = [unit for stage, tasks in enumerate(plan, 1) for unit in [*map(teacher_unit, tasks), stage_unit(stage)]]
    places = [snapshot_of(run, unit, config) for unit in names]
    notes: list[str] = []
    queue, slurm = _ask(run, places, notes)
    # a job may have ended between the look at its folder and the question
    places = [snapshot_of(run, place.unit, config) if queue.over(place) else place for place in places]
    rates = rates or Rates()
    units = [_unit(run, place, queue, config, rates) for place in places]
    tasks = [place for place in places if place.unit.startswith("teacher ")]
    stages = [place for place in places if place.unit.startswith("stage ")]
    done = {
        "teachers": sum(place.parts[0] for place in tasks),
        "trajectories": sum(place.parts[1] for place in tasks),
        "stages": sum(place.done for place in stages),
    }
    total = {"teachers": len(tasks), "trajectories": len(tasks), "stages": len(stages)}
    if run.stop_file.exists():
        notes.append(f"{run.stop_file} asks every job of this run to stop; delete it before going on")
    return RunStatus(str(run.folder), slurm, units, done, total, _next(run, units, queue), notes)


# ---- what Slurm tells


def _ask(run: Run, places: Sequence[UnitSnapshot], notes: list[str]) -> tuple[Queue, str | None]:
    """The ledger and the states of the jobs that matter, with who was asked. What went wrong becomes a note."""
    try:
        ledger = Submissions.read(run)
        written = (run.logs / "submitted.json").stat().st_mtime if ledger.units else 0.0
    except (UserError, OSError) as error:
        notes.append(str(error))
        return Queue(Submissions(run), {}, False, 0.0), None
    left = [place.unit for place in places if not place.done and place.unit in ledger.units]
    if not left:
        return Queue(ledger, {}, False, written), None
    try:
        states = job_states(ledger.jobs(left), ledger.site.accounting)
    except UserError as error:
        words = " ".join(str(error).split()).partition("; try again")[0]
        notes.append(f"{words}; what is told here is from the files alone")
        return Queue(ledger, {}, False, written), "not answering"
    return Queue(ledger, states, True, written), "sacct" if ledger.site.accounting else "squeue"


def _unit(run: Run, place: UnitSnapshot, queue: Queue, config: Config, rates: Rates) -> UnitStatus:
    """Put the two together. What Slurm says about a job outweighs the lock that the job left behind."""
    last, attempt, owner = queue.last(place), place.attempt, place.owner
    unit = UnitStatus(
        place.unit,
        "done",
        job=last.job if last is not None else attempt.job if attempt is not None else None,
        node=None if attempt is None else foreign(attempt.host, attempt.job),
        restarts=0 if attempt is None else attempt.number - 1,
        failures=0 if last is None else last.failures,
        progress=place.progress,
        success=place.success,
        log=None if attempt is None else attempt.log,
    )
    if place.done:
        return unit
    state = None if last is None else queue.states.get(last.job)
    if owner is not None and (state is None or last is None or owner.job != last.job):
        return _running(replace(unit, job=owner.job, node=foreign(owner.host, owner.job)), place, rates)
    if state is not None and state.live:
        if state.state not in _AT_WORK:
            return replace(unit, state="waiting", node=None, reason=state.reason or state.state)
        return _running(replace(unit, node=state.nodes or unit.node, seconds_left=state.seconds_left), place, rates)
    unit = replace(unit, state="stopped" if place.begun else "not started")
    if last is None or not queue.answered:
        return _ended_alone(unit, attempt, last, config)
    return _ended(run, unit, place, last, state, config)


def _running(unit: UnitStatus, place: UnitSnapshot, rates: Rates) -> UnitStatus:
    doing, rate = said_last(place)
    if doing is not None:
        return replace(unit, state="running", progress=UnitProgress(doing))
    return replace(unit, state="running", steps_per_second=rate if rate is not None else rates.of(place))


def _ended(
    run: Run, unit: UnitStatus, place: UnitSnapshot, last: Submission, state: JobState | None, config: Config
) -> UnitStatus:
    """A unit whose job is over, as the scheduler judges it; a job that Slurm forgot may never have started."""
    attempt = place.attempt if place.attempt is not None and place.attempt.job == last.job else None
    log = Path(attempt.log) if attempt is not None else slurm_logs(run) / f"{last.job}_0_log.out"
    began = attempt is not None or log.is_file()
    if state is None and not began:
        return replace(unit, reason="forgotten by Slurm")
    word, nodes = ("FAILED", "") if state is None else (state.state, state.nodes)
    unit = replace(unit, reason=word, log=str(log) if began else None, node=nodes or unit.node)
    verdict, _ = judge(run, place.unit, last, state, place.attempt)
    if verdict == "failed" and word != "COMPLETED":  # completed but not done: somebody deleted what it had made
        return _failed(replace(unit, error=_error(word, attempt, log)), last, config)
    if verdict == "interrupted" and word == "CANCELLED":  # by Slurm and not by a person
        return replace(unit, reason="DependencyNeverSatisfied")
    if attempt is not None and word in _TOLD:
        return replace(unit, error=_error(word, attempt, log))
    return replace(unit, reason=None) if word == "FAILED" else unit  # it saved and left, for which Slurm has no word


def _ended_alone(unit: UnitStatus, attempt: JobRecord | None, last: Submission | None, config: Config) -> UnitStatus:
    """A unit nobody works on, as its own last words tell."""
    if attempt is None or attempt.code not in (EXIT_FAULT, EXIT_USER_ERROR):
        return unit
    return _failed(replace(unit, error=_error("FAILED", attempt, Path(attempt.log))), last, config)


def _failed(unit: UnitStatus, last: Submission | None, config: Config) -> UnitStatus:
    failures = unit.failures + 1
    gave_up = last is not None and failures > config.cluster.max_retries
    return replace(unit, state="given up" if gave_up else "failed", failures=failures)


def _error(word: str, attempt: JobRecord | None, log: Path) -> str:
    """One line: what only Slurm knows comes first, then what the job itself said."""
    spoke = attempt is not None and attempt.code in (EXIT_FAULT, EXIT_USER_ERROR)
    said = (attempt.sentence.strip().splitlines() or [""])[-1].strip() if attempt is not None and spoke else ""
    ends = [line.strip() for line in tail(log)[0] if line.strip()]
    if word == "FAILED" and any(_MEMORY.search(line) for line in ends):  # where Slurm has no other word for it
        word = "OUT_OF_MEMORY"
    if word in _ADVICE:
        return f"{word}: {_ADVICE[word]}" + (f" (it said: {said})" if said else "")
    end = f"ends with: {ends[0]}" if ends else "is empty or missing"
    return said or f"{word}: killed without a word; its log {end}"


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
    if unit.unit in queue.ledger.units:
        return queue.caretaker and unit.state != "given up" and unit.reason != "CANCELLED"
    return launcher and unit.state in ("stopped", "not started")
