"""The batched simulator against stock Meta-World: all 50 tasks, whole episodes, resets in the middle."""

import hashlib
import inspect
from importlib import metadata

import metaworld
import mujoco
import numpy as np
import pytest
from gymnasium.envs.mujoco import MujocoEnv
from metaworld.policies import ENV_POLICY_MAP
from metaworld.sawyer_xyz_env import SawyerXYZEnv
from metaworld.utils import reward_utils

from hpc_cpd.tasks.families.metaworld import HORIZON, NAMES, REWARD_VERSION, _goals
from hpc_cpd.tasks.metaworld.batch import MetaWorldBatch
from hpc_cpd.tasks.metaworld.program import _touching

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Constant.s. may be too high")]
# an episode per line: (row, first step, goal, kind of actions); a row's next episode interrupts the one before
EPISODES = [(0, 0, 3, "scripted"), (1, 0, 11, "noisy"), (2, 0, 24, "random"), (1, 70, 42, "saturated")]
EPISODES += [(2, 90, 3, "noisy"), (0, HORIZON, 49, "noisy")]
ENDS = {0: HORIZON + 60, 1: 150, 2: 150}
ROUNDING = 1e-14
"""Observations and success are equal to the last bit. Rewards reach 10; NumPy squares an array by multiplying and one
number through pow, and its logarithm of an array and of one number differ in the last bit."""


def stock_environment(name):
    return metaworld.env_dict.ALL_V3_ENVIRONMENTS[name](reward_function_version=REWARD_VERSION)


def arrays_of(model):
    values = {word: getattr(model, word) for word in dir(model) if not word.startswith("_")}
    return {word: value.copy() for word, value in values.items() if isinstance(value, np.ndarray)}


def actions_for(kind, policy, observation, step, rng, before):
    if kind == "random":
        return rng.uniform(-1, 1, 4)
    if kind == "saturated":
        return np.sign(rng.uniform(-1, 1, 4)) if step % 10 == 0 else before
    noise = 0.0 if kind == "scripted" else 0.2
    return np.clip(policy.get_action(observation) + noise * rng.normal(size=4), -1, 1)


@pytest.mark.parametrize("seed,name", [(index % 3, name) for index, name in enumerate(NAMES)])
def test_every_number_is_the_stock_environments(seed, name):
    goals, rng = metaworld.MT1(name, seed=seed).train_tasks, np.random.default_rng(seed)
    assert [goal.data for goal in _goals(name, seed)] == [goal.data for goal in goals]
    batch = MetaWorldBatch(name, goals, 3, 2, {})
    stock = [stock_environment(name) for _ in range(3)]
    compiled = arrays_of(stock[1].model)
    policies = [ENV_POLICY_MAP[name]() for _ in range(3)]
    kinds, observations = [""] * 3, [np.zeros(39)] * 3
    actions = np.zeros((3, 4), np.float32)
    for step in range(max(ENDS.values())):
        for row, first, goal, kind in EPISODES:
            if first == step:
                kinds[row] = kind
                stock[row].set_task(goals[goal])
                observations[row] = stock[row].reset()[0]
                policies[row] = ENV_POLICY_MAP[name]()
                begun = batch.reset(np.array([row]), np.array([goal]))
                assert np.array_equal(begun[0], observations[row])
        rows = np.array([row for row in range(3) if step < ENDS[row]])
        for row in rows:
            actions[row] = actions_for(kinds[row], policies[row], observations[row], step, rng, actions[row])
        steps = batch.step(rows, actions)
        for place, row in enumerate(rows):
            observations[row], reward, _, _, info = stock[row].step(actions[row])
            assert np.array_equal(steps.observations[place], observations[row]), step
            assert abs(steps.rewards[place] - reward) <= ROUNDING, step
            assert steps.success[place] == bool(info.pop("success"))
            assert set(info) == set(steps.info)
            for word, value in info.items():
                assert abs(steps.info[word][place] - float(value)) <= ROUNDING, (step, word)
    # rows share a model: what else a reset wrote into it would leak into the others
    used = arrays_of(stock[1].model)
    changed = {word for word, value in compiled.items() if not np.array_equal(value, used[word], equal_nan=True)}
    assert changed <= {"body_pos", "site_pos"}


