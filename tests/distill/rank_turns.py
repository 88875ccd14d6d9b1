"""One rank that takes pieces of work in turn with others: ``rank_turns.py ANSWER``.

ANSWER: JSON with, for each of two lots of nine pieces, what each rank took. Of the second lot, rank 0 asks for a stop
after two pieces.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from hpc_cpd.distributed.torch import finish_distributed, gather, start_distributed, taken_in_turn


def main() -> None:
    rank, _ = start_distributed()
    answers: list[list[list[int]]] = []
    for stops in (False, True):
        mine: list[int] = []
        for piece in taken_in_turn(range(9), lambda stops=stops, mine=mine: stops and rank == 0 and len(mine) == 2):  # type: ignore[misc]
            mine.append(piece)
            time.sleep(0.05 if rank == 0 else 0.2)
        answers.append(gather(mine))
    if rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(answers))
    finish_distributed()


if __name__ == "__main__":
    main()
