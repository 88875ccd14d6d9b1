"""A launch finds the mistakes of tasks before it writes anything, and says each in one sentence."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete

from hpc_cpd import plugins
from hpc_cpd.config import parse_config
from hpc_cpd.errors import UserError
from hpc_cpd.tasks import Step, TaskSpec, probe
from hpc_cpd.tasks.registry import describe

FLAT, UNIT = Box(-9, 9, (2,)), Box(-1, 1, (1,))


class Good:
    num_goals = 1

    def reset(self, goal_index):
        return np.zeros(2)

    def step(self, action):
        return Step(np.zeros(2), 0.0, False, False, False)

    def close(self):
        pass


def spec(observation=FLAT, action=UNIT, name="a", **facts):
    return TaskSpec(f"mine/{name}", observation, action, 5, "1", "1", **facts)


@pytest.fixture
def mine(monkeypatch):
    """Makes a family ``mine`` with the one simulator that is given, or whose `parts` are replaced."""
    load, names = plugins.load, plugins.names

    def add(description=None, describe=None, make=None, **parts):
        simulator = type("Changed", (Good,), parts)
        family = SimpleNamespace(
            names=lambda: ["a"],
            describe=describe or (lambda name: description or spec(name=name)),
            make=make or (lambda name, num, seed: [simulator() for _ in range(num)]),
        )
        monkeypatch.setattr(plugins, "names", lambda kind: [*names(kind), "mine"])
        monkeypatch.setattr(plugins, "load", lambda kind, name: family if name == "mine" else load(kind, name))
        return family

    return add


def sentence(call, *arguments):
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "mine/a" in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_a_good_task_passes(mine):
    mine()
    probe.probe("mine/a")
    mine(description=spec(Dict(x=Discrete(2)), Discrete(3)), reset=lambda self, goal: {"x": 1}, step=dict_step)
    probe.probe("mine/a")


def dict_step(self, action):
    assert action in Discrete(3)
    return Step({"x": 0}, 1.0, False, False, True)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"reset": lambda self, goal: np.zeros(3)}, r"reset\(\) returns an observation of float64\[3\].*Box \[2\]"),
        ({"reset": lambda self, goal: np.full(2, np.nan)}, "NaN"),
        ({"reset": lambda self, goal: (np.zeros(2), {})}, "not a tuple"),
        ({"reset": lambda self, goal: np.array(["a", "b"])}, "of <U1"),
        ({"reset": lambda self, goal: np.random.default_rng().normal(size=2)}, "the same observation twice"),
        ({"reset": lambda self, goal: {}["goal"]}, r"fails in reset\(\): KeyError: 'goal'"),
        ({"step": lambda self, action: (np.zeros(2), 0.0, False, False)}, r"fails in step\(\).*expected 5, got 4"),
        ({"step": lambda self, action: (np.zeros(2), 0.0, False, False, {})}, "success as a bool, but returns {}"),
        ({"step": lambda self, action: Step(np.zeros(1), 0.0, False, False, False)}, r"step\(\) returns an obs.*\[1\]"),
        ({"step": lambda self, action: Step(np.zeros(2), None, False, False, False)}, "the reward None"),
        ({"num_goals": 0}, "num_goals"),
        ({"make": lambda name, num, seed: 1 / 0}, r"fails in make\(\): ZeroDivisionError"),
    ],
)
def test_a_simulator_that_does_not_do_what_its_task_says_is_one_sentence(mine, parts, said):
    mine(**parts)
    assert re.search(said, sentence(probe.probe, "mine/a"))


@pytest.mark.parametrize(
    ("description", "said"),
    [
        ((4, 2), r"must return a TaskSpec, but returned tuple \(4, 2\)"),
        (spec(name="b"), "says task_id 'mine/b'"),
        (spec(observation=4), "observation_space must be a gymnasium space, but is 4"),
        (spec(action=Box(0, 5, (1,))), "float32 with the bounds -1 and 1"),
        (spec(action=Box(-1, 1, (1,), np.float64)), "float32 with the bounds -1 and 1"),
    ],
)
def test_a_wrong_description_is_one_sentence(mine, description, said):
    mine(description=description)
    assert re.search(said, sentence(describe, "mine/a"))


def test_what_a_family_raises_is_one_sentence(mine):
    mine(describe=lambda name: {}[name])
    assert "fails in describe(): KeyError: 'a'" in sentence(describe, "mine/a")


def check(success_only, *tasks):
    probe.check_tasks([list(tasks)], parse_config({"trajectories": {"success_only": success_only}}))


def test_tasks_that_nothing_can_learn_are_refused_by_name(mine):
    mine(description=spec(action=Discrete(2)))
    assert "has actions Discrete(2)" in sentence(check, True, "mine/a")
    mine(description=spec(observation=Box(0, 255, (4, 4, 3), np.uint8)))
    assert "has observations Box [4, 4, 3] uint8" in sentence(check, True, "mine/a")
    mine(description=spec(has_success=False))
    assert "trajectories.success_only=false" in sentence(check, True, "mine/a")
    check(False, "mine/a")


def test_tasks_of_other_shapes_than_the_first_are_refused(mine):
    mine()
    said = sentence(check, True, "metaworld/reach-v3", "mine/a")
    assert "observations Box [39] float32" in said and "mine/a has observations Box [2] float32" in said


def test_a_trusted_family_is_not_simulated(mine):
    mine(make=lambda name, num, seed: 1 / 0).trusted = True
    check(True, "mine/a")
