"""A rank that behaves as it is told, on the real worker's own machinery: what the launcher is tested with.

    python -m tests.cluster.rank_worker ACT FOLDER [mpi]

ACT: done, wait (until asked to stop), mistake-R, mistake-all, fault-R, killed-R: what rank R does after a moment,
while the other ranks go on waiting. stopped-R: it stops, and rank 0 says so.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

from hpc_cpd.cluster.preemption import StopFlag
from hpc_cpd.cluster.schedulers.base import find_rank
from hpc_cpd.errors import RankLost, StopRequested, UserError
from hpc_cpd.progress import Progress
from hpc_cpd.worker import run_rank


def main() -> NoReturn:
    act, folder, *mpi = sys.argv[1:]
    info = find_rank(os.environ)

    def agree(flag: bool) -> bool:
        if mpi:
            from mpi4py import MPI

            assert MPI.COMM_WORLD.Get_size() == info.size
            return bool(MPI.COMM_WORLD.allreduce(int(flag), MPI.MAX))
        return flag

    def work(stop: StopFlag) -> None:
        Path(folder, f"pid-{info.rank}").write_text(str(os.getpid()))
        what, _, who = act.partition("-")
        Progress("stage 1", enabled=info.rank == 0, folder=Path(folder)).update(f"rank {info.rank} of {info.size}")
        print("noise of some library", flush=True)
        end = time.monotonic() + 60
        agree(False)
        Path(folder, f"begun-{info.rank}").touch()
        for step in range(10**9):
            if time.monotonic() > end:
                raise TimeoutError("nobody asked this rank to stop")
            if step == 5 and who in (str(info.rank), "all"):
                if what == "mistake":
                    raise UserError(f"the file of rank {info.rank} is missing; make it")
                if what == "fault":
                    raise RuntimeError("an invariant was broken")
                os.kill(os.getpid(), signal.SIGSTOP if what == "stopped" else signal.SIGKILL)
            if what == "stopped" and step == 10:
                raise RankLost(f"rank {who} of {info.size} no longer answers", [int(who)])
            if what == "done" and step == 5:
                return
            if agree(stop()):
                Path(folder, f"saved-{info.rank}").write_text(str(stop.count))
                raise StopRequested("a checkpoint stands on disk")
            time.sleep(0.05)

    run_rank(work, info)


if __name__ == "__main__":
    main()
