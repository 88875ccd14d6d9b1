"""Ranks: the groups of torch and of MPI, running work on one rank and telling all, and finding out who is lost."""