@pytest.mark.parametrize("name", ["push-v3", "stick-pull-v3"])
def test_threads_and_neighbours_change_nothing(name):
    goals, rng = _goals(name, 0), np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (60, 5, 4)).astype(np.float32)
    alone, together = MetaWorldBatch(name, goals, 1, 1, {}), MetaWorldBatch(name, goals, 5, 3, {})
    alone.reset(np.array([0]), np.array([8]))
    together.reset(np.arange(5), np.array([1, 2, 3, 8, 5]))
    for action in actions:
        one, many = alone.step(np.array([0]), action[3:4]), together.step(np.arange(5), action)
        assert np.array_equal(one.observations[0], many.observations[3]) and one.rewards[0] == many.rewards[3]


def test_the_contact_test_answers_as_upstream_does():
    environment, policy, answers = stock_environment("push-v3"), ENV_POLICY_MAP["push-v3"](), []
    environment.set_task(_goals("push-v3", 0)[0])
    observation = environment.reset()[0]
    geom = environment._get_id_main_object()
    for _ in range(80):
        observation = environment.step(np.clip(policy.get_action(observation), -1, 1).astype(np.float32))[0]
        answers.append(environment.touching_object(geom))
        assert _touching(environment.data, geom) == answers[-1]
    assert any(answers) and not all(answers)


def test_what_is_reimplemented_is_what_upstream_has_today():
    """When this fails, upstream moved: read its change, adapt the batch, run this file, then renew the digests."""
    assert (metadata.version("metaworld"), mujoco.__version__) == ("3.1.1", "3.3.0")
    rewritten = [
        metaworld._make_tasks,
        metaworld._encode_task,
        SawyerXYZEnv.reset,
        SawyerXYZEnv._reset_hand,
        SawyerXYZEnv.set_xyz_action,
        SawyerXYZEnv.touching_object,
        SawyerXYZEnv._get_obs,
        SawyerXYZEnv._get_curr_obs_combined_no_goal,
        inspect.getclosurevars(SawyerXYZEnv.step).nonlocals["func"],
        MujocoEnv.do_simulation,
        MujocoEnv._step_mujoco_simulation,
        MujocoEnv.reset,
        reward_utils.tolerance,
        reward_utils.hamacher_product,
        reward_utils.rect_prism_tolerance,
    ]
    found = {f.__qualname__: hashlib.sha256(inspect.getsource(f).encode()).hexdigest()[:12] for f in rewritten}
    assert found == DIGESTS


DIGESTS: dict[str, str] = {
    "_make_tasks": "1ce2f9da8e06",
    "_encode_task": "b49a714f54d2",
    "SawyerXYZEnv.reset": "6e8ce1bf9066",
    "SawyerXYZEnv._reset_hand": "edaeaf591dc9",
    "SawyerXYZEnv.set_xyz_action": "0fc19d095c6b",
    "SawyerXYZEnv.touching_object": "b8e2c6f38fd9",
    "SawyerXYZEnv._get_obs": "6fb5a24d0a07",
    "SawyerXYZEnv._get_curr_obs_combined_no_goal": "8c45967bdc72",
    "SawyerXYZEnv.step": "42574d779e01",
    "MujocoEnv.do_simulation": "e74c4bf660b0",
    "MujocoEnv._step_mujoco_simulation": "04a7e4f3d926",
    "MujocoEnv.reset": "3ebd72aa270c",
    "tolerance": "6a4d52642ce1",
    "hamacher_product": "79e620808695",
    "rect_prism_tolerance": "d990556c9f48",
}
