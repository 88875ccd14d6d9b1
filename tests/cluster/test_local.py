"""Ranks on this machine: signals, deaths, exit codes, and that nothing outlives a killed launcher."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpc_cpd.cluster import ranks
from hpc_cpd.cluster.preemption import StopFlag
from hpc_cpd.cluster.ranks import RankedJob
from hpc_cpd.cluster.schedulers.local import supervise
from hpc_cpd.errors import UserError

ROOT = Path(__file__).parents[2]
KINDS = [pytest.param([], id="ranks"), pytest.param(["mpi"], id="mpiexec")]


def start(act: str, folder: Path, mpi: list[str], ranks: int = 2) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.cluster.launcher", act, str(folder), str(ranks), *mpi]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def wait_until(condition: object, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def begun(folder: Path, ranks: int = 2) -> None:
    wait_until(lambda: all((folder / f"begun-{rank}").is_file() for rank in range(ranks)))


def alive(folder: Path) -> list[int]:
    """Ranks that still run: a killed child of init may stay a zombie for seconds."""
    pids = []
    for path in folder.glob("pid-*"):
        try:
            fields = Path(f"/proc/{path.read_text()}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] not in "ZX":
            pids.append(int(path.read_text()))
    return pids


@pytest.mark.parametrize(
    ("mpi", "number"),
    [([], signal.SIGUSR1), ([], signal.SIGINT), (["mpi"], signal.SIGTERM), (["mpi"], signal.SIGUSR2)],
)
def test_a_signal_to_the_launcher_stops_all_ranks_together_with_exit_code_3(tmp_path, mpi, number):
    launcher = start("wait", tmp_path, mpi)
    begun(tmp_path)
    launcher.send_signal(number)
    assert launcher.wait(60) == 3
    # each rank heard of it once, through the launcher alone, and saved
    assert [(tmp_path / f"saved-{rank}").read_text() for rank in (0, 1)] == ["1", "1"]
    assert not alive(tmp_path)


@pytest.mark.parametrize(("mpi", "number"), [([], signal.SIGTERM), (["mpi"], signal.SIGUSR2), (["mpi"], signal.SIGINT)])
def test_a_signal_to_the_whole_group_does_the_same(tmp_path, mpi, number):
    launcher = start("wait", tmp_path, mpi)
    begun(tmp_path)
    os.killpg(launcher.pid, number)
    assert launcher.wait(60) == 3
    assert [(tmp_path / f"saved-{rank}").read_text() for rank in (0, 1)] == ["1", "1"]


@pytest.mark.parametrize("mpi", KINDS)
@pytest.mark.parametrize("kill", [os.kill, os.killpg])
def test_nothing_outlives_a_killed_launcher(tmp_path, mpi, kill):
    launcher = start("wait", tmp_path, mpi)
    begun(tmp_path)
    assert len(alive(tmp_path)) == 2
    kill(launcher.pid, signal.SIGKILL)
    assert launcher.wait(10) == -signal.SIGKILL
    wait_until(lambda: not alive(tmp_path), 10)
    assert not list(tmp_path.glob("saved-*"))


@pytest.mark.parametrize("mpi", KINDS)
def test_a_signal_before_the_ranks_listen_is_not_lost(tmp_path, mpi):
    launcher = start("wait", tmp_path, mpi)
    wait_until(lambda: catches(launcher.pid, signal.SIGUSR1))
    wait_until(lambda: (tmp_path / "logs").is_dir())
    launcher.send_signal(signal.SIGUSR1)
    assert launcher.wait(60) == 3


def catches(pid: int, number: int) -> bool:
    """Whether the process has a handler for the signal."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(line.split()[1], 16) & (1 << (number - 1)))


@pytest.mark.parametrize(("mpi", "rank"), [([], 0), (["mpi"], 1)])
def test_a_killed_rank_ends_the_job_within_seconds_and_is_named(tmp_path, mpi, rank):
    begin = time.monotonic()
    launcher = start(f"killed-{rank}", tmp_path, mpi)
    _, errors = launcher.communicate(timeout=90)
    assert launcher.returncode == 1
    assert time.monotonic() - begin < 30
    assert f"rank {rank} of 2" in errors
    assert f"rank-{rank}.log" in errors and "noise of some library" in errors
    assert not alive(tmp_path)


