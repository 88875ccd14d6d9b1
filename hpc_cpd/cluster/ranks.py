"""The ranks of a job that this process starts: their logs, their signals, their end.

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
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path

from hpc_cpd.cluster.exit_order import Lifelines
from hpc_cpd.cluster.preemption import StopFlag
from hpc_cpd.cluster.schedulers.base import foreign_variables
from hpc_cpd.cluster.supervisor import LAST_LINES, Outcome, end_in_words, tethered
from hpc_cpd.errors import EXIT_DONE, EXIT_FAULT, EXIT_STOPPED, EXIT_USER_ERROR, UserError
from hpc_cpd.progress import Reader

GRACE_SECONDS = 3.0
PORTS = (20000, 32000)  # where the ranks of a stage meet
_FOREIGN = ("PMI_", "PMIX_", "OMPI_", "HYDRA_", "HPC_CPD_")  # of an MPI job around us, and ours


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class RankedJob:
    """The ranks of one teacher or one stage. `module` and `arguments`: what each runs with ``python -m``.

    `starter`: the command that starts them, inside an allocation of several nodes, and `scheduler` whose it is.
    `progress`: the folder in which they tell how far they are.
    """

    name: str
    arguments: Sequence[str]
    ranks: int
    mpi: bool
    logs: Path
    threads: int = 1
    module: str = "hpc_cpd.worker"
    starter: tuple[str, ...] = ()
    scheduler: str = ""
    progress: Path | None = None

    def start(self) -> RunningJob:
        return RunningJob(self)


@dataclass
class _Process:
    """One child: a rank, or the mpiexec of several."""

    popen: subprocess.Popen[bytes]
    rank: int | None
    text: bytes = b""
    other: list[str] = field(default_factory=list)


class RunningJob:
    """The processes of a started job."""

    def __init__(self, job: RankedJob) -> None:
        self.job = job
        self.name = job.name
        self._said: dict[int, tuple[int, str]] = {}
        self._ranks: dict[int, int] = {}
        self._order: list[int] = []
        self._news = Reader(job.progress)
        self._failed_at: float | None = None
        self._lifelines = Lifelines()
        self._ended: list[int] = []  # process ids, in the order of their ends
        self._missed: set[int] = set()  # ranks of which the others said that they no longer answer
        self._killed = False
        self._stop = self._asked = self._killed_on_request = False
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
        if not job.starter:  # whose ranks may run on other machines
            environment["HPC_CPD_LIFELINE"] = self._lifelines.address
        worker = [sys.executable, "-m", job.module, *job.arguments]
        if job.starter or (job.mpi and job.ranks > 1):
            starter = job.starter or (find_mpiexec(), "-n", str(job.ranks))
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

    def pass_on(self, stop: StopFlag) -> None:
        """Have every rank save and leave (SIGUSR1), once all are there to catch it; a second Ctrl-C kills them."""
        self._stop = self._stop or not self._asked
        self._asked = True
        if stop.count > 1 and stop.last == signal.SIGINT:
            self._killed_on_request = True
            self.kill()

    def kill(self) -> None:
        """SIGKILL to every rank."""
        self._killed = True
        if self.job.starter:  # its ranks live on other nodes: two interrupts in a row make srun kill them
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

    def news(self) -> list[str]:
        """The line of progress that rank 0 has told since the last call."""
        news = self._news.read()
        return [] if news is None else [news.line]

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
            outcome = self._outcome()
            if outcome.code == EXIT_FAULT and self._killed_on_request:
                return replace(
                    outcome, code=EXIT_STOPPED, sentence="killed on request; the last checkpoint stands on disk"
                )
            return outcome
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

    def _outcome(self) -> Outcome:
        codes = {process.rank: process.popen.returncode for process in self._processes}
        said = {rank: code for rank, (code, _) in self._said.items()}
        if (
            len(said) == self.job.ranks
            and set(said.values()) <= {EXIT_DONE, EXIT_STOPPED}
            and not any(code not in (EXIT_DONE, EXIT_STOPPED) for code in codes.values())
        ):
            worst = max(said.values())
            return Outcome(self.job.name, worst, next(text for code, text in self._said.values() if code == worst))
        mistaken = [rank for rank in self._order if said[rank] == EXIT_USER_ERROR]
        if mistaken:
            return Outcome(self.job.name, EXIT_USER_ERROR, self._said[min(mistaken)][1])
        return Outcome(self.job.name, EXIT_FAULT, self._blame(codes))

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
        how = end_in_words(code)
        if missed:  # and ended here, by our hand
            how = "no longer answered the others"
        elif rank in silent and None in codes:
            how = f"died ({self.job.starter[0] if self.job.starter else 'mpiexec'} ended with code {codes[None]})"
        log = self.job.logs / f"rank-{rank}.log"
        try:
            last = log.read_text(errors="replace").splitlines()[-LAST_LINES:]
        except OSError:
            last = []
        shown = "\n".join(f"    {line}" for line in last or other[-LAST_LINES:])
        return f"{self.job.name}: rank {rank} of {self.job.ranks} {how}; its log {log} ends with\n{shown}"


def job_environment(job: RankedJob, outer: Mapping[str, str]) -> dict[str, str]:
    """What the ranks of `job` inherit: nothing of an MPI or other job around us, and a fair share of the cores."""
    foreign = _FOREIGN + (() if job.starter else foreign_variables())
    environment = {name: value for name, value in outer.items() if not name.startswith(foreign)}
    if job.starter:
        environment["HPC_CPD_STARTER"] = job.scheduler
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
    """The mpiexec beside this Python, in the package mpich, or else in PATH. Raises UserError: there is none."""
    places = [Path(sys.executable).parent / "mpiexec"]
    with contextlib.suppress(metadata.PackageNotFoundError):
        files = metadata.files("mpich") or []
        places += [Path(str(file.locate())) for file in files if file.name == "mpiexec"]
    in_path = shutil.which("mpiexec")
    places += [Path(in_path)] if in_path is not None else []
    for place in places:
        if os.access(place, os.X_OK) and place.is_file():
            return str(place)
    raise UserError(
        f"there is no mpiexec, neither {places[0]} nor in PATH; install it with "
        f"'{sys.executable} -m pip install mpich', or use --ranks 1"
    )


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
