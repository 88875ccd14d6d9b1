"""Success is the benchmark's own number, whoever plays which episode."""

from __future__ import annotations

from typing import Any

import gymnasium
import metaworld
import numpy as np
import pytest
from metaworld.policies import ENV_POLICY_MAP

from hpc_cpd.errors import UserError
from hpc_cpd.evaluation.rollouts import EpisodeResult, evaluate_policy
from hpc_cpd.tasks.batch import BatchEnv

SEED = 10_000


class Scripted:
    """The benchmark's hand-written policy, made worse by `gain` so that it fails on some goals."""

    def __init__(self, task: str, gain: float = 1.0) -> None:
        self.task, self.gain = task, gain
        self.rows = 0
        self.calls: list[int] = []

    def reset(self, task_id: str | None, num_envs: int) -> None:
        assert task_id == f"metaworld/{self.task}"
        self.rows = num_envs
        self.policy = ENV_POLICY_MAP[self.task]()

    def act(self, observations: np.ndarray) -> np.ndarray:
        assert observations.dtype == np.float32
        self.calls.append(len(observations))
        return np.stack([self.one(row) for row in observations])

    def one(self, observation: np.ndarray) -> np.ndarray:
        action = self.policy.get_action(observation.astype(np.float64))
        return np.clip(self.gain * action, -1, 1).astype(np.float32)


class Counting(Scripted):
    """Remembers its own history row by row, so that a row out of place or not forgotten changes the actions."""

    def reset(self, task_id: str | None, num_envs: int) -> None:
        super().reset(task_id, num_envs)
        self.age = np.zeros(num_envs)

    def act(self, observations: np.ndarray) -> np.ndarray:
        actions = super().act(observations)
        self.age += 1
        wobble = 0.3 * np.sin(self.age[:, None] + observations[:, 36:37] * 100)
        return np.clip(actions + wobble, -1, 1).astype(np.float32)


@pytest.mark.parametrize(
    "task, gain, episodes", [("reach-v3", 0.08, 3), ("button-press-v3", 0.2, 2), ("push-v3", 1.0, 2)]
)
@pytest.mark.slow
def test_stock_environment_gives_the_same_episodes(task: str, gain: float, episodes: int) -> None:
    ours = evaluate_policy(Scripted(task, gain), f"metaworld/{task}", episodes, SEED)

    env = gymnasium.make("Meta-World/MT1", env_name=task, seed=SEED)
    env.get_wrapper_attr("toggle_sample_tasks_on_reset")(False)
    goals = metaworld.MT1(task, seed=SEED).train_tasks
    policy = Scripted(task, gain)
    stock = []
    for episode in range(episodes):
        env.unwrapped.set_task(goals[episode])  # type: ignore[attr-defined]
        policy.reset(f"metaworld/{task}", 1)
        observation, _ = env.reset()
        total, steps, over, success = 0.0, 0, False, False
        while not over:  # to the horizon: the verdict may not depend on our stopping at the first success
            observation, reward, terminated, truncated, info = env.step(policy.one(observation.astype(np.float32)))
            if not success:
                total, steps = total + float(reward), steps + 1
            success |= bool(info["success"])
            over = terminated or truncated
        stock.append(EpisodeResult(episode, episode, success, total, steps if success else None, steps))
    env.close()
    assert [r.success for r in ours] == [r.success for r in stock]
    assert ours == stock
    if task == "reach-v3":
        assert {r.success for r in stock} == {True, False}, "the policy must fail on some goals to prove anything"


def test_result_does_not_depend_on_who_plays_which_episode() -> None:
    def play(indices: list[int] | None, rows: int = 4) -> list[EpisodeResult]:
        return evaluate_policy(Counting("button-press-v3", 0.2), "metaworld/button-press-v3", 7, SEED, indices, rows)

    whole = play(None)
    assert [r.episode for r in whole] == list(range(7))
    assert len({r.length for r in whole}) > 3
    for ranks in (2, 3):
        parts = [result for rank in range(ranks) for result in play(list(range(7))[rank::ranks])]
        assert sorted(parts, key=lambda r: r.episode) == whole
    assert play([6, 2]) == [whole[2], whole[6]]
    assert play(None, rows=7) == whole
    assert play([]) == []


def test_policy_is_called_with_a_constant_number_of_rows() -> None:
    policy = Scripted("reach-v3")
    results = evaluate_policy(policy, "metaworld/reach-v3", 3, SEED, [2], num_envs=5)
    assert policy.rows == 5 and set(policy.calls) == {5}
    assert results[0].episode == 2 and len(policy.calls) == results[0].length


def test_only_running_environments_cost_physics(monkeypatch: pytest.MonkeyPatch) -> None:
    advanced = 0
    original = BatchEnv.step

    def count(self: BatchEnv, actions: np.ndarray) -> Any:
        nonlocal advanced
        answer = original(self, actions)
        advanced += int(answer[-1]["active"].sum())
        return answer

    monkeypatch.setattr(BatchEnv, "step", count)
    results = evaluate_policy(Scripted("reach-v3", 0.5), "metaworld/reach-v3", 5, SEED, num_envs=3)
    lengths = [r.length for r in results]
    assert len(set(lengths)) > 1
    assert advanced == sum(lengths)


def test_goals_come_round_again_after_the_last() -> None:
    results = evaluate_policy(Scripted("reach-v3"), "metaworld/reach-v3", 102, SEED, [1, 51, 101])
    assert [r.goal_index for r in results] == [1, 1, 1]
    assert len({(r.total_reward, r.length) for r in results}) == 1


def test_unsuccessful_episode_ends_at_the_horizon() -> None:
    class Still(Scripted):
        def one(self, observation: np.ndarray) -> np.ndarray:
            return np.zeros(4, np.float32)

    (result,) = evaluate_policy(Still("push-v3"), "metaworld/push-v3", 1, SEED)
    assert (result.success, result.length, result.steps_to_success) == (False, 500, None)


def test_mistakes_are_refused() -> None:
    with pytest.raises(ValueError, match="must lie in"):
        evaluate_policy(Scripted("reach-v3"), "metaworld/reach-v3", 3, SEED, [3])
    with pytest.raises(UserError, match="reach-v3"):
        evaluate_policy(Scripted("reach-v33"), "metaworld/reach-v33", 1, SEED)

    class Short(Scripted):
        def act(self, observations: np.ndarray) -> np.ndarray:
            return np.zeros((1, 4), np.float32)

    with pytest.raises(ValueError, match="5 observations"):
        evaluate_policy(Short("reach-v3"), "metaworld/reach-v3", 1, SEED, num_envs=5)
