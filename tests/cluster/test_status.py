"""What every unit of a run is doing, from its files alone, and how fast that is told."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpc_cpd.cluster.snapshot import live_owner
from hpc_cpd.cluster.status import UnitStatus, snapshot
from hpc_cpd.cluster.submit import Submission
from hpc_cpd.config import config_as_yaml, parse_config
from hpc_cpd.progress import Progress
from hpc_cpd.run.lock import STALE_SECONDS, Lock, process_space
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import write_json
from tests.cluster.half_done import (
    ONE,
    THREE,
    TWO,
    lock_of_another,
    new_run,
    publish,
    publish_all,
    publish_task,
    status_command,
    submitted,
    units,
    write_attempt,
    write_metrics,
    write_news,
)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return new_run(tmp_path / "run")


def place(unit: UnitStatus) -> tuple[str, int | None, int | None, float | None]:
    assert unit.progress is not None
    return unit.progress.phase, unit.progress.step, unit.progress.total, unit.progress.loss


def test_units_come_in_order_of_work_each_stage_after_its_tasks(run):
    assert list(units(run)) == [f"teacher {ONE}", f"teacher {TWO}", "stage 1", f"teacher {THREE}", "stage 2"]


def test_every_state_of_a_run_on_this_machine_is_told_apart(run):
    assert {unit.state for unit in units(run).values()} == {"not started"}
    publish_task(run, ONE)
    checkpoint = run.teacher(TWO) / "checkpoints"
    checkpoint.mkdir(parents=True)
    assert units(run)[f"teacher {TWO}"].state == "not started"  # an empty folder is no checkpoint
    (checkpoint / "0").mkdir()
    (run.stage(1) / "checkpoints" / "5").mkdir(parents=True)
    write_attempt(run.teacher(THREE), code=1, ended=2.0, sentence="ValueError: no\nreally not")
    with Lock(run.stage(1), "stage 1"):
        found = units(run)
    assert [unit.state for unit in found.values()] == ["done", "stopped", "running", "failed", "not started"]
    assert found[f"teacher {THREE}"].error == "really not" and found[f"teacher {THREE}"].log == "/nowhere/rank-0.log"
    assert units(run)["stage 1"].state == "stopped"


def test_a_teacher_is_done_only_with_its_trajectories_which_run_under_its_lock(run):
    publish(run.teacher(ONE), success=0.8)
    with Lock(run.teacher(ONE), "the teacher"):
        unit = units(run)[f"teacher {ONE}"]
    assert (unit.state, unit.success) == ("running", 0.8)
    assert snapshot(run).done == {"teachers": 1, "trajectories": 0, "stages": 0}
    publish(run.trajectories(ONE))
    assert units(run)[f"teacher {ONE}"].state == "done"
    assert snapshot(run).done == {"teachers": 1, "trajectories": 1, "stages": 0}


def test_one_that_was_asked_to_stop_or_killed_has_stopped_and_not_failed(run):
    write_attempt(run.teacher(ONE), code=3, sentence="saved", number=4)
    write_attempt(run.teacher(TWO))
    found = units(run)
    assert found[f"teacher {ONE}"].state == found[f"teacher {TWO}"].state == "stopped"
    assert found[f"teacher {ONE}"].error is None and found[f"teacher {ONE}"].restarts == 3


def test_a_dead_owner_is_no_owner(tmp_path):
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    owner = {"host": socket.gethostname(), "space": process_space(), "pid": int(gone.stdout), "born": 1, "token": "x"}
    (tmp_path / "lock.json").write_text(json.dumps(owner))
    assert live_owner(tmp_path) is None
    lock_of_another(tmp_path, "5_1")  # of which only the heartbeat tells
    owner_seen = live_owner(tmp_path)
    assert owner_seen is not None and (owner_seen.host, owner_seen.job) == ("node7", "5_1")
    old = time.time() - STALE_SECONDS - 1
    os.utime(tmp_path / "lock.json", (old, old))
    assert live_owner(tmp_path) is None


def test_progress_is_what_the_unit_told_last_and_success_its_last_evaluation(run):
    folder, stage = run.teacher(ONE), run.stage(1)
    write_news(folder, "cloning", 2950, 3000, loss=0.5)
    write_metrics(folder, {"step": 3000, "success": 0.5}, {"step": 3007, "success": 0.25}, {"step": 3008}, end='{"succ')
    unit = units(run)[f"teacher {ONE}"]
    assert (place(unit), unit.success) == (("cloning", 2950, 3000, 0.5), 0.25)
    write_news(stage, "phase 2", 900, 2000, loss=0.1)
    assert place(units(run)["stage 1"]) == ("phase 2", 900, 2000, 0.1)
    (stage / "progress.json").write_bytes(b"\xff not json\n[1]\n")
    assert units(run)["stage 1"].progress is None


def test_the_success_of_what_is_done_is_the_published_one(run):
    publish_task(run, ONE, success=0.75)
    publish(run.stage(1))
    record = {"episodes": 20, "mean_return": 1.0}
    write_json(
        run.stage(1) / "evaluation.json", {"tasks": {"a": record | {"successes": 20}, "b": {**record, "successes": 10}}}
    )
    publish(run.stage(2))
    (run.stage(2) / "evaluation.json").write_text("damaged")
    found = units(run)
    assert [found[name].success for name in (f"teacher {ONE}", "stage 1", "stage 2")] == [0.75, 0.75, None]


def test_the_success_of_a_stage_is_that_of_all_its_tasks_also_where_some_old_ones_stand_for_the_others(run):
    record = {"episodes": 20, "mean_return": 1.0}
    tasks = {"old": record | {"successes": 10}, "new": record | {"successes": 20}}
    for stage, learnt in ((1, 2), (2, 10)):
        write_json(run.stage(stage) / "evaluation.json", {"tasks": tasks, "new_tasks": ["new"], "tasks_learnt": learnt})
        publish(run.stage(stage))
    found = [units(run)[name] for name in ("stage 1", "stage 2")]
    assert [(unit.success, unit.success_estimated) for unit in found] == [(0.75, False), (pytest.approx(0.55), True)]


def test_what_is_reported_tells_how_fast_it_goes_and_what_it_does_between(run, capsys, monkeypatch):
    folder = run.stage(1)
    reporter = Progress("stage 1", every_seconds=0, folder=folder)
    reporter.update("phase 2 step 800/2000 loss 0.2", phase="phase 2", step=800, total=2000, loss=0.2)
    now = time.monotonic()
    with Lock(folder, "stage 1"):
        monkeypatch.setattr(time, "monotonic", lambda: now + 0.25)
        reporter.update("phase 2 step 900/2000 loss 0.1", phase="phase 2", step=900, total=2000, loss=0.1)
        unit = units(run)["stage 1"]
        assert unit.steps_per_second is not None and 390 < unit.steps_per_second <= 410
        assert place(unit) == ("phase 2", 900, 2000, 0.1)
        reporter.update("evaluating 10 tasks")
        unit = units(run)["stage 1"]
        assert (place(unit), unit.steps_per_second) == (("evaluating 10 tasks", None, None, None), None)
        monkeypatch.undo()
    first, second, _ = capsys.readouterr().out.splitlines()
    assert "steps/s" not in first and second.endswith(" steps/s")
    rounds = Progress("teacher x", every_seconds=0)
    for number in range(2):
        rounds.update("ppo", phase="ppo", step=number, counted="rounds")
    assert capsys.readouterr().out.endswith(" rounds/s\n")
    write_news(folder, "phase 2", 950, 2000, steps_per_second=8.0)
    assert units(run)["stage 1"].steps_per_second is None  # nobody works on it any more


def test_the_logs_of_a_run_that_was_copied_are_those_of_the_copy(run, tmp_path):
    write_attempt(run.teacher(ONE), code=1, sentence="it broke", log="logs/1/rank-0.log")
    copy = Run(shutil.copytree(run.folder, tmp_path / "copy"))
    shutil.rmtree(run.folder)
    assert units(copy)[f"teacher {ONE}"].log == str(copy.logs / "1" / "rank-0.log")


# ---- Slurm's part, where there is none


def test_where_slurm_does_not_answer_the_files_tell_and_one_line_says_so(run, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    submitted(run, one="1", two=Submission("2", failures=2), stage_1="3")
    write_attempt(run.teacher(TWO), job="2", code=1, sentence="broken", host="n3")
    with Lock(run.teacher(ONE), "the teacher"):
        status = snapshot(run)
    assert status.scheduler == "not answering"
    assert [unit.state for unit in status.units] == ["running", "given up", "not started", "not started", "not started"]
    assert [note for note in status.notes if "Slurm does not answer" in note and "\n" not in note] == status.notes
    printed = status_command(run.folder)
    assert printed.returncode == 0 and "Slurm does not answer" in printed.stdout, printed.stderr


def test_slurm_is_not_asked_without_a_ledger_or_about_what_is_done(run, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert (snapshot(run).scheduler, snapshot(run).notes) == (None, [])
    submitted(run, resubmitter="9", one="1", stage_1="2")
    publish_task(run, ONE)
    publish(run.stage(1))
    assert (snapshot(run).scheduler, snapshot(run).notes) == (None, [])


def test_a_damaged_ledger_is_told_and_hides_nothing_else(run):
    publish_task(run, ONE)
    run.logs.mkdir()
    (run.logs / "submitted.json").write_text('{"units": {"stage 1": 5}}')
    status = snapshot(run)
    assert "submitted.json is damaged" in status.notes[0] and status.units[0].state == "done"


def test_a_stop_file_is_told_and_the_exit_code_is_0_whatever_has_failed(run):
    write_attempt(run.teacher(ONE), code=2, sentence="error: no such setting")
    run.stop_file.touch()
    printed = status_command(run.folder)
    assert printed.returncode == 0
    assert "STOP asks every job" in printed.stdout and "no such setting" in printed.stdout


def test_the_next_command_is_a_launch_only_where_something_is_in_nobodys_hands(run):
    launch = f"python -m hpc_cpd.launch --stage all --run {run.folder}"
    assert snapshot(run).next == launch
    with Lock(run.folder, "the run"):  # a launcher on this machine
        assert snapshot(run).next == f"hpc-cpd status {run.folder} --watch"
    publish_all(run)
    assert snapshot(run).next is None and snapshot(run).finished


# ---- speed


@pytest.fixture
def large_run(tmp_path: Path) -> tuple[Run, dict[str, str]]:
    """1,000 tasks of a family of its own in 200 stages, half of them done, and the environment that knows them."""
    info = tmp_path / "packages" / "x-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: x\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[hpc_cpd.tasks]\nx = xtasks:Family\n")
    (info.parent / "xtasks.py").write_text(
        "NAMES = [f'{i:04d}' for i in range(1000)]\n"
        "class Family:\n    names = staticmethod(lambda: NAMES)\n    describe = make = names\n"
    )
    run, tasks = Run(tmp_path / "run"), [f"x/{index:04d}" for index in range(1000)]
    run.folder.mkdir()
    config = parse_config({"stream": {"tasks": tasks, "tasks_per_stage": 5}})
    run.config_file.write_text(config_as_yaml(config))
    metrics = "".join(json.dumps({"step": 50 * n, "phase": "clone", "loss": 0.1 / n}) + "\n" for n in range(1, 60))
    for number, task in enumerate(tasks):
        folder, recorded = run.teacher(task), run.trajectories(task)
        for path in (folder, recorded):
            path.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text(metrics)
        attempt = {"number": 1, "job": f"1_{number}", "restart": 0, "host": "n1", "log": "", "started": 1.0}
        (folder / "attempt.json").write_text(json.dumps(attempt | {"code": number % 3, "sentence": "it is broken"}))
        if number < 500:
            (folder / "DONE").write_text('{"success": 0.9}')
            (recorded / "DONE").write_text("{}")
    for stage in range(1, 101):
        run.stage(stage).mkdir(parents=True)
        (run.stage(stage) / "DONE").write_text("{}")
        record = {"successes": 17, "episodes": 20, "mean_return": 957.5, "mean_steps_to_success": 44.5}
        (run.stage(stage) / "evaluation.json").write_text(
            json.dumps({"tasks": dict.fromkeys(tasks[: 5 * stage], record)})
        )
    return run, {**os.environ, "PYTHONPATH": str(info.parent)}


@pytest.mark.slow
def test_a_thousand_tasks_and_two_hundred_stages_take_less_than_two_seconds(large_run):
    run, environment = large_run

    def processor_seconds() -> float:  # and not those of the clock, in which other tests may be at work
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    status_command(run.folder, env=environment)
    before = processor_seconds()
    printed = status_command(run.folder, env=environment)
    assert processor_seconds() - before < 2
    assert "500 of 1000 teachers, 500 of 1000 trajectories, 100 of 200 stages" in printed.stdout, printed.stderr
    assert len(printed.stdout.splitlines()) > 1200


def test_nothing_heavy_is_imported(run):
    code = f"""
import sys
from hpc_cpd import cli
from hpc_cpd.errors import run_command
sys.argv = ["hpc-cpd", "status", {str(run.folder)!r}]
try:
    cli.main()
finally:
    print(sorted({{"torch", "gymnasium", "submitit", "h5py", "mujoco", "scipy", "matplotlib"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
