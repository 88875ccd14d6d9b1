"""The front door with everything behind it, on a tiny stream: stopped, killed, finished, launched again, verified.

One run goes through all tests of this file, in order.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.ranks  # started by the command line
ROOT = Path(__file__).parents[1]
SETTINGS = """
name: tiny
checkpoint_every_seconds: 1
stream: {tasks: [gymnasium/Pendulum-v1], tasks_per_stage: 1}
teachers:
  source: {evaluation_episodes: 2}
  start: scratch
  algorithm: {hidden: [8], iterations: 3, num_envs: 2, rollout_steps: 20}
trajectories: {episodes: 2, success_only: false}
student:
  width: 8
  backbone: {heads: 2}
  expert_hidden: 8
  history: 2
  task_embedding: {gradient_steps: 5, width: 8, size: 4, window: 2, windows_per_task: 2}
distill: {phase1_steps: 5, phase2_steps: 5, batch_size: 8}
evaluation: {episodes: 1, forward_transfer: false}
"""
TASK = "gymnasium/Pendulum-v1"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    (folder / "tiny.yaml").write_text(SETTINGS)
    return folder / "run"


def start(run: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "hpc_cpd.launch", "--cluster", "local", "--run", str(run), *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def door(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hpc_cpd.cli", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)


def lock_of(run: Path, unit: str) -> dict | None:
    path = run / unit / "lock.json"
    return json.loads(path.read_text()) if path.is_file() else None


def wait_for_lock(run: Path, unit: str, launcher: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while lock_of(run, unit) is None:
        assert launcher.poll() is None and time.monotonic() < end, launcher.communicate()
        time.sleep(0.02)


def test_a_stopped_launch_exits_with_3_and_leaves_no_lock(run):
    launcher = start(run, "--stage", "all", "--config", str(run.parent / "tiny.yaml"))
    wait_for_lock(run, f"teachers/{TASK}", launcher)
    os.killpg(launcher.pid, signal.SIGTERM)
    output, errors = launcher.communicate(timeout=180)
    assert launcher.returncode == 3, errors
    assert "stopped: " in errors and "Traceback" not in errors
    assert lock_of(run, "") is None and lock_of(run, f"teachers/{TASK}") is None
    assert "teachers and trajectories: 0 of 1 done, 1 to do" in output


def test_a_launch_killed_in_a_stage_is_resumed_by_the_same_command_without_a_wait(run):
    first = start(run, "--stage", "all")
    wait_for_lock(run, "stages/1", first)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert lock_of(run, "") is not None  # it could not clean up
    output, errors = start(run, "--stage", "all").communicate(timeout=240)
    assert "teachers and trajectories: 1 of 1 done" in output, errors
    assert (run / "stages" / "1" / "DONE").is_file(), errors
    assert "Pendulum-v1" in output and f"Report: {run / 'report' / 'index.html'}" in output
    assert (run / "report" / "index.html").is_file()
    provenance = json.loads((run / "provenance.json").read_text())
    assert provenance["seed"] == 0 and provenance["packages"]["torch"] and provenance["reward_versions"]
    assert (run / "logs").is_dir() and list((run / "logs").rglob("rank-1.log"))


def test_launched_again_nothing_is_redone(run):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and "report" not in path.parts}
    launcher = start(run, "--stage", "all")
    output, errors = launcher.communicate(timeout=180)
    assert launcher.returncode == 0, errors
    assert "Everything asked for is done already." in output and "Pendulum-v1" in output
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_the_doors_open(run, tmp_path):
    shown = door("status", str(run))
    assert shown.returncode == 0 and "1 of 1 teachers, 1 of 1 trajectories, 1 of 1 stages" in shown.stdout
    assert door("verify", str(run)).returncode == 0
    evaluated = door("evaluate", str(run), "--episodes", "2", "--seed", "3")
    assert evaluated.returncode == 0 and "seed 3" in " ".join(evaluated.stdout.split()), evaluated.stderr
    exported = door("export", str(run), "--out", str(tmp_path / "out"), "--trajectories")
    assert exported.returncode == 0, exported.stderr
    assert (tmp_path / "out" / "trajectories" / f"{TASK}.hdf5").is_file()
    model = "student/model.safetensors"
    assert (tmp_path / "out" / model).read_bytes() == (run / "stages" / "1" / model).read_bytes()
    assert door("export", str(run), "--out", str(tmp_path / "out")).returncode == 2  # never overwritten


@pytest.mark.parametrize(
    "pattern",
    [f"stages/1/student/{name}.safetensors" for name in ("model", "mixture-0-expert-0000")]
    + [f"teachers/{TASK}/policy.safetensors", f"trajectories/{TASK}/shard-*.h5"],
)
def test_verify_finds_a_changed_byte_and_names_the_file(run, pattern):
    (path, *_) = sorted(run.glob(pattern))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        done = door("verify", str(run))
    finally:
        path.write_bytes(whole)
    assert done.returncode == 2
    assert path.name in done.stdout and "problems: 1" in done.stderr and "Traceback" not in done.stderr
