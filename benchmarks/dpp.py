"""Time and peak memory of choosing diverse trajectories: ours against the greedy rule on an N x N kernel.

    python benchmarks/dpp.py [--sizes N ...] [--json OUT.json]

Ours is asked twice. ``greedy_map`` gives at most as many picks as the rows have rank (256 features: 256 picks), since
nothing is left to gain then. More picks are what the selection ``dpp`` makes of it: it calls it
again on the rows that are left, round after round, until the budget is used. The peer is the published algorithm (Chen,
Zhang and Zhou 2018, arXiv 1709.05135), which wants the kernel of all pairs; it runs where that fits into memory, and
must pick the same rows.

Each figure comes from a process of its own that makes the rows (random, float64) and measures itself. Memory is the
peak of the whole process less what it held before the call: rows, interpreter and libraries. Time is processor time:
neighbours do not count.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from numpy.typing import NDArray

from hpc_cpd.cluster.provenance import describe_origin
from hpc_cpd.errors import run_command
from hpc_cpd.trajectories.dpp import greedy_map
from hpc_cpd.trajectories.selection.base import Candidates
from hpc_cpd.trajectories.selection.dpp import DPPSelection, DPPSettings

SIZES = (1_000, 10_000, 100_000, 1_000_000)
FEATURES, PICKS = 256, 1_000
TARGET_SECONDS, TARGET_SIZE = 20.0, 1_000_000
OURS, ROUNDS, KERNEL = "ours, one call", "ours, in rounds", "N x N kernel"
KERNEL_BYTES = 4e9
"""A kernel that takes more is left out."""
EPSILON = 1e-10  # the relative tolerance of ours


def pick_by_kernel(rows: NDArray[np.float64], limit: int) -> NDArray[np.int64]:
    """The published greedy rule, which updates the Cholesky rows of all items against the kernel."""
    kernel = rows @ rows.T
    gains = kernel.diagonal().copy()
    smallest = EPSILON * gains.max()
    cholesky = np.zeros((limit, len(rows)))
    picked: list[int] = []
    while len(picked) < limit:
        best = int(gains.argmax())
        if gains[best] <= smallest:
            break
        before = cholesky[: len(picked)]
        cholesky[len(picked)] = (kernel[best] - before[:, best] @ before) / np.sqrt(gains[best])
        gains -= cholesky[len(picked)] ** 2
        gains[best] = -np.inf
        picked.append(best)
    return np.array(picked, np.int64)


def pick_in_rounds(rows: NDArray[np.float64], limit: int) -> NDArray[np.int64]:
    """As the replay memory does for episodes of one step each, with a budget of so many steps."""
    ones = np.ones(len(rows))
    candidates = Candidates("", [], ones.astype(np.int64), ones, limit, np.random.default_rng(0), lambda: rows)
    return candidates.choose(DPPSelection(DPPSettings()))  # type: ignore[arg-type]


CONTENDERS: dict[str, Callable[..., Any]] = {OURS: greedy_map, ROUNDS: pick_in_rounds, KERNEL: pick_by_kernel}


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(who: str, size: int) -> dict[str, Any]:
    rows = np.random.default_rng(size).standard_normal((size, FEATURES))
    rank = min(rows.shape)
    before = peak_megabytes()
    began, worked = time.perf_counter(), time.process_time()
    picks = CONTENDERS[who](rows, min(PICKS, rank) if who == KERNEL else PICKS)
    return {
        "seconds": round(time.perf_counter() - began, 3),
        "processor_seconds": round(time.process_time() - worked, 3),
        "megabytes": round(peak_megabytes() - before, 1),
        "megabytes_before": round(before, 1),
        "picks": len(picks),
        "first_picks": hashlib.sha256(picks[:rank].tobytes()).hexdigest(),  # those that all contenders make
    }


def in_own_process(who: str, size: int) -> dict[str, Any]:
    """Started from a process without rows: a peak of memory is handed down to children."""
    command = [sys.executable, __file__, "--play", json.dumps([who, size])]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if ended.returncode:
        raise RuntimeError(f"{who} failed on {size:,} rows; see above")
    return json.loads(ended.stdout)


def measure_size(size: int) -> dict[str, Any]:
    found = {who: in_own_process(who, size) for who in (OURS, ROUNDS)}
    needed = 8 * size * (size + 2 * FEATURES)
    if needed <= KERNEL_BYTES:
        found[KERNEL] = in_own_process(KERNEL, size)
    for who, figures in found.items():
        if figures["first_picks"] != found[OURS]["first_picks"]:
            raise RuntimeError(f"{who} picks other rows of {size:,} than {OURS}")
        processor, memory = figures["processor_seconds"], figures["megabytes"]
        cells = [
            f"{figures['picks']:6,d} picks",
            f"{processor:8.2f} s",
            f"({figures['seconds']:.2f} s with neighbours)",
        ]
        if who == KERNEL:
            cells.append(f"kernel/ours {processor / found[OURS]['processor_seconds']:.1f}")
        print(f"{size:9,d} rows  {who:16s}{memory:9,.0f} MB {' '.join(cells)}", flush=True)
    if KERNEL not in found:
        print(f"{size:9,d} rows  {KERNEL:16s}left out: it needs {needed / 1e9:,.0f} GB", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="N", help="trajectories to choose from")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--play", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.play is not None:
        return print(json.dumps(measure(*json.loads(given.play))))
    print(f"{FEATURES} features of float64, up to {PICKS:,} picks")
    results = {str(size): measure_size(size) for size in given.sizes}
    if str(TARGET_SIZE) in results:
        for who in (OURS, ROUNDS):
            figures = results[str(TARGET_SIZE)][who]
            share = figures["megabytes"] * 2**20 / (8 * TARGET_SIZE * FEATURES)
            seconds = figures["processor_seconds"]
            words = "met" if seconds < TARGET_SECONDS else "MISSED"
            print(f"{who}, {TARGET_SIZE:,} rows: {seconds:.1f} s, target {TARGET_SECONDS:.0f}: {words}; ", end="")
            print(f"memory beside the rows: {share:.2f} times theirs")
    if given.json is not None:
        settings = {"features": FEATURES, "picks": PICKS, "sizes": list(given.sizes)}
        everything = {"settings": settings, "results": results, "origin": describe_origin()}
        given.json.write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(run_command(main))
