"""Meta-World through our batch: the benchmark's own numbers, and nothing carried from one episode to the next."""

import os
from pathlib import Path
from typing import Any

import gymnasium
import metaworld
import numpy as np
import pytest
from metaworld.policies import ENV_POLICY_MAP

from hpc_cpd.errors import UserError
from hpc_cpd.tasks.families.base import TaskSpec
from hpc_cpd.tasks.families.metaworld import HORIZON, NAMES, REWARD_VERSION
from hpc_cpd.tasks.families.metaworld import plugin as metaworld_family
from hpc_cpd.tasks.registry import describe, make_batch, task_set

# gymnasium's checker and the scripted policies warn about stock Meta-World's own spaces and gains
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(observation space|obs returned)"),
    pytest.mark.filterwarnings("ignore:Constant.s. may be too high"),
]
SEED = 7


def scripted_actions(name: str, goal: int, steps: int, seed: int = 0) -> np.ndarray:
    """Noisy actions of the scripted policy on one goal, float32 [steps, 4]: they reach contacts and success."""
    batch, policy, noise = make_batch(f"metaworld/{name}", 1, SEED), ENV_POLICY_MAP[name](), np.random.default_rng(seed)
    observations, _ = batch.reset(options={"goal_index": np.array([goal])})
    actions = []
    for _ in range(steps):
        action = policy.get_action(observations[0].astype(np.float64)) + 0.1 * noise.normal(size=4)
        actions.append(np.clip(action, -1, 1).astype(np.float32))
        observations, *_ = batch.step(actions[-1][None])
    return np.array(actions)


