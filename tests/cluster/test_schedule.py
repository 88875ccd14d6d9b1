"""What is submitted, and what is known of it, where Slurm refuses or does not answer. Slurm itself is played."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from hpc_cpd.cluster import submit
from hpc_cpd.cluster.schedulers import _slurm_commands as commands
from hpc_cpd.cluster.schedulers.base import JobState, scheduler_of
from hpc_cpd.cluster.submit import Submissions
from hpc_cpd.cluster.units import LaunchRequest, StageUnit, Unit, request_of
from hpc_cpd.config import parse_config
from hpc_cpd.errors import UserError
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import mark_done
from tests.cluster.lab import merged, settings

TASKS = ["toy/a", "toy/b"]


def work_of(folder: Path, allow_missing: bool = False, **more: object) -> LaunchRequest:
    config = parse_config(merged(settings(TASKS), **more))
    run = Run(folder / "run")
    run.open(config, {})
    return request_of(run, config, [TASKS], "all", allow_missing)


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The scripts that were submitted; the job of the n-th is n."""
    submitted: list[str] = []

    def submit(logs: Path, name: str, text: str, environment: object) -> str:
        submitted.append(text)
        return str(len(submitted))

    monkeypatch.setattr(commands, "submit", submit)
    monkeypatch.setattr(commands, "slurm_answers", lambda: True)
    monkeypatch.setattr(commands, "ask_site", commands.Site)
    monkeypatch.setattr(commands, "job_states", lambda jobs, accounting: {})
    return submitted


def submit_all(work: LaunchRequest, retry: bool = False) -> None:
    submit.submit_all(work, scheduler_of(work.config), retry=retry, stop=lambda: False)


def test_links_that_were_submitted_before_a_refusal_are_known(tmp_path, scripts, monkeypatch):
    work, submit = (
        work_of(tmp_path, cluster={"scheduler": {"continuation": "chain", "chain_length": 4}}),
        commands.submit,
    )

    def at_most_two(logs: Path, name: str, text: str, environment: object) -> str:
        if len(scripts) == 2:
            raise UserError("QOSMaxSubmitJobPerUserLimit")
        return submit(logs, name, text, environment)

    monkeypatch.setattr(commands, "submit", at_most_two)
    with pytest.raises(UserError, match="QOSMax"):
        submit_all(work)
    assert Submissions.read(work.run).units["teacher toy/a"].job == "2_0"


def test_what_no_script_can_be_made_for_is_refused_before_any_job_is_submitted(tmp_path, scripts):
    work = work_of(tmp_path, cluster={"scheduler": {"nodes_per_stage": 2}}, distill={"ranks": 3})
    with pytest.raises(UserError, match="make it a multiple"):
        submit_all(work)
    assert not scripts


@pytest.mark.parametrize(("way", "waits"), [("requeue", "afterok"), ("resubmit", "afterok"), ("chain", "afterany")])
def test_a_stage_that_may_do_without_teachers_waits_until_none_of_them_can_go_on(tmp_path, scripts, way, waits):
    """A teacher that was stopped or failed once goes on in another job, unless its jobs are a chain."""
    submit_all(work_of(tmp_path, allow_missing=True, cluster={"scheduler": {"continuation": way, "chain_length": 1}}))
    assert f"--dependency={waits}:1_0:1_1\n" in scripts[1]


@pytest.mark.parametrize(("own", "watches"), [("7", False), ("3", True), ("8", True)])
def test_a_resubmitter_leaves_the_run_to_that_of_a_later_launch(tmp_path, scripts, monkeypatch, own, watches):
    """Job 3 watches. Its own process goes on, and so does job 8, to which job 3 has handed over; job 7 is of before."""
    work = work_of(tmp_path)
    submit_all(work)
    assert Submissions.read(work.run).resubmitter == "3"
    failed = {job: JobState("FAILED", "failed") for job in ("1_0", "1_1", "2")}
    there = failed if own == "8" else failed | {"3": JobState("PENDING", "waiting")}
    monkeypatch.setattr(commands, "job_states", lambda jobs, accounting: there)
    monkeypatch.setattr(commands, "cancel", lambda jobs, environment: None)
    monkeypatch.setenv("SLURM_JOB_ID", own)
    before = len(scripts)
    submit_all(work, retry=True)
    assert (len(scripts) > before) == watches


def answering(*answers: bool) -> Callable[..., dict[str, JobState]]:
    left = list(answers)

    def job_states(jobs: list[str], accounting: bool) -> dict[str, JobState]:
        if not left.pop(0):
            raise UserError("Unable to contact slurm controller")
        return {}

    return job_states


def test_a_controller_that_is_away_for_a_while_does_not_end_the_waiting(tmp_path, scripts, monkeypatch):
    work = work_of(tmp_path)
    submit_all(work)
    monkeypatch.setattr(commands, "job_states", answering(False, True, False, True))
    submit.wait_for(
        work, scheduler_of(work.config), lambda: False, every_seconds=0.0
    )  # until it said twice that no job is left
    monkeypatch.setattr(commands, "job_states", answering(False))
    monkeypatch.setattr(submit, "MOST_UNHEARD_SECONDS", -1.0)
    with pytest.raises(UserError, match="contact"):
        submit.wait_for(work, scheduler_of(work.config), lambda: False, every_seconds=0.0)


def test_what_is_published_while_a_stage_is_being_refused_is_no_reason_to_refuse_it(tmp_path, monkeypatch):
    request = replace(work_of(tmp_path), asked="1", units=[StageUnit(Run(tmp_path / "run"), 1)])
    with pytest.raises(UserError, match="the teachers of toy/a, toy/b"):
        submit.require_one_stage(request, set())
    needs = StageUnit.needs

    def then_published(unit: StageUnit, plan: list[list[str]]) -> list[Unit]:
        found = needs(unit, plan)
        for folder in (folder for one in found for folder in one.folders):
            folder.mkdir(parents=True)
            mark_done(folder, {})
        return found

    monkeypatch.setattr(StageUnit, "needs", then_published)
    submit.require_one_stage(request, set())
