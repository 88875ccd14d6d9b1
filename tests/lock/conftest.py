"""Hearts that beat fast, and no job around the tests of locks."""

import os

import pytest

from hpc_cpd.run import lock as lock_module


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hearts of this process beat 50 times as fast. It does not wait longer than 1.2 s for one that stands still."""
    monkeypatch.setattr(lock_module, "HEARTBEAT_SECONDS", 0.2)
    monkeypatch.setattr(lock_module, "STALE_SECONDS", 1.2)


@pytest.fixture(autouse=True)
def no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("HPC_CPD_")]:
        monkeypatch.delenv(name)
