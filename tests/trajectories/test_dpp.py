"""Greedy MAP of a determinantal point process against brute force."""

from __future__ import annotations

import itertools
import time
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_cpd.trajectories import dpp
from hpc_cpd.trajectories.dpp import greedy_map


def _determinant(rows: np.ndarray, chosen) -> float:
    part = rows[list(chosen)]
    return float(np.linalg.det(part @ part.T))


def _greedy_by_determinants(rows: np.ndarray, k: int) -> list[int]:
    chosen: list[int] = []
    for _ in range(k):
        rest = [number for number in range(len(rows)) if number not in chosen]
        chosen.append(max(rest, key=lambda number: _determinant(rows, [*chosen, number])))
    return chosen


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000), items=st.integers(1, 12), size=st.integers(1, 8), scale=st.sampled_from([1e-3, 1, 1e3])
)
def test_every_pick_raises_the_determinant_most(seed, items, size, scale):
    rows = scale * np.random.default_rng(seed).normal(size=(items, size))
    k = min(items, size, 4)  # beyond, determinants of the brute force are rounding
    assert greedy_map(rows, k).tolist() == _greedy_by_determinants(rows, k)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_gain_of_a_set_is_within_the_bound_of_the_best_set(seed):
    """Greedy volume is at least 1/k! of the largest (Civril and Magdon-Ismail 2009): its square for the determinant."""
    rows = np.random.default_rng(seed).normal(size=(9, 5))
    best = max(_determinant(rows, subset) for subset in itertools.combinations(range(9), 3))
    assert _determinant(rows, greedy_map(rows, 3)) >= best / 36


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 4))
def test_greedy_is_the_best_set_when_directions_are_orthogonal(seed, k):
    rng = np.random.default_rng(seed)
    directions = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    rows = np.concatenate([directions * length for length in rng.uniform(0.5, 2.0, (2, 4, 1))])
    best = max(itertools.combinations(range(8), k), key=lambda subset: _determinant(rows, subset))
    assert sorted(greedy_map(rows, k)) == sorted(best)


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 10_000), items=st.integers(1, 60), candidates=st.integers(1, 9), at_once=st.integers(1, 20))
def test_how_many_rows_are_kept_up_to_date_changes_no_pick(seed, items, candidates, at_once):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(items, 8)) * rng.uniform(0.1, 3.0, (items, 1))
    picks = greedy_map(rows, 8)
    with patch.multiple(dpp, CANDIDATES=candidates, ROWS_AT_ONCE=at_once):
        assert greedy_map(rows, 8).tolist() == picks.tolist()


def test_quality_decides_among_equally_different_items():
    features = np.eye(4)
    quality = np.array([1.0, 3.0, 2.0, 4.0])
    assert greedy_map(quality[:, None] * features, 4).tolist() == [3, 1, 2, 0]


def test_a_copy_of_a_picked_item_is_never_picked():
    rows = np.random.default_rng(1).normal(size=(6, 20))
    picks = greedy_map(np.concatenate([rows, rows, -2.0 * rows]), 18)
    assert len(picks) == 6
    assert sorted(picks % 6) == list(range(6))


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_it_stops_when_the_rank_is_used_up(rank):
    rng = np.random.default_rng(rank)
    rows = rng.normal(size=(50, rank)) @ rng.normal(size=(rank, 30))
    assert len(greedy_map(rows, 50)) == rank


def test_nearly_dependent_rows_do_not_count_as_new():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(40, 3)) @ rng.normal(size=(3, 30)) + 1e-9 * rng.normal(size=(40, 30))
    assert len(greedy_map(rows, 40)) == 3


@pytest.mark.parametrize(("shape", "k"), [((0, 3), 2), ((4, 3), 0), ((4, 0), 2)])
def test_nothing_to_pick_is_an_empty_answer(shape, k):
    picks = greedy_map(np.ones(shape), k)
    assert (picks.tolist(), picks.dtype) == ([], np.int64)
    assert greedy_map(np.zeros((3, 2)), 2).tolist() == []


def test_huge_numbers_do_not_overflow():
    rows = np.random.default_rng(0).normal(size=(9, 6))
    np.testing.assert_array_equal(greedy_map(1e200 * rows, 6), greedy_map(rows, 6))


@pytest.mark.parametrize(("features", "k"), [([[np.nan, 1.0]], 1), ([1.0, 2.0], 1), ([[1.0]], -1)])
def test_wrong_arguments_are_refused(features, k):
    with pytest.raises(ValueError, match="must"):
        greedy_map(features, k)


def test_many_items_need_no_kernel():
    """100,000 items: the kernel alone would be 80 GB."""
    rows = np.random.default_rng(0).normal(size=(100_000, 32))
    began = time.perf_counter()
    assert len(set(greedy_map(rows, 20).tolist())) == 20
    assert time.perf_counter() - began < 10.0
