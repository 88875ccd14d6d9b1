"""The stop flag, and who a rank is."""

import os
import signal

import pytest

from hpc_cpd.cluster.preemption import STOP_SIGNALS, StopFlag
from hpc_cpd.cluster.schedulers.base import RankInfo, find_rank, scheduler_of
from hpc_cpd.config import load_config
from hpc_cpd.run.job import JobStart
from hpc_cpd.worker import rendezvous


@pytest.fixture
def handlers():
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_sets_the_flag_and_nothing_else(handlers, number):
    stop = StopFlag().install()
    assert not stop()
    os.kill(os.getpid(), number)
    assert stop() and stop.count == 1 and stop.last == number


def test_our_launcher_is_believed_before_the_slurm_job_around_it():
    step = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "5"}
    ours = {"HPC_CPD_LAUNCHER": "77", "HPC_CPD_RANKS": "2"}
    assert find_rank({**step, **ours, "RANK": "1", "LOCAL_RANK": "1"}) == RankInfo(1, 2, 1, launcher=77)
    assert find_rank({**ours, "PMI_RANK": "1"}) == RankInfo(1, 2, 1, launcher=77)  # mpiexec names no local rank
    slurm = RankInfo(3, 4, 1, scheduler="slurm", job=JobStart("5"))
    assert find_rank(step) == slurm and slurm.own_job
    inside = find_rank({**step, **ours, "HPC_CPD_STARTER": "slurm"})  # our launcher had srun start the ranks
    assert (inside.rank, inside.launcher, inside.scheduler, inside.own_job) == (3, 77, "slurm", False)


@pytest.mark.parametrize(
    ("more", "job"),
    [
        ({}, JobStart("12")),
        ({"SLURM_RESTART_COUNT": "3"}, JobStart("12", 3)),
        ({"SLURM_ARRAY_JOB_ID": "10", "SLURM_ARRAY_TASK_ID": "0", "SLURM_RESTART_COUNT": "1"}, JobStart("10_0", 1)),
    ],
)
def test_a_rank_of_a_slurm_step_knows_its_job_and_which_start_of_it_this_is(more, job):
    assert find_rank({"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_JOB_ID": "12", **more}).job == job


def test_a_batch_script_is_no_rank_of_a_step():
    # Slurm sets these in the batch script too: taken for a step, one process would wait for three others
    batch = {"SLURM_JOB_ID": "5", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_RESTART_COUNT": "2"}
    assert find_rank(batch) == RankInfo() == find_rank({})
    assert RankInfo().job == JobStart(None, 0) and not RankInfo().own_job


def test_all_ranks_of_a_slurm_step_meet_at_the_first_host(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[07-09,12]")
    monkeypatch.setenv("SLURM_JOB_ID", "4021")
    slurm = scheduler_of(load_config(None), "slurm")
    ports = set()
    for rank in range(4):
        names = rendezvous(RankInfo(rank, 4, rank % 2, scheduler="slurm"), slurm)
        assert names["MASTER_ADDR"] == "node07"
        assert (names["RANK"], names["WORLD_SIZE"], names["LOCAL_RANK"]) == (str(rank), "4", str(rank % 2))
        ports.add(names["MASTER_PORT"])
    assert len(ports) == 1
    monkeypatch.setenv("SLURM_JOB_ID", "4022")
    assert {rendezvous(RankInfo(0, 4, 0, scheduler="slurm"), slurm)["MASTER_PORT"]} != ports
