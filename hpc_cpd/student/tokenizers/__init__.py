"""Tokenizers, found by name: what makes a token of an observation."""
