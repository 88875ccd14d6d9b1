"""What a rank of the tests' own jobs runs: python rank.py RUN TASK RANKS [--die-at BOUNDARY] [--no-collect]."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from hpc_cpd.distributed.mpi import open_communicator
from hpc_cpd.errors import run_command
from hpc_cpd.run.paths import Run
from hpc_cpd.teachers.collect import collect_trajectories
from hpc_cpd.teachers.sources.base import make_teacher


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("task")
    parser.add_argument("ranks", type=int)
    parser.add_argument("--die-at", type=int, default=0)
    parser.add_argument("--only", choices=["train", "collect"])
    arguments = parser.parse_args()
    run = Run(arguments.run)
    boundaries = 0

    def stop() -> bool:
        nonlocal boundaries
        boundaries += 1
        if boundaries == arguments.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    communicator = open_communicator(arguments.ranks)
    if arguments.only != "collect":
        make_teacher(run, arguments.task, communicator, stop)
    if arguments.only != "train":
        collect_trajectories(run, arguments.task, communicator, stop)


if __name__ == "__main__":
    sys.exit(run_command(main))
