"""The ranks of a job that this process starts: their logs, their signals, their end.

Every job runs in a session of its own, so a signal to the launcher (or to its process group, as from a
terminal) reaches the launcher alone, which passes one SIGUSR1 on: mpiexec hands that to its ranks, whereas
SIGUSR2 would kill it. Ranks of a killed launcher are killed by the kernel: the launcher's end kills mpiexec,
whose end makes its proxy kill the ranks, and the proxy's end kills them too.
"""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT, Popen
from typing import Any

from hpc_cpd.cluster.preemption import StopFlag
from hpc_cpd.cluster.schedulers.base import foreign_variables
from hpc_cpd.errors import EXIT_DONE, EXIT_FAULT, EXIT_STOPPED, EXIT_USER_ERROR, UserError
from hpc_cpd.progress import Reader

GRACE_SECONDS = 3.0
LAST_LINES = 15
PORTS = (20000, 32000)  # where the ranks of a stage meet

# The kernel's promise to kill a command with its parent must be asked for before the command replaces this process.
_TETHER = (
    "import os, sys; from hpc_cpd.cluster.preemption import die_with_parent; "
    "die_with_parent(int(sys.argv[1])); os.execvp(sys.argv[2], sys.argv[2:])"
)


@dataclass(frozen=True)
class Outcome:
    """How a piece of work ended: an exit code of the public interface, and one sentence if it was not done."""

    name: str
    code: int
    sentence: str = ""


