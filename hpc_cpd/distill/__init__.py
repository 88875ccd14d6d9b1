"""Continual distillation: how a stage turns trajectories into the next student."""
