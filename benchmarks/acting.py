"""Actions per second of a published student, with keys and values kept, against computing the window anew each tick.

    python benchmarks/acting.py [--json OUT.json]

All act in 1, 64 and 1,024 environments in the middle of an episode, on made-up observations, and must give the same
actions. "window" is the plain way: the student's forward pass on the last `history` observations, of which the last
action is taken. "newest" is the same pass with the experts at the newest observation alone, as in training. One thread,
processor time (neighbours do not count); the contenders take turns, and a time is the least of its turns.

What can be saved is bounded by the length of the history, which is 4 by default, and by the experts, which a tick needs
in any case: all 25 of them by default, and in one environment their weights come from memory for a single row.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from hpc_cpd.cluster.provenance import describe_origin
from hpc_cpd.errors import run_command
from hpc_cpd.settings import StudentSettings
from hpc_cpd.student.backbones.transformer import TransformerSettings
from hpc_cpd.student.embeddings.one_hot import OneHotSettings
from hpc_cpd.student.network import Student, StudentShape
from hpc_cpd.student.policy import StudentParts, StudentPolicy

OBSERVATION, ACTION, VECTOR, EXPERTS = 39, 4, 32, 25
DIMENSIONS = {
    "observation_size": OBSERVATION,
    "action_size": ACTION,
    "task_vector_size": VECTOR,
    "initial_gate_bias": -5.0,
}
SIZES = {
    "default": StudentSettings(),
    "default, history 32": StudentSettings(history=32),
    "default, history 32, top-2": StudentSettings(history=32, top_k=2),
    "large, history 64, top-2": StudentSettings(
        width=256, backbone=TransformerSettings(layers=4, heads=8), history=64, expert_hidden=512, top_k=2
    ),
}
ENVIRONMENTS = (1, 64, 1024)
TASK = "made/up"
KEPT, WINDOW, NEWEST = "kept", "window", "newest"
SECONDS = 0.3
"""Least duration of a turn."""
PATIENCE_SECONDS = 2.0
"""A contender whose ticks took this long takes no further turn."""
TARGET = 10.0


def make_policy(settings: StudentSettings, device: str | torch.device = "cpu") -> StudentPolicy:
    shape = StudentShape.from_settings(settings, **DIMENSIONS)
    experts = [list(range(EXPERTS))]
    state = Student(shape, experts, for_training=False).state_dict()
    vector = np.ones(shape.task_vector_size, np.float32) / shape.task_vector_size**0.5
    parts = StudentParts(state, shape, experts, {TASK: vector}, {}, OneHotSettings())
    return StudentPolicy(parts, device)


class Window:
    """Acts by the training pass on a ring of the last observations."""

    def __init__(self, policy: StudentPolicy, rows: int, newest_alone: bool) -> None:
        length = policy.shape.history
        self.student = policy.student
        self.window = torch.zeros(rows, length, OBSERVATION)
        self.vectors = torch.tensor(policy.task_vectors[TASK]).repeat(rows, 1)
        self.valid = torch.arange(length).expand(rows, length) == length - 1 if newest_alone else None

    def see(self, observations: np.ndarray) -> None:
        self.window = torch.cat([self.window[:, 1:], torch.tensor(observations)[:, None]], dim=1)

    def act(self, observations: np.ndarray) -> np.ndarray:
        self.see(observations)
        with torch.inference_mode():
            actions: np.ndarray = self.student(self.window, self.vectors, self.valid)[0][:, -1].clamp(-1, 1).numpy()
        return actions


def seconds_per_tick(act: Callable[[np.ndarray], np.ndarray], seen: np.ndarray) -> float:
    began, ticks = time.process_time(), 0
    while True:
        act(seen[ticks % len(seen)])
        ticks += 1
        spent = time.process_time() - began
        if spent >= SECONDS:
            return spent / ticks


def compare(settings: StudentSettings, rows: int, turns: int) -> dict[str, Any]:
    policy = make_policy(settings)
    policy.reset(TASK, rows)
    windows = {WINDOW: Window(policy, rows, False), NEWEST: Window(policy, rows, True)}
    acts = {KEPT: policy.act} | {who: window.act for who, window in windows.items()}
    rng = np.random.default_rng(0)
    seen = rng.normal(size=(settings.history + 3, rows, OBSERVATION)).astype(np.float32)
    for observations in seen[:-1]:
        policy.act(observations)
        for window in windows.values():
            window.see(observations)
    actions = {who: act(seen[-1]) for who, act in acts.items()}
    for who, other in actions.items():
        if not np.allclose(actions[KEPT], other, rtol=0, atol=1e-5):
            raise RuntimeError(f"{KEPT} and {who} differ by {np.abs(actions[KEPT] - other).max()}")
    times: dict[str, list[float]] = {who: [] for who in acts}
    for _ in range(turns):
        for who, act in acts.items():
            if sum(times[who]) < PATIENCE_SECONDS:
                times[who].append(seconds_per_tick(act, seen))
    best = {who: min(values) for who, values in times.items()}
    return {
        "milliseconds_per_tick": {who: round(seconds * 1000, 3) for who, seconds in best.items()},
        "actions_per_second": round(rows / best[KEPT]),
        "ratios": {f"{who}/{KEPT}": round(best[who] / best[KEPT], 2) for who in (WINDOW, NEWEST)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write all figures here")
    given = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name, settings in SIZES.items():
        results[name] = {}
        for rows in ENVIRONMENTS:
            found = results[name][str(rows)] = compare(settings, rows, given.turns)
            milliseconds = "  ".join(f"{who} {value:8.2f} ms" for who, value in found["milliseconds_per_tick"].items())
            ratios = "  ".join(f"{names} {ratio:5.1f}" for names, ratio in found["ratios"].items())
            print(f"{name:27s}{rows:5,d} environments: {found['actions_per_second']:7,d} actions/s  {milliseconds}")
            print(f"    {ratios}", flush=True)
        least = min(found["ratios"][f"{WINDOW}/{KEPT}"] for found in results[name].values())
        print(f"{name}: at least {least:.1f} times, target {TARGET:.0f}: {'met' if least >= TARGET else 'MISSED'}")
    if given.json is not None:
        everything = {"experts": EXPERTS, "results": results, "origin": describe_origin()}
        given.json.write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(run_command(main))
