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
from hpc_cpd.errors import RankLost, StopRequested, UserError
from hpc_cpd.worker import find_place, run_rank


def main() -> NoReturn:
    act, folder, *mpi = sys.argv[1:]
    place = find_place(dict(os.environ))

    def agree(flag: bool) -> bool:
        if mpi:
            from mpi4py import MPI

            assert MPI.COMM_WORLD.Get_size() == place.size
            return bool(MPI.COMM_WORLD.allreduce(int(flag), MPI.MAX))
        return flag

    def work(stop: StopFlag) -> None:
        Path(folder, f"pid-{place.rank}").write_text(str(os.getpid()))
        what, _, who = act.partition("-")
        print(f"stage 1: rank {place.rank} of {place.size}", flush=True)
        print("noise of some library", flush=True)
        end = time.monotonic() + 60
        agree(False)
        Path(folder, f"begun-{place.rank}").touch()
        for step in range(10**9):
            if time.monotonic() > end:
                raise TimeoutError("nobody asked this rank to stop")
            if step == 5 and who in (str(place.rank), "all"):
                if what == "mistake":
                    raise UserError(f"the file of rank {place.rank} is missing; make it")
                if what == "fault":
                    raise RuntimeError("an invariant was broken")
                os.kill(os.getpid(), signal.SIGSTOP if what == "stopped" else signal.SIGKILL)
            if what == "stopped" and step == 10:
                raise RankLost(f"rank {who} of {place.size} no longer answers", [int(who)])
            if what == "done" and step == 5:
                return
            if agree(stop()):
                Path(folder, f"saved-{place.rank}").write_text(str(stop.count))
                raise StopRequested("a checkpoint stands on disk")
            time.sleep(0.05)

    run_rank(work, place)


if __name__ == "__main__":
    main()
