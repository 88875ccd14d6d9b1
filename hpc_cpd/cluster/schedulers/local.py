"""This machine: teachers side by side, then one stage after another, in processes of the launcher.

`supervise` also looks after the launchers of a sweep.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal, Protocol

from rich.console import Console

from hpc_cpd.cluster.preemption import StopFlag
from hpc_cpd.cluster.ranks import Outcome, RankedJob, find_mpiexec
from hpc_cpd.cluster.schedulers.base import Job, JobState, RankInfo, Scheduler, Starter
from hpc_cpd.cluster.units import LaunchRequest, TeacherUnit, Unit, not_done
from hpc_cpd.errors import EXIT_FAULT, EXIT_STOPPED, EXIT_USER_ERROR, StopRequested, UserError
from hpc_cpd.progress import say
from hpc_cpd.run.cores import usable_cores
from hpc_cpd.settings import PluginSettings


class LocalSettings(PluginSettings):
    """Nothing to choose."""

    name: Literal["local"] = "local"


class Local(Scheduler):
    """Runs everything here and now; inside an allocation of several nodes, over all of them."""

    Settings = LocalSettings
    queues: ClassVar[bool] = False

    def __init__(self, settings: LocalSettings | None = None, around: Scheduler | None = None) -> None:
        """`around`: the scheduler whose allocation this process lives in."""
        super().__init__(settings or LocalSettings())
        self.around = around

    def available(self) -> bool:
        return True

    def check(self, request: LaunchRequest) -> None:
        for unit in request.todo:
            ranks, ours = unit.ranks(request.config), self._starter(unit, request) is None
            if ours and unit.uses_mpi and ranks > 1:
                find_mpiexec()
            elif ours and not unit.uses_mpi and Path("/proc/driver/nvidia/gpus").is_dir():
                from hpc_cpd.distributed.torch import require_gpus

                require_gpus(ranks)

    def submit(self, job: Job, after: Mapping[Unit, str], avoid: Sequence[str]) -> Iterator[Sequence[str]]:
        raise NotImplementedError("nothing waits on this machine: see run()")

    def states(self, jobs: Sequence[str]) -> dict[str, JobState]:
        return {}

    def cancel(self, jobs: Sequence[str]) -> None:
        return

    @classmethod
    def rank(cls, environment: Mapping[str, str]) -> RankInfo | None:
        """Of a process that `hpc_cpd.cluster.ranks` started, itself or by mpiexec, which names no local rank."""
        if "HPC_CPD_RANKS" not in environment:
            return None
        rank = int(environment.get("RANK", environment.get("PMI_RANK", "0")))
        return RankInfo(rank, int(environment["HPC_CPD_RANKS"]), int(environment.get("LOCAL_RANK", rank)))

    def run(self, request: LaunchRequest, stop: StopFlag) -> None:
        """Do all that is left of `request`. Raises StopRequested or UserError, or leaves by SystemExit(1)."""
        logs = (request.run.logs / time.strftime("%Y%m%d-%H%M%S")).absolute()
        teachers = not_done(request.teachers)
        if teachers:
            starter, ranks = self._starter(teachers[0], request), teachers[0].ranks(request.config)
            at_once = starter.at_once if starter is not None else max(1, usable_cores() // ranks)
            jobs = [self._job(unit, request, logs, at_once) for unit in teachers]
            _run_jobs(jobs, at_once, stop, request.allow_missing)
        for unit in not_done(request.stages):
            _run_jobs([self._job(unit, request, logs, 1)], 1, stop, go_on=False)

    def _starter(self, unit: Unit, request: LaunchRequest) -> Starter | None:
        return None if self.around is None else self.around.starter(unit, request.config)

    def _job(self, unit: Unit, request: LaunchRequest, logs: Path, at_once: int) -> RankedJob:
        words, ranks, starter = request.arguments(unit), unit.ranks(request.config), self._starter(unit, request)
        place = logs / "teachers" / unit.task if isinstance(unit, TeacherUnit) else logs / unit.name.replace(" ", "-")
        threads = max(1, usable_cores() // (ranks * at_once))
        job = RankedJob(unit.name, words, ranks, unit.uses_mpi, place, unit.folder, threads)
        if self.around is not None and starter is not None:
            job.threads, job.starter, job.scheduler = starter.threads, starter.command, self.around.name
        return job


plugin = Local


class Work(Protocol):
    """Work that supervise() starts, once, and looks after."""

    name: str

    def start(self) -> None:
        """Start its processes."""

    def pass_on(self, stop: StopFlag) -> None:
        """A signal came: see `stop.count` and `stop.last`."""

    def poll(self) -> Outcome | None:
        """The outcome, once all of its processes have ended."""

    def news(self) -> list[str]:
        """Lines worth showing since the last call."""

    def kill(self) -> None:
        """End all of its processes now."""


Show = Callable[[str, str], None]
"""(name of the work, one line)"""


def supervise(work: Sequence[Work], at_once: int, stop: StopFlag, show: Show, go_on: bool = True) -> list[Outcome]:
    """Do `work`, at most `at_once` pieces at a time; return the outcomes of those that were started.

    One that fails does not disturb the others. Every signal is passed on to all that run, and no other is started
    then; nor, without `go_on`, after a user's mistake, for the others would make it too.
    """
    waiting, running, outcomes = list(work), list[Work](), list[Outcome]()
    passed_on = 0
    try:
        while running or waiting:
            if stop() or (not go_on and any(outcome.code == EXIT_USER_ERROR for outcome in outcomes)):
                waiting.clear()
            while waiting and len(running) < at_once:
                waiting[0].start()
                running.append(waiting.pop(0))
            heard = stop.count
            for begun in list(running):
                if heard > passed_on:
                    begun.pass_on(stop)
                outcome = begun.poll()
                for line in begun.news():
                    show(begun.name, line)
                if outcome is not None:
                    running.remove(begun)
                    outcomes.append(outcome)
            passed_on = heard
            if running:
                time.sleep(0.1)
    finally:
        for begun in running:
            begun.kill()
    return outcomes


def _run_jobs(jobs: Sequence[RankedJob], at_once: int, stop: StopFlag, go_on: bool) -> None:
    """Run and show `jobs`. With `go_on` those that fail are told and left behind."""
    console = Console()
    live = console.is_terminal
    with console.status("starting") as status:
        if not live:
            status.stop()

        def show(name: str, line: str) -> None:
            if live:
                status.update(f"{len(jobs)} jobs, {line}" if len(jobs) > 1 else line)
            else:
                say(line)

        outcomes = supervise(jobs, at_once, stop, show, go_on=go_on)
    for outcome in outcomes:
        if outcome.code == EXIT_FAULT or (go_on and outcome.code == EXIT_USER_ERROR):
            print(f"error: {outcome.sentence}", file=sys.stderr, flush=True)
    codes = {outcome.code for outcome in outcomes}
    if EXIT_FAULT in codes and not go_on:
        raise SystemExit(EXIT_FAULT)
    if EXIT_USER_ERROR in codes and not go_on:
        raise UserError(next(outcome.sentence for outcome in outcomes if outcome.code == EXIT_USER_ERROR))
    if EXIT_STOPPED in codes or stop():
        raise StopRequested("the same command goes on from here")
