"""A family from outside: pictures and directions are described, listed and stepped, and refused by a launch."""

import subprocess
import sys
from pathlib import Path

from tests.examples.installed import installed

STEPPED = """
import numpy as np, hpc_cpd
envs = hpc_cpd.make_batch("image/corner", 3, seed=0)
first, _ = envs.reset(options={"goal_index": np.array([0, 1, 0])})
assert first.shape == (3, 8, 8, 3) and first.dtype == np.uint8 and (first[0] == first[2]).all()
observations, rewards, _, truncated, info = envs.step(np.array([0, 1, 2]))
assert observations in envs.observation_space and not (first == observations).all()
for _ in range(10):
    observations, rewards, _, truncated, info = envs.step(np.array([0, 0, 2]))
for _ in range(9):
    observations, rewards, _, truncated, info = envs.step(np.array([2, 3, 2]))
assert info["success"].tolist() == [True, True, False] and truncated.all()
"""


def call(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = installed(tmp_path / "site", "image_task")
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=120)


def test_it_is_described_and_listed(tmp_path):
    listed = call(tmp_path, "-m", "hpc_cpd.cli", "tasks", "image/corner").stdout
    assert "Box [8, 8, 3] uint8" in listed and "Discrete(4)" in listed
    everything = call(tmp_path, "-m", "hpc_cpd.cli", "tasks").stdout
    assert "image/... (image-task 0.1.0)" in everything and "metaworld/... (hpc_cpd)" in everything
    assert "MT50x2" in everything


def test_it_is_stepped_and_keeps_its_promises(tmp_path):
    probe = "from hpc_cpd.tasks.probe import probe; probe('image/corner')"
    done = call(tmp_path, "-c", f"{STEPPED}\n{probe}")
    assert done.returncode == 0, done.stderr


def test_a_launch_with_it_is_refused_before_anything_is_written(tmp_path):
    run = tmp_path / "run"
    words = ["--stage", "all", "--config", "configs/mt10.yaml", "--run", str(run), "stream.tasks=[image/corner]"]
    done = call(tmp_path, "-m", "hpc_cpd.launch", *words)
    assert done.returncode == 2 and "image/corner has observations Box [8, 8, 3] uint8" in done.stderr
    assert done.stderr.count("\n") == 1 and not run.exists()
