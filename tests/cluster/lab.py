"""A user on the test cluster: launches, waits, looks. Runs are tiny, and real from end to end."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import is_done
from tests.cluster.slurm_cluster import SlurmCluster

ROOT = Path(__file__).parents[2]


def settings(tasks: Sequence[str], max_retries: int = 2, **scheduler: Any) -> dict[str, Any]:
    """A run that takes a few seconds per job; two tasks a stage. `scheduler`: settings of Slurm."""
    scheduler = {"time_limit_minutes": 30, "memory_per_cpu": "400M", **scheduler}
    return {
        "name": "toy",
        "checkpoint_every_seconds": 0.5,
        "stream": {"tasks": list(tasks), "tasks_per_stage": 2},
        "teachers": {
            "source": {"evaluation_episodes": 2, "evaluate_every_rounds": 1},
            "start": "scratch",
            "algorithm": {
                "hidden": [16],
                "iterations": 1,
                "num_envs": 2,
                "rollout_steps": 25,
                "epochs": 1,
                "minibatches": 1,
            },
            "ranks": 1,
        },
        "trajectories": {"episodes": 8, "success_only": False, "episodes_per_shard": 4},
        "student": {
            "width": 16,
            "backbone": {"heads": 2},
            "expert_hidden": 16,
            "task_embedding": {"gradient_steps": 10, "windows_per_task": 4, "width": 16, "size": 4},
        },
        "method": {"memory": {"budget_fraction": 0.5}},
        "distill": {"ranks": 2, "batch_size": 32, "phase1_steps": 40, "phase2_steps": 30, "warmup_steps": 5},
        "evaluation": {"episodes": 2, "forward_transfer": False},
        "cluster": {"scheduler": scheduler, "max_retries": max_retries},
    }


def merged(base: dict[str, Any], **more: Any) -> dict[str, Any]:
    """`base` with the groups of `more` laid over it."""
    return base | {key: base.get(key, {}) | value if isinstance(value, dict) else value for key, value in more.items()}


class Lab:
    """`cluster` with the toy tasks installed, seen from its login node. Files go to `folder`."""

    def __init__(self, cluster: SlurmCluster, folder: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        info = folder / "packages" / "toy_tasks-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-tasks\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[hpc_cpd.tasks]\ntoy = tests.cluster.toy_tasks:family\n")
        self.environment = cluster.environment() | {"PYTHONPATH": f"{info.parent}:{ROOT}"}

    def config(self, values: dict[str, Any], name: str = "toy.yaml") -> Path:
        path = self.folder / name
        path.write_text(yaml.safe_dump(values))
        return path

    def run(self, *words: object, expected: int | None = 0, cwd: Path = ROOT) -> str:
        """Run a command as this user and return what it printed."""
        done = subprocess.run(
            [str(word) for word in words],
            cwd=cwd,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=400,
            check=False,
        )
        assert expected is None or done.returncode == expected, done.stdout
        return done.stdout

    def launch(self, *words: object, cluster: str = "slurm", expected: int | None = 0) -> str:
        return self.run(sys.executable, "-m", "hpc_cpd.launch", "--cluster", cluster, *words, expected=expected)

    def status(self, run: Run) -> dict[str, Any]:
        """What ``hpc-cpd status --json`` says, by unit."""
        words = ["-c", "from hpc_cpd.cli import main; main()", "status", str(run.folder), "--json"]
        units = json.loads(self.run(sys.executable, *words))["units"]
        return {unit["unit"]: unit for unit in units}

    def wait(self, condition: Any, seconds: float, what: str) -> None:
        self.cluster.wait_for(condition, seconds, what)

    def queue(self, form: str = "%i %T") -> list[str]:
        """Jobs that wait or run, oldest first."""
        return self.cluster.run("squeue", "-h", "-r", "-S", "i", "-o", form).stdout.split("\n")[:-1]

    def clear(self) -> None:
        """Cancel everything and wait until it is gone."""
        for user in set(self.queue("%u")):
            self.cluster.run("scancel", "--user", user)
        self.wait(lambda: not self.queue(), 30, "an empty queue")

    def preempt(self, seconds: int = 3, nodes: int = 4) -> None:
        """Take `nodes` whole nodes for a moment, in the higher partition."""
        words = ["--partition=high", f"--nodes={nodes}", "--exclusive", "--output=/dev/null"]
        job = self.cluster.submit(*words, "--wrap", f"sleep {seconds}")
        self.wait(lambda: self.cluster.state(job) in ("COMPLETED", ""), 60, f"job {job}")


def job_of(run: Run, unit: str) -> str:
    """The Slurm job of a unit."""
    return str(json.loads((run.logs / "submitted.json").read_text())["units"][unit]["job"])


def student_hash(run: Run, stage: int = 1) -> str:
    assert is_done(run.stage(stage))
    return hashlib.sha256((run.stage(stage) / "student" / "student.json").read_bytes()).hexdigest()
