"""Ranks that no longer answer: how long the others wait for them, and which ones they were.

A killed process closes its connections, and the others fail at once. One that is stopped, or whose machine or network
is gone, says nothing: then only the collective_timeout of the collectives ends the waiting.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from hpc_cpd.errors import RankLost

ROLL_CALL_SECONDS = 5.0  # the ranks that are left find out within this time of each other


@contextmanager
def collective_timeout(seconds: float) -> Iterator[None]:
    """Let collectives of all groups wait this long for a peer."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before = distributed_c10d._get_default_group()._get_backend(device).options._timeout
    _set_timeout(timedelta(seconds=seconds))
    try:
        yield
    finally:
        _set_timeout(before)


@contextmanager
def naming_lost_ranks(where: str) -> Iterator[None]:
    """Turn a failed collective into RankLost naming the ranks that no longer answer; `where`: "stage 2 phase 1"."""
    try:
        yield
    except RuntimeError as error:
        if "gloo" not in str(error) and not isinstance(error, dist.DistError):
            raise
        lost = missing_ranks()
        if not lost:
            raise
        ranks = " and ".join(str(rank) for rank in lost)
        raise RankLost(
            f"{where}: rank {ranks} of {dist.get_world_size()} no longer answers; was the process killed or stopped, or"
            " is its machine or network gone? The last checkpoint stands, the same command goes on from it",
            lost,
        ) from error


def missing_ranks() -> list[int]:
    """The ranks that do not report within `ROLL_CALL_SECONDS`; every rank that is left calls this after a failure."""
    store, rank, size = distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size()
    present: set[int] = set()

    def call() -> None:
        with suppress(RuntimeError):
            store.set(f"present/{rank}", "yes")
            while len(present) < size:
                present.update(other for other in range(size) if store.check([f"present/{other}"]))
                time.sleep(0.1)

    # in a thread, because the store lives in rank 0, and does not answer when that one is gone
    caller = threading.Thread(target=call, daemon=True)
    caller.start()
    caller.join(ROLL_CALL_SECONDS)
    return sorted(set(range(size)) - present) if present else [0]


def _set_timeout(time: timedelta) -> None:
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(time, group)
