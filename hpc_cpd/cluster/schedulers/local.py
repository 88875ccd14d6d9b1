"""Jobs on this machine: their ranks, their logs, their end.

Every job runs in a session of its own, so a signal to the launcher (or to its process group, as from a
terminal) reaches the launcher alone, which passes one SIGUSR1 on: mpiexec hands that to its ranks, whereas
SIGUSR2 would kill it. Ranks of a killed launcher are killed by the kernel: the launcher's end kills mpiexec,
whose end makes its proxy kill the ranks, and the proxy's end kills them too.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hpc_cpd.cluster.exit_order import Lifelines
from hpc_cpd.cluster.preemption import StopFlag
from hpc_cpd.errors import EXIT_DONE, EXIT_FAULT, EXIT_STOPPED, EXIT_USER_ERROR, UserError

POLL_SECONDS = 0.1
GRACE_SECONDS = 3.0
LAST_LINES = 15
PORTS = (20000, 32000)  # where the ranks of a stage meet
_FOREIGN = ("SLURM_", "SRUN_", "SBATCH_", "PMI_", "PMIX_", "OMPI_", "HYDRA_", "HPC_CPD_")

# The kernel's promise to kill a command with its parent must be asked for before the command replaces this process.
_TETHER = (
    "import os, sys; from hpc_cpd.cluster.preemption import die_with_parent; "
    "die_with_parent(int(sys.argv[1])); os.execvp(sys.argv[2], sys.argv[2:])"
)


def tethered(command: Sequence[str]) -> list[str]:
    """`command` such that the kernel kills it when this process ends."""
    return [sys.executable, "-c", _TETHER, str(os.getpid()), *command]


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Job:
    """One teacher or one stage. `module` and `arguments`: what each rank runs with ``python -m``.

    `srun`: the command that starts the ranks, inside an allocation of several nodes.
    """

    name: str
    arguments: Sequence[str]
    ranks: int
    mpi: bool
    logs: Path
    threads: int = 1
    module: str = "hpc_cpd.worker"
    srun: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """How a job ended: an exit code of the public interface, and what to tell."""

    job: Job
    code: int
    sentence: str = ""


@dataclass
class _Process:
    """One child: a rank, or the mpiexec of several."""

    popen: subprocess.Popen[bytes]
    rank: int | None
    text: bytes = b""
    other: list[str] = field(default_factory=list)


class RunningJob:
    """The processes of a started job."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._said: dict[int, tuple[int, str]] = {}
        self._ranks: dict[int, int] = {}
        self._order: list[int] = []
        self._position = 0
        self._failed_at: float | None = None
        self._lifelines = Lifelines()
        self._ended: list[int] = []  # process ids, in the order of their ends
        self._missed: set[int] = set()  # ranks of which the others said that they no longer answer
        self._killed = False
        self._stop = False
        job.logs.mkdir(parents=True, exist_ok=True)
        self._processes: list[_Process] = []
        try:
            self._start()
        except BaseException:
            self.kill()
            raise

    def _start(self) -> None:
        job = self.job
        environment = job_environment(job, os.environ)
        if not job.srun:  # whose ranks may run on other machines
            environment["HPC_CPD_LIFELINE"] = self._lifelines.address
        worker = [sys.executable, "-m", job.module, *job.arguments]
        if job.srun or (job.mpi and job.ranks > 1):
            starter = job.srun or (find_mpiexec(), "-n", str(job.ranks))
            self._spawn(tethered([*starter, *worker]), environment, None)
            return
        port = str(free_port())
        for rank in range(job.ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job.ranks)}
            own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            self._spawn(worker, environment | own, rank)

    def _spawn(self, command: Sequence[str], environment: Mapping[str, str], rank: int | None) -> None:
        popen = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert popen.stdout is not None
        os.set_blocking(popen.stdout.fileno(), False)
        self._processes.append(_Process(popen, rank))

    def ask_to_stop(self) -> None:
        """SIGUSR1 to every rank, as soon as all of them are there to catch it."""
        self._stop = True

    def kill(self) -> None:
        """SIGKILL to every rank."""
        self._killed = True
        if self.job.srun:  # its ranks live on other nodes: two interrupts in a row make srun kill them
            self._send(signal.SIGINT)
            self._send(signal.SIGINT)
            return
        self._send(signal.SIGKILL)
        for pid in self._ranks.values():  # ranks under mpiexec: its proxy does this too, a moment later
            with contextlib.suppress(OSError):
                if self.job.module.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)

    def _send(self, number: int) -> None:
        for process in self._processes:
            if process.popen.poll() is None:
                process.popen.send_signal(number)

    def new_lines(self) -> list[str]:
        """Whole lines that rank 0 has written since the last call."""
        try:
            with open(self.job.logs / "rank-0.log", "rb") as file:
                file.seek(self._position)
                text = file.read()
        except FileNotFoundError:
            return []
        text = text[: text.rfind(b"\n") + 1]
        self._position += len(text)
        return text.decode(errors="replace").splitlines()

    def poll(self) -> Outcome | None:
        """The outcome once every rank has ended. A failed rank gives the others a moment, then kills them."""
        for process in self._processes:
            self._listen(process)
        self._see_ends()
        if self._stop and len(self._ranks) == self.job.ranks:
            self._stop = False
            self._send(signal.SIGUSR1)
        ended = [process.popen.poll() for process in self._processes]
        if None not in ended:
            for process in self._processes:
                self._listen(process)
            self._see_ends()
            return self._judge()
        said = [code for code, _ in self._said.values()]
        bad = any(code not in (None, EXIT_DONE, EXIT_STOPPED) for code in [*ended, *said])
        if bad and self._failed_at is None:
            self._failed_at = time.monotonic()
        if self._failed_at is not None and time.monotonic() - self._failed_at > GRACE_SECONDS and not self._killed:
            self.kill()
        return None

    def _see_ends(self) -> None:
        self._ended += self._lifelines.ended()
        for process in self._processes:  # a rank may end before it holds a lifeline
            if process.popen.poll() is not None and process.popen.pid not in self._ended:
                self._ended.append(process.popen.pid)

    def _listen(self, process: _Process) -> None:
        assert process.popen.stdout is not None
        while True:
            chunk = process.popen.stdout.read(65536)
            if not chunk:
                break
            process.text += chunk
        *lines, process.text = process.text.split(b"\n")
        for line in lines:
            try:
                message = json.loads(line)
                rank = int(message["rank"])
            except (ValueError, TypeError, KeyError):
                process.other = [*process.other, line.decode(errors="replace")][-LAST_LINES:]
                continue
            if "pid" in message:
                self._ranks[rank] = message["pid"]
            if "outcome" in message:
                self._said[rank] = (message["outcome"], message["sentence"])
                self._missed.update(message["lost"])
                self._order.append(rank)

    def _judge(self) -> Outcome:
        codes = {process.rank: process.popen.returncode for process in self._processes}
        said = {rank: code for rank, (code, _) in self._said.items()}
        if (
            len(said) == self.job.ranks
            and set(said.values()) <= {EXIT_DONE, EXIT_STOPPED}
            and not any(code not in (EXIT_DONE, EXIT_STOPPED) for code in codes.values())
        ):
            worst = max(said.values())
            return Outcome(self.job, worst, next(text for code, text in self._said.values() if code == worst))
        mistaken = [rank for rank in self._order if said[rank] == EXIT_USER_ERROR]
        if mistaken:
            return Outcome(self.job, EXIT_USER_ERROR, self._said[min(mistaken)][1])
        return Outcome(self.job, EXIT_FAULT, self._blame(codes))

    def _blame(self, codes: Mapping[int | None, int]) -> str:
        """Which rank failed first, how, and the last lines of its log."""
        silent = [rank for rank in range(self.job.ranks) if rank not in self._said]
        faulty = [rank for rank in self._order if self._said[rank][0] == EXIT_FAULT]
        other = [line for process in self._processes for line in process.other]
        ranks = {pid: rank for rank, pid in self._ranks.items()} | {p.popen.pid: p.rank for p in self._processes}
        # a rank that was killed tells nothing; the others then fail because it is gone
        first = [rank for rank in map(ranks.get, self._ended) if rank in silent or rank in faulty]
        missed = [rank for rank in silent if rank in self._missed and first[:1] != [rank]]
        rank = next(iter([*missed, *first, *faulty, *silent]), 0)
        code = codes.get(rank, codes.get(None, 1))
        how = f"was killed by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
        if missed:  # and ended here, by our hand
            how = "no longer answered the others"
        elif rank in silent and None in codes:
            how = f"died ({'srun' if self.job.srun else 'mpiexec'} ended with code {codes[None]})"
        log = self.job.logs / f"rank-{rank}.log"
        try:
            last = log.read_text(errors="replace").splitlines()[-LAST_LINES:]
        except OSError:
            last = []
        shown = "\n".join(f"    {line}" for line in last or other[-LAST_LINES:])
        return f"{self.job.name}: rank {rank} of {self.job.ranks} {how}; its log {log} ends with\n{shown}"


