"""Training windows per second of one core: our store in RAM against HDF5 files in two layouts, and NumPy as the limit.

    python benchmarks/windows.py [--json OUT.json]

"mapped" is our store when the trajectories are larger than it may hold: here their files are in the kernel's memory.
The peers are robomimic's layout, read as its SequenceDataset does with hdf5_cache_mode=None (a group per demonstration,
a look-up by path for each key of each window, repeated ends, a stack per batch; robomimic itself is not needed), and
h5py slices of our own shards. The limit knows beforehand which rows to copy and has nothing else to do: NumPy's
``take``, once into new arrays (whose pages the kernel may have to hand over each time) and once into arrays it keeps.

`gather` (windows that begin at a step) and `gather_histories` (that end at one) are each measured at two lengths. The
contenders take turns on the same batches, and every window that they make is checked to be equal. Time is processor
time, so neither neighbours nor the disk count; rates and ratios are medians over the turns.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import h5py
import numpy as np
from numpy.typing import NDArray

from hpc_cpd.cluster.provenance import describe_origin
from hpc_cpd.errors import run_command
from hpc_cpd.run.publish import mark_done
from hpc_cpd.trajectories.formats.robomimic import OBSERVATION_KEY, export_robomimic
from hpc_cpd.trajectories.schema import Episode, Origin
from hpc_cpd.trajectories.shard import closed_shards, write_manifest, write_shard
from hpc_cpd.trajectories.store import TrajectoryStore, open_trajectories

EPISODES_PER_SHARD = 250
OBSERVATION, ACTION = 39, 4
LENGTHS = (4, 32)
SLOWER = 16  # a file is read for this part of the batches: it takes so much longer
TARGET_RATE, TARGET_RATIO = 500_000, 20
OURS, MAPPED, ROBOMIMIC, SLICES = "ours", "ours, mapped", "robomimic's layout", "slices of our shards"
NEW, KEPT = "NumPy, new arrays", "NumPy, kept arrays"

Windows = dict[str, NDArray[Any]]
Reader = Callable[[NDArray[np.int64], NDArray[np.int64], int], Windows]
"""Windows that begin and end (exclusive) at these steps, the last repeated up to this length."""


def record(folder: Path, episodes: int, steps: int) -> None:
    rng = np.random.default_rng(0)
    for part in range(-(-episodes // EPISODES_PER_SHARD)):
        made: list[Episode] = []
        for index in range(part * EPISODES_PER_SHARD, min(episodes, (part + 1) * EPISODES_PER_SHARD)):
            observations = rng.standard_normal((steps + 1, OBSERVATION), np.float32)
            actions, teacher_mean = rng.standard_normal((2, steps, ACTION), np.float32)
            flat = np.zeros(steps, np.float32)
            made.append(Episode(observations[:-1], actions, teacher_mean, flat, flat > 0, observations[-1], 0, index))
        write_shard(folder, 0, part, Origin("metaworld/reach-v3", "0" * 64, 0, "v2", "synthetic"), made)
    write_manifest(folder)
    mark_done(folder, {})


def repeat_last(values: NDArray[Any], length: int) -> NDArray[Any]:
    """robomimic repeats the ends too (pad_same)."""
    missing = length - len(values)
    return np.concatenate([values, np.repeat(values[-1:], missing, axis=0)]) if missing else values


def robomimic_reader(file: h5py.File, steps: int, names: list[str]) -> Reader:
    """`names`: what is read of each window, beside the observation as dataset keys."""
    keys = {name: f"obs/{OBSERVATION_KEY}" if name == "observations" else name for name in names}

    def read(begins: NDArray[np.int64], ends: NDArray[np.int64], length: int) -> Windows:
        items = []
        for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
            demo, first = divmod(begin, steps)
            values = {}
            for name, key in keys.items():
                part = file[f"data/demo_{demo}/{key}"][first : first + end - begin]
                values[name] = repeat_last(part, length)
            items.append(values)
        return {name: np.stack([item[name] for item in items]) for name in keys}

    return read


def slices_reader(files: list[h5py.File], steps: int, names: list[str]) -> Reader:
    datasets = [[file[name] for name in names] for file in files]
    per_shard = EPISODES_PER_SHARD * steps

    def read(begins: NDArray[np.int64], ends: NDArray[np.int64], length: int) -> Windows:
        items = []
        for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
            shard, first = divmod(begin, per_shard)
            items.append([repeat_last(data[first : first + end - begin], length) for data in datasets[shard]])
        return {name: np.stack(column) for name, column in zip(names, zip(*items, strict=True), strict=True)}

    return read


def check_equal(ours: Windows, theirs: Windows, who: str) -> None:
    for name, values in theirs.items():
        if not np.array_equal(ours[name], values):
            raise RuntimeError(f"{who} returns other {name} than our store")


def play(make: Callable[[int], Windows], batches: int) -> None:
    for number in range(batches):
        make(number)


def measure(
    store: TrajectoryStore,
    mapped: TrajectoryStore,
    method: str,
    length: int,
    files: dict[str, Reader],
    given: argparse.Namespace,
) -> dict[str, Any]:
    """Windows per second of each contender, and ratios of ours to it."""
    rng = np.random.default_rng(length)
    drawn = [store.draw_windows(given.batch, rng) for _ in range(given.batches)]
    gather = getattr(store, method)
    first_of_episode = [batch // given.steps * given.steps for batch in drawn]
    if method == "gather":
        spans = [
            (batch, np.minimum(batch + length, first + given.steps))
            for batch, first in zip(drawn, first_of_episode, strict=True)
        ]
    else:
        spans = [
            (np.maximum(batch + 1 - length, first), batch + 1)
            for batch, first in zip(drawn, first_of_episode, strict=True)
        ]
    sources: Windows = {name: getattr(store, name) for name in gather(drawn[0], length) if hasattr(store, name)}
    rows = [np.minimum(begins[:, None] + np.arange(length), ends[:, None] - 1) for begins, ends in spans]
    kept = {name: np.empty((given.batch, length, *values.shape[1:]), values.dtype) for name, values in sources.items()}

    def into_new(wanted: NDArray[np.int64]) -> Windows:
        return {name: values.take(wanted, axis=0) for name, values in sources.items()}

    def into_kept(wanted: NDArray[np.int64]) -> Windows:
        for name, values in sources.items():  # any other mode than "clip" would go through a new array
            values.take(wanted, axis=0, out=kept[name], mode="clip")
        return kept

    few = max(1, given.batches // SLOWER)
    contenders: dict[str, tuple[Callable[[int], Windows], int]] = {
        OURS: (lambda number: gather(drawn[number], length), given.batches),
        MAPPED: (lambda number: getattr(mapped, method)(drawn[number], length), few),
        NEW: (lambda number: into_new(rows[number]), given.batches),
        KEPT: (lambda number: into_kept(rows[number]), given.batches),
    }
    for who, read in files.items():
        contenders[who] = (partial(lambda read, number: read(*spans[number], length), read), few)

    mine = [gather(batch, length) for batch in drawn]
    for who, (make, count) in contenders.items():
        for number in range(count):
            check_equal(mine[number], make(number), who)
    rates: dict[str, list[float]] = {who: [] for who in contenders}
    for _ in range(given.turns):
        for who, (make, count) in contenders.items():
            began = time.process_time()
            play(make, count)
            rates[who].append(count * given.batch / (time.process_time() - began))
    return {
        "windows_per_second": {who: round(median(values)) for who, values in rates.items()},
        "ours_to": {
            who: round(median(mine / other for mine, other in zip(rates[OURS], values, strict=True)), 2)
            for who, values in rates.items()
            if who != OURS
        },
    }


def report(results: dict[str, Any]) -> None:
    rates = {case: found["windows_per_second"][OURS] for case, found in results.items()}
    ratios = {case: found["ours_to"][ROBOMIMIC] for case, found in results.items()}
    for what, values, target in (("windows/s of ours", rates, TARGET_RATE), ("x robomimic", ratios, TARGET_RATIO)):
        worst = min(values, key=values.__getitem__)
        words = "met" if values[worst] >= target else "MISSED"
        print(f"least {what}: {values[worst]:,.0f} ({worst}), target {target:,}: {words}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=2500)
    parser.add_argument("--steps", type=int, default=200, help="steps of each episode")
    parser.add_argument("--batch", type=int, default=256, help="windows gathered by one call")
    parser.add_argument("--batches", type=int, default=64, help="batches in a turn; of the files, a sixteenth")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write all figures here")
    given = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="windows-") as name:
        folder = Path(name) / "trajectories"
        folder.mkdir()
        record(folder, given.episodes, given.steps)
        demonstrations = Path(name) / "demonstrations.hdf5"
        export_robomimic(folder, demonstrations)
        store, mapped = open_trajectories(folder), open_trajectories(folder, in_memory_gigabytes=0.0)
        print(f"{len(store):,} steps of {OBSERVATION} + {ACTION} numbers, {given.batch} windows per call, one core")
        shards = [h5py.File(path, "r") for path in closed_shards(folder)]
        # as robomimic opens it
        file = h5py.File(demonstrations, "r", swmr=True, libver="latest", rdcc_nbytes=10**10)
        for method in ("gather", "gather_histories"):
            # robomimic's user asks for two keys; ours reads the teacher's means too where it returns them
            names = ["observations", "actions" if method == "gather" else "teacher_mean"]
            readers = {
                ROBOMIMIC: robomimic_reader(file, given.steps, names),
                SLICES: slices_reader(shards, given.steps, names),
            }
            for length in LENGTHS:
                case = f"{method}, {length} steps"
                found = results[case] = measure(store, mapped, method, length, readers, given)
                cells = [f"{who} {rate:,}/s" for who, rate in found["windows_per_second"].items()]
                ratios = [f"ours/{who} {ratio}" for who, ratio in found["ours_to"].items()]
                print(f"{case}: {', '.join(cells)}\n    {', '.join(ratios)}", flush=True)
        for opened in [file, *shards]:
            opened.close()
    report(results)
    if given.json is not None:
        settings = {word: value for word, value in vars(given).items() if word != "json"}
        everything = {"settings": settings, "results": results, "origin": describe_origin()}
        given.json.write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(run_command(main))
