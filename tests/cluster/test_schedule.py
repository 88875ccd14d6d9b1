"""What is submitted, and what is known of it, where Slurm refuses or does not answer. Slurm itself is played."""

from collections.abc import Callable
from pathlib import Path

import pytest

from hpc_cpd.cluster import submit
from hpc_cpd.cluster.schedulers import slurm
from hpc_cpd.cluster.submissions import Submissions
from hpc_cpd.cluster.units import LaunchRequest
from hpc_cpd.config import parse_config
from hpc_cpd.errors import UserError
from hpc_cpd.run.paths import Run
from tests.cluster.lab import merged, settings

TASKS = ["toy/a", "toy/b"]


def work_of(folder: Path, allow_missing: bool = False, **more: object) -> LaunchRequest:
    config = parse_config(merged(settings(TASKS), **more))
    run = Run(folder / "run")
    run.open(config, {})
    return LaunchRequest(run, config, [TASKS], "all", TASKS, [1], allow_missing)


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The scripts that were submitted; the job of the n-th is n."""
    submitted: list[str] = []

    def submit(logs: Path, name: str, text: str) -> str:
        submitted.append(text)
        return str(len(submitted))

    monkeypatch.setattr(slurm, "submit", submit)
    monkeypatch.setattr(slurm, "ask_site", slurm.Site)
    monkeypatch.setattr(slurm, "job_states", lambda jobs, accounting: {})
    return submitted


def submit_all(work: LaunchRequest) -> None:
    submit.submit_all(work, retry=False, say=lambda text: None, stop=lambda: False)


def test_links_that_were_submitted_before_a_refusal_are_known(tmp_path, scripts, monkeypatch):
    work, submit = work_of(tmp_path, cluster={"continuation": "chain", "chain_length": 4}), slurm.submit

    def at_most_two(logs: Path, name: str, text: str) -> str:
        if len(scripts) == 2:
            raise UserError("QOSMaxSubmitJobPerUserLimit")
        return submit(logs, name, text)

    monkeypatch.setattr(slurm, "submit", at_most_two)
    with pytest.raises(UserError, match="QOSMax"):
        submit_all(work)
    assert Submissions.read(work.run).units["teacher toy/a"].job == "2_0"


def test_what_no_script_can_be_made_for_is_refused_before_any_job_is_submitted(tmp_path, scripts):
    work = work_of(tmp_path, cluster={"nodes_per_stage": 2}, distill={"ranks": 3})
    with pytest.raises(UserError, match="make it a multiple"):
        submit_all(work)
    assert not scripts


@pytest.mark.parametrize(("way", "waits"), [("requeue", "afterok"), ("resubmit", "afterok"), ("chain", "afterany")])
def test_a_stage_that_may_do_without_teachers_waits_until_none_of_them_can_go_on(tmp_path, scripts, way, waits):
    """A teacher that was stopped or failed once goes on in another job, unless its jobs are a chain."""
    submit_all(work_of(tmp_path, allow_missing=True, cluster={"continuation": way, "chain_length": 1}))
    assert f"--dependency={waits}:1_0:1_1\n" in scripts[1]


def answering(*answers: bool) -> Callable[..., dict[str, slurm.JobState]]:
    left = list(answers)

    def job_states(jobs: list[str], accounting: bool) -> dict[str, slurm.JobState]:
        if not left.pop(0):
            raise UserError("Unable to contact slurm controller")
        return {}

    return job_states


def test_a_controller_that_is_away_for_a_while_does_not_end_the_waiting(tmp_path, monkeypatch):
    work = work_of(tmp_path)
    monkeypatch.setattr(slurm, "job_states", answering(False, True, False, True))
    submit.wait_for(work, lambda: False, every_seconds=0.0)  # until it said twice that no job is left
    monkeypatch.setattr(slurm, "job_states", answering(False))
    monkeypatch.setattr(submit, "MOST_UNHEARD_SECONDS", -1.0)
    with pytest.raises(UserError, match="contact"):
        submit.wait_for(work, lambda: False, every_seconds=0.0)
