"""Any Gymnasium environment: scaled actions, seeded episodes, success, and what is refused."""

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete, Text

from hpc_cpd.errors import UserError
from hpc_cpd.tasks.families.gymnasium import episode_seed
from hpc_cpd.tasks.registry import describe, make_batch, resolve_tasks

PENDULUM = "gymnasium/Pendulum-v1"
CAR = "gymnasium/MountainCarContinuous-v0"


class Counter(gymnasium.Env):
    """Counts its steps and pays -1 for each; `told` is reported as is_success from the second step on."""

    action_space = Box(-1, 1, (1,), np.float32)
    observation_space = Box(-np.inf, np.inf, (1,), np.float32)

    def __init__(self, told=False, space=None, action=None):
        self.told = told
        self.observation_space = space or self.observation_space
        self.action_space = action or self.action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        info = {"is_success": np.bool_(self.steps == 2)} if self.told else {}
        return np.full(1, self.steps, np.float32), -1.0, False, False, info


@pytest.fixture
def register():
    names = []

    def add(name, max_episode_steps=4, reward_threshold=None, **kwargs):
        names.append(name)
        gymnasium.register(
            name, Counter, kwargs=kwargs, max_episode_steps=max_episode_steps, reward_threshold=reward_threshold
        )
        return f"gymnasium/{name}"

    yield add
    for name in names:
        gymnasium.registry.pop(name)


def successes(task_id, steps):
    batch = make_batch(task_id, 1, seed=0)
    batch.reset()
    return [bool(batch.step(np.zeros((1, 1)))[4]["success"][0]) for _ in range(steps)]


def test_descriptions_come_from_the_environment():
    spec = describe(PENDULUM)
    assert (spec.observation_space.shape, spec.action_space.shape, spec.horizon) == ((3,), (1,), 200)
    assert spec.reward_version == "native"
    assert spec.environment_version == f"gymnasium {gymnasium.__version__}"


def test_it_is_the_stock_environment_under_scaled_actions():
    batch = make_batch(PENDULUM, 2, seed=3)
    goals = np.array([0, 12])
    observations, _ = batch.reset(options={"goal_index": goals})
    actions = np.random.default_rng(0).uniform(-1, 1, (50, 2, 1)).astype(np.float32)
    stocks = [gymnasium.make("Pendulum-v1") for _ in goals]
    for row, (stock, goal) in enumerate(zip(stocks, goals, strict=True)):
        assert np.array_equal(observations[row], stock.reset(seed=episode_seed(3, int(goal)))[0])
    for action in actions:
        observations, rewards, _, _, info = batch.step(action)
        for row, stock in enumerate(stocks):
            # Pendulum's torque lies in [-2, 2]
            observation, reward, *_ = stock.step(2 * action[row])
            assert np.array_equal(observations[row], observation) and rewards[row] == reward
        assert not info["success"].any()


def test_the_goal_index_seeds_the_episode_and_another_batch_seed_changes_it():
    first, second = make_batch(PENDULUM, 2, seed=3), make_batch(PENDULUM, 2, seed=4)
    at = {"goal_index": np.array([0, 1])}
    start, _ = first.reset(options=at)
    first.step(np.ones((2, 1)))
    assert np.array_equal(start, first.reset(options=at)[0])
    assert not np.array_equal(start[0], start[1])
    assert not np.array_equal(start, second.reset(options=at)[0])
    assert first.num_goals is None


def drive_up(batch, wasted_steps):
    """Waste some steps going the wrong way, then swing up to the flag of MountainCarContinuous."""
    observations, _ = batch.reset()
    for step in range(batch.task.horizon):
        push = 0.6 * np.sign(observations[:, 1:] + 1e-9)
        if step < wasted_steps:
            push = np.where(step % 2, 1.0, -1.0) * np.ones_like(push)
        observations, _, terminated, truncated, info = batch.step(push)
        if terminated[0] or truncated[0]:
            break
    return observations, terminated, info, step


def test_success_is_the_reward_threshold_reached_at_the_end_and_an_early_end_stands_still():
    batch = make_batch(CAR, 1, seed=0)
    observations, terminated, info, step = drive_up(batch, 0)
    assert terminated[0] and step < 900 and info["success"][0]
    after, rewards, terminated, truncated, info = batch.step(np.ones((1, 1)))
    assert np.array_equal(observations, after) and rewards[0] == 0
    assert terminated[0] and not truncated[0] and not info["active"][0]


