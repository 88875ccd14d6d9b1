"""Continual-learning methods, found by name."""
