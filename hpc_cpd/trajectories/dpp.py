"""Kept for those who import it from here: the algorithm moved to `hpc_cpd.trajectories.selection.dpp`."""

from hpc_cpd.trajectories.selection.dpp import greedy_map as greedy_map
