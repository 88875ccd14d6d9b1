"""The batch: who is advanced, who stands still, and what is refused. On Pendulum, which costs nothing."""

import numpy as np
import pytest
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, VectorEnv

from hpc_cpd.tasks.batch import BatchEnv
from hpc_cpd.tasks.families.base import OneByOne, Step, TaskSpec
from hpc_cpd.tasks.registry import make_batch

TASK = "gymnasium/Pendulum-v1"


@pytest.fixture
def batch():
    return make_batch(TASK, 3, seed=0)


def ones(batch):
    return np.ones(batch.action_space.shape, np.float32)


def test_it_is_a_vector_environment_without_autoreset(batch):
    assert isinstance(batch, VectorEnv)
    assert batch.metadata["autoreset_mode"] is AutoresetMode.DISABLED
    observations, _ = batch.reset()
    assert observations in batch.observation_space and observations.dtype == np.float32
    assert batch.action_space.shape == (3, 1)
    observations, rewards, terminated, truncated, info = batch.step(batch.action_space.sample())
    assert observations in batch.observation_space
    assert rewards.dtype == np.float64
    assert terminated.dtype == truncated.dtype == info["success"].dtype == np.bool_
    assert rewards.shape == terminated.shape == truncated.shape == info["success"].shape == (3,)


def test_a_row_does_not_depend_on_its_neighbours_or_its_place(batch):
    alone = make_batch(TASK, 1, seed=0)
    here, _ = batch.reset(options={"goal_index": np.array([9, 4, 6])})
    there, _ = alone.reset(options={"goal_index": np.array([6])})
    assert np.array_equal(here[2], there[0])
    for _ in range(5):
        here, *_ = batch.step(ones(batch))
        there, *_ = alone.step(ones(alone))
    assert np.array_equal(here[2], there[0])


def test_halted_environments_stand_still_until_reset_and_the_others_go_on(batch):
    batch.reset(options={"goal_index": np.arange(3)})
    before, *_ = batch.step(ones(batch))
    batch.halt(np.array([False, True, False]))
    for _ in range(3):
        after, rewards, terminated, truncated, info = batch.step(ones(batch))
    assert info["active"].tolist() == batch.active.tolist() == [True, False, True]
    assert np.array_equal(before[1], after[1]) and rewards[1] == 0
    assert not np.array_equal(before[0], after[0]) and rewards[0] != 0
    assert not terminated.any() and not truncated.any()
    batch.reset()
    assert batch.active.all()


def test_reset_mask_leaves_the_others_undisturbed(batch):
    reference = make_batch(TASK, 3, seed=0)
    goals = {"goal_index": np.array([1, 2, 3])}
    for each in (batch, reference):
        each.reset(options=goals)
        each.step(ones(each))
    _, info = batch.reset(options={"goal_index": np.array([8, 8, 8]), "reset_mask": np.array([False, True, False])})
    assert info["goal_index"].tolist() == [1, 8, 3]
    new, *_ = batch.step(ones(batch))
    old, *_ = reference.step(ones(reference))
    assert np.array_equal(new[[0, 2]], old[[0, 2]])
    assert not np.array_equal(new[1], old[1])


def test_a_masked_reset_does_not_wake_the_halted(batch):
    batch.reset()
    batch.halt(np.array([True, True, False]))
    batch.reset(options={"reset_mask": np.array([True, False, False])})
    assert batch.active.tolist() == [True, False, True]


class Endless:
    """A simulator that never ends by itself."""

    num_goals = 1

    def reset(self, goal_index):
        return np.zeros(1)

    def step(self, action):
        return Step(action, 0.0, False, False, False)

    def close(self):
        pass


def test_the_horizon_counts_from_each_environments_own_reset():
    batch = BatchEnv(
        TaskSpec("test/endless", Box(-1, 1, (1,)), Box(-1, 1, (1,)), 5, "1", "1"),
        OneByOne([Endless(), Endless()]),
        seed=0,
    )
    batch.reset()
    for _ in range(4):
        *_, truncated, _ = batch.step(ones(batch))
    assert not truncated.any()
    batch.reset(options={"reset_mask": np.array([True, False])})
    *_, truncated, _ = batch.step(ones(batch))
    assert truncated.tolist() == [False, True]
    assert batch.active.tolist() == [True, False]
    for _ in range(4):
        *_, truncated, _ = batch.step(ones(batch))
    assert truncated.all()


def test_drawn_goals_are_a_function_of_the_seed(batch):
    draws = [batch.reset()[1]["goal_index"] for _ in range(3)]
    again = make_batch(TASK, 3, seed=0)
    assert np.array_equal(draws, [again.reset()[1]["goal_index"] for _ in range(3)])
    assert len(np.unique(draws)) == 9
    assert not np.array_equal(draws[0], make_batch(TASK, 3, seed=1).reset()[1]["goal_index"])
    first = batch.reset(seed=5)[1]["goal_index"]
    batch.reset()
    assert np.array_equal(first, batch.reset(seed=5)[1]["goal_index"])


def test_a_mask_does_not_shift_the_goals_drawn_later(batch):
    reference = make_batch(TASK, 3, seed=0)
    batch.reset()
    reference.reset()
    batch.reset(options={"reset_mask": np.array([True, False, False])})
    reference.reset()
    assert np.array_equal(batch.reset()[1]["goal_index"], reference.reset()[1]["goal_index"])


def test_what_was_returned_is_never_changed_afterwards(batch):
    observations, info = batch.reset()
    result = batch.step(ones(batch))
    kept = [observations, info["goal_index"], *result[:4], *result[4].values()]
    copies = [array.copy() for array in kept]
    batch.halt(np.ones(3, np.bool_))
    batch.reset()
    batch.step(ones(batch))
    assert all(np.array_equal(array, copy) for array, copy in zip(kept, copies, strict=True))


def test_actions_beyond_the_bounds_are_clipped(batch):
    goals = {"goal_index": np.arange(3)}
    batch.reset(options=goals)
    inside = batch.step(ones(batch))
    batch.reset(options=goals)
    outside = batch.step(5 * ones(batch))
    assert np.array_equal(inside[0], outside[0]) and np.array_equal(inside[1], outside[1])


def test_bad_calls_are_refused(batch):
    with pytest.raises(RuntimeError, match="reset"):
        batch.step(ones(batch))
    batch.reset()
    with pytest.raises(ValueError, match=r"\[3, 1\]"):
        batch.step(np.zeros((2, 1)))
    with pytest.raises(ValueError, match="not finite"):
        batch.step(np.full((3, 1), np.nan))
    with pytest.raises(ValueError, match="unknown reset option 'goal'"):
        batch.reset(options={"goal": 1})
    with pytest.raises(ValueError, match="goal_index"):
        batch.reset(options={"goal_index": np.array([0.5, 1.0, 2.0])})
    with pytest.raises(ValueError, match="goal_index"):
        batch.reset(options={"goal_index": np.array([0, -1, 0])})
    with pytest.raises(ValueError, match="reset_mask"):
        batch.reset(options={"reset_mask": np.array([1, 0, 1])})
    with pytest.raises(ValueError, match="halt mask"):
        batch.halt(np.array([True]))
    with pytest.raises(ValueError, match="num_envs"):
        make_batch(TASK, 0, seed=0)
