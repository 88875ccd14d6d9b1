"""Heads, found by name: what makes an action of the features."""
