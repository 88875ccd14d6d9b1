"""Taking over from the dead, waiting for the living."""

import json
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from hpc_cpd.errors import StopRequested, UserError
from hpc_cpd.run import lock as lock_module
from hpc_cpd.run.lock import Lock
from hpc_cpd.run.publish import read_json
from tests.lock.owners import (
    HOUR,
    beating,
    eventually,
    heard,
    owning,
    starting,
    tell,
    token_in,
    write_lock,
)


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


def test_a_process_id_of_another_container_says_nothing_about_its_owner(tmp_path, fast):
    """Containers may share the host's name: where its process is cannot be seen, its heartbeat can."""
    path = write_lock(tmp_path, host=socket.gethostname(), space="another", pid=2**22 + 1)
    with beating(path, 0.0), pytest.raises(UserError, match="being worked on"), Lock(tmp_path, "the work"):
        pass
    assert token_in(tmp_path) == "another"
    with Lock(tmp_path, "the work") as lock:  # the heart has stopped
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
                owner = {"host": socket.gethostname(), "space": lock_module.process_space(), "pid": os.getppid()}
                owner |= {"token": "fresh", "born": lock_module._birth(os.getppid())}
                replacement.write_text(json.dumps(owner))
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