def run_jobs(
    jobs: Sequence[Job], at_once: int, stop: StopFlag, show: Callable[[Job, str], None], go_on: bool = False
) -> list[Outcome]:
    """Run `jobs`, at most `at_once` at a time; return the outcomes of those that were started.

    When `stop` is set, running jobs save and leave, and no other is started; a second SIGINT kills them. A job that
    fails does not disturb the others; after a user's mistake no other job is started, for it would make it too, unless
    `go_on` says to.
    `show` gets each line of progress that a rank 0 prints.
    """
    waiting, running, outcomes = list(jobs), list[RunningJob](), list[Outcome]()
    asked = False
    try:
        while running or waiting:
            mistake = any(outcome.code == EXIT_USER_ERROR for outcome in outcomes)
            if stop() or (mistake and not go_on):
                waiting.clear()
            while waiting and len(running) < at_once:
                running.append(RunningJob(waiting.pop(0)))
            if stop() and not asked:
                asked = True
                for job in running:
                    job.ask_to_stop()
            if stop.count > 1 and stop.last == signal.SIGINT:
                for job in running:
                    job.kill()
            for job in list(running):
                outcome = job.poll()
                for line in job.new_lines():
                    if line.startswith(("stage ", "teacher ", "trajectories ")):
                        show(job.job, line)
                if outcome is not None:
                    running.remove(job)
                    outcomes.append(_after_stop(outcome, stop))
            if running:
                time.sleep(POLL_SECONDS)
    finally:
        for job in running:
            job.kill()
    return outcomes


