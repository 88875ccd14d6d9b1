"""Starting real DeepSpeed ranks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.rank_environments import rank_environments


def start_ranks(
    world_size: int, *arguments: object, script: str = "rank_stage.py", **variables: str
) -> list[subprocess.Popen[str]]:
    """Start `world_size` ranks of a stage on a free port of this machine; `arguments` are those of rank_stage.py.

    `variables`: of the environment, besides.
    """
    ranks = []
    for environment in rank_environments(world_size):
        command = [sys.executable, str(Path(__file__).with_name(script)), *map(str, arguments)]
        environment |= variables
        ranks.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    return ranks


def in_turn(*wishes: tuple[object, ...]) -> list[object]:
    """The arguments of ranks that do `wishes` (RUN STAGE [STOP_AFTER_STEPS]) one after the other."""
    return [word for wish in wishes for word in ("--", *wish)]


def finish(ranks: list[subprocess.Popen[str]], expected: int = 0) -> str:
    """Wait for all ranks, check their exit codes, return what they printed."""
    output = "".join(rank.communicate(timeout=300)[0] for rank in ranks)
    assert [rank.returncode for rank in ranks] == [expected] * len(ranks), output
    return output
