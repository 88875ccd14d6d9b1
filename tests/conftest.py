"""Marks the tests that start ranks or a Slurm cluster, so that ``make check`` can leave them out.

Nobody has to remember a marker: a test is followed through the functions and fixtures of ``tests`` that it uses. Where
ranks are started by a command line instead, the file says ``pytestmark = pytest.mark.ranks``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest

CLUSTER_FIXTURES = {"slurm_site", "slurm_with_accounting"}
STARTS_RANKS = {
    ("tests.rank_environments", "rank_environments"),
    ("tests.teachers.jobs", "launch"),
    ("hpc_cpd.cluster.schedulers.local", "run_jobs"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    known: dict[int, bool] = {}
    for item in items:
        if not isinstance(item, pytest.Function):
            continue
        if CLUSTER_FIXTURES & set(item.fixturenames):
            item.add_marker(pytest.mark.cluster)
        fixtures = [definition.func for found in item._fixtureinfo.name2fixturedefs.values() for definition in found]
        if any(_starts_ranks(function, known) for function in [item.function, *fixtures]):
            item.add_marker(pytest.mark.ranks)


def _starts_ranks(function: Callable[..., Any], known: dict[int, bool]) -> bool:
    """Whether `function`, or one of ``tests`` that it uses, starts ranks. `known`: the answers so far, by id."""
    function = getattr(function, "__wrapped__", function)
    if id(function) not in known:
        known[id(function)] = False  # what it calls may come back to it
        known[id(function)] = any(
            (used.__module__, used.__qualname__) in STARTS_RANKS
            or (used.__module__.startswith("tests.") and _starts_ranks(used, known))
            for used in _functions_used(function)
        )
    return known[id(function)]


def _functions_used(function: Callable[..., Any]) -> Iterator[FunctionType]:
    """The functions that `function`, or one defined in it, names: by themselves or as ``module.name``."""
    codes = [function.__code__] if isinstance(function, FunctionType) else []
    while codes:
        code = codes.pop()
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        named = [function.__globals__[name] for name in code.co_names if name in function.__globals__]
        modules = [one for one in named if isinstance(one, ModuleType)]
        named += [vars(module)[name] for module in modules for name in code.co_names if name in vars(module)]
        yield from (one for one in named if isinstance(one, FunctionType))
