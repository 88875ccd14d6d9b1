"""Compare the students of two runs tensor by tensor, the first of which may be of an earlier version.

    python benchmarks/same_tensors.py OLD-RUN NEW-RUN

prints a line per tensor with its former name, its name of today and its SHA-256, and exits with 1 where one differs. A
change that must not touch any result is checked with it: same config, seed, ranks and machine.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from tests.student.renamed_tensors import new_name


def today(stored: str) -> str:
    """The name of today of a tensor in a student's file: ``student/...``, ``task_vector/TASK`` and so on."""
    group, _, rest = stored.partition("/")
    return {
        "student": f"student/{new_name(rest)}",
        "task_encoder": f"task_embedding/{rest}",
    }.get(group, stored)


def tensors_of(student: Path) -> dict[str, Any]:
    """All tensors of a published student, whose experts have had files of their own since schema 4."""
    found = load_file(student / "model.safetensors")
    for path in student.glob("mixture-*.safetensors"):
        found |= {f"student/{name}": tensor for name, tensor in load_file(path).items()}
    return found


def main(old_run: Path, new_run: Path) -> int:
    differing = total = 0
    print(f"| stage | tensor of {old_run} | tensor of {new_run} | SHA-256 | |")
    print("|---|---|---|---|---|")
    for stage in sorted(path.name for path in (old_run / "stages").iterdir()):
        old, new = (tensors_of(run / "stages" / stage / "student") for run in (old_run, new_run))
        if unknown := set(new) - {today(name) for name in old}:
            print(f"only in {new_run}, stage {stage}: {sorted(unknown)}")
            differing += len(unknown)
        for name, tensor in old.items():
            hashes = [
                hashlib.sha256(repr((t.dtype, t.shape)).encode() + t.tobytes()).hexdigest() if t is not None else "none"
                for t in (tensor, new.get(today(name)))
            ]
            same = hashes[0] == hashes[1]
            total, differing = total + 1, differing + (not same)
            verdict = "same" if same else f"DIFFERS, now {hashes[1][:16]}"
            print(f"| {stage} | {name} | {today(name)} | {hashes[0][:16]} | {verdict} |")
    print(f"\n{total - differing} of {total} tensors are the same")
    return differing > 0


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
