import numpy as np
import pytest

from hpc_cpd.distributed.mpi import Communicator
from hpc_cpd.teachers.rollouts import BLOCK, keep_successes
from hpc_cpd.trajectories.schema import Episode

FAILING = {1, 2, 9, 10}


def _episode(number: int) -> Episode:
    flags = np.array([False, number not in FAILING])
    column = np.zeros((2, 1), np.float32)
    return Episode(column, column, column, np.zeros(2, np.float32), flags, column[0], 0, number)


def _keep(
    wanted: int, limit: int, success_only: bool = True, stored: frozenset[int] = frozenset()
) -> tuple[list[int], tuple[int, int], list[int]]:
    """Indices kept, what was returned, and the blocks that were played."""
    kept: list[int] = []
    blocks: list[int] = []

    def play(block: int) -> list[Episode]:
        blocks.append(block)
        return [_episode(number) for number in range(block * BLOCK, (block + 1) * BLOCK)]

    def keep(episodes: list[Episode], kept_by_all: int) -> None:
        kept.extend(episode.index for episode in episodes)
        assert kept_by_all == len(kept) + len(stored)

    answer = keep_successes(wanted, limit, success_only, play, keep, stored, Communicator())
    return kept, answer, blocks


def test_exactly_the_first_successes_are_kept() -> None:
    assert _keep(3, 100) == ([0, 3, 4], (3, 5), [0])
    assert _keep(8, 100) == ([0, 3, 4, 5, 6, 7, 8, 11], (8, 12), [0, 1])
    assert _keep(4, 100, success_only=False) == ([0, 1, 2, 3], (4, 4), [0])


def test_the_episodes_played_are_limited() -> None:
    assert _keep(50, 10) == ([0, 3, 4, 5, 6, 7, 8], (7, 10), [0, 1])


def test_a_stored_block_counts_and_is_not_played_again() -> None:
    stored = frozenset({0, 3, 4, 5, 6, 7})
    assert _keep(8, 100, stored=stored) == ([8, 11], (8, 12), [1])
    assert _keep(6, 100, stored=stored) == ([], (6, 8), [])


@pytest.mark.parametrize("wanted", [1, 7, 30])
def test_a_collection_cut_after_any_block_ends_the_same(wanted: int) -> None:
    whole, answer, blocks = _keep(wanted, 100)
    for cut in range(len(blocks)):
        stored = frozenset(number for number in whole if number < cut * BLOCK)
        later, same, played = _keep(wanted, 100, stored=stored)
        assert sorted(stored) + later == whole
        assert same == answer
        assert played == blocks[cut:]
