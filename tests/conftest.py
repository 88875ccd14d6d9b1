"""Marks the tests that start ranks or a Slurm cluster, so that ``make check`` can leave them out.

Nobody has to remember a marker: a test is followed through the functions and fixtures of ``tests`` that it uses. Where
ranks are started by a command line instead, the file says ``pytestmark = pytest.mark.ranks``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest

STARTERS = {
    "cluster": {("tests.cluster.conftest", "need_slurm")},
    "ranks": {
        ("tests.rank_environments", "rank_environments"),
        ("tests.teachers.jobs", "launch"),
        ("hpc_cpd.cluster.schedulers.local", "run_jobs"),
    },
}
"""The functions that start something, by marker."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for marker, starters in STARTERS.items():
        known: dict[int, bool] = {}
        for item in items:
            if isinstance(item, pytest.Function):
                found = item._fixtureinfo.name2fixturedefs.values()
                fixtures = [definition.func for definitions in found for definition in definitions]
                if any(_reaches(function, starters, known) for function in [item.function, *fixtures]):
                    item.add_marker(marker)


def _reaches(function: Callable[..., Any], starters: set[tuple[str, str]], known: dict[int, bool]) -> bool:
    """Whether `function`, or one of ``tests`` that it uses, names one of `starters`. `known`: the answers, by id."""
    function = getattr(function, "__wrapped__", function)
    if id(function) not in known:
        known[id(function)] = False  # what it calls may come back to it
        known[id(function)] = any(
            (used.__module__, used.__qualname__) in starters
            or (used.__module__.startswith("tests.") and _reaches(used, starters, known))
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
