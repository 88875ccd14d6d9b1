"""What test_reinforce runs where the example is installed: python train_reinforce.py FOLDER; prints one JSON object."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import hpc_cpd
from hpc_cpd.config import load_config
from hpc_cpd.distributed.mpi import Communicator
from hpc_cpd.evaluation.rollouts import evaluate_policy
from hpc_cpd.run.paths import Run
from hpc_cpd.teachers.collect import collect_trajectories
from hpc_cpd.teachers.sources.base import make_teacher
from tests.teachers.jobs import until_done

TASK = "line/short"
WORDS = ["teachers.algorithm=reinforce", "teachers.start=scratch", "teachers.start.initial_log_std=-1.0"]
WORDS += ["teachers.source.evaluate_every_rounds=10", "trajectories.episodes=8", "checkpoint_every_seconds=0.001"]


def main(folder: Path) -> None:
    runs = {name: Run(folder / name) for name in ("untrained", "whole", "stopped")}
    for name, run in runs.items():
        run.open(load_config(None, [*WORDS, *["teachers.algorithm.rounds=0"] * (name == "untrained")]), {})
    for name in ("untrained", "whole"):
        make_teacher(runs[name], TASK, Communicator(), lambda: False)
    launches = until_done(lambda stop: make_teacher(runs["stopped"], TASK, Communicator(), stop), 2)
    collect_trajectories(runs["whole"], TASK, Communicator(), lambda: False)
    teacher = hpc_cpd.load_teacher(runs["whole"].teacher(TASK))
    played = evaluate_policy(teacher, TASK, 50, seed=3)
    files = [(run.teacher(TASK) / "policy.safetensors").read_bytes() for run in (runs["whole"], runs["stopped"])]
    print(
        json.dumps(
            {
                "class": type(teacher).__name__,
                "untrained": json.loads((runs["untrained"].teacher(TASK) / "DONE").read_text())["success"],
                "success": sum(result.success for result in played) / 50,
                "launches": launches,
                "same_bits": files[0] == files[1],
                "episodes": len(hpc_cpd.open_trajectories(runs["whole"].trajectories(TASK)).episodes),
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
