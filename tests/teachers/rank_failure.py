"""What a rank of test_actors runs: one rank fails while the others wait for it."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable

from hpc_cpd.cluster.schedulers.base import RankInfo
from hpc_cpd.distributed.mpi import open_communicator
from hpc_cpd.errors import LockLost, StopRequested, UserError
from hpc_cpd.worker import run_rank


def work(stop: Callable[[], bool]) -> None:
    kind, ranks = sys.argv[1], int(sys.argv[2])
    communicator = open_communicator(ranks)

    failures = {
        "agreed": UserError("rank 0 cannot read the file"),
        "stopped": StopRequested("nothing was begun"),
        "fenced": LockLost("another job took the lock"),
        "full": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/runs/x/DONE"),
    }

    def fail() -> None:
        raise failures[kind]

    if kind in failures:
        try:
            communicator.on_root(fail)
        except Exception as error:
            told = (type(error).__name__, getattr(error, "errno", None), getattr(error, "filename", None))
            print(f"rank {communicator.rank} met {told}", flush=True)
            raise
    if communicator.rank == 1:
        raise {"mistake": UserError("rank 1 cannot go on"), "fault": RuntimeError("rank 1 broke")}[kind]
    communicator.any(False)


if __name__ == "__main__":
    rank = int(os.environ["PMI_RANK"])
    run_rank(work, RankInfo(rank, int(os.environ["PMI_SIZE"]), rank))
