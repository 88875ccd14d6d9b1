"""How a teacher learns: one file per algorithm."""
