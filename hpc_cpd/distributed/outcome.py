"""Run something on one rank, or on all of them, and let every rank know how it ended.

A rank that fails alone would leave the others waiting in their next collective. So outcomes are exchanged after the
work, and a failure is raised on every rank, as the error that it was.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from hpc_cpd.errors import LockLost, StopRequested, UserError

Result = TypeVar("Result")


class Ranks(Protocol):
    """A group of processes that meet in collectives."""

    rank: int
    size: int

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value` in rank order, on every rank."""


def run_on_rank(ranks: Ranks, work: Callable[[], Result]) -> Result:
    """Run `work` on rank 0 alone and return its result on every rank. A collective.

    When it fails, that rank raises its own error, and the others raise UserError, StopRequested, LockLost or OSError
    alike, or RuntimeError with its text.
    """
    result: Result = _results(ranks, work if ranks.rank == 0 else lambda: None)[0]
    return result


def run_on_all_ranks(ranks: Ranks, work: Callable[[], Result]) -> Result:
    """Run `work` on every rank and return this rank's result; when it fails on any rank, raise on all. A collective.

    Errors are raised as by `run_on_rank`; the error of the lowest rank is the one that the others raise.
    """
    kept: list[Result] = []
    _results(ranks, lambda: kept.append(work()))
    return kept[0]


def _results(ranks: Ranks, work: Callable[[], Any]) -> list[Any]:
    result = failure = for_others = None
    try:
        result = work()
    except Exception as error:
        failure, for_others = error, _for_others(error, ranks.rank)
    outcomes = ranks.gather((result, for_others))
    raised = next((error for error in (failure, *(told for _, told in outcomes)) if error is not None), None)
    if raised is not None:
        raise raised
    return [result for result, _ in outcomes]


def _for_others(error: Exception, rank: int) -> Exception:
    """What the other ranks raise when `rank` raised `error`: an exception that travels, whatever `error` holds."""
    if isinstance(error, UserError | StopRequested | LockLost):
        return type(error)(str(error))
    if isinstance(error, OSError) and error.errno is not None:
        file = None if error.filename is None else str(error.filename)
        return OSError(error.errno, f"{os.strerror(error.errno)} (on rank {rank}: {error})", file)
    return RuntimeError(f"rank {rank} failed: {type(error).__name__}: {error}")
