"""What a GPU makes of the student: the share of its peak that a training step reaches, and actions per second.

    python benchmarks/gpu.py [--device cpu] [--small] [--out FOLDER]

The peak is measured here: the floating-point operations per second of one large product of bfloat16 matrices. The data
sheet's number is no better reference, as no product reaches it; it is written beside it where it is known.

tests       the tests that need a GPU (pytest -m gpu)
stage       the quickstart end to end with the included teachers, two stages of two tasks: seconds and successes
step        the default student as `ours` and as one that learns everything, and a student of 64 experts of which two
            serve a token, 100 million parameters active, in bfloat16: windows and tokens per second, share of the peak
layer       one mixture of the large student, forward and backward: ours, DeepSpeed's own layer with the same experts,
            and a dense layer of the same active arithmetic
acting      actions per second in 1, 64 and 4,096 environments

Operations are counted by torch (torch.utils.flop_counter: matrix products and attention, a multiplication and an
addition apart) in one forward and backward pass; nothing is counted twice for being computed again. On the CPU it works
too (--device cpu --small, for the tests), and then says nothing about a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from gpu_acting import acting
from gpu_layer import layer
from gpu_stage import stage
from gpu_step import steps

from hpc_cpd.cluster.provenance import describe_origin
from hpc_cpd.distributed.torch import finish_distributed, start_distributed
from hpc_cpd.errors import run_command


def tests(device: torch.device, small: bool, peak: float) -> list[dict[str, Any]]:
    """Whether the tests passed, and pytest's last line. Their ranks are processes of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/distill"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    if done.returncode:
        print(done.stdout + done.stderr)
    return [{"passed": done.returncode == 0, "pytest": done.stdout.strip().splitlines()[-1]}]


DATA_SHEET = {"A100": 312, "H100": 989, "H200": 989, "L40S": 362, "A40": 150, "B200": 2250, "MI250X": 383}
"""Dense bfloat16 teraflop/s of the SXM or full part, by a part of the device's name; smaller parts have less."""
PARTS: dict[str, Callable[..., list[dict[str, Any]]]] = {
    "tests": tests,
    "stage": stage,
    "step": steps,
    "layer": layer,
    "acting": acting,
}
NO_GPU = (
    "make gpu measures nothing: torch sees no GPU on this machine; run it where nvidia-smi shows one, with a "
    "torch that was built for it."
)


def peak(device: torch.device, small: bool) -> float:
    """Measured floating-point operations per second: the best of several large bfloat16 products."""
    size = 256 if small else 8192
    one, other = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(3 if small else 30):
        wait(device)
        began = time.perf_counter()
        torch.mm(one, other)
        wait(device)
        best = min(best, time.perf_counter() - began)
    return 2.0 * size**3 / best


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def about(device: torch.device, small: bool) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    sheet = next((value for word, value in DATA_SHEET.items() if word in name), None)
    measured = peak(device, small) / 1e12
    facts = {"device": name, "torch": torch.__version__, "peak_teraflops": measured, "data_sheet_teraflops": sheet}
    if device.type == "cuda":
        facts["cuda"] = torch.version.cuda
    return facts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes, which say nothing about speed")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=Path("docs/gpu"), help="folder of the figures, a file per part")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        print(NO_GPU)
        return 0
    start_distributed()
    device = torch.device(given.device, *([0] if given.device == "cuda" else []))
    facts = about(device, given.small)
    print(f"{facts['device']}: a bfloat16 product reaches {facts['peak_teraflops']:.2f} teraflop/s")
    code = 0
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.parts:
        rows = PARTS[name](device, given.small, facts["peak_teraflops"] * 1e12)
        for row in rows:
            print(f"{name}: " + ", ".join(f"{word} {shown(value)}" for word, value in row.items()), flush=True)
        code |= any(row.get("passed") is False for row in rows)
        document = facts | {"small": given.small, "results": rows, "origin": describe_origin()}
        (given.out / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    finish_distributed()
    return code


def shown(value: object) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(run_command(main))