def test_an_episode_that_ends_below_the_threshold_is_no_success():
    _, terminated, info, _ = drive_up(make_batch(CAR, 1, seed=0), 200)
    assert terminated[0] and not info["success"][0]


def test_a_negative_threshold_is_not_reached_before_the_end(register):
    assert successes(register("Reached-v0", reward_threshold=-4.0), 4) == [False, False, False, True]
    assert successes(register("Missed-v0", reward_threshold=-3.0), 4) == [False, False, False, False]


def test_the_environments_own_flag_comes_before_its_threshold(register):
    assert successes(register("Told-v0", told=True, reward_threshold=-9.0), 4) == [False, True, False, False]


def test_what_cannot_be_used_is_one_sentence(register):
    with pytest.raises(UserError, match=r"Text\(.*is none of Box, Discrete, MultiDiscrete and Dict"):
        describe(register("Text-v0", space=Text(5)))
    with pytest.raises(UserError, match="no finite bounds"):
        describe(register("Open-v0", action=Box(-np.inf, np.inf, (1,), np.float32)))
    with pytest.raises(UserError, match="max_episode_steps"):
        describe(register("Endless-v0", max_episode_steps=None))
    with pytest.raises(UserError, match="did you mean 'gymnasium/Pendulum-v1'"):
        resolve_tasks(["gymnasium/Pendulun-v1"])


@pytest.mark.parametrize("name", ["Pendulum-v0", "HalfCheetah-v3", "foo bar", "phys2d/Pendulum-v0"])
def test_what_gymnasium_refuses_is_one_sentence(name):
    """An old version, one that needs a package of its own, a name that is none."""
    with pytest.raises(UserError, match=f"gymnasium/{name}"):
        describe(f"gymnasium/{name}")


def test_discrete_actions_are_numbers_and_observations_of_any_kind_are_passed_on(register):
    cart = make_batch("gymnasium/CartPole-v1", 2, seed=0)
    assert describe("gymnasium/CartPole-v1").action_space == Discrete(2)
    first, _ = cart.reset(options={"goal_index": np.array([3, 4])})
    observations, rewards, *_ = cart.step(np.array([1, 0]))
    stock = gymnasium.make("CartPole-v1")
    assert np.array_equal(stock.reset(seed=episode_seed(0, 4))[0], first[1])
    assert np.array_equal(stock.step(0)[0], observations[1]) and rewards.tolist() == [1.0, 1.0]
    assert observations in cart.observation_space and cart.action_space.sample().dtype == np.int64
    for wrong in (np.array([0.0, 1.0]), np.array([0, 2]), np.array([[0], [1]])):
        with pytest.raises(ValueError, match="action"):
            cart.step(wrong)

    several = register("Several-v0", action=MultiDiscrete([3, 2]))
    assert make_batch(several, 2, seed=0).action_space.shape == (2, 2)


class Camera(gymnasium.Env):
    """A picture and a number, told a scaled Box and a switch."""

    observation_space = Dict(picture=Box(0, 255, (4, 4, 3), np.uint8), number=Box(-9, 9, (1,), np.float64))
    action_space = Dict(push=Box(0, 10, (1,), np.float64), switch=Discrete(2))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        picture = self.np_random.integers(256, size=(4, 4, 3), dtype=np.uint8)
        return {"picture": picture, "number": np.zeros(1)}, {}

    def step(self, action):
        seen = {"picture": np.full((4, 4, 3), action["switch"], np.uint8), "number": action["push"]}
        return seen, 0.0, False, False, {}


def test_a_dict_has_an_array_per_key():
    gymnasium.register("Camera-v0", Camera, max_episode_steps=3)
    try:
        batch = make_batch("gymnasium/Camera-v0", 2, seed=0)
    finally:
        gymnasium.registry.pop("Camera-v0")
    before, _ = batch.reset()
    after, *_ = batch.step({"push": np.array([[-1.0], [0.5]]), "switch": np.array([1, 0])})
    assert before in batch.observation_space and after in batch.observation_space
    assert after["number"].tolist() == [[0.0], [7.5]] and after["number"].dtype == np.float32
    assert after["picture"][:, 0, 0, 0].tolist() == [1, 0] and after["picture"].dtype == np.uint8
    assert not np.array_equal(before["picture"][0], before["picture"][1])


def test_a_task_that_never_reports_success_says_so(register):
    assert not describe(PENDULUM).has_success
    assert describe(CAR).has_success and describe(register("Threshold-v0", reward_threshold=0.0)).has_success
    assert describe(register("Flag-v0", told=True)).has_success
