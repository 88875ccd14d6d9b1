"""Acting on a GPU, for benchmarks/gpu.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import numpy as np
import torch
from acting import OBSERVATION, SIZES, TASK, make_policy
from gpu_timing import seconds

from hpc_cpd.student.policy import StudentPolicy


def acting_in(policy: StudentPolicy, seen: Iterator[np.ndarray]) -> Callable[[], object]:
    return lambda: policy.act(next(seen))


def acting(device: torch.device, small: bool, peak: float) -> list[dict[str, Any]]:
    """Actions per second, from observations in numpy to actions in numpy, which every step of an environment needs."""
    rows = []
    for name in list(SIZES)[:1] if small else ("default", "large, history 64, top-2"):
        for count in (1, 4) if small else (1, 64, 4096):
            policy = make_policy(SIZES[name], device)
            policy.reset(TASK, count)
            rng = np.random.default_rng(0)
            seen = cycle(rng.normal(size=(8, count, OBSERVATION)).astype(np.float32))
            spent = seconds(acting_in(policy, seen), device, small)
            rows.append(
                {
                    "student": name,
                    "environments": count,
                    "milliseconds": 1000.0 * spent,
                    "actions_per_second": count / spent,
                }
            )
    return rows
