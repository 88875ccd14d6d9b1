"""What every rank of a job runs.

python -m hpc_cpd.worker teacher --run DIR --task ID              train a teacher, then record its trajectories
python -m hpc_cpd.worker teacher --run DIR --index N --plan FILE  the same, as element N of an array of jobs
python -m hpc_cpd.worker stage --run DIR --stage K                learn stage K
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

from hpc_cpd.cluster.preemption import Stop
from hpc_cpd.cluster.schedulers.base import find_rank
from hpc_cpd.cluster.units import StageUnit, TeacherUnit
from hpc_cpd.cluster.worker import learn, run_rank, train
from hpc_cpd.errors import run_command
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import read_json


def main() -> NoReturn:
    """Be one rank, as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m hpc_cpd.worker", description="One rank of one job.")
    kinds = parser.add_subparsers(dest="kind", required=True)
    teacher, stage = kinds.add_parser("teacher"), kinds.add_parser("stage")
    which = teacher.add_mutually_exclusive_group(required=True)
    which.add_argument("--task")
    which.add_argument("--index", type=int)
    teacher.add_argument("--plan", type=Path)
    stage.add_argument("--stage", type=int, required=True)
    stage.add_argument("--allow-missing", action="store_true")
    for kind in (teacher, stage):
        kind.add_argument("--run", type=Path, required=True)
    arguments = parser.parse_args()
    info, run = find_rank(os.environ), Run(arguments.run)
    if arguments.kind == "stage":
        unit = StageUnit(run, arguments.stage)

        def work(stop: Stop) -> None:
            learn(unit, info, stop, arguments.allow_missing)
            if info.own_job and info.rank == 0:  # elsewhere the launcher does this
                from hpc_cpd.report.page import build_report

                build_report(run)

        run_rank(work, info, unit)
    task = arguments.task
    if task is None and arguments.plan is None:
        parser.error("--index needs --plan, the file that maps it to a task")
    elif task is None:
        tasks = read_json(arguments.plan)["tasks"]
        if not 0 <= arguments.index < len(tasks):
            parser.error(f"{arguments.plan} has no element {arguments.index}; it has {len(tasks)}")
        task = tasks[arguments.index]
    teacher_unit = TeacherUnit(run, task)
    run_rank(lambda stop: train(teacher_unit, info, stop), info, teacher_unit)


if __name__ == "__main__":
    sys.exit(run_command(main))
