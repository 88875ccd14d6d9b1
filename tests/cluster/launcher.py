"""A launcher around the test worker: python -m tests.cluster.launcher ACT FOLDER RANKS [mpi]."""

import sys
from pathlib import Path

from hpc_cpd.cluster.preemption import StopFlag
from hpc_cpd.cluster.ranks import RankedJob
from hpc_cpd.cluster.schedulers.local import supervise


def main() -> int:
    act, folder, ranks, *mpi = sys.argv[1:]
    stop = StopFlag().install()
    logs, at = Path(folder, "logs"), Path(folder)
    module = "tests.cluster.rank_worker"
    job = RankedJob("the job", [act, folder, *mpi], int(ranks), bool(mpi), logs, module=module, progress=at)
    outcomes = supervise([job], 1, stop, lambda name, line: print(f"shown: {line}", flush=True))
    print(outcomes[0].sentence if outcomes else "", file=sys.stderr, flush=True)
    return outcomes[0].code if outcomes else 3


if __name__ == "__main__":
    sys.exit(main())
