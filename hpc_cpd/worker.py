"""One rank of a job, from its command line on: take the lock, work, stop when it is asked to, tell how it ended.

python -m hpc_cpd.worker teacher --run DIR --task ID              train a teacher, then record its trajectories
python -m hpc_cpd.worker teacher --run DIR --index N --plan FILE  the same, as element N of an array of jobs
python -m hpc_cpd.worker stage --run DIR --stage K                learn stage K

Ranks are started by mpiexec (teachers) or the launcher itself (stages) on one machine, and by the scheduler on a
cluster. Exit codes are those of the launcher: 0 done, 3 stopped with a checkpoint, 2 the user's mistake, 1.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import NoReturn

from hpc_cpd.cluster.job_record import begin_job, end_job
from hpc_cpd.cluster.preemption import Stop, StopFlag, Watch, die_with_parent, hold_lifeline
from hpc_cpd.cluster.schedulers.base import RankInfo, Scheduler, find_rank, scheduler_of
from hpc_cpd.cluster.units import StageUnit, TeacherUnit, Unit
from hpc_cpd.errors import EXIT_DONE, EXIT_FAULT, EXIT_STOPPED, UserError, run_command, sentence_of
from hpc_cpd.run.job import set_this_job
from hpc_cpd.run.lock import Lock
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import read_json


def main() -> NoReturn:
    """Be one rank, as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m hpc_cpd.worker", description="One rank of one job.")
    kinds = parser.add_subparsers(dest="kind", required=True)
    teacher, stage = kinds.add_parser("teacher"), kinds.add_parser("stage")
    which = teacher.add_mutually_exclusive_group(required=True)
    which.add_argument("--task")
    which.add_argument("--index", type=int)
    teacher.add_argument("--plan", type=Path)
    stage.add_argument("--stage", type=int, required=True)
    stage.add_argument("--allow-missing", action="store_true")
    for kind in (teacher, stage):
        kind.add_argument("--run", type=Path, required=True)
    arguments = parser.parse_args()
    info, run = find_rank(os.environ), Run(arguments.run)
    if arguments.kind == "stage":
        stage_unit = StageUnit(run, arguments.stage)
        run_rank(lambda stop: learn(stage_unit, info, stop, arguments.allow_missing), info, stage_unit)
    task = arguments.task
    if task is None and arguments.plan is None:
        parser.error("--index needs --plan, the file that maps it to a task")
    elif task is None:
        tasks = read_json(arguments.plan)["tasks"]
        if not 0 <= arguments.index < len(tasks):
            parser.error(f"{arguments.plan} has no element {arguments.index}; it has {len(tasks)}")
        task = tasks[arguments.index]
    teacher_unit = TeacherUnit(run, task)
    run_rank(lambda stop: train(teacher_unit, info, stop), info, teacher_unit)


