"""Owners of locks for the tests: other processes, other hosts, hearts that beat."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import pytest

from hpc_cpd.run.lock import process_space
from hpc_cpd.run.publish import read_json

HOUR = 3600.0
ANSWERS = nullcontext()
# A process that takes the lock as soon as it may, says so, and holds it until its input ends.
OWNER = """
import socket, sys
from pathlib import Path
from hpc_cpd.run import lock
from hpc_cpd.errors import UserError

folder, host, heartbeat, stale = sys.argv[1:]
lock.HEARTBEAT_SECONDS, lock.STALE_SECONDS = float(heartbeat), float(stale)
if host:
    socket.gethostname = lambda: host
print("ready", flush=True)
sys.stdin.readline()
try:
    with lock.Lock(Path(folder), "the work"):
        print("mine", flush=True)
        sys.stdin.read()
except UserError as error:
    print(f"refused: {error}", flush=True)
"""


def as_job(monkeypatch: pytest.MonkeyPatch, **names: str | None) -> None:
    """Make this process a rank of a job: JOB, and RESTART where it was started again."""
    for name, value in names.items():
        if value is None:
            monkeypatch.delenv(f"HPC_CPD_{name}", raising=False)
        else:
            monkeypatch.setenv(f"HPC_CPD_{name}", value)


@contextmanager
def starting(folder: Path, host: str = "", **environment: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", OWNER, str(folder), host, "0.2", "1.2"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, env=os.environ | environment, stdin=pipe, stdout=pipe, text=True)
    try:
        assert heard(process) == "ready"
        yield process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def owning(folder: Path, host: str = "", **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of `folder`, on this host or one of another name."""
    with starting(folder, host, **environment) as process:
        tell(process)
        assert heard(process) == "mine"
        yield process


def tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def heard(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def write_lock(folder: Path, host: str = "elsewhere", token: str = "another", **more: object) -> Path:
    """A lock file without a process."""
    folder.mkdir(exist_ok=True)
    path = folder / "lock.json"
    path.write_text(json.dumps({"host": host, "space": process_space(), "pid": 77, "born": 1, "token": token, **more}))
    return path


@contextmanager
def beating(path: Path, offset: float, server: AbstractContextManager[object] = ANSWERS) -> Iterator[None]:
    """The heart of an owner elsewhere, on a file server whose clock is `offset` seconds ahead."""
    over = threading.Event()

    def beat() -> None:
        while not over.is_set():
            with server:
                now = time.time() + offset
                os.utime(path, (now, now))
            over.wait(0.05)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def token_in(folder: Path) -> str:
    token: str = read_json(folder / "lock.json")["token"]
    return token


def eventually(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)
