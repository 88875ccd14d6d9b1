"""Trajectories: the HDF5 shards, their reader, diverse selection, and the replay memory."""
