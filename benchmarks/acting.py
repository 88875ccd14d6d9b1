"""Actions per second of a published student, with keys and values kept, against computing the window anew each tick.

    python benchmarks/acting.py [--json OUT.json]

All act in 1, 64 and 1,024 environments in the middle of an episode, on made-up observations, and must give the same
actions. "window" is the plain way: the student's forward pass on the last `history` observations, of which the last
action is taken. "newest" is the same pass with the experts at the newest observation alone, as in training. One thread,
processor time; the contenders take turns of many ticks, and a time is the fastest tick of all: neighbours that take
the core away count little then. What fits into the caches is in them, for all contenders and for the bound.

No tick can be faster than its weights are read and its numbers multiplied. "bound" is the longer of two times that are
measured in the same turns: of a product of one row and a matrix as large as all the weights that a tick reads (the
experts that nobody chose are not among them), and of as many multiplications at the rate of a product of two matrices
of 1024 x 1024. Both are measured and not taken from a data sheet, so they differ with what neighbours do.

With a history of 16 and more, acting is to be ten times as fast as computing the window. With 4, the default, there is
no such target: what can be saved is a quarter of the window at most, and most of a tick goes to experts anyway.
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
    f"default, history {history}{f', top-{top_k}' if top_k else ''}": StudentSettings(history=history, top_k=top_k)
    for history in (4, 16, 32, 64)
    for top_k in (0, 2)
} | {
    "large, history 64, top-2": StudentSettings(
        width=256, backbone=TransformerSettings(layers=4, heads=8), history=64, expert_hidden=512, top_k=2
    ),
}
ENVIRONMENTS = (1, 64, 1024)
TASK = "made/up"
KEPT, WINDOW, NEWEST = "kept", "window", "newest"
READING, MULTIPLYING = "reading", "multiplying"
SECONDS = 0.1
"""Least duration of a turn."""
PATIENCE_SECONDS = 0.3
"""A contender whose ticks took this long takes no further turn."""
TARGET, LEAST_HISTORY = 10.0, 16
SIDE = 1024


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
    """The fastest of the ticks of a turn: between the others of them, neighbours had the core."""
    ticks: list[float] = []
    while sum(ticks) < SECONDS:
        began = time.process_time()
        act(seen[len(ticks) % len(seen)])
        ticks.append(time.process_time() - began)
    return min(ticks)


def weights_of_tick(policy: StudentPolicy, window: Window) -> tuple[int, int]:
    """(numbers in the weights that a tick reads, multiplications of a tick)."""
    student, rows = policy.student, len(window.window)
    every = sum(parameter.numel() for parameter in student.parameters())
    one_expert = sum(parameter.numel() for _, parameter in student.expert_parameters([0]))
    others, top_k = every - EXPERTS * one_expert, policy.shape.top_k
    if not top_k:
        return every, rows * every
    with torch.inference_mode():
        gate = student(window.window, window.vectors)[2][:, -1, 0]
    chosen = len(gate.topk(top_k, dim=1).indices.unique())
    return others + chosen * one_expert, rows * (others + top_k * one_expert)


def compare(settings: StudentSettings, rows: int) -> dict[str, Any]:
    policy = make_policy(settings)
    policy.reset(TASK, rows)
    windows = {WINDOW: Window(policy, rows, False), NEWEST: Window(policy, rows, True)}
    acts: dict[str, Callable[[np.ndarray], np.ndarray]] = {KEPT: policy.act}
    acts |= {who: window.act for who, window in windows.items()}
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
    numbers, multiplications = weights_of_tick(policy, windows[WINDOW])
    row, weights, square = torch.randn(1, 512), torch.randn(512, numbers // 512), torch.randn(SIDE, SIDE)
    acts[READING] = lambda observations: (row @ weights).numpy()
    acts[MULTIPLYING] = lambda observations: (square @ square).numpy()
    times: dict[str, list[float]] = {who: [] for who in acts}
    spent = dict.fromkeys(acts, 0.0)
    while min(spent.values()) < PATIENCE_SECONDS:
        for who, act in acts.items():
            if spent[who] < PATIENCE_SECONDS:
                began = time.process_time()
                times[who].append(seconds_per_tick(act, seen))
                spent[who] += time.process_time() - began
    best = {who: min(values) for who, values in times.items()}
    best[MULTIPLYING] *= multiplications / SIDE**3
    bound, ratio = max(best[READING], best[MULTIPLYING]), best[WINDOW] / best[KEPT]
    return {
        "milliseconds_per_tick": {who: round(seconds * 1000, 3) for who, seconds in best.items()},
        "actions_per_second": round(rows / best[KEPT]),
        "megabytes_of_weights": round(4 * numbers / 1e6, 2),
        "ratios": {f"{who}/{KEPT}": round(best[who] / best[KEPT], 2) for who in (WINDOW, NEWEST)}
        | {"kept/bound": round(best[KEPT] / bound, 2), "window/bound": round(best[WINDOW] / bound, 2)},
        "target_met": None if settings.history < LEAST_HISTORY else ratio >= TARGET,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all figures here")
    given = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    words = {None: "no target", True: f"target {TARGET:.0f}: met", False: f"target {TARGET:.0f}: MISSED"}
    for name, settings in SIZES.items():
        results[name] = {}
        for rows in ENVIRONMENTS:
            found = results[name][str(rows)] = compare(settings, rows)
            milliseconds = "  ".join(f"{who} {value:.2f} ms" for who, value in found["milliseconds_per_tick"].items())
            ratios = "  ".join(f"{names} {ratio:.1f}" for names, ratio in found["ratios"].items())
            print(f"{name:27s}{rows:5,d} environments: {found['actions_per_second']:7,d} actions/s  {milliseconds}")
            print(f"    {ratios}  {words[found['target_met']]}", flush=True)
    if given.json is not None:
        everything = {"experts": EXPERTS, "results": results, "origin": describe_origin()}
        given.json.write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(run_command(main))
