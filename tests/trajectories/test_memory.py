"""The replay memory: under budget, diverse, led by the student's error, and readable as trajectories."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_cpd import plugins
from hpc_cpd.config import load_config
from hpc_cpd.distill.validation import check_settings
from hpc_cpd.errors import UserError
from hpc_cpd.run.publish import read_json
from hpc_cpd.settings import Choice
from hpc_cpd.tasks.registry import stage_plan
from hpc_cpd.trajectories.memory import (
    episode_quality,
    open_memory,
    select_memory,
    write_memory,
)
from hpc_cpd.trajectories.selection.base import Candidates, trajectory_features
from hpc_cpd.trajectories.store import open_trajectories, verify_folder
from tests.trajectories.recorded import TASK, assert_same_episode, make_episode, write_folder

OTHER = "metaworld/push-v3"


DPP, UNIFORM = (Choice("selections", "dpp").resolve(name) for name in ("dpp", "uniform"))


def _select(features, quality, lengths, budget, method="dpp", seed=0):
    rng = np.random.default_rng(seed)
    candidates = Candidates(TASK, [], np.asarray(lengths), np.asarray(quality), budget, rng, lambda: features)
    settings = UNIFORM if method == "uniform" else DPP
    return candidates.choose(plugins.load("selections", method)(settings)).tolist()


@settings(max_examples=300, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=15),
    budget=st.integers(0, 200),
    size=st.integers(1, 4),
    method=st.sampled_from(["dpp", "uniform"]),
    seed=st.integers(0, 99),
)
def test_the_budget_is_kept_and_used_until_the_next_episode_does_not_fit(lengths, budget, size, method, seed):
    rng = np.random.default_rng(seed)
    features, quality = rng.normal(size=(len(lengths), size)), rng.uniform(0.5, 2.0, len(lengths))
    chosen = _select(features, quality, lengths, budget, method, seed)
    used = sum(lengths[number] for number in chosen)
    assert used <= budget
    assert len(set(chosen)) == len(chosen)
    if budget >= sum(lengths):
        assert sorted(chosen) == list(range(len(lengths)))  # also past the rank of the features
    elif min(lengths) <= budget:
        assert chosen
        assert used + max(lengths) > budget
    assert chosen == _select(features, quality, lengths, budget, method, seed)


def test_an_episode_longer_than_the_budget_is_passed_over():
    features = np.diag([100.0, 1.0, 1.0])
    assert _select(features, np.ones(3), [50, 10, 10], 20) == [1, 2]
    assert all(_select(features, np.ones(3), [50, 10, 50], 20, "uniform", seed) == [1] for seed in range(8))


def test_room_that_is_left_is_not_filled_with_whatever_is_short():
    assert _select(np.diag([100.0, 10.0, 1.0]), np.ones(3), [10, 15, 5], 20) == [0]


def test_copies_are_kept_last_and_only_when_the_rank_is_used_up():
    features = np.repeat(np.eye(3), 4, axis=0)  # three kinds, four copies of each
    chosen = _select(features, np.ones(12), np.full(12, 10), 60)
    assert sorted(number // 4 for number in chosen[:3]) == [0, 1, 2]
    assert sorted(number // 4 for number in chosen[3:]) == [0, 1, 2]


def test_the_harder_of_two_copies_is_kept():
    features = np.repeat(np.eye(3), 2, axis=0)
    quality = episode_quality([1.0, 2.0, 2.0, 1.0, 1.0, 2.0])
    assert sorted(_select(features, quality, np.full(6, 10), 30)) == [1, 2, 5]


def test_quality_is_bounded_and_rises_with_the_error():
    quality = episode_quality([0.0, 0.5, 1.0, 2.0, 1e9])
    assert (np.diff(quality) >= 0).all()
    assert (quality.min(), quality.max()) == (0.5, 2.0)
    assert episode_quality([0.0, 0.0]).tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="finite"):
        episode_quality([np.nan])


def test_the_shorter_of_two_copies_is_kept():
    features = np.repeat(np.eye(3), 2, axis=0)
    assert sorted(_select(features, np.ones(6), [10, 20, 20, 10, 10, 20], 30)) == [0, 3, 4]


def test_the_dpp_covers_kinds_of_behaviour_that_a_uniform_choice_misses():
    """90 episodes of one kind and 2 of each of five others: with 8 kept, all six kinds are there."""
    kinds = np.array([max(0, number // 2 - 44) for number in range(100)])
    shifts = np.concatenate([np.zeros((1, 8)), 6.0 * np.eye(8)])
    episodes = [
        dataclasses.replace(
            episode,
            observations=episode.observations + shifts[kind],
            final_observation=episode.final_observation + shifts[kind],
        )
        for kind, episode in zip(kinds, (make_episode(number, 20, 8) for number in range(100)), strict=True)
    ]
    stacked = np.concatenate([episode.observations for episode in episodes])
    features = trajectory_features(episodes, stacked.mean(axis=0), stacked.std(axis=0))
    lengths = np.full(100, 20)
    diverse = len(set(kinds[_select(features, np.ones(100), lengths, 160)]))
    uniform = np.mean([len(set(kinds[_select(features, np.ones(100), lengths, 160, "uniform", s)])) for s in range(20)])
    assert diverse == 6
    assert uniform < 3


def test_features_have_length_one_and_tell_episodes_apart():
    episodes = [make_episode(number, steps) for number, steps in enumerate([1, 3, 40, 40, 7])]
    features = trajectory_features([*episodes, episodes[2]], np.zeros(3), np.ones(3))
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1.0)
    similarity = features @ features.T
    assert similarity[2, 5] == pytest.approx(1.0)
    assert (similarity - np.eye(6))[:5, :5].max() < 0.9


def test_what_all_episodes_share_does_not_make_them_alike():
    episodes = [make_episode(number) for number in range(6)]
    shifted = [make_episode(number, offset=9.0) for number in range(6)]
    features = trajectory_features(episodes, np.zeros(3), np.ones(3))
    np.testing.assert_allclose(trajectory_features(shifted, np.zeros(3), np.ones(3)), features, atol=1e-5)


def test_numbers_that_never_change_do_not_blow_up():
    episodes = [make_episode(number) for number in range(4)]
    assert np.isfinite(trajectory_features(episodes, np.zeros(3), np.zeros(3))).all()
    assert np.isfinite(trajectory_features(episodes[:1], np.zeros(3), np.ones(3))).all()


def test_large_observations_are_folded_and_keep_their_similarities():
    episodes = [make_episode(number % 6 + 100 * (number // 6), 10, 300) for number in range(12)]
    mean, std = np.zeros(300), np.ones(300)
    whole = trajectory_features(episodes, mean, std, max_features=10_000)
    folded = trajectory_features(episodes, mean, std, max_features=2048)
    assert folded.shape == (12, 2049)
    np.testing.assert_array_equal(folded, trajectory_features(episodes, mean, std, max_features=2048))
    assert np.abs(whole @ whole.T - folded @ folded.T).max() < 0.1


@pytest.fixture
def store(tmp_path):
    write_folder(tmp_path / "a", [make_episode(n, 5 + n % 3) for n in range(30)], TASK)
    write_folder(tmp_path / "b", [make_episode(n, 10) for n in range(10)], OTHER)
    return open_trajectories([tmp_path / "a", tmp_path / "b"])


def test_a_memory_is_read_back_as_trajectories_with_its_provenance(store, tmp_path):
    errors = np.linspace(1, 2, 30)
    memories = [
        select_memory(store, TASK, errors, 0.2, DPP, 1),
        select_memory(store, OTHER, np.ones(10), 0.3, DPP, 1),
    ]
    write_memory(tmp_path / "memory", memories, stage=1, method="dpp")
    assert verify_folder(tmp_path / "memory") == []
    kept = open_memory([tmp_path / "memory"])
    assert kept.task_ids == [TASK, OTHER]
    assert kept.origins == store.origins
    for memory in memories:
        task_id = memory.origin.task_id
        original = {store.episodes[n].index: store.episode(n) for n in store.task_episodes(task_id)}
        numbers = kept.task_episodes(task_id)
        assert sorted(e.index for e in memory.episodes) == [kept.episodes[n].index for n in numbers]
        for number in numbers:
            assert_same_episode(kept.episode(number), original[kept.episodes[number].index])
    selection = read_json(tmp_path / "memory" / "selection.json")
    assert (selection["stage"], selection["method"]) == (1, "dpp")
    first = selection["memories"][0]
    assert (first["task_id"], first["total_episodes"], first["total_steps"]) == (TASK, 30, 180)
    assert first["budget_steps"] == 36
    assert first["kept_steps"] == sum(entry["length"] for entry in first["episodes"]) <= 36
    for entry, episode in zip(first["episodes"], memories[0].episodes, strict=True):
        assert (entry["episode_index"], entry["length"]) == (episode.index, len(episode))
        assert entry["quality"] == pytest.approx(episode_quality(errors)[episode.index])


@pytest.mark.parametrize("selection", [DPP, UNIFORM], ids=["dpp", "uniform"])
def test_the_selection_follows_from_its_arguments(store, selection):
    def chosen(seed: int) -> list[int]:
        return [e.index for e in select_memory(store, TASK, np.ones(30), 0.2, selection, seed).episodes]

    assert chosen(1) == chosen(1)
    assert (chosen(1) == chosen(2)) == (selection is DPP)


def test_features_are_computed_when_a_selection_asks_for_them(store, monkeypatch):
    monkeypatch.setattr("hpc_cpd.trajectories.memory.trajectory_features", lambda *_: 1 / 0)
    select_memory(store, TASK, np.ones(30), 0.2, UNIFORM, 1)
    with pytest.raises(ZeroDivisionError):
        select_memory(store, TASK, np.ones(30), 0.2, DPP, 1)


@pytest.mark.parametrize(
    ("order", "said"),
    [
        ([4, 0, 0], "row 0 more than once"),
        ([0, 30], "row 30"),
        ([-1], "row -1"),
        ([[0]], r"array\(\[\[0\]\]\)"),
        (["a"], "row 'a'"),
        ([], "nothing"),
        ([2, 0], "first row 2, an episode of 7 steps,"),
    ],
)
def test_a_selection_that_returns_no_order_is_named_with_what_it_returned(store, monkeypatch, order, said):
    monkeypatch.setattr("hpc_cpd.trajectories.selection.uniform.UniformSelection.order", lambda *_: order)
    expected = "it must return row numbers below 30, each at most once, the first of an episode that fits the budget of"
    with pytest.raises(UserError, match=f"^the selection 'uniform' returned {said} for {TASK}; {expected} 5 steps"):
        select_memory(store, TASK, np.ones(30), 1e-9, UNIFORM, 1)


@pytest.mark.parametrize(
    ("order", "said"),
    [
        (lambda *_: [], "'uniform' returned nothing for metaworld/reach-v3"),
        (lambda *_: [12], "'uniform' returned row 12 for"),
        (lambda *_: 1 / 0, "'uniform' fails in order.*ZeroDivisionError: division by zero; repair"),
    ],
)
@pytest.mark.parametrize("method", ["ours", "replay", "a_gem", "clonex"])
def test_a_selection_that_keeps_nothing_is_refused_before_anything_is_learnt(monkeypatch, method, order, said):
    words = ["stream.tasks=MT10", f"method={method}", "method.memory.selection=uniform", "trajectories.episodes=12"]
    config = load_config(None, words)
    check_settings(config, stage_plan(config.stream))
    monkeypatch.setattr("hpc_cpd.trajectories.selection.uniform.UniformSelection.order", order)
    with pytest.raises(UserError, match=said):
        check_settings(config, stage_plan(config.stream))


def test_the_chosen_episodes_stay_the_same(store):
    """A change here changes what runs of the same seed keep, and needs a line in CHANGELOG.md."""
    errors = np.linspace(1, 2, 30)
    chosen = [[e.index for e in select_memory(store, TASK, errors, 0.2, each, 1).episodes] for each in (DPP, UNIFORM)]
    assert chosen == [[27, 18, 24, 15, 22, 28], [25, 18, 28, 10, 13, 29]]


def test_writing_a_memory_again_gives_the_same_bytes(store, tmp_path):
    memory = [select_memory(store, TASK, np.ones(30), 0.2, DPP, 1)]
    write_memory(tmp_path / "memory", memory)
    before = {path.name: path.read_bytes() for path in (tmp_path / "memory").iterdir()}
    write_memory(tmp_path / "memory", memory)
    assert {path.name: path.read_bytes() for path in (tmp_path / "memory").iterdir()} == before


def test_a_failed_write_leaves_the_old_memory(store, tmp_path, monkeypatch):
    write_memory(tmp_path / "memory", [select_memory(store, TASK, np.ones(30), 0.2, DPP, 1)])
    monkeypatch.setattr("hpc_cpd.trajectories.memory.write_manifest", lambda _: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_memory(tmp_path / "memory", [select_memory(store, OTHER, np.ones(10), 0.5, DPP, 1)])
    assert open_memory([tmp_path / "memory"]).task_ids == [TASK]
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "memory"]


def test_an_empty_memory_is_none_and_a_missing_one_is_named(store, tmp_path):
    write_memory(tmp_path / "empty", [])
    write_memory(tmp_path / "memory", [select_memory(store, OTHER, np.ones(10), 0.3, DPP, 1)])
    assert open_memory([tmp_path / "empty"]) is None
    assert open_memory([tmp_path / "empty", tmp_path / "memory"]).task_ids == [OTHER]
    with pytest.raises(UserError, match=r"nothing/manifest\.json is missing"):
        open_memory([tmp_path / "empty", tmp_path / "nothing"])
