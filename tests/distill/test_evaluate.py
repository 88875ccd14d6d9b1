"""How the ranks of a stage share out an evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpc_cpd.distill import evaluate
from hpc_cpd.evaluation.rollouts import EpisodeResult
from tests.distill.ranks import finish, start_ranks


def test_each_piece_of_work_goes_to_one_rank_and_to_none_once_a_rank_stops(tmp_path: Path) -> None:
    answer = tmp_path / "answer.json"
    finish(start_ranks(2, answer, script="rank_turns.py"))
    whole, stopped = json.loads(answer.read_text())
    assert sorted(whole[0] + whole[1]) == list(range(9))
    assert len(whole[0]) > len(whole[1]) > 0  # whoever is free takes the next
    assert len(stopped[0]) == 2
    assert len(stopped[1]) in (1, 2), "rank 1 went on after rank 0 had stopped"


@pytest.mark.parametrize(("world_size", "sizes"), [(1, {50, 20}), (4, {50, 20}), (16, {25, 10})])
def test_every_episode_is_played_once_and_in_as_few_policy_calls_as_keep_all_ranks_busy(
    monkeypatch: pytest.MonkeyPatch, world_size: int, sizes: set[int]
) -> None:
    """Two students and three tasks of 70 episodes are 12 pieces; 16 ranks play half pieces."""
    played: list[int] = []

    def play(policy: int, task: str, episodes: int, seed: int, indices: range) -> list[EpisodeResult]:
        played.append(len(indices))
        return [EpisodeResult(i, i, policy == 1, float(i), 1, 1) for i in indices]

    monkeypatch.setattr(evaluate, "evaluate_policy", play)
    monkeypatch.setattr(evaluate, "taken_in_turn", lambda pieces, stop: iter(pieces[::-1]))
    monkeypatch.setattr(evaluate, "gather", lambda value: [value])
    monkeypatch.setattr(evaluate, "stop_together", lambda *arguments: None)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: world_size)
    records = evaluate.records_of([0, 1], ["a", "b", "c"], 70, 0, lambda: False)  # type: ignore[list-item]
    assert set(played) == sizes
    assert [list(record) for record in records] == [["a", "b", "c"]] * 2
    for policy, record in enumerate(records):
        for task in record.values():
            assert (task["episodes"], task["goals"], task["successes"]) == (70, 70, 70 * policy)
