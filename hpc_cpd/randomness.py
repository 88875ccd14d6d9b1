"""Random numbers without a running generator: every draw is a pure function of (seed, purpose, indices).

A resumed run needs no generator's state, and ranks that share work draw what one rank would have drawn. Purposes are
words, and are hashed: two of them never share a key, and a key with one more index is another key.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def numpy_generator(seed: int, purpose: str, *indices: int) -> np.random.Generator:
    """A fresh generator; the same arguments give the same numbers."""
    words = np.frombuffer(hashlib.sha256(purpose.encode()).digest()[:16], dtype=np.uint32)
    return np.random.default_rng([seed, *(int(word) for word in words), *indices])


def torch_generator(seed: int, purpose: str, *indices: int) -> torch.Generator:
    """The same for tensors."""
    import torch

    return torch.Generator().manual_seed(int(numpy_generator(seed, purpose, *indices).integers(2**63)))