class Lifelines:
    """In which order the ranks on this machine ended: the launcher's side; `address` is for `hold_lifeline`.

    A rank that dies takes the others along within a millisecond: mpiexec kills them, and may then name one of these. So
    each rank holds a connection to its launcher as a high file descriptor. Linux (4.3 or later) closes the descriptors
    of an ending process from the highest down, thus this one before those by which mpiexec hears of the end; and epoll
    hands events out in the order in which they came.
    """

    def __init__(self) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind("")  # Linux chooses an address that is no file
        self._listener.listen()
        self._listener.setblocking(False)
        self.address: str = self._listener.getsockname()[1:].decode()
        self._epoll = select.epoll()
        self._held: dict[int, tuple[socket.socket, int]] = {}

    def ended(self) -> list[int]:
        """The process ids of the holders that have ended since the last call, in the order of their ends."""
        with suppress(BlockingIOError):  # nobody else has connected
            while True:
                line, _ = self._listener.accept()
                pid = struct.unpack("3i", line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
                self._held[line.fileno()] = line, pid
                self._epoll.register(line, 0)  # a hang-up is always told
        gone = [self._held.pop(descriptor) for descriptor, _ in self._epoll.poll(0)]
        for line, _ in gone:
            line.close()
        return [pid for _, pid in gone]


@dataclass
class _Process:
    """One child: a rank, or the mpiexec of several."""

    popen: Popen[bytes]
    rank: int | None
    text: bytes = b""
    other: list[str] = field(default_factory=list)

    def listen(self) -> Iterator[dict[str, Any]]:
        """What its ranks have told since the last call. Other lines are kept, the last ones."""
        assert self.popen.stdout is not None
        while chunk := self.popen.stdout.read(65536):
            self.text += chunk
        *lines, self.text = self.text.split(b"\n")
        for line in lines:
            try:
                message = json.loads(line)
                yield {**message, "rank": int(message["rank"])}
            except (ValueError, TypeError, KeyError):
                self.other = [*self.other, line.decode(errors="replace")][-LAST_LINES:]


@dataclass(eq=False)
class RankedJob:
    """The ranks of one teacher or one stage. `module` and `arguments`: what each runs with ``python -m``.

    `progress`: the folder in which they tell how far they are. `starter`: the command that starts them, inside an
    allocation of several nodes, and `scheduler` whose it is.
    """

    name: str
    arguments: Sequence[str]
    ranks: int
    mpi: bool
    logs: Path
    progress: Path
    threads: int = 1
    module: str = "hpc_cpd.worker"
    starter: tuple[str, ...] = ()
    scheduler: str = ""

    def start(self) -> None:
        """Start the processes. Raises UserError: there is no mpiexec."""
        self._processes: list[_Process] = []
        self._ranks: dict[int, int] = {}  # rank -> process id
        self._said: dict[int, tuple[int, str]] = {}  # rank -> its outcome, in the order in which they were told
        self._ended: list[int] = []  # process ids, in the order of their ends
        self._missed: set[int] = set()  # ranks of which the others said that they no longer answer
        self._news, self._lifelines = Reader(self.progress), Lifelines()
        self._asked = self._passed_on = self._killed = self._killed_on_request = False
        self._failed_at = float("inf")
        self.logs.mkdir(parents=True, exist_ok=True)
        environment = self._environment()
        worker = [sys.executable, "-m", self.module, *self.arguments]
        try:
            if self.starter or (self.mpi and self.ranks > 1):
                starter = self.starter or (find_mpiexec(), "-n", str(self.ranks))
                self._spawn(tethered([*starter, *worker]), environment, None)
                return
            port = str(free_port())
            for rank in range(self.ranks):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.ranks)}
                own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                self._spawn(worker, environment | own, rank)
        except BaseException:
            self.kill()
            raise

    def _environment(self) -> dict[str, str]:
        """What the ranks inherit: nothing of an MPI or other job around us, and a fair share of the cores."""
        foreign = ("PMI_", "PMIX_", "OMPI_", "HYDRA_", "HPC_CPD_", *(() if self.starter else foreign_variables()))
        environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        if self.starter:
            environment["HPC_CPD_STARTER"] = self.scheduler
        else:  # whose ranks may run on other machines
            environment["HPC_CPD_LIFELINE"] = self._lifelines.address
        return environment | {
            "HPC_CPD_LAUNCHER": str(os.getpid()),
            "HPC_CPD_RANKS": str(self.ranks),
            "HPC_CPD_LOGS": str(self.logs.absolute()),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(self.threads)),
            "OMP_WAIT_POLICY": "passive",  # waiting threads of two ranks on the same cores cost a factor of sixty
            "HDF5_USE_FILE_LOCKING": "FALSE",
            "PYTHONUNBUFFERED": "1",
        }

    def _spawn(self, command: Sequence[str], environment: Mapping[str, str], rank: int | None) -> None:
        popen = Popen(command, env=environment, stdin=DEVNULL, stdout=PIPE, stderr=STDOUT, start_new_session=True)
        assert popen.stdout is not None
        os.set_blocking(popen.stdout.fileno(), False)
        self._processes.append(_Process(popen, rank))

    def pass_on(self, stop: StopFlag) -> None:
        """Have every rank save and leave (SIGUSR1), once all are there to catch it; a second Ctrl-C kills them."""
        self._asked = True
        if stop.count > 1 and stop.last == signal.SIGINT:
            self._killed_on_request = True
            self.kill()

    def kill(self) -> None:
        """SIGKILL to every rank."""
        self._killed = True
        if self.starter:  # its ranks live on other nodes: two interrupts in a row make srun kill them
            self._send(signal.SIGINT)
            self._send(signal.SIGINT)
            return
        self._send(signal.SIGKILL)
        for pid in self._ranks.values():  # ranks under mpiexec: its proxy does this too, a moment later
            with suppress(OSError):
                if self.module.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
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
        ended = [process.popen.poll() for process in self._processes]  # before they are heard for the last time
        for message in [message for process in self._processes for message in process.listen()]:
            rank = message["rank"]
            if "pid" in message:
                self._ranks[rank] = message["pid"]
            if "outcome" in message:
                self._said[rank] = message["outcome"], message["sentence"]
                self._missed.update(message["lost"])
        self._ended += self._lifelines.ended()
        gone = [one.popen.pid for one in self._processes if one.popen.poll() is not None]
        self._ended += [pid for pid in gone if pid not in self._ended]  # a rank may end before it holds a lifeline
        if self._asked and not self._passed_on and len(self._ranks) == self.ranks:
            self._passed_on = True
            self._send(signal.SIGUSR1)
        if None not in ended:
            return self._outcome()
        if not {*ended, *(code for code, _ in self._said.values())} <= {None, EXIT_DONE, EXIT_STOPPED}:
            self._failed_at = min(self._failed_at, time.monotonic())
        if time.monotonic() - self._failed_at > GRACE_SECONDS and not self._killed:
            self.kill()
        return None

    def _outcome(self) -> Outcome:
        codes = {process.rank: process.popen.returncode for process in self._processes}
        said = {rank: code for rank, (code, _) in self._said.items()}
        if len(said) == self.ranks and {*said.values(), *codes.values()} <= {EXIT_DONE, EXIT_STOPPED}:
            worst = max(said.values())
            return Outcome(self.name, worst, next(text for code, text in self._said.values() if code == worst))
        mistaken = [rank for rank, code in said.items() if code == EXIT_USER_ERROR]
        if mistaken:
            return Outcome(self.name, EXIT_USER_ERROR, self._said[min(mistaken)][1])
        if self._killed_on_request:
            return Outcome(self.name, EXIT_STOPPED, "killed on request; the last checkpoint stands on disk")
        return Outcome(self.name, EXIT_FAULT, self._blame(codes))

    def _blame(self, codes: Mapping[int | None, int]) -> str:
        """Which rank failed first, how, and the last lines of its log."""
        silent = [rank for rank in range(self.ranks) if rank not in self._said]
        faulty = [rank for rank, (code, _) in self._said.items() if code == EXIT_FAULT]
        ranks = {pid: rank for rank, pid in self._ranks.items()} | {p.popen.pid: p.rank for p in self._processes}
        # a rank that was killed tells nothing; the others then fail because it is gone
        first = [rank for rank in map(ranks.get, self._ended) if rank in silent or rank in faulty]
        missed = [rank for rank in silent if rank in self._missed and first[:1] != [rank]]
        rank = next(iter([*missed, *first, *faulty, *silent]), 0)
        how = end_in_words(codes.get(rank, codes.get(None, 1)))
        if missed:  # and ended here, by our hand
            how = "no longer answered the others"
        elif rank in silent and None in codes:
            how = f"died ({self.starter[0] if self.starter else 'mpiexec'} ended with code {codes[None]})"
        log = self.logs / f"rank-{rank}.log"
        last = log.read_text(errors="replace").splitlines() if log.is_file() else []
        last = last or [line for process in self._processes for line in process.other]
        shown = "\n".join(f"    {line}" for line in last[-LAST_LINES:])
        return f"{self.name}: rank {rank} of {self.ranks} {how}; its log {log} ends with\n{shown}"


def tethered(command: Sequence[str]) -> list[str]:
    """`command` such that the kernel kills it when this process ends."""
    return [sys.executable, "-c", _TETHER, str(os.getpid()), *command]


def end_in_words(code: int) -> str:
    """``was killed by SIGKILL`` or ``ended with exit code 1``."""
    names = {number.value: number.name for number in signal.Signals}
    return f"ended with exit code {code}" if code >= 0 else f"was killed by {names.get(-code, f'signal {-code}')}"


def find_mpiexec() -> str:
    """The mpiexec beside this Python, in the package mpich, or else in PATH. Raises UserError: there is none."""
    places = [str(Path(sys.executable).parent / "mpiexec")]
    with suppress(metadata.PackageNotFoundError):
        places += [str(file.locate()) for file in metadata.files("mpich") or () if file.name == "mpiexec"]
    for place in (*places, "mpiexec"):
        if found := shutil.which(place):
            return found
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
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
