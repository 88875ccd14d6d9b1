"""What a scheduler offers: the place where the jobs of a run wait, run and end.

A plug-in of kind ``schedulers`` is a subclass of :class:`Scheduler` with a ``Settings`` of its own. Only it knows its
commands and its variables; all else speaks of units, of jobs by their ids, and of the states below.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from hpc_cpd import plugins
from hpc_cpd.cluster.units import LaunchRequest, Unit
from hpc_cpd.errors import UserError
from hpc_cpd.run.job import JobStart
from hpc_cpd.run.paths import Run
from hpc_cpd.settings import Choice, Config, PluginSettings

Phase = Literal["waiting", "running", "done", "interrupted", "unmet", "cancelled", "timeout", "failed"]
"""Where a job stands. interrupted: ended early by the scheduler, through nobody's fault (preemption, a lost node);
unmet: it never began, for what it waited for had failed; cancelled: by a person; timeout: at its time limit."""


@dataclass(frozen=True)
class JobState:
    """One job as its scheduler tells it. `word` and `reason`: in its own words; `seconds_left`: None: no limit.

    The word FAILED means that it failed by itself: where it left no word either, its next job avoids `nodes`.
    """

    word: str
    phase: Phase
    reason: str = ""
    nodes: str = ""
    seconds_left: float | None = None

    @property
    def live(self) -> bool:
        """Whether it waits or runs."""
        return self.phase in ("waiting", "running")


@dataclass(frozen=True)
class Job:
    """What is submitted at once: units that do not wait for each other, for one launch.

    `needs`: the units that must be done before it and are not.
    """

    request: LaunchRequest
    units: Sequence[Unit]
    needs: Sequence[Unit]

    @property
    def name(self) -> str:
        return self.units[0].name if len(self.units) == 1 else f"{len(self.units)} teachers"


@dataclass(frozen=True)
class RankInfo:
    """Who this process is. `launcher`: the process id of our own launcher, if there is one; `job`: its scheduler's."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    launcher: int | None = None
    scheduler: str = "local"
    job: JobStart = field(default_factory=JobStart)

    @property
    def own_job(self) -> bool:
        """Whether this is a job that its scheduler may requeue, and that tells nobody but its files how it ended."""
        return self.launcher is None and self.scheduler != "local"


@dataclass(frozen=True)
class Starter:
    """How the ranks of a unit are started inside an allocation of several nodes.

    `command`: what stands before the command of each rank; `threads`: of each rank; `at_once`: units side by side.
    """

    command: tuple[str, ...]
    threads: int
    at_once: int