@pytest.mark.slow
def test_a_rank_that_no_longer_answers_is_ended_and_named(tmp_path):
    launcher = start("stopped-1", tmp_path, [])
    _, errors = launcher.communicate(timeout=90)
    assert launcher.returncode == 1
    assert "rank 1 of 2 no longer answered the others" in errors and "rank-1.log" in errors
    assert not alive(tmp_path)


@pytest.mark.parametrize("mpi", KINDS)
def test_a_rank_with_a_traceback_is_named_and_its_last_lines_are_shown(tmp_path, mpi):
    launcher = start("fault-1", tmp_path, mpi)
    _, errors = launcher.communicate(timeout=90)
    assert launcher.returncode == 1
    assert "rank 1 of 2" in errors and "RuntimeError: an invariant was broken" in errors
    assert not alive(tmp_path)


@pytest.mark.parametrize(("mpi", "who"), [([], "1"), (["mpi"], "1"), (["mpi"], "all")])
def test_a_users_mistake_on_any_rank_is_one_sentence_and_exit_code_2(tmp_path, mpi, who):
    launcher = start(f"mistake-{who}", tmp_path, mpi)
    _, errors = launcher.communicate(timeout=90)
    assert launcher.returncode == 2
    first = "0" if who == "all" else who
    assert errors.strip() == f"the file of rank {first} is missing; make it"
    assert not alive(tmp_path)


@pytest.mark.parametrize("go_on", [False, True])
def test_after_a_mistake_no_other_job_is_begun_unless_it_was_said_to_go_on(tmp_path, go_on):
    def job(act: str) -> RankedJob:
        folder = tmp_path / act
        folder.mkdir()
        return RankedJob(act, [act, str(folder)], 1, False, folder / "logs", folder, module="tests.cluster.rank_worker")

    jobs = [job("mistake-0"), job("done")]
    outcomes = supervise(jobs, 1, StopFlag(), lambda name, line: None, go_on=go_on)
    assert [outcome.code for outcome in outcomes] == ([2, 0] if go_on else [2])


@pytest.mark.parametrize("mpi", KINDS)
def test_done_is_exit_code_0_and_only_rank_0s_progress_is_shown(tmp_path, mpi):
    launcher = start("done", tmp_path, mpi)
    output, _ = launcher.communicate(timeout=90)
    assert launcher.returncode == 0
    assert output.splitlines() == ["shown: stage 1: rank 0 of 2"]
    assert "noise" in (tmp_path / "logs" / "rank-1.log").read_text()


@pytest.mark.parametrize("who", ["1", "all"])
def test_under_srun_a_mistake_ends_all_ranks_and_is_told_once(tmp_path, who):
    # as under srun: no launcher of ours to gather the ranks' words, and mpiexec in srun's place
    mpiexec = str(Path(sys.executable).parent / "mpiexec")
    step = ["-env", "SLURM_STEP_ID", "0", "-env", "SLURM_STEP_NUM_TASKS", "2"]
    command = [mpiexec]
    for rank in ("0", "1"):
        names = [*step, "-env", "SLURM_PROCID", rank, "-env", "SLURM_LOCALID", rank]
        worker = [sys.executable, "-m", "tests.cluster.rank_worker", f"mistake-{who}", str(tmp_path), "mpi"]
        command += [*([":"] if rank == "1" else []), "-n", "1", *names, *worker]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    told = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("error: ")]
    assert told == [f"error: the file of rank {'0' if who == 'all' else who} is missing; make it"]
    assert not alive(tmp_path)


def test_mpiexec_is_sought_beside_python_in_its_package_and_in_the_path(tmp_path, monkeypatch):
    beside = ranks.find_mpiexec()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / "bin" / "python"))
    assert Path(ranks.find_mpiexec()).resolve() == Path(beside).resolve()  # that of the package mpich
    monkeypatch.setattr(ranks.metadata, "files", lambda name: None)
    other = tmp_path / "mpiexec"
    other.write_text("#!/bin/sh\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"no mpiexec.*pip install mpich.*--ranks 1"):
        ranks.find_mpiexec()  # a file that cannot be run is none
    other.chmod(0o755)
    assert ranks.find_mpiexec() == str(other)
