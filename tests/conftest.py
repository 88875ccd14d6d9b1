"""Which tests one worker runs in a row, when `make test` has several (pytest-xdist)."""

from __future__ import annotations

import pytest

FOLDERS_OF_ONE_WORKER = ("cluster", "journey")
"""Their files share what takes long to make: a Slurm site, a finished run."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep a file's tests together, since they share its fixtures, and those of some folders."""
    for item in items:
        folder = item.path.parent.name
        group = folder if folder in FOLDERS_OF_ONE_WORKER else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
