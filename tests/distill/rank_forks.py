"""Ranks of stages that start in an instant: forks of a process that has imported everything already.

Tests that kill ranks many times would wait for imports most of their time.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from tests.distill.ranks import in_turn
from tests.rank_environments import rank_environments


def start_forks(world_size: int, log: Path, *arguments: object) -> list[ForkServerProcess]:
    """Start `world_size` ranks, whose output is appended to `log`; `arguments` are those of rank_stage.py.

    The first call waits for the imports.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["deepspeed", "tests.distill.rank_stage"])
    words = [str(argument) for argument in arguments]
    ranks = [context.Process(target=_rank, args=(own, log, words)) for own in rank_environments(world_size)]
    for rank in ranks:
        rank.start()
    return ranks


def learn_on_forks(world_size: int, log: Path, *wishes: tuple[object, ...]) -> None:
    """Do `wishes` (RUN STAGE [STOP_AFTER_STEPS]) one after the other, and wait for that."""
    ranks = start_forks(world_size, log, *in_turn(*wishes))
    for rank in ranks:
        rank.join(300)
    assert [rank.exitcode for rank in ranks] == [0] * world_size, log.read_text()


def _rank(environment: dict[str, str], log: Path, words: list[str]) -> None:
    os.environ.update(environment)
    with open(log, "a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    from tests.distill import rank_stage

    sys.argv = ["rank_stage.py", *words]
    rank_stage.leave(rank_stage.main())
