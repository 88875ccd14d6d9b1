"""What every rank of a job runs.

    python -m hpc_cpd.worker teacher --run DIR --task ID              train a teacher, then record its trajectories
    python -m hpc_cpd.worker teacher --run DIR --index N --plan FILE  the same, as element N of an array of jobs
    python -m hpc_cpd.worker stage --run DIR --stage K                learn stage K

Ranks are started by mpiexec (teachers) or the launcher itself (stages) on one machine, and by srun on a
cluster. Exit codes are those of the launcher: 0 done, 3 stopped with a checkpoint, 2 the user's mistake, 1.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from hpc_cpd.cluster.exit_order import hold_lifeline
from hpc_cpd.cluster.job_record import begin_job, end_job
from hpc_cpd.cluster.mpich_cleanup import remove_leftovers
from hpc_cpd.cluster.preemption import StopFlag, Watch, die_with_parent
from hpc_cpd.cluster.schedulers.local import PORTS, free_port
from hpc_cpd.cluster.schedulers.slurm import requeue_this_job, seconds_left, this_job
from hpc_cpd.errors import (
    EXIT_DONE,
    EXIT_FAULT,
    EXIT_STOPPED,
    LockLost,
    RankLost,
    StopRequested,
    UserError,
    disk_error_sentence,
    run_command,
)
from hpc_cpd.run.lock import Lock
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import is_done, read_json

FIRST_RANK_SPEAKS_SECONDS = 2.0
LOCK_WAIT_SECONDS = 120.0
REQUEUE_SECONDS = 60.0
Stop = Callable[[], bool]


@dataclass(frozen=True)
class Unit:
    """What this job works on. `folder`: where it is published; `done`: whether it is already."""

    run: Run
    folder: Path
    done: Callable[[], bool]


@dataclass(frozen=True)
class Place:
    """Who this process is. `launcher`: process id of our own launcher, None elsewhere; `slurm`: srun started it.

    Both inside an allocation, where our launcher runs srun. A job of its own has no launcher.
    """

    rank: int
    size: int
    local_rank: int
    launcher: int | None = None
    slurm: bool = False

    @property
    def own_job(self) -> bool:
        """Whether this is a job that Slurm may requeue, and that tells nobody but its files how it ended."""
        return self.slurm and self.launcher is None


def find_place(environment: dict[str, str]) -> Place:
    """Read the launcher's, then srun's environment; a process started by hand is rank 0 of 1.

    A batch script is no step: Slurm sets SLURM_PROCID and SLURM_NTASKS there too, but no SLURM_STEP_ID.
    """
    number = {name: int(value) for name, value in environment.items() if value.isdigit()}
    launcher = number.get("HPC_CPD_LAUNCHER")
    if "SLURM_STEP_ID" in environment and (launcher is None or "HPC_CPD_SRUN" in environment):
        size = number.get("SLURM_STEP_NUM_TASKS", number.get("SLURM_NTASKS", 1))
        return Place(number["SLURM_PROCID"], size, number["SLURM_LOCALID"], launcher, slurm=True)
    if launcher is not None:
        rank = number.get("RANK", number.get("PMI_RANK", 0))
        return Place(rank, number["HPC_CPD_RANKS"], number.get("LOCAL_RANK", rank), launcher)
    return Place(0, 1, 0)


def rendezvous(place: Place, environment: dict[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as torch.distributed reads them."""
    names = {"RANK": str(place.rank), "WORLD_SIZE": str(place.size), "LOCAL_RANK": str(place.local_rank)}
    if place.slurm:
        from submitit.slurm.slurm import SlurmJobEnvironment

        names["MASTER_ADDR"] = SlurmJobEnvironment().hostnames[0]
        # All ranks must know the port without talking; two jobs on one node must not share it.
        names["MASTER_PORT"] = str(PORTS[0] + int(environment["SLURM_JOB_ID"]) % (PORTS[1] - PORTS[0]))
    elif place.size == 1:
        names["MASTER_ADDR"] = "127.0.0.1"
        names["MASTER_PORT"] = str(free_port())
    return names


