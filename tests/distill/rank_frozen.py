"""One rank that learns stages as rank_stage.py does: ``rank_frozen.py [never] WORDS``.

In each phase rank 0 adds to STAGE/served.txt what was computed once: ``nothing``, ``features`` or ``experts``. With
``never`` nothing is, whatever is frozen.
"""

from __future__ import annotations

import sys

import torch

from hpc_cpd.distill.frozen import FrozenParts
from hpc_cpd.student.network import Student
from hpc_cpd.worker import leave
from tests.distill.rank_stage import main

SERVE = FrozenParts.serve


def serve(parts: FrozenParts, student: Student) -> bool:
    served = SERVE(parts, student)
    if torch.distributed.get_rank() == 0:
        with open(parts.folder.parent / "served.txt", "a") as file:
            print(("experts" if parts.with_experts else "features") if served else "nothing", file=file)
    return served


if __name__ == "__main__":
    FrozenParts.serve = serve  # type: ignore[method-assign]
    if sys.argv[1] == "never":
        FrozenParts.serve = lambda parts, student: False  # type: ignore[method-assign]
        del sys.argv[1]
    leave(main())
