"""The last words of a job: whose they are, and that nobody else's replace them."""

import json
import os
from pathlib import Path

from hpc_cpd.cluster.job_record import begin_job, end_job, read_job_record

LOG = Path("rank-0.log")


def become(monkeypatch, job: str, restart: int) -> None:
    monkeypatch.delenv("HPC_CPD_LAUNCHER", raising=False)
    monkeypatch.setenv("HPC_CPD_JOB", job)
    monkeypatch.setenv("HPC_CPD_RESTART", str(restart))


def test_every_start_is_counted_once(tmp_path, monkeypatch):
    numbers = []
    for job, restart in (("7", 0), ("7", 0), ("7", 1), ("8", 0)):
        become(monkeypatch, job, restart)
        begin_job(tmp_path, LOG)
        numbers.append(read_job_record(tmp_path).number)
    assert numbers == [1, 1, 2, 3]


def test_the_first_word_of_a_start_counts_and_a_replaced_start_has_none(tmp_path, monkeypatch):
    become(monkeypatch, "7", 0)
    begin_job(tmp_path, LOG)
    become(monkeypatch, "7", 1)
    begin_job(tmp_path, LOG)
    become(monkeypatch, "7", 0)
    end_job(tmp_path, LOG, 1, "the old one")
    assert read_job_record(tmp_path).code is None
    become(monkeypatch, "7", 1)
    end_job(tmp_path, LOG, 1, "the cause")
    end_job(tmp_path, LOG, 1, "connection closed by peer")
    assert (read_job_record(tmp_path).code, read_job_record(tmp_path).sentence) == (1, "the cause")


def test_a_launch_that_is_refused_leaves_the_word_to_the_one_at_work(tmp_path, monkeypatch):
    monkeypatch.delenv("HPC_CPD_JOB", raising=False)
    monkeypatch.setenv("HPC_CPD_LAUNCHER", "11")
    begin_job(tmp_path, LOG)
    monkeypatch.setenv("HPC_CPD_LAUNCHER", "12")
    end_job(tmp_path, LOG, 2, "another works there")
    assert read_job_record(tmp_path).code is None


def test_a_damaged_file_is_no_attempt(tmp_path):
    (tmp_path / "attempt.json").write_text('{"number": 1}')
    assert read_job_record(tmp_path) is None


def test_the_seconds_of_earlier_starts_are_carried_over(tmp_path, monkeypatch):
    clock = iter([1000.0, 1100.0, 2000.0, 3000.0, 3005.0])
    monkeypatch.setattr("hpc_cpd.cluster.job_record.time.time", lambda: next(clock))
    become(monkeypatch, "7", 0)
    begin_job(tmp_path, LOG)
    end_job(tmp_path, LOG, 3, "stopped")  # after 100 s
    become(monkeypatch, "7", 1)
    begin_job(tmp_path, LOG)  # saves after 40 s, is killed later
    (tmp_path / "checkpoints" / "20").mkdir(parents=True)
    os.utime(tmp_path / "checkpoints" / "20", (2040, 2040))
    become(monkeypatch, "8", 0)
    begin_job(tmp_path, LOG)
    end_job(tmp_path, LOG, 0, "")
    last = read_job_record(tmp_path)
    assert (last.seconds_before, last.ended - last.started) == (140.0, 5.0)


def test_a_file_of_an_earlier_version_is_read_and_its_unknown_seconds_stay_unknown(tmp_path, monkeypatch):
    old = {"who": "job 5 restart 0", "job": "5", "restart": 0, "host": "a", "log": "l", "started": 10.0, "ended": 30.0}
    for number, known in ((1, 20.0), (2, None)):
        (tmp_path / "attempt.json").write_text(json.dumps({"number": number, "code": 3, **old}))
        assert read_job_record(tmp_path).number == number
        become(monkeypatch, "9", 0)
        begin_job(tmp_path, LOG)
        assert read_job_record(tmp_path).seconds_before == known
