"""What torch.distributed reads in every rank that a test starts."""

from __future__ import annotations

import os
from pathlib import Path

from hpc_cpd.cluster.ranks import free_port


def rank_environments(world_size: int) -> list[dict[str, str]]:
    """The environment of each of `world_size` ranks that meet at a free port of this machine."""
    common = {
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "DS_ACCELERATOR": "cpu",
        # behind ours what the test says, as if it were installed
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])),
    }
    return [{**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]