def train(run: Run, task_id: str, place: Place, stop: Stop) -> None:
    """One rank of one teacher: train it, then record its trajectories."""
    from hpc_cpd.distributed.mpi import open_communicator
    from hpc_cpd.teachers.collect import collect_trajectories
    from hpc_cpd.teachers.sources.base import make_teacher

    remove_leftovers()
    communicator = open_communicator(place.size)
    lock = _lock(run.teacher(task_id), f"the teacher of {task_id}", place, stop, also=[run.trajectories(task_id)])
    log = _log_of(place, run)
    communicator.on_root(lambda: _enter(lock, log))
    try:
        make_teacher(run, task_id, communicator, stop)
        collect_trajectories(run, task_id, communicator, stop)
    finally:
        if communicator.rank == 0:
            lock.__exit__()


def _enter(lock: Lock, log: Path) -> None:
    """Take the lock, and note who works here. The lock itself must not travel to the other ranks."""
    lock.__enter__()
    begin_job(lock.path.parent, log)


def _lock(folder: Path, what: str, place: Place, stop: Stop, also: Sequence[Path] = ()) -> Lock:
    """A job waits until the heart of a lost job has stopped; a person's launch is told at once who works there."""
    wait = LOCK_WAIT_SECONDS if place.own_job else 0.0
    return Lock(folder, what, wait_seconds=wait, on_lost=_fenced, stop=stop, also=also)


def _fenced() -> None:
    print("another job took this work over, for Slurm says that this one is over: it ends here", file=sys.stderr)
    sys.stderr.flush()
    os._exit(EXIT_FAULT)  # from the heartbeat's thread: the others may be waiting in a collective


def learn(run: Run, stage: int, place: Place, stop: Stop, allow_missing: bool) -> None:
    """One rank of one stage. The other ranks wait in the first collective until rank 0 holds the lock."""
    os.environ.update(rendezvous(place, dict(os.environ)))
    from hpc_cpd.distill.stage import run_stage

    if place.rank != 0:
        run_stage(run, stage, stop, allow_missing)
        return
    lock = _lock(run.stage(stage), f"stage {stage}", place, stop)
    _enter(lock, _log_of(place, run))
    try:
        run_stage(run, stage, stop, allow_missing)
    finally:
        lock.__exit__()
    if place.own_job:  # elsewhere the launcher does this
        from hpc_cpd.report.page import build_report

        build_report(run)


def run_rank(work: Callable[[Stop], None], place: Place, unit: Unit | None = None) -> NoReturn:
    """Do `work` on `unit` as one rank and leave with its exit code; a rank that fails leaves nobody waiting.

    Our launcher collects the ranks' outcomes and prints one sentence. Elsewhere rank 0 speaks first, and
    a rank with an error ends without its farewell (MPI_Finalize would wait for the others for ever), which
    makes mpiexec and srun end the rest.
    """
    flag = StopFlag().install()
    speak = _connect(place)
    sentence = ""
    lost: list[int] = []
    may_requeue = False

    def guarded() -> None:
        nonlocal sentence, lost, may_requeue
        try:
            _redirect(place)
            stop: Stop = flag
            if unit is not None:
                settings = unit.run.config().cluster
                may_requeue = settings.continuation == "requeue"
                if unit.done():
                    return
                if place.rank == 0:
                    if not (unit.folder / "lock.json").exists():  # else whoever works there has the word
                        begin_job(unit.folder, _log_of(place, unit.run))
                    left = _time_left if place.slurm else lambda: None
                    stop = Watch(flag, unit.run.stop_file, left, settings.signal_seconds_before_end)
            work(stop)
        except (UserError, StopRequested, LockLost) as error:
            sentence = str(error)
            raise
        except RankLost as error:
            sentence, lost = str(error), error.ranks
            raise
        except Exception as error:
            sentence = disk_error_sentence(error) or f"{type(error).__name__}: {error}"
            raise
        finally:
            if place.rank and not place.launcher and isinstance(sys.exc_info()[1], UserError):
                time.sleep(FIRST_RANK_SPEAKS_SECONDS)

    try:
        code = run_command(guarded)
    except Exception:  # not swallowed: shown here, and told to the launcher, so that no other rank waits for this one
        code = EXIT_FAULT
        with suppress(OSError):  # the log may be on a full disk; the outcome travels to the launcher by pipe
            traceback.print_exc()
    if unit is not None and (place.rank == 0 or code not in (EXIT_DONE, EXIT_STOPPED)):
        with suppress(OSError, UserError):  # news only
            end_job(unit.folder, _log_of(place, unit.run), code, sentence)
    speak({"outcome": code, "rank": place.rank, "sentence": sentence[:2000], "lost": lost})
    if code == EXIT_STOPPED and place.own_job:
        _leave_mpi()  # requeueing kills what is left of this job
        if may_requeue and unit is not None and not unit.run.stop_file.exists():
            if place.rank == 0:
                requeue_this_job()
            else:  # srun ends a step, and rank 0 before its word is out, as soon as one rank has ended
                flag.wait(REQUEUE_SECONDS)
    leave(code)