def rendezvous(info: RankInfo, scheduler: Scheduler) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as torch.distributed reads them."""
    names = {"RANK": str(info.rank), "WORLD_SIZE": str(info.size), "LOCAL_RANK": str(info.local_rank)}
    if info.scheduler != "local":  # our own launcher has told its ranks already
        host, port = scheduler.rendezvous(info, os.environ)
        names |= {"MASTER_ADDR": host, "MASTER_PORT": str(port)}
    elif info.size == 1:
        names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # 0: any that is free
    return names


def train(unit: TeacherUnit, info: RankInfo, stop: Stop) -> None:
    """One rank of one teacher: train it, then record its trajectories."""
    from hpc_cpd.distributed.mpi import open_communicator
    from hpc_cpd.teachers.collect import collect_trajectories
    from hpc_cpd.teachers.sources.base import make_teacher

    use_threads(unit.run.config().teachers.threads_per_rank)
    remove_leftovers()
    communicator = open_communicator(info.size)
    with ExitStack() as held:  # by rank 0 alone; where the lock is another's, all ranks raise its error
        communicator.on_root(lambda: held.enter_context(_owned(unit, f"the teacher of {unit.task}", info, stop)))
        make_teacher(unit.run, unit.task, communicator, stop)
        collect_trajectories(unit.run, unit.task, communicator, stop)


def learn(unit: StageUnit, info: RankInfo, stop: Stop, allow_missing: bool) -> None:
    """One rank of one stage. The other ranks wait in the first collective until rank 0 holds the lock."""
    os.environ.update(rendezvous(info, _scheduler(info, unit.run)))
    from hpc_cpd.distill.stage import run_stage

    use_threads(unit.run.config().distill.threads_per_rank)
    with _owned(unit, unit.name, info, stop) if info.rank == 0 else nullcontext():
        run_stage(unit.run, unit.stage, stop, allow_missing)
    if info.rank == 0 and info.own_job:  # elsewhere the launcher does this
        from hpc_cpd.report.page import build_report

        build_report(unit.run)


def use_threads(count: int) -> None:
    """Let torch's products use so many cores, whatever the scheduler says: the bits of a sum depend on their number.

    OMP_NUM_THREADS, by which a launcher or a scheduler says how many cores a rank has, is for what is the same on any
    number of them: simulators, and batches that are made ahead.
    """
    import torch

    torch.set_num_threads(count)


@contextmanager
def _owned(unit: Unit, what: str, info: RankInfo, stop: Stop) -> Iterator[None]:
    """Hold the lock of `unit`, with a record of this start.

    A job waits until the heart of a lost job has stopped; a person's launch is told at once who works there.
    """
    wait = 120.0 if info.own_job else 0.0
    with Lock(unit.folder, what, wait_seconds=wait, on_lost=_fenced, stop=stop, also=unit.folders[1:]):
        begin_job(unit.folder, _log_of(info, unit))
        yield


def _fenced() -> None:
    sentence = "another job took this work over, for the scheduler says that this one is over: it ends here"
    print(sentence, file=sys.stderr, flush=True)
    os._exit(EXIT_FAULT)  # from the heartbeat's thread: the others may be waiting in a collective


def run_rank(work: Callable[[Stop], None], info: RankInfo, unit: Unit | None = None) -> NoReturn:
    """Do `work` on `unit` as one rank and leave with its exit code; a rank that fails leaves nobody waiting.

    Our launcher collects the ranks' outcomes and prints one sentence. Elsewhere rank 0 speaks first, and
    a rank with an error ends without its farewell (MPI_Finalize would wait for the others for ever), which
    makes mpiexec and srun end the rest.
    """
    set_this_job(info.job)
    flag = StopFlag().install()
    speak = _connect(info)
    sentence, lost = "", list[int]()
    scheduler: Scheduler | None = None

    def guarded() -> None:
        nonlocal sentence, lost, scheduler
        try:
            folder = os.environ.get("HPC_CPD_LOGS")
            if info.launcher is not None and folder is not None:
                with open(Path(folder, f"rank-{info.rank}.log"), "ab") as log:  # this rank's own
                    os.dup2(log.fileno(), 1)
                    os.dup2(log.fileno(), 2)
            stop: Stop = flag
            if unit is not None:
                scheduler = _scheduler(info, unit.run)
                if unit.done:
                    return
                if info.rank == 0:
                    if not (unit.folder / "lock.json").exists():  # else whoever works there has the word
                        begin_job(unit.folder, _log_of(info, unit))
                    left = partial(scheduler.seconds_left, info.job)
                    stop = Watch(flag, unit.run.stop_file, left, scheduler.lead_seconds)
            work(stop)
        except Exception as error:
            sentence = sentence_of(error) or f"{type(error).__name__}: {error}"
            lost = getattr(error, "ranks", [])
            if info.rank and not info.launcher and isinstance(error, UserError):
                time.sleep(2.0)  # rank 0 speaks first
            raise

    try:
        code = run_command(guarded)
    except Exception:  # not swallowed: shown here, and told to the launcher, so that no other rank waits for this one
        code = EXIT_FAULT
        with suppress(OSError):  # the log may be on a full disk; the outcome travels to the launcher by pipe
            traceback.print_exc()
    if unit is not None and (info.rank == 0 or code not in (EXIT_DONE, EXIT_STOPPED)):
        with suppress(OSError, UserError):  # news only
            end_job(unit.folder, _log_of(info, unit), code, sentence)
    speak({"outcome": code, "rank": info.rank, "sentence": sentence[:2000], "lost": lost})
    if code == EXIT_STOPPED and info.own_job:
        _leave_mpi()  # requeueing kills what is left of this job
        if scheduler is not None and scheduler.requeues and unit is not None and not unit.run.stop_file.exists():
            if info.rank == 0:
                scheduler.requeue(info.job)
            else:  # the step ends, and rank 0 before its word is out, as soon as one rank has ended
                flag.wait(60.0)
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


def _scheduler(info: RankInfo, run: Run) -> Scheduler:
    """The one that started this process, with the run's settings."""
    return scheduler_of(run.config(), info.scheduler)


def _log_of(info: RankInfo, unit: Unit) -> Path:
    """Where this rank's output goes: relative to the run folder, which may be moved later, if it is there."""
    log, top = Path(os.environ.get("HPC_CPD_LOGS", "."), f"rank-{info.rank}.log"), unit.run.folder.absolute()
    if info.own_job:
        log = _scheduler(info, unit.run).log(unit.run, str(info.job.id), info.rank)
    return log.absolute().relative_to(top) if log.absolute().is_relative_to(top) else log.absolute()


def _leave_mpi() -> None:
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()


def _connect(info: RankInfo) -> Callable[[dict[str, object]], None]:
    """The way to tell our launcher something: lines of JSON on what was standard output."""
    if info.launcher is None:
        return lambda message: None
    die_with_parent(info.launcher if "RANK" in os.environ else None)
    if "HPC_CPD_LIFELINE" in os.environ:
        hold_lifeline(os.environ["HPC_CPD_LIFELINE"])
    pipe = os.dup(1)

    def speak(message: dict[str, object]) -> None:
        os.write(pipe, (json.dumps(message) + "\n").encode())  # one write: mpiexec keeps it in one piece

    speak({"rank": info.rank, "pid": os.getpid()})
    return speak


def remove_leftovers(folder: Path = Path("/dev/shm")) -> list[str]:
    """Delete this user's MPICH files that no living process maps; returns their names.

    MPICH's ranks on one node find each other through a file in /dev/shm whose name is made from the job's and step's
    number. Killed ranks leave it there. A requeued job has the same number: on the same node its ranks would read the
    dead ones' addresses and fail in MPI_Init, each time anew. Every rank calls this before it starts MPI, so none can
    meet an old file. Files of other jobs on this node are mapped, or (for a moment while they are made) young.
    """
    candidates = {}
    for path in folder.glob("mpich_shm_*"):
        with suppress(OSError):
            status = path.stat()
            if status.st_uid == os.getuid() and time.time() - status.st_mtime > 2.0:
                candidates[str(path)] = path
    for maps in Path("/proc").glob("[0-9]*/maps") if candidates else ():
        with suppress(OSError):  # gone, or of another user, who cannot map our files
            text = maps.read_text(errors="replace")
            candidates = {name: path for name, path in candidates.items() if name not in text}
    for path in candidates.values():
        with suppress(OSError):  # another rank was faster
            path.unlink()
    return sorted(path.name for path in candidates.values())


if __name__ == "__main__":
    sys.exit(run_command(main))
