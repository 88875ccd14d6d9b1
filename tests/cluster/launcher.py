"""A launcher around the test worker: python -m tests.cluster.launcher ACT FOLDER RANKS [mpi]."""

import sys
from pathlib import Path

from hpc_cpd.cluster.preemption import StopFlag
from hpc_cpd.cluster.schedulers.local import Job, run_jobs


def main() -> int:
    act, folder, ranks, *mpi = sys.argv[1:]
    stop = StopFlag().install()
    job = Job(
        "the job", [act, folder, *mpi], int(ranks), bool(mpi), Path(folder, "logs"), module="tests.cluster.rank_worker"
    )
    outcomes = run_jobs([job], 1, stop, lambda job, line: print(f"shown: {line}", flush=True))
    print(outcomes[0].sentence if outcomes else "", file=sys.stderr, flush=True)
    return outcomes[0].code if outcomes else 3


if __name__ == "__main__":
    sys.exit(main())
