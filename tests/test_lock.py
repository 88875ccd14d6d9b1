"""One owner per folder, whatever the clocks say, and none that publishes after it was told that it is over."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import pytest

from hpc_cpd import lock as lock_module
from hpc_cpd.errors import LockLost, StopRequested, UserError
from hpc_cpd.lock import Lock
from hpc_cpd.run import MetricsLog, atomic_folder, mark_done, publish_folder, read_json, write_bytes, write_json

HOUR = 3600.0
ANSWERS = nullcontext()
# A process that takes the lock as soon as it may, says so, and holds it until its input ends.
OWNER = """
import socket, sys
from pathlib import Path
from hpc_cpd import lock
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


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hearts of this process beat 50 times as fast. It does not wait longer than 1.2 s for one that stands still."""
    monkeypatch.setattr(lock_module, "HEARTBEAT_SECONDS", 0.2)
    monkeypatch.setattr(lock_module, "STALE_SECONDS", 1.2)


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)


def as_job(monkeypatch: pytest.MonkeyPatch, **names: str | None) -> None:
    """Make this process a Slurm step, as far as the environment tells."""
    for name, value in {"STEP_ID": "0", **names}.items():
        if value is None:
            monkeypatch.delenv(f"SLURM_{name}", raising=False)
        else:
            monkeypatch.setenv(f"SLURM_{name}", value)


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
    path.write_text(json.dumps({"host": host, "pid": 77, "born": 1, "token": token, **more}))
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


# ---- fencing


def test_the_later_start_takes_over_at_once_and_the_earlier_one_publishes_no_more(tmp_path, monkeypatch, fast):
    folder, elsewhere = tmp_path / "work", tmp_path / "elsewhere"
    as_job(monkeypatch, JOB_ID="5")
    told: list[bool] = []
    earlier = Lock(folder, "the work", on_lost=lambda: told.append(True))
    with earlier:
        write_json(folder / "old.json", 1)
        with atomic_folder(folder / "model") as model:
            write_json(model / "weights.json", 1)
        metrics = MetricsLog(folder / "metrics.jsonl")
        metrics.append(1)
        prepared = folder / "prepared"
        prepared.mkdir()
        foreign = folder / ".model.later.tmp"  # what the later start has begun to write
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        del before[earlier.path]
        # here, alive and beating: nothing but the restart count speaks for the newcomer
        with owning(folder, SLURM_RESTART_COUNT="1") as later:
            foreign.mkdir()
            attempts: list[Callable[[], object]] = [
                lambda: write_bytes(folder / "new", b"2"),
                lambda: write_json(folder / "old.json", 2),
                lambda: write_json(folder / "deep" / "er.json", 2),
                lambda: mark_done(folder, {}),
                lambda: publish_folder(prepared, folder / "published"),
                lambda: publish_folder(prepared, folder / "model"),
                lambda: atomic_folder(folder / "model").__enter__(),
                lambda: metrics.append(2),
            ]
            for attempt in attempts:
                with pytest.raises(LockLost) as lost:
                    attempt()
                for part in ("the work was taken over", f"process {later.pid} on", "job 5", "nothing was written"):
                    assert part in str(lost.value)
            assert foreign.is_dir()
            write_json(elsewhere / "file.json", 2)
            with atomic_folder(elsewhere / "model") as model:
                write_json(model / "weights.json", 2)
            eventually(lambda: bool(told))
            assert earlier.lost and read_json(earlier.path)["restart"] == 1
            eventually(lambda: not earlier._thread.is_alive())
            assert told == [True]
            earlier.__exit__()
            assert read_json(earlier.path)["pid"] == later.pid  # leaving does not take it from the other
        now = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path != earlier.path}
        assert now == before
        assert read_json(elsewhere / "file.json") == read_json(elsewhere / "model" / "weights.json") == 2


@pytest.mark.parametrize(
    ("names", "owner"),
    [
        ({"JOB_ID": "5", "RESTART_COUNT": "1"}, {"job": "5", "restart": 1}),
        ({"JOB_ID": "5"}, {"job": "5", "restart": 1}),
        ({"JOB_ID": "6", "RESTART_COUNT": "2"}, {"job": "5", "restart": 1}),
        ({"JOB_ID": "5", "RESTART_COUNT": "2", "STEP_ID": None}, {"job": None, "restart": 0}),
        ({"JOB_ID": "5", "RESTART_COUNT": "2"}, {}),
        (
            {"JOB_ID": "7", "ARRAY_JOB_ID": "5", "ARRAY_TASK_ID": "1", "RESTART_COUNT": "2"},
            {"job": "5_2", "restart": 1},
        ),
    ],
    ids=["same start", "earlier start", "other job", "no step", "owner of old", "other element"],
)
def test_nobody_else_is_a_later_start(tmp_path, monkeypatch, names, owner):
    born = lock_module._birth(os.getppid())
    path = write_lock(tmp_path, host=socket.gethostname(), pid=os.getppid(), born=born, **owner)
    before = path.read_bytes()
    as_job(monkeypatch, **names)
    with pytest.raises(UserError, match="being worked on"), Lock(tmp_path, "the work"):
        pass
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("names", "job", "restart"),
    [
        ({"JOB_ID": "12"}, "12", 0),
        ({"JOB_ID": "12", "RESTART_COUNT": "3"}, "12", 3),
        ({"JOB_ID": "14", "ARRAY_JOB_ID": "12", "ARRAY_TASK_ID": "0", "RESTART_COUNT": "1"}, "12_0", 1),
        ({"JOB_ID": "12", "RESTART_COUNT": "3", "STEP_ID": None}, None, 0),
    ],
)
def test_the_lock_tells_the_job_and_its_start(tmp_path, monkeypatch, names, job, restart):
    as_job(monkeypatch, **names)
    with Lock(tmp_path, "the work"):
        owner = read_json(tmp_path / "lock.json")
    assert (owner["job"], owner["restart"]) == (job, restart)
    assert (owner["host"], owner["pid"]) == (socket.gethostname(), os.getpid())


def test_a_lock_speaks_for_the_folders_it_was_told_and_for_no_neighbour(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "work")
    with Lock(tmp_path / "work", "the work", also=[tmp_path / "products"]):
        write_lock(tmp_path / "work")
        for name in ("work", "link", "products", "products/deep", "work/../work"):
            with pytest.raises(LockLost):
                write_json(tmp_path / name / "file.json", 1)
        write_json(tmp_path / "workshop" / "file.json", 1)
    write_json(tmp_path / "work" / "file.json", 1)  # who holds no lock is not asked for one


def test_a_deleted_lock_is_lost(tmp_path, fast):
    lock = Lock(tmp_path, "the work")
    with lock:
        lock.path.unlink()
        with pytest.raises(LockLost, match="deleted"):
            write_json(tmp_path / "file.json", 2)
        eventually(lambda: lock.lost)
    assert not list(tmp_path.iterdir())


def test_a_lock_that_is_put_back_within_a_moment_is_not_lost(tmp_path):
    with Lock(tmp_path, "the work") as lock:
        os.rename(lock.path, tmp_path / "caught")
        timer = threading.Timer(0.3, os.rename, (tmp_path / "caught", lock.path))
        timer.start()
        write_json(tmp_path / "file.json", 1)
        timer.join()
        assert not lock.lost and read_json(tmp_path / "file.json") == 1


def test_the_heart_of_the_former_owner_does_not_keep_the_lock_of_the_next_one_alive(tmp_path, fast):
    with Lock(tmp_path, "the work"):
        path = write_lock(tmp_path)
        os.utime(path, (1e9, 1e9))
        time.sleep(0.7)
        assert path.stat().st_mtime == 1e9
    assert path.is_file()


# ---- who is alive


@pytest.mark.parametrize("offset", [-HOUR, 0.0, HOUR])
def test_a_beating_heart_is_respected_whatever_the_clock_says(tmp_path, fast, capsys, offset):
    path = write_lock(tmp_path)
    with beating(path, offset):
        with pytest.raises(UserError) as refused, Lock(tmp_path, "the work"):
            pass
        assert token_in(tmp_path) == "another"
    for part in ("the work", "process 77 on elsewhere", str(path), "wait for it"):
        assert part in str(refused.value)


@pytest.mark.parametrize(("offset", "least"), [(-HOUR, 0.5), (-0.5, 0.6), (0.0, 1.1), (HOUR, 1.2)])
def test_a_heart_that_stands_still_is_watched_long_enough_and_then_given_up(tmp_path, fast, offset, least):
    path = write_lock(tmp_path)
    now = time.time() + offset
    os.utime(path, (now, now))
    began = time.monotonic()
    with Lock(tmp_path, "the work") as lock:
        assert time.monotonic() - began >= least
        assert token_in(tmp_path) == lock.token
        assert [path.name for path in tmp_path.iterdir()] == ["lock.json"]
    assert not list(tmp_path.iterdir())


def test_time_in_which_nobody_could_look_says_nothing_about_the_owner(tmp_path, fast, monkeypatch):
    path = write_lock(tmp_path)
    server = threading.Lock()  # while somebody holds it, the file server is away
    look, looks = lock_module._look, []

    def slow_look(*words):
        looks.append(words)
        if len(looks) == 5:
            time.sleep(1.6)
        return look(*words)

    def serve(*words):
        with server:
            return slow_look(*words)

    monkeypatch.setattr(lock_module, "_look", serve)
    with pytest.raises(UserError), beating(path, 0.0, server), Lock(tmp_path, "the work"):
        pass
    # and the other way round: nothing beats, and one long look is not enough to give the owner up
    looks.clear()
    began = time.monotonic()
    with Lock(tmp_path, "the work"):
        assert time.monotonic() - began > 1.6 + 0.3


def test_a_dead_process_of_this_host_does_not_keep_anybody_waiting(tmp_path):
    with owning(tmp_path) as owner:
        owner.kill()
        owner.wait()
        assert token_in(tmp_path)
        with Lock(tmp_path, "the work") as lock:  # with real durations: a wait would be half a minute
            assert token_in(tmp_path) == lock.token
    # the process id lives, but it belongs to another process
    write_lock(tmp_path, host=socket.gethostname(), pid=os.getppid(), born=1)
    with Lock(tmp_path, "the work") as lock:
        assert token_in(tmp_path) == lock.token
    write_lock(tmp_path, host=socket.gethostname(), pid=os.getpid(), born=lock_module._birth(os.getpid()))
    with Lock(tmp_path, "the work") as lock:
        assert token_in(tmp_path) == lock.token


def test_a_living_process_of_this_host_is_respected_at_once_even_without_a_heartbeat(tmp_path):
    with owning(tmp_path) as owner:
        os.utime(tmp_path / "lock.json", (0, 0))
        began = time.monotonic()
        with pytest.raises(UserError, match=f"process {owner.pid} on"), Lock(tmp_path, "the work"):
            pass
        assert time.monotonic() - began < 5
        assert read_json(tmp_path / "lock.json")["pid"] == owner.pid


def test_a_damaged_lock_is_given_up_like_a_dead_one(tmp_path, fast):
    for text in ("", '{"host": "elsew', "[1]"):
        (tmp_path / "lock.json").write_text(text)
        with Lock(tmp_path, "the work") as lock:
            assert token_in(tmp_path) == lock.token


# ---- one winner


@pytest.mark.parametrize("host", ["", "elsewhere"])
def test_of_many_processes_that_take_over_at_once_one_becomes_the_owner(tmp_path, host):
    with owning(tmp_path, host) as dead:
        dead.kill()
        dead.wait()
    hosts = [f"host{number}" if host else "" for number in range(4)]
    newcomers = [starting(tmp_path, name) for name in hosts]
    processes = [newcomer.__enter__() for newcomer in newcomers]
    try:
        for process in processes:
            tell(process)
        answers = [heard(process) for process in processes]
        winners = [process for process, answer in zip(processes, answers, strict=True) if answer == "mine"]
        assert len(winners) == 1, answers
        assert read_json(tmp_path / "lock.json")["pid"] == winners[0].pid
        named = f"process {winners[0].pid} on {hosts[processes.index(winners[0])]}"
        assert all(named in answer for answer in answers if answer != "mine")
    finally:
        for newcomer in newcomers:
            newcomer.__exit__(None, None, None)


def test_of_many_threads_that_take_over_at_once_one_becomes_the_owner(tmp_path, fast):
    size = 8
    for number in range(100):
        folder = tmp_path / str(number)
        write_lock(folder, host=socket.gethostname(), pid=2**22 + 1)  # gone
        together, won = threading.Barrier(size), []

        def take(folder: Path = folder, together: threading.Barrier = together, won: list[str] = won) -> None:
            together.wait()
            try:
                with Lock(folder, "the work") as lock:
                    won.append(lock.token)
                    together.wait()  # until everybody had an answer
            except UserError:
                together.wait()

        threads = [threading.Thread(target=take) for _ in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert not list(folder.iterdir())


@pytest.mark.parametrize("fresh", ["another owner", "a later beat"])
def test_a_lock_caught_too_late_is_put_back(tmp_path, monkeypatch, fast, fresh):
    path = write_lock(tmp_path, token="dead")
    rename, caught = os.rename, []

    def late(source, target):  # in the instant before the rename the owner becomes another, or wakes up
        if not caught:
            if fresh == "another owner":
                replacement = tmp_path / "fresh"
                owner = {"host": socket.gethostname(), "pid": os.getppid(), "token": "fresh"}
                replacement.write_text(json.dumps(owner | {"born": lock_module._birth(os.getppid())}))
                os.replace(replacement, path)
            else:
                os.utime(path)
        caught.append(target)
        rename(source, target)

    monkeypatch.setattr(lock_module.os, "rename", late)
    if fresh == "another owner":
        with pytest.raises(UserError, match=f"process {os.getppid()} on"), Lock(tmp_path, "the work"):
            pass
        assert token_in(tmp_path) == "fresh"
        assert os.listdir(tmp_path) == ["lock.json"]
    else:
        with Lock(tmp_path, "the work"):
            assert len(caught) == 2  # the first was put back, and watched from the start


def test_somebody_killed_while_taking_over_does_not_block_the_next(tmp_path, fast):
    write_lock(tmp_path, host=socket.gethostname(), pid=2**22 + 1)
    gate = tmp_path / ".lock.takeover"
    gate.write_text((tmp_path / "lock.json").read_text())
    began = time.monotonic()
    with Lock(tmp_path, "the work") as lock:
        assert time.monotonic() - began >= 0.5  # it might be at work
        assert token_in(tmp_path) == lock.token
    assert not list(tmp_path.iterdir())
    # nor does it keep a free lock from being taken, and the owner that cannot pass the gate still leaves
    gate.write_text("")
    with Lock(tmp_path, "the work"):
        pass
    with Lock(tmp_path, "the work"):
        assert not gate.exists()


# ---- waiting


def test_a_waiting_newcomer_gets_the_lock_when_the_owner_leaves_and_says_for_whom_it_waits(tmp_path, fast, capsys):
    for host in ("", "elsewhere"):
        with owning(tmp_path, host) as owner:
            timer = threading.Timer(2.0, owner.stdin.close)
            timer.start()
            began = time.monotonic()
            with Lock(tmp_path, "the work", wait_seconds=50) as lock:
                assert 1.5 < time.monotonic() - began < 15
                assert token_in(tmp_path) == lock.token
            timer.join()
            owner.stdin = None
        (line,) = capsys.readouterr().err.splitlines()
        assert f"waiting for process {owner.pid} on {host or socket.gethostname()}" in line
        assert str(tmp_path / "lock.json") in line and "50 s" in line


def test_a_waiting_newcomer_takes_over_when_the_owner_dies(tmp_path, fast):
    with owning(tmp_path, "elsewhere") as owner:
        threading.Timer(0.5, owner.kill).start()
        with Lock(tmp_path, "the work", wait_seconds=50) as lock:
            assert token_in(tmp_path) == lock.token


@pytest.mark.parametrize("host", ["", "elsewhere"])
def test_waiting_ends_where_it_was_told_to(tmp_path, fast, host):
    with owning(tmp_path, host) as owner:
        began = time.monotonic()
        with pytest.raises(UserError, match=f"process {owner.pid} on"), Lock(tmp_path, "the work", wait_seconds=2):
            pass
        assert 2 <= time.monotonic() - began < 10
        asked = time.monotonic() + 0.3
        with pytest.raises(StopRequested), Lock(tmp_path, "it", wait_seconds=50, stop=lambda: time.monotonic() > asked):
            pass
        assert read_json(tmp_path / "lock.json")["pid"] == owner.pid


def test_the_owner_keeps_its_heart_beating_and_leaves_nothing_behind(tmp_path, fast):
    with Lock(tmp_path, "the work") as lock:
        first = lock.path.stat().st_mtime_ns
        eventually(lambda: lock.path.stat().st_mtime_ns != first)
    assert not list(tmp_path.iterdir())
