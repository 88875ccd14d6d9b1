"""The quickstart on a GPU, for benchmarks/gpu.py: two stages of two tasks, from the included teachers to the report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
TASKS = ["metaworld/reach-v3", "metaworld/door-open-v3", "metaworld/drawer-close-v3", "metaworld/window-open-v3"]
SETTINGS = [
    "teachers.source=zoo",
    "stream.tasks_per_stage=2",
    "distill.ranks=1",
    "distill.expert_parallel_size=1",
    "trajectories.episodes=50",
    "evaluation.episodes=20",
]
SMALL = [
    "stream.tasks_per_stage=1",
    "trajectories.episodes=4",
    "evaluation.episodes=1",
    "evaluation.forward_transfer=false",
    "student.task_embedding.gradient_steps=5",
    "distill.batch_size=16",
    "distill.phase1_steps=12",
    "distill.phase2_steps=6",
]


def stage(device: torch.device, small: bool, peak: float) -> list[dict[str, Any]]:
    """One row: seconds of all of it, most of which are the simulator's, and whether the student can do its tasks.

    Raises RuntimeError with what the launch printed when it fails.
    """
    tasks = f"stream.tasks=[{','.join(TASKS[: 2 if small else 4])}]"
    environment = os.environ | ({} if device.type == "cuda" else {"CUDA_VISIBLE_DEVICES": ""})
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):  # of this process
        environment.pop(name, None)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "hpc_cpd.launch", "--stage", "all", "--config", str(CONFIG), "--run", str(run)]
        command += ["--cluster", "local", tasks, *SETTINGS, *(SMALL if small else [])]
        began = time.perf_counter()
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the quickstart failed with exit code {done.returncode}:\n{done.stdout}{done.stderr}")
        evaluation = json.loads((run / "stages" / "2" / "evaluation.json").read_text())
    records = evaluation["tasks"].values()
    return [
        {
            "tasks": len(records),
            "seconds": time.perf_counter() - began,
            "successes": sum(record["successes"] for record in records),
            "episodes": sum(record["episodes"] for record in records),
        }
    ]