def play(batch: Any, goals: list[int], actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Observations [steps + 1, N, 39], rewards [steps, N] and success [steps, N]; every row takes the same actions."""
    observations = [batch.reset(options={"goal_index": np.array(goals)})[0]]
    rewards, success = [], []
    for action in actions:
        observation, reward, _, _, info = batch.step(np.tile(action, (batch.num_envs, 1)))
        observations.append(observation)
        rewards.append(reward)
        success.append(info["success"])
    return np.array(observations), np.array(rewards), np.array(success)


def test_the_static_names_are_the_benchmarks_own_lists():
    lists = metaworld.env_dict
    assert list(NAMES[:10]) == list(lists.MT10_V3)
    assert list(NAMES[:25]) == list(lists.MT25_V3)
    assert list(NAMES[25:]) == [name for name in lists.MT50_V3 if name not in lists.MT25_V3]
    assert len(NAMES) == 50


def test_a_description_is_what_the_environment_is():
    spec = describe("metaworld/door-open-v3")
    environment = metaworld.env_dict.ALL_V3_ENVIRONMENTS["door-open-v3"]()
    assert spec.observation_space.shape == environment.observation_space.shape
    assert spec.action_space == environment.action_space
    assert spec.horizon == environment.max_path_length
    assert spec.environment_version == "metaworld 3.1.1, mujoco 3.3.0"
    template = metaworld_family.make("door-open-v3", 1, SEED)._template  # type: ignore[attr-defined]
    assert template.reward_function_version == spec.reward_version == REWARD_VERSION == "v2"


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(UserError, match="did you mean 'metaworld/reach-v3'"):
        describe("metaworld/reech-v3")


@pytest.mark.parametrize("name", ["push-v3", "coffee-pull-v3"])
def test_the_batch_is_stock_metaworld_to_the_last_bit(name):
    goals, steps = [0, 31], 120
    actions = scripted_actions(name, goals[0], steps)
    observations, rewards, success = play(make_batch(f"metaworld/{name}", 2, SEED), goals, actions)

    stock = gymnasium.make("Meta-World/MT1", env_name=name, seed=SEED)
    stock.get_wrapper_attr("toggle_sample_tasks_on_reset")(False)
    tasks = stock.get_wrapper_attr("tasks")
    assert [task.data for task in tasks] == [task.data for task in metaworld_family.make(name, 1, SEED)._goals]  # type: ignore[attr-defined]
    for row, goal in enumerate(goals):
        stock.unwrapped.set_task(tasks[goal])  # type: ignore[attr-defined]
        observation, _ = stock.reset()
        assert np.array_equal(observation.astype(np.float32), observations[0, row])
        for step, action in enumerate(actions):
            observation, reward, _, _, info = stock.step(action)
            assert np.array_equal(observation.astype(np.float32), observations[step + 1, row])
            assert reward == rewards[step, row]
            assert bool(info["success"]) == success[step, row]
    assert success[:, 0].any()


def play_stock(name: str, goal: int, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the benchmark's own class returns in its first episode, in the form of `play` without rows."""
    environment = metaworld.env_dict.ALL_V3_ENVIRONMENTS[name](reward_function_version="v2")
    # the same task objects as MT1's: the test against gym.make holds them against upstream's
    environment.set_task(metaworld_family.make(name, 1, SEED)._goals[goal])  # type: ignore[attr-defined]
    observations, rewards, success = [environment.reset()[0]], [], []
    for action in actions:
        observation, reward, _, _, info = environment.step(action)
        observations.append(observation)
        rewards.append(reward)
        success.append(bool(info["success"]))
    return np.array(observations, np.float32), np.array(rewards), np.array(success)


@pytest.mark.parametrize("task_id", task_set("MT10"))
def test_goal_and_actions_decide_every_bit_whatever_was_simulated_before(task_id):
    name, goal = task_id.partition("/")[2], 5
    actions = scripted_actions(name, goal, 90)
    batch = make_batch(task_id, 2, SEED)
    wild = np.random.default_rng(1).uniform(-1, 1, (60, 4)).astype(np.float32)
    play(batch, [17, 40], wild)
    play(batch, [goal, 23], actions[:50])
    result = play(batch, [2, goal], actions)
    another = play(make_batch(task_id, 1, SEED), [goal], actions)  # which takes over the first states of this one
    for expected, actual, again in zip(play_stock(name, goal, actions), result, another, strict=True):
        assert np.array_equal(expected, actual[:, 1]) and np.array_equal(expected, again[:, 0])


def test_an_episode_is_truncated_at_the_horizon_where_stock_truncates():
    batch = make_batch("metaworld/reach-v3", 2, SEED)
    batch.reset(options={"goal_index": np.array([0, 1])})
    actions = np.zeros((2, 4), np.float32)
    for step in range(1, HORIZON + 1):
        observations, _, terminated, truncated, _ = batch.step(actions)
        assert truncated.tolist() == [step == HORIZON] * 2
        assert not terminated.any()
    after, rewards, _, truncated, info = batch.step(actions)
    assert np.array_equal(after, observations)
    assert not rewards.any() and truncated.all() and not info["active"].any()


def test_every_goal_of_the_seed_can_be_chosen_and_is_visible():
    batch = make_batch("metaworld/reach-v3", 10, SEED)
    assert batch.num_goals == 50
    seen = []
    for start in range(0, 50, 10):
        indices = np.arange(start, start + 10)
        observations, info = batch.reset(options={"goal_index": indices})
        assert np.array_equal(info["goal_index"], indices)
        seen.append(observations[:, 36:39])
    # the vector of reach-v3 is (object position, goal position)
    environment = metaworld.env_dict.ALL_V3_ENVIRONMENTS["reach-v3"]()
    drawn = []
    for task in metaworld.MT1("reach-v3", seed=SEED).train_tasks:
        environment.set_task(task)
        drawn.append(environment._last_rand_vec[3:])
    assert np.array_equal(np.concatenate(seen), np.array(drawn, np.float32))
    assert len({tuple(goal) for goal in np.concatenate(seen)}) == 50


def test_the_global_generator_is_neither_read_nor_moved():
    np.random.seed(1)
    before = np.random.get_state()
    batch = make_batch("metaworld/drawer-open-v3", 2, seed=101)
    first, info = batch.reset()
    batch.step(np.ones((2, 4), np.float32))
    after = np.random.get_state()
    assert np.array_equal(before[1], after[1]) and before[2] == after[2]

    np.random.seed(2)
    second, again = make_batch("metaworld/drawer-open-v3", 2, seed=101).reset()
    assert np.array_equal(info["goal_index"], again["goal_index"])
    assert np.array_equal(first, second)


def test_another_seed_gives_other_goals():
    at = {"goal_index": np.array([0])}
    first, second = (make_batch("metaworld/reach-v3", 1, seed).reset(options=at)[0] for seed in (SEED, SEED + 1))
    assert not np.array_equal(first[:, 36:39], second[:, 36:39])


def test_goals_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"\[0, 50\)"):
        make_batch("metaworld/reach-v3", 1, SEED).reset(options={"goal_index": np.array([50])})


def test_descriptions_of_all_tasks_are_ready_without_a_simulator():
    specs = [describe(task_id) for task_id in task_set("MT50")]
    assert all(isinstance(spec, TaskSpec) for spec in specs)
    assert len({spec.task_id for spec in specs}) == 50


def test_what_batches_took_goes_back_to_the_system():
    def used_megabytes() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    def play_some() -> None:
        for name in ("reach-v3", "push-v3", "door-open-v3"):
            batch = make_batch(f"metaworld/{name}", 50, SEED)
            batch.reset()
            batch.close()

    play_some()
    before = used_megabytes()
    for _ in range(2):
        play_some()
    assert used_megabytes() < before + 40  # without it, twenty for every batch
