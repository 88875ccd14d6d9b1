"""The stop flag, and who a rank is."""

import os
import signal

import pytest

from hpc_cpd.cluster.preemption import STOP_SIGNALS, StopFlag
from hpc_cpd.worker import Place, find_place, rendezvous


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
    step = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"}
    ours = {"HPC_CPD_LAUNCHER": "77", "HPC_CPD_RANKS": "2"}
    assert find_place({**step, **ours, "RANK": "1", "LOCAL_RANK": "1"}) == Place(1, 2, 1, launcher=77)
    assert find_place({**ours, "PMI_RANK": "1"}) == Place(1, 2, 1, launcher=77)  # mpiexec names no local rank
    assert find_place(step) == Place(3, 4, 1, slurm=True)


def test_a_batch_script_is_no_rank_of_a_step():
    # Slurm sets these in the batch script too: taken for a step, one process would wait for three others
    assert find_place({"SLURM_JOB_ID": "5", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) == Place(0, 1, 0)
    assert find_place({}) == Place(0, 1, 0)


def test_all_ranks_of_a_slurm_step_meet_at_the_first_host(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[07-09,12]")
    environment = {"SLURM_JOB_ID": "4021"}
    ports = set()
    for rank in range(4):
        names = rendezvous(Place(rank, 4, rank % 2, slurm=True), environment)
        assert names["MASTER_ADDR"] == "node07"
        assert (names["RANK"], names["WORLD_SIZE"], names["LOCAL_RANK"]) == (str(rank), "4", str(rank % 2))
        ports.add(names["MASTER_PORT"])
    assert len(ports) == 1
    other = rendezvous(Place(0, 4, 0, slurm=True), {"SLURM_JOB_ID": "4022"})
    assert {other["MASTER_PORT"]} != ports
