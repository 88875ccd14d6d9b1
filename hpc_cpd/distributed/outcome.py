"""Run something on one rank, or on all of them, and let every rank know how it ended.

A rank that fails alone would leave the others waiting in their next collective. So outcomes are exchanged after the
work, and a failure is raised on every rank, as the error that it was.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

from hpc_cpd.errors import LockLost, StopRequested, UserError

Result = TypeVar("Result")
_KNOWN = {kind.__name__: kind for kind in (UserError, StopRequested, LockLost)}


class Ranks(Protocol):
    """A group of processes that meet in collectives."""

    rank: int
    size: int

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value` in rank order, on every rank."""


class _Failure(NamedTuple):
    """An error in a form that travels: the class by name, and the number and file of an OSError."""

    kind: str
    text: str
    number: int | None = None
    file: str | None = None


def run_on_rank(ranks: Ranks, work: Callable[[], Result], rank: int = 0) -> Result:
    """Run `work` on `rank` alone and return its result on every rank. A collective.

    When it fails, that rank raises its own error, and the others raise UserError, StopRequested, LockLost or OSError
    alike, or RuntimeError with its text.
    """
    if ranks.size == 1:
        return work()
    outcomes = _outcomes(ranks, work if ranks.rank == rank else None)
    result: Result = outcomes[rank]
    return result


def run_on_all_ranks(ranks: Ranks, work: Callable[[], Result]) -> Result:
    """Run `work` on every rank and return this rank's result; when it fails on any rank, raise on all. A collective.

    Errors are raised as by `run_on_rank`; the error of the lowest rank is the one that the others raise.
    """
    if ranks.size == 1:
        return work()
    kept: list[Result] = []
    _outcomes(ranks, lambda: kept.append(work()))
    return kept[0]


def _outcomes(ranks: Ranks, work: Callable[[], Any] | None) -> list[Any]:
    result: Any = None
    failure: Exception | None = None
    if work is not None:
        try:
            result = work()
        except Exception as error:
            failure = error
    outcomes = ranks.gather((result, None if failure is None else _described(failure)))
    if failure is not None:
        raise failure
    for rank, (_, failed) in enumerate(outcomes):
        if failed is not None:
            raise _raised_again(rank, _Failure(*failed))
    return [result for result, _ in outcomes]


def _described(failure: Exception) -> _Failure:
    if isinstance(failure, OSError) and failure.errno is not None:
        file = None if failure.filename is None else str(failure.filename)
        return _Failure("OSError", str(failure), failure.errno, file)
    return _Failure(type(failure).__name__, str(failure))


def _raised_again(rank: int, failure: _Failure) -> Exception:
    if failure.kind in _KNOWN:
        return _KNOWN[failure.kind](failure.text)
    if failure.number is not None:
        return OSError(failure.number, f"{os.strerror(failure.number)} (on rank {rank}: {failure.text})", failure.file)
    return RuntimeError(f"rank {rank} failed: {failure.kind}: {failure.text}")
