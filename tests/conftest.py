"""Which tests may run beside each other: those of one file stay together, and so do all that need a Slurm cluster."""

from __future__ import annotations

import pytest

SLURM = {"slurm_site", "slurm_with_accounting"}


@pytest.hookimpl(tryfirst=True)  # before the workers share out what is marked
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        needs_slurm = not SLURM.isdisjoint(getattr(item, "fixturenames", ()))
        item.add_marker(pytest.mark.xdist_group("slurm" if needs_slurm else item.location[0]))
