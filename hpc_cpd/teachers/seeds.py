"""Randomness without a running generator: every draw is a pure function of what it is for.

A resumed run needs no generator state, and ranks that share the work draw what one rank would have drawn.
"""

from __future__ import annotations

import hashlib

import numpy as np


def generator(seed: int, task_id: str, purpose: str, *indices: int) -> np.random.Generator:
    """A fresh generator for (`seed`, `task_id`, `purpose`, `indices`); the same arguments give the same numbers."""
    words = np.frombuffer(hashlib.sha256(f"{task_id}\n{purpose}".encode()).digest()[:16], dtype=np.uint32)
    return np.random.default_rng([seed, *(int(word) for word in words), *indices])
