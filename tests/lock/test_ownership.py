"""Whose a lock is: jobs and their later starts, the folders it speaks for, and when it is lost."""

import os
import socket
import threading
import time
from collections.abc import Callable

import pytest

from hpc_cpd.errors import LockLost, UserError
from hpc_cpd.run import lock as lock_module
from hpc_cpd.run.lock import Lock
from hpc_cpd.run.metrics_log import MetricsLog
from hpc_cpd.run.publish import atomic_folder, mark_done, publish_folder, read_json, write_bytes, write_json
from tests.lock.owners import as_job, eventually, owning, write_lock


def test_the_later_start_takes_over_at_once_and_the_earlier_one_publishes_no_more(tmp_path, monkeypatch, fast):
    folder, elsewhere = tmp_path / "work", tmp_path / "elsewhere"
    as_job(monkeypatch, JOB="5")
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
        with owning(folder, HPC_CPD_RESTART="1") as later:
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
            assert read_json(earlier.path)["restart"] == 1
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
        ({"JOB": "5", "RESTART": "1"}, {"job": "5", "restart": 1}),
        ({"JOB": "5"}, {"job": "5", "restart": 1}),
        ({"JOB": "6", "RESTART": "2"}, {"job": "5", "restart": 1}),
        ({"RESTART": "2"}, {"job": None, "restart": 0}),
        ({"JOB": "5", "RESTART": "2"}, {}),
        ({"JOB": "5_1", "RESTART": "2"}, {"job": "5_2", "restart": 1}),
    ],
    ids=["same start", "earlier start", "other job", "no job", "owner of old", "other element"],
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
        ({"JOB": "12"}, "12", 0),
        ({"JOB": "12_0", "RESTART": "3"}, "12_0", 3),
        ({}, None, 0),
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
    told: list[bool] = []
    with Lock(tmp_path, "the work", on_lost=lambda: told.append(True)) as lock:
        lock.path.unlink()
        with pytest.raises(LockLost, match="deleted"):
            write_json(tmp_path / "file.json", 2)
        eventually(lambda: bool(told))
    assert not list(tmp_path.iterdir())


def test_a_lock_that_is_put_back_within_a_moment_is_not_lost(tmp_path):
    with Lock(tmp_path, "the work") as lock:
        os.rename(lock.path, tmp_path / "caught")
        timer = threading.Timer(0.3, os.rename, (tmp_path / "caught", lock.path))
        timer.start()
        write_json(tmp_path / "file.json", 1)
        timer.join()
        assert read_json(tmp_path / "file.json") == 1


def test_the_heart_of_the_former_owner_does_not_keep_the_lock_of_the_next_one_alive(tmp_path, fast):
    with Lock(tmp_path, "the work"):
        path = write_lock(tmp_path)
        os.utime(path, (1e9, 1e9))
        time.sleep(0.7)
        assert path.stat().st_mtime == 1e9
    assert path.is_file()


# ---- who is alive