def leave(code: int) -> NoReturn:
    """End this process with `code`, without tearing it down.

    A library's thread may abort the teardown ("terminate called without an active exception"), after all is published.
    """
    if code in (EXIT_DONE, EXIT_STOPPED):
        _leave_mpi()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # a full disk must not hide the exit code
            stream.flush()
    os._exit(code)


def _time_left() -> float | None:
    return seconds_left(str(this_job()))


def _log_of(place: Place, run: Run) -> Path:
    """Where this rank's output goes."""
    if place.own_job:
        return run.logs / "slurm" / f"{this_job()}_{place.rank}_log.out"
    return Path(os.environ.get("HPC_CPD_LOGS", ".")) / f"rank-{place.rank}.log"


def _leave_mpi() -> None:
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()


def _connect(place: Place) -> Callable[[dict[str, object]], None]:
    """The way to tell our launcher something: lines of JSON on what was standard output."""
    if place.launcher is None:
        return lambda message: None
    die_with_parent(place.launcher if "RANK" in os.environ else None)
    if "HPC_CPD_LIFELINE" in os.environ:
        hold_lifeline(os.environ["HPC_CPD_LIFELINE"])
    pipe = os.dup(1)

    def speak(message: dict[str, object]) -> None:
        os.write(pipe, (json.dumps(message) + "\n").encode())  # one write: mpiexec keeps it in one piece

    speak({"rank": place.rank, "pid": os.getpid()})
    return speak


def _redirect(place: Place) -> None:
    """Under our launcher, send output to this rank's own log."""
    folder = os.environ.get("HPC_CPD_LOGS")
    if place.launcher is not None and folder is not None:
        log = os.open(Path(folder) / f"rank-{place.rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)


def main(words: Sequence[str] | None = None) -> int:
    return run_command(lambda: _main(words))


def _main(words: Sequence[str] | None) -> NoReturn:
    parser = argparse.ArgumentParser(prog="python -m hpc_cpd.worker", description="One rank of one job.")
    kinds = parser.add_subparsers(dest="kind", required=True)
    teacher = kinds.add_parser("teacher")
    which = teacher.add_mutually_exclusive_group(required=True)
    which.add_argument("--task")
    which.add_argument("--index", type=int)
    teacher.add_argument("--plan", type=Path)
    stage = kinds.add_parser("stage")
    stage.add_argument("--stage", type=int, required=True)
    for kind in (teacher, stage):
        kind.add_argument("--run", type=Path, required=True)
    stage.add_argument("--allow-missing", action="store_true")
    arguments = parser.parse_args(words)
    place = find_place(dict(os.environ))
    run = Run(arguments.run)
    if arguments.kind == "stage":
        number = arguments.stage
        unit = Unit(run, run.stage(number), lambda: is_done(run.stage(number)))
        run_rank(lambda stop: learn(run, number, place, stop, arguments.allow_missing), place, unit)
    if arguments.task is not None:
        task = arguments.task
    elif arguments.plan is None:
        parser.error("--index needs --plan, the file that maps it to a task")
    else:
        tasks = read_json(arguments.plan)["tasks"]
        if not 0 <= arguments.index < len(tasks):
            parser.error(f"{arguments.plan} has no element {arguments.index}; it has {len(tasks)}")
        task = tasks[arguments.index]
    folders = (run.teacher(task), run.trajectories(task))
    unit = Unit(run, folders[0], lambda: all(map(is_done, folders)))
    run_rank(lambda stop: train(run, task, place, stop), place, unit)


if __name__ == "__main__":
    sys.exit(main())
