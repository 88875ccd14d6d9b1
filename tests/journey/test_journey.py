"""From an empty folder to a student and its report, stopped and broken on the way."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import gymnasium
import h5py
import metaworld
import pytest

import hpc_cpd
from hpc_cpd.evaluation.rollouts import evaluate_policy
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import is_done, read_json
from tests.journey.conftest import TASKS, launch, run_command

pytestmark = pytest.mark.ranks  # started by the command line


def student_hash(run: Run, stage: int = 2) -> str:
    return hashlib.sha256((run.stage(stage) / "student" / "student.json").read_bytes()).hexdigest()


def table_of(output: str) -> list[str]:
    """The rows of the table that a launch ends with."""
    return [line.rstrip() for line in output.splitlines() if re.search(r"-v3\s+\d+\s+[\d.]+%", line)]


def copy_of(run: Run, folder: Path) -> Run:
    return Run(shutil.copytree(run.folder, folder / "run"))


def without_stage(run: Run, stage: int) -> Run:
    shutil.rmtree(run.stage(stage))
    return run


def test_the_launch_ends_with_a_table_the_report_and_a_student(small_run: Run) -> None:
    output = (small_run.folder / "output.txt").read_text()
    assert len(table_of(output)) == len(TASKS)
    assert f"Report: {small_run.report / 'index.html'}" in output
    assert read_json(small_run.report / "metrics.json")["metrics"]["recovery"] > 0.5
    page = (small_run.report / "index.html").read_text()
    for picture in re.findall(r'src="([^"]+)"', page):
        assert (small_run.report / picture).is_file()
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_killed_at_random_moments_the_run_ends_the_same(small_run: Run, config_file: Path, tmp_path: Path) -> None:
    """SIGKILL to the whole process group, three times, then until the end."""
    folder = tmp_path / "run"
    command = launch("--stage", "all", "--run", folder, "--config", config_file)
    moments = random.Random(1)
    for _ in range(3):
        process = subprocess.Popen(
            command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(moments.uniform(5.0, 22.0))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    output = run_command(command)
    assert table_of(output) == table_of((small_run.folder / "output.txt").read_text())
    assert student_hash(Run(folder)) == student_hash(small_run)


def test_a_signal_stops_all_ranks_with_exit_code_3_and_the_next_launch_goes_on(small_run: Run, tmp_path: Path) -> None:
    run = without_stage(copy_of(small_run, tmp_path), 2)
    process = subprocess.Popen(
        launch("--stage", "2", "--run", run.folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 120
    while not (run.stage(2) / "metrics.jsonl").is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR2)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 3, output
    assert not is_done(run.stage(2))
    run_command(launch("--stage", "2", "--run", run.folder))
    assert student_hash(run) == student_hash(small_run)


def first_shard(run: Run, task: str) -> Path:
    return sorted(run.trajectories(task).glob("shard-*.h5"))[0]


def stage_2_is_refused(run: Run, *parts: str) -> None:
    output = run_command(launch("--stage", "2", "--run", run.folder), expected=2)
    assert "Traceback" not in output
    for part in parts:
        assert part in output, output


def test_a_missing_stage_is_named_with_the_command_that_makes_it(small_run: Run, tmp_path: Path) -> None:
    run = without_stage(without_stage(copy_of(small_run, tmp_path), 2), 1)
    stage_2_is_refused(run, "the student of stage 1", f"--run {run.folder} --stage 1")


def test_a_truncated_shard_is_named(small_run: Run, tmp_path: Path) -> None:
    run = without_stage(copy_of(small_run, tmp_path), 2)
    shard = first_shard(run, TASKS[2])
    shard.write_bytes(shard.read_bytes()[:-1000])
    stage_2_is_refused(run, str(shard))


def test_a_shard_of_another_task_is_named(small_run: Run, tmp_path: Path) -> None:
    run = without_stage(copy_of(small_run, tmp_path), 2)
    shard = first_shard(run, TASKS[2])
    with h5py.File(shard, "r+") as file:
        file.attrs["task_id"] = TASKS[0]
    manifest_file = run.trajectories(TASKS[2]) / "manifest.json"
    manifest = json.loads(manifest_file.read_text())
    for entry in manifest["shards"]:
        if entry["file"] == shard.name:
            entry["sha256"] = hashlib.sha256(shard.read_bytes()).hexdigest()
    manifest_file.write_text(json.dumps(manifest))
    stage_2_is_refused(run, str(shard), TASKS[0])


def test_a_student_of_another_schema_is_named(small_run: Run, tmp_path: Path) -> None:
    run = without_stage(copy_of(small_run, tmp_path), 2)
    description = run.stage(1) / "student" / "student.json"
    description.write_text(json.dumps({**json.loads(description.read_text()), "schema_version": 99}))
    stage_2_is_refused(run, str(description), "99")


def test_other_settings_are_refused_key_by_key(small_run: Run, config_file: Path) -> None:
    output = run_command(
        launch("--stage", "all", "--run", small_run.folder, "--config", config_file, "seed=1", "student.width=32"),
        expected=2,
    )
    assert "seed was 0 and is now 1" in output
    assert "student.width was 64 and is now 32" in output


@pytest.mark.parametrize("task_id", TASKS[:3])
def test_the_student_scores_the_same_on_the_stock_environment(small_run: Run, task_id: str) -> None:
    seed = 10_000
    student = hpc_cpd.load_student(small_run.stage(2) / "student")
    batched = evaluate_policy(student, task_id, 6, seed)
    name = task_id.removeprefix("metaworld/")
    goals = metaworld.MT1(name, seed=seed).train_tasks
    environment = gymnasium.make("Meta-World/MT1", env_name=name, seed=seed)
    for result in batched:
        environment.unwrapped.set_task(goals[result.goal_index])  # type: ignore[attr-defined]
        student.reset(task_id, 1)
        # the wrapper draws another goal at reset, so the environment below it is reset
        observation, _ = environment.unwrapped.reset()
        steps = None
        for step in range(1, 501):
            action = student.act(observation[None].astype("float32"))[0]
            observation, _, _, _, info = environment.unwrapped.step(action)
            if info["success"]:
                steps = step
                break
        assert (steps is not None) == result.success
        assert steps == result.steps_to_success
    environment.close()
