"""A real Slurm for the tests that ask for one; where it cannot be had they are skipped, and the run says why."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.lab import Lab
from tests.cluster.slurm_cluster import SlurmCluster, install, reason_it_cannot_run


def bring_down_leftovers() -> list[Path]:
    """Remove the clusters of test runs that were killed before they could do it; the folders that went."""
    gone = []
    for kept in Path("/tmp").glob("slurm-*/cluster.json"):
        if kept.stat().st_uid == os.getuid():
            cluster = SlurmCluster.open(kept.parent)
            if not cluster.owner_lives:
                cluster.down(wipe=True)
                gone.append(cluster.folder)
    return gone


def need_slurm(accounting: bool = False) -> None:
    """Have Slurm's programs, or skip. A skip alone is one letter among many: the warning is printed at the end."""
    reason = reason_it_cannot_run(accounting)
    if reason is None:
        try:
            install(accounting)
        except RuntimeError as error:
            reason = str(error)
    if reason is not None:
        warnings.warn(f"tests on a real Slurm were skipped: {reason}", stacklevel=2)
        pytest.skip(reason)
    bring_down_leftovers()


def running(cluster: SlurmCluster) -> Iterator[SlurmCluster]:
    try:
        yield cluster.up()
    finally:
        cluster.down(wipe=True)


@pytest.fixture(scope="session")
def slurm_site() -> Iterator[SlurmCluster]:
    """Four nodes of four processors, without accounting. Shared: a test ends the jobs that it starts."""
    need_slurm()
    yield from running(SlurmCluster(nodes=4, cpus=4))


@pytest.fixture(scope="session")
def slurm_with_accounting() -> Iterator[SlurmCluster]:
    """Two nodes and a database, so that sacct answers."""
    need_slurm(accounting=True)
    yield from running(SlurmCluster(nodes=2, accounting=True))


@pytest.fixture
def lab(slurm_site: SlurmCluster, tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(slurm_site.up(), tmp_path)  # up: the test before may have taken a node down
    yield lab
    lab.clear()