def _after_stop(outcome: Outcome, stop: StopFlag) -> Outcome:
    """Ranks that a second Ctrl-C killed were stopped, not faulty: their last checkpoint stands."""
    if outcome.code == EXIT_FAULT and stop.count > 1 and stop.last == signal.SIGINT:
        return Outcome(outcome.job, EXIT_STOPPED, "killed on request; the last checkpoint stands on disk")
    return outcome


def job_environment(job: Job, outer: Mapping[str, str]) -> dict[str, str]:
    """What the ranks of `job` inherit: nothing of an MPI or Slurm step around us, and a fair share of the cores."""
    foreign = tuple(prefix for prefix in _FOREIGN if not (job.srun and prefix == "SLURM_"))
    environment = {name: value for name, value in outer.items() if not name.startswith(foreign)}
    if job.srun:
        environment["HPC_CPD_SRUN"] = "1"
    environment |= {
        "HPC_CPD_LAUNCHER": str(os.getpid()),
        "HPC_CPD_RANKS": str(job.ranks),
        "HPC_CPD_LOGS": str(job.logs.absolute()),
        "OMP_NUM_THREADS": outer.get("OMP_NUM_THREADS", str(job.threads)),
        "OMP_WAIT_POLICY": "passive",  # waiting threads of two ranks on the same cores cost a factor of sixty
        "HDF5_USE_FILE_LOCKING": "FALSE",
        "PYTHONUNBUFFERED": "1",
    }
    return environment


def find_mpiexec() -> str:
    """The mpiexec that belongs to this Python's MPI. Raises UserError when there is none."""
    path = Path(sys.executable).parent / "mpiexec"
    if not path.is_file():
        raise UserError(
            f"there is no {path}; install it with '{sys.executable} -m pip install mpich', or use --ranks 1"
        )
    return str(path)


def free_port() -> int:
    """A TCP port of this machine that nobody listens on.

    Not one that the kernel would give (32768 and above): it may give it to any client that connects, before our first
    rank listens there.
    """
    while True:
        port = random.randrange(*PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
