"""What every unit of a run is doing, where a real Slurm knows its jobs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc_cpd.cluster.status import snapshot
from hpc_cpd.cluster.submit import Submission
from hpc_cpd.run.paths import Run
from tests.cluster.half_done import (
    ONE,
    TWO,
    lock_of_another,
    new_run,
    submitted,
    units,
    write_attempt,
)
from tests.cluster.slurm_cluster import SlurmCluster

SMALL = ("--mem-per-cpu=10", "--output=/dev/null")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return new_run(tmp_path / "run")


@pytest.fixture
def site(slurm_site: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlurmCluster]:
    """The cluster, with this process on its login node."""
    for name in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(name, slurm_site.environment()[name])
    yield slurm_site
    slurm_site.run("scancel", "-t", "PENDING")
    slurm_site.run("scancel", "-f", "-s", "KILL", "-t", "RUNNING")
    slurm_site.run("scancel", "-t", "RUNNING")


def is_in(cluster: SlurmCluster, job: str, state: str) -> None:
    cluster.wait_for(lambda: cluster.state(job) == state, 20, f"job {job} is {state}")


def test_a_job_runs_and_the_one_after_it_waits_with_slurms_reason(site, run):
    job = site.submit(*SMALL, "--time=30", "-w", "n2", "--wrap", "sleep 100")
    after = site.submit(*SMALL, f"--dependency=afterok:{job}", "--wrap", "true")
    held = site.submit(*SMALL, "--hold", "--array=0-1", "--wrap", "true")
    submitted(run, one=job, two=f"{held}_1", stage_1=after)
    write_attempt(run.teacher(ONE), job=job, host="n2", number=3)
    is_in(site, job, "RUNNING")
    status = snapshot(run)
    one, two, stage, three, _ = status.units
    assert status.scheduler == "squeue"
    assert (one.state, one.job, one.node, one.restarts) == ("running", job, "n2", 2)
    assert one.seconds_left is not None and 1500 < one.seconds_left <= 1800
    assert (two.state, two.job, two.reason) == ("waiting", f"{held}_1", "JobHeldUser")
    assert (stage.state, stage.reason, stage.seconds_left) == ("waiting", "Dependency", None)
    assert three.state == "not started" and status.next == f"python -m hpc_cpd.launch --stage all --run {run.folder}"
    submitted(run, one=job, two=f"{held}_1", stage_1=after, three=after, stage_2=after)
    assert snapshot(run).next == f"hpc-cpd status {run.folder} --watch"


def test_a_lock_that_a_requeued_job_left_behind_does_not_make_it_run(site, run):
    job = site.submit(*SMALL, "--hold", "--wrap", "true")
    submitted(run, one=job, stage_1=job)
    lock_of_another(run.teacher(ONE), job)
    lock_of_another(run.stage(1), "77")  # an earlier link of its chain, which Slurm need not know
    found = units(run)
    assert found[f"teacher {ONE}"].state == "waiting"
    assert (found["stage 1"].state, found["stage 1"].job, found["stage 1"].node) == ("running", "77", "node7")


def test_a_job_that_dies_without_a_word_fails_with_slurms_word_and_the_end_of_its_log(site, run):
    logs = run.logs / "slurm"
    logs.mkdir(parents=True)
    script = "echo 'python: command not found'; exit 7"
    job = site.submit("--mem-per-cpu=10", f"--output={logs}/%j_0_log.out", "--wrap", script)
    is_in(site, job, "FAILED")
    log = logs / f"{job}_0_log.out"
    site.wait_for(lambda: log.is_file() and log.read_text(), 10)
    submitted(run, one=job, two=Submission(job, failures=2))
    write_attempt(run.teacher(TWO), job=job, code=1, sentence="RuntimeError: it broke")
    one, two, *_ = snapshot(run).units
    assert (one.state, one.failures, one.log) == ("failed", 1, str(log))
    assert one.error == "FAILED: killed without a word; its log ends with: python: command not found"
    assert (two.state, two.failures, two.error) == ("given up", 3, "RuntimeError: it broke")
    log.write_text("slurmstepd-n1: error: Detected 1 oom_kill event in StepId=1.0.\nsrun: error: task 0: Killed\n")
    one, *_ = snapshot(run).units
    assert one.error is not None and "raise cluster.scheduler.memory_per_cpu" in one.error


def test_a_job_that_slurm_ended_says_who_did_it_and_what_to_do(site, run):
    lost = site.submit(*SMALL, "--no-requeue", "-w", "n4", "--wrap", "sleep 100")
    job = site.submit(*SMALL, "-w", "n3", "--wrap", "sleep 100")
    after = site.submit(*SMALL, f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes", "--wrap", "true")
    submitted(run, one=job, two=lost, stage_1=after)
    for task, one in ((ONE, job), (TWO, lost)):
        is_in(site, one, "RUNNING")
        write_attempt(run.teacher(task), job=one, host="n3")
    lock_of_another(run.teacher(ONE), job)  # its heart stopped a moment ago
    site.run("scancel", job)
    site.run("scontrol", "update", "nodename=n4", "state=down", "reason=test")
    is_in(site, job, "CANCELLED")
    is_in(site, after, "CANCELLED")
    is_in(site, lost, "NODE_FAIL")
    site.up()  # returns when all nodes are ready again
    one, two, stage, *_ = snapshot(run).units
    assert (one.state, one.reason) == ("stopped", "CANCELLED") and "somebody cancelled it" in str(one.error)
    assert (two.state, two.reason) == ("stopped", "NODE_FAIL") and "launch again" in str(two.error)
    assert (stage.state, stage.reason, stage.error) == ("not started", "DependencyNeverSatisfied", None)


def test_what_slurm_has_forgotten_is_told_from_the_files(site, run):
    submitted(run, one="900001", two="900002", stage_1="900003_7")
    write_attempt(run.teacher(ONE), job="900001", code=1, sentence="ValueError: no", host="n1")
    write_attempt(run.stage(1), job="900003_7", code=3, sentence="saved", host="n1")
    status = snapshot(run)
    one, two, stage, *_ = status.units
    assert status.scheduler == "squeue" and status.notes == []
    assert (one.state, one.error, one.node) == ("failed", "ValueError: no", "n1")
    assert (two.state, two.reason) == ("not started", "forgotten by slurm")
    assert (stage.state, stage.error) == ("stopped", None)


def test_what_was_started_here_after_its_job_is_told_by_itself(site, run):
    job = site.submit(*SMALL, "--wrap", "exit 1")
    is_in(site, job, "FAILED")
    submitted(run, one=job, two=job)
    write_attempt(run.teacher(ONE), started=time.time() + 60, code=3)
    one, two, *_ = snapshot(run).units
    assert (one.state, one.job, one.reason) == ("stopped", None, None) and two.state == "failed"


def test_with_accounting_the_database_is_asked(slurm_with_accounting, run, monkeypatch):
    cluster = slurm_with_accounting
    for name in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(name, cluster.environment()[name])
    job = cluster.submit(*SMALL, "--time=30", "--wrap", "sleep 100")
    failed = cluster.submit(*SMALL, "--array=0-1", "--wrap", "exit 1")
    after = cluster.submit(*SMALL, f"--dependency=afterok:{job}", "--wrap", "true")
    submitted(run, one=job, two=f"{failed}_1", stage_1=after)
    cluster.wait_for(lambda: [unit.state for unit in snapshot(run).units[:3]] == ["running", "failed", "waiting"], 30)
    status = snapshot(run)
    one, two, *_ = status.units
    assert status.scheduler == "sacct" and one.node in ("n1", "n2") and two.reason == "FAILED"
    assert one.seconds_left is not None and 1500 < one.seconds_left <= 1800
    cluster.run("scancel", job, after)
    cluster.wait_for(lambda: units(run)[f"teacher {ONE}"].reason == "CANCELLED", 30)
