"""One thread per process, as the launcher gives every rank: threads that wait actively starve the others."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
