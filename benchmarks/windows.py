"""Training windows per second: our store in RAM against slices of the same HDF5 shards.

Both read windows at the same random places, and every window is checked to be equal. Prints the ratio.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import h5py
import numpy as np

from hpc_cpd.run import mark_done
from hpc_cpd.trajectories.schema import Episode
from hpc_cpd.trajectories.shard import ShardWriter, write_manifest
from hpc_cpd.trajectories.store import open_trajectories

EPISODES, STEPS, LENGTH, BATCH, BATCHES = 200, 100, 4, 256, 200


def record(folder: Path) -> Path:
    writer = ShardWriter(folder, 0, 0, "metaworld/reach-v3", "0" * 64, 0, "v2", "synthetic")
    rng = np.random.default_rng(0)
    for index in range(EPISODES):
        observations = rng.normal(size=(STEPS + 1, 39)).astype(np.float32)
        actions = rng.normal(size=(STEPS, 4)).astype(np.float32)
        flat = np.zeros(STEPS, np.float32)
        writer.add(Episode(observations[:-1], actions, actions, flat, flat > 0, observations[-1], index, index))
    shard = writer.close()
    assert shard is not None
    write_manifest(folder)
    mark_done(folder, {})
    return shard


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        shard = record(Path(name))
        store = open_trajectories(name)
        rng = np.random.default_rng(1)
        starts = rng.integers(EPISODES, size=(BATCHES, BATCH)) * STEPS + rng.integers(
            STEPS - LENGTH, size=(BATCHES, BATCH)
        )

        began = time.perf_counter()
        ours = [store.gather(batch, LENGTH) for batch in starts]
        ours_seconds = time.perf_counter() - began

        with h5py.File(shard, "r") as file:
            observations, actions = file["observations"], file["teacher_mean"]
            began = time.perf_counter()
            for number, batch in enumerate(starts[: BATCHES // 20]):
                for row, start in enumerate(batch):
                    window = observations[start : start + LENGTH], actions[start : start + LENGTH]
                    assert np.array_equal(window[0], ours[number]["observations"][row])
                    assert np.array_equal(window[1], ours[number]["teacher_mean"][row])
            slices_seconds = (time.perf_counter() - began) * 20
    windows = BATCHES * BATCH
    print(
        f"windows of {LENGTH} steps: store {windows / ours_seconds:,.0f}/s, "
        f"h5py slices {windows / slices_seconds:,.0f}/s"
    )
    print(f"ratio: {slices_seconds / ours_seconds:.0f}x")


if __name__ == "__main__":
    main()
