"""Runs and jobs of tiny teachers, for the tests of this folder."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from hpc_cpd.config import load_config
from hpc_cpd.errors import StopRequested
from hpc_cpd.run.paths import Run

REACH = "metaworld/reach-v3"
PENDULUM = "gymnasium/Pendulum-v1"

TINY = (
    "checkpoint_every_seconds=0.001",
    "evaluation.episodes=2",
    "trajectories.episodes=5",
    "trajectories.episodes_per_shard=2",
    "teachers.algorithm.hidden=[32]",
    "teachers.source.evaluation_episodes=3",
    "teachers.source.evaluate_every_rounds=1",
    "teachers.source.target_success=1.0",
    "teachers.start.episodes=3",
    "teachers.start.action_noise=[0.0,0.2]",
    "teachers.start.gradient_steps=60",
    "teachers.start.batch_size=65",
    "teachers.algorithm.iterations=3",
    "teachers.algorithm.num_envs=3",
    "teachers.algorithm.rollout_steps=30",
    "teachers.algorithm.epochs=2",
    "teachers.algorithm.minibatches=2",
)


def tiny_run(folder: Path, *overrides: str) -> Run:
    run = Run(folder)
    run.open(load_config(None, [*TINY, *overrides]), {})
    return run


def launch(ranks: int, script: Path, *arguments: str | Path | int, timeout: float = 120) -> subprocess.CompletedProcess:
    """Start real MPI ranks and wait for them. mpi4py's own runner ends them all when one fails."""
    mpiexec = Path(sys.executable).with_name("mpiexec")
    command = [mpiexec, "-n", str(ranks), sys.executable, "-m", "mpi4py", script, *map(str, arguments)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def until_done(work: Callable[[Callable[[], bool]], None], stop_after: int) -> int:
    """Call `work(stop)` again and again, stopping it at its `stop_after`-th boundary each time; how often it took."""
    for attempt in range(1, 100):
        calls = 0

        def stop() -> bool:
            nonlocal calls
            calls += 1
            return calls >= stop_after

        try:
            work(stop)
        except StopRequested:
            continue
        return attempt
    raise AssertionError("it never ended")


def teacher_files(run: Run, task_id: str) -> dict[str, bytes]:
    """Everything a published teacher consists of, but the wall clock in DONE."""
    folder = run.teacher(task_id)
    names = ("policy.safetensors", "policy.json", "evaluation.json", "metrics.jsonl")
    return {name: (folder / name).read_bytes() for name in names}
