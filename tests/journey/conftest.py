"""One small run of the whole way, on real parts: MuJoCo, MPI ranks, HDF5, DeepSpeed ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpc_cpd.run.paths import Run

TASKS = [f"metaworld/{name}-v3" for name in ("reach", "drawer-close", "window-open", "button-press-topdown")]
CONFIG = """\
name: small
checkpoint_every_seconds: 2
stream:
  tasks: [{tasks}]
  tasks_per_stage: 2
teachers:
  source: {{evaluate_every_rounds: 1, evaluation_episodes: 6}}
  start: {{episodes: 20, gradient_steps: 500}}
  algorithm: {{iterations: 1, num_envs: 4, rollout_steps: 100}}
trajectories: {{episodes: 20, episodes_per_shard: 10}}
student: {{width: 64, expert_hidden: 64}}
distill: {{phase1_steps: 300, phase2_steps: 200}}
evaluation: {{episodes: 6, forward_transfer: false}}
method: {{memory: {{budget_fraction: 0.1}}}}
"""


def launch(*words: object) -> list[str]:
    """The command line of a launch on this machine."""
    return [sys.executable, "-m", "hpc_cpd.launch", "--cluster", "local", *map(str, words)]


def run_command(command: list[str], expected: int = 0) -> str:
    """Run `command`, check its exit code, return what it printed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=580, check=False)
    output = done.stdout + done.stderr
    assert done.returncode == expected, output
    return output


@pytest.fixture(scope="session")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(CONFIG.format(tasks=", ".join(TASKS)))
    return path


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory, config_file: Path) -> Run:
    """A finished run of four tasks in two stages."""
    folder = tmp_path_factory.mktemp("journey") / "run"
    output = run_command(launch("--stage", "all", "--run", folder, "--config", config_file))
    (folder / "output.txt").write_text(output)
    return Run(folder)
