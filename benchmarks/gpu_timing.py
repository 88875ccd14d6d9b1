"""Timing and counting for benchmarks/gpu.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode


def seconds(work: Callable[[], object], device: torch.device, small: bool) -> float:
    """Of one call: the median of several turns of several calls each, by the wall-clock, after two to warm up.

    The device is waited for at the end of a turn alone: calls may be under way together, as in training.
    """
    turns, budget = (2, 0.02) if small else (5, 2.0)

    def turn(calls: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        for _ in range(calls):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - began) / calls

    turn(2)
    calls = max(2, round(budget / turn(2)))
    return median(turn(calls) for _ in range(turns))


def operations(work: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products and attention of one call, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()