class Scheduler(ABC):
    """A place for jobs. The defaults are those of one that neither tries again nor stops a job early."""

    Settings: ClassVar[type[PluginSettings]]
    variables: ClassVar[tuple[str, ...]] = ()
    """How its environment variables begin: those of a job around it must not reach the ranks of another one."""
    queues: ClassVar[bool] = True
    """Whether jobs are submitted, and run without the launcher."""
    lead_seconds: float = 0.0
    """How long before its time limit a job saves and leaves."""
    requeues: bool = False
    """Whether a job that was asked to stop puts itself back into the queue, by `requeue`."""

    def __init__(self, settings: Any) -> None:
        """`settings`: an instance of `Settings`."""
        self.settings = settings

    @property
    def name(self) -> str:
        return str(self.settings.name)

    # ---- before and while jobs are submitted

    @abstractmethod
    def available(self) -> bool:
        """Whether jobs can be submitted from here."""

    def check(self, request: LaunchRequest) -> None:
        """Raise UserError for what jobs would find out later. Nothing is written yet, and nothing may be."""
        self.jobs(request, request.todo)

    def jobs(self, request: LaunchRequest, units: Sequence[Unit]) -> Sequence[Job]:
        """The jobs that do `units`, in the order of submission. Writes nothing. Raises UserError: it cannot be done."""
        return [Job(request, [unit], unit.needs(request.plan)) for unit in units]

    def describe(self, job: Job, after: Mapping[Unit, str]) -> str:
        """What ``--dry-run`` prints of `job`; `after` names the job of each unit that it waits for."""
        return " ".join(job.request.arguments(job.units[0]))

    @abstractmethod
    def submit(self, job: Job, after: Mapping[Unit, str], avoid: Sequence[str]) -> Iterator[Sequence[str]]:
        """Submit `job` and yield the job id of each of its units; several times where one job takes over from another.

        It may begin when the jobs `after` (by unit) have succeeded. `avoid`: nodes on which it died without a word.
        Raises UserError with the scheduler's own words when it refuses.
        """

    def watch(self, request: LaunchRequest, jobs: Sequence[str]) -> str | None:
        """Submit a job that starts when one of `jobs` ends unfinished and launches again what is left; its id.

        None: nobody watches, a person launches again.
        """
        return None

    def this_job(self) -> str | None:
        """The id of the job in which this process runs; None: in none."""
        return None

    @abstractmethod
    def cancel(self, jobs: Sequence[str]) -> None:
        """Cancel jobs that wait; those that run or have ended are left alone."""

    # ---- questions about jobs

    @abstractmethod
    def states(self, jobs: Sequence[str]) -> dict[str, JobState]:
        """The state of each of `jobs` that it still knows. Raises UserError when it does not answer."""

    @property
    def source(self) -> str:
        """Who answers `states`, for ``hpc-cpd status``."""
        return self.name

    def explain(self, state: JobState, log: Sequence[str]) -> str:
        """What the scheduler alone knows about an ended job, and what to do; "" if nothing. `log`: its last lines."""
        return ""

    def log(self, run: Run, job: str, rank: int = 0) -> Path:
        """The file that gets the output of a rank of `job`."""
        return run.logs / self.name / f"{job}_{rank}.log"

    # ---- inside a job

    @classmethod
    def rank(cls, environment: Mapping[str, str]) -> RankInfo | None:
        """Who this process is, if this scheduler started it as a rank; None: it did not."""
        return None

    def rendezvous(self, info: RankInfo, environment: Mapping[str, str]) -> tuple[str, int]:
        """The host and the port where the ranks of a stage meet; all ranks know them without talking."""
        raise NotImplementedError  # asked only of a scheduler whose `rank` names ranks

    def seconds_left(self, job: JobStart) -> float | None:
        """How long the job of this process may still run; None: no limit, or no answer."""
        return None

    def requeue(self, job: JobStart) -> None:
        """Put the running job of this process back into the queue, and end it: its other ranks wait to be killed."""
        raise NotImplementedError  # asked only where `requeues` is true

    # ---- inside an allocation, where work is not submitted but runs at once

    def inside(self) -> bool:
        """Whether this process lives in an allocation or a job of this scheduler."""
        return False

    def starter(self, unit: Unit, config: Config) -> Starter | None:
        """How the allocation around this process starts the ranks of `unit`; None: like any other machine."""
        return None


def scheduler_of(config: Config, name: str | None = None) -> Scheduler:
    """The configured scheduler; with another `name`, that one with its defaults. Raises UserError: there is none."""
    settings = config.cluster.scheduler
    if name is not None and name != settings.name:
        settings = Choice("schedulers", name).resolve({})
    made: Scheduler = plugins.load("schedulers", settings.name)(settings)
    return made


def choose(name: str, config: Config) -> Scheduler:
    """The scheduler that ``--cluster NAME`` means.

    auto: the configured one where it is available, else this machine; inside an allocation this machine too, with the
    nodes of the allocation. Raises UserError for a name that nothing has.
    """
    from hpc_cpd.cluster.schedulers.local import Local

    if name == "auto":
        configured = scheduler_of(config)
        if configured.inside():
            return Local(around=configured)
        return configured if configured.available() else Local()
    known = plugins.names("schedulers")
    if name not in known:
        near = plugins.hint(name, ["auto", *known])
        raise UserError(f"--cluster is '{name}'; {near}known: auto, {', '.join(known)}")
    return scheduler_of(config, name)


def find_rank(environment: Mapping[str, str]) -> RankInfo:
    """Who this process is, by the first scheduler that says it started it; one started by hand is rank 0 of 1.

    Our own launcher is believed before the job around it. Where it had an allocation start the ranks, it says whose.
    """
    launcher = environment.get("HPC_CPD_LAUNCHER")
    names = plugins.names("schedulers") if launcher is None else [environment.get("HPC_CPD_STARTER", "local")]
    for name in names:
        with suppress(UserError):  # a plug-in that cannot be loaded did not start this process
            info: RankInfo | None = plugins.load("schedulers", name).rank(environment)
            if info is not None:
                return replace(info, launcher=None if launcher is None else int(launcher))
    return RankInfo()


def foreign_variables() -> tuple[str, ...]:
    """How the variables of all schedulers begin."""
    found: list[str] = []
    for name in plugins.names("schedulers"):
        with suppress(UserError):  # see find_rank
            found += plugins.load("schedulers", name).variables
    return tuple(found)
