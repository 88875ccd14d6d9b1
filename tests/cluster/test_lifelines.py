"""The order in which ranks ended, when one takes the others along at once."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from hpc_cpd.cluster.ranks import Lifelines

RANK = """
import os, signal, sys
from hpc_cpd.cluster.preemption import hold_lifeline
hold_lifeline(sys.argv[1])
os.write(1, b"here")
signal.pause()
"""


@pytest.fixture
def ranks() -> Iterator[tuple[Lifelines, list[subprocess.Popen[bytes]]]]:
    lifelines = Lifelines()
    command = [sys.executable, "-c", RANK, lifelines.address]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(24)]
    try:
        for process in processes:
            assert process.stdout is not None and os.read(process.stdout.fileno(), 4) == b"here"
        yield lifelines, processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_each_rank_is_killed_as_soon_as_a_descriptor_of_the_one_before_closes_and_the_order_is_told(ranks):
    lifelines, processes = ranks
    assert lifelines.ended() == []
    order = processes[::-1]
    for process in order:
        process.kill()
        assert process.stdout is not None and os.read(process.stdout.fileno(), 1) == b""  # as mpiexec's proxy does
    for process in processes:
        process.wait()
    assert lifelines.ended() == [process.pid for process in order]
    assert lifelines.ended() == []
