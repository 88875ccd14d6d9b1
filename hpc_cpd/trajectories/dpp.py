"""Kept for those who import it from here: `greedy_map` is what the selection ``dpp`` is made of."""

from hpc_cpd.trajectories.selection._greedy_map import greedy_map as greedy_map
