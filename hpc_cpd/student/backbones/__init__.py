"""Backbones, found by name: what makes features of the tokens of a history."""
