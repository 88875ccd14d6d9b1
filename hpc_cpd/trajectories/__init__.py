"""Trajectories: the HDF5 shards, their reader, diverse selection, and the replay memory."""

from hpc_cpd.trajectories.schema import Episode, Origin
from hpc_cpd.trajectories.shard import ShardWriter, read_shard, write_manifest
from hpc_cpd.trajectories.store import TrajectoryStore, open_trajectories, verify_folder

__all__ = [
    "Episode",
    "Origin",
    "ShardWriter",
    "TrajectoryStore",
    "open_trajectories",
    "read_shard",
    "verify_folder",
    "write_manifest",
]
