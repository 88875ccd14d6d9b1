"""The measurements of benchmarks/gpu.py, tiny, on a device that is not there (tests/other_device.py)."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.other_device import OTHER, install

install()

import torch  # noqa: E402

from hpc_cpd.distributed import torch as distributed  # noqa: E402

distributed.device_of_rank = lambda: OTHER
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from gpu_acting import acting  # noqa: E402
from gpu_layer import layer  # noqa: E402
from gpu_step import steps  # noqa: E402

if __name__ == "__main__":
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        setattr(torch.cuda, name, lambda *device: None)
    torch.cuda.max_memory_allocated = lambda *device: 0
    distributed.start_distributed()
    for part in (acting, steps, layer):
        print(part.__name__, len(part(OTHER, True, 1e12)))
    distributed.finish_distributed()
