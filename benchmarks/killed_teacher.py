"""A teacher from scratch, killed ten times at random and left alone: the same weights; and moved from 2 ranks to 1.

    python benchmarks/killed_teacher.py [OUT.json]

Kills are SIGKILL to every process of the launch, at a random moment within `KILL_SECONDS` of its start. The second part
stops (SIGTERM) a teacher of two ranks and goes on with one: its curve goes on too.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hpc_cpd.cluster.provenance import describe_origin
from hpc_cpd.run.metrics_log import read_metrics
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import is_done, read_json

TASK = "metaworld/window-open-v3"
KILLS, KILL_SECONDS = 10, (6.0, 20.0)
SETTINGS = [
    "teachers.start=scratch",
    "teachers.algorithm.hidden=[128,128]",
    "teachers.source.target_success=1.0",
    "teachers.source.evaluate_every_rounds=10",
    "teachers.algorithm.iterations=40",
    "trajectories.episodes=8",
    "checkpoint_every_seconds=3",
    "evaluation.episodes=10",
]
ROOT = Path(__file__).parents[1]


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="killed-") as name:
        folder = Path(name)
        whole, killed, moved = (Run(folder / word) for word in ("whole", "killed", "moved"))
        begin = time.monotonic()
        launch(whole, ranks=1).wait()
        undisturbed = time.monotonic() - begin
        times: list[dict[str, float]] = []
        rng = random.Random(0)
        while not is_done(killed.trajectories(TASK)):
            job = launch(killed, ranks=1)
            if len(times) < KILLS:
                seconds = rng.uniform(*KILL_SECONDS)
                try:
                    job.wait(seconds)
                except subprocess.TimeoutExpired:
                    os.killpg(job.pid, signal.SIGKILL)
                    times.append({"after_seconds": round(seconds, 1), "iteration": iterations(killed)})
            job.wait()
        job = launch(moved, ranks=2)
        while iterations(moved) < 12:
            time.sleep(0.5)
        os.kill(job.pid, signal.SIGTERM)
        stopped = job.wait()
        at = iterations(moved)
        launch(moved, ranks=1).wait()
        results: dict[str, Any] = {
            "task": TASK,
            "settings": SETTINGS,
            "kills": times,
            "undisturbed_seconds": round(undisturbed, 1),
            "sha256": {run.folder.name: weights(run) for run in (whole, killed)},
            "same_bits": weights(whole) == weights(killed),
            "moved": {"exit_code_of_2_ranks": stopped, "at_iteration": at, "curve": curve(moved)},
            "curve_undisturbed": curve(whole),
        }
    print(f"killed {len(times)} times: {'the same bits' if results['same_bits'] else 'OTHER BITS'}")
    print(f"2 ranks until iteration {at}, then 1; evaluated success: {results['moved']['curve']}")
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps({"results": results, "origin": describe_origin()}, indent=1) + "\n")


def launch(run: Run, ranks: int) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "hpc_cpd.launch", "--stage", "teachers", "--run", str(run.folder)]
    words += ["--cluster", "local", f"stream.tasks={TASK}", f"teachers.ranks={ranks}", *SETTINGS]
    if not run.config_file.is_file():
        empty = run.folder.with_suffix(".yaml")
        empty.write_text("name: killed\n")
        words += ["--config", str(empty)]
    return subprocess.Popen(words, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)


def iterations(run: Run) -> int:
    """PPO iterations that the log shows."""
    path = run.teacher(TASK) / "metrics.jsonl"
    return max((line["step"] for line in read_metrics(path)), default=0) if path.is_file() else 0


def weights(run: Run) -> str:
    return hashlib.sha256((run.teacher(TASK) / "policy.safetensors").read_bytes()).hexdigest()


def curve(run: Run) -> list[Any]:
    evaluations = read_json(run.teacher(TASK) / "evaluation.json")["while_training"]
    return [[one["environment_steps"], one["successes"] / one["episodes"]] for one in evaluations]


if __name__ == "__main__":
    main()
