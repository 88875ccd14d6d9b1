"""Any Gymnasium environment: ``gymnasium/<id>``, or ``gymnasium/<module>:<id>`` where a module registers it.

Float32 actions in [-1, 1] are mapped linearly onto the bounds of a Box of floats; all other actions, and observations,
are the environment's own. Success is what the environment reports as ``info["is_success"]`` or ``info["success"]``; if
it reports neither, an episode succeeds at its last step when its return has reached the ``reward_threshold`` of the
environment's registration; without one it never does.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from functools import cache
from importlib import metadata
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Space

from hpc_cpd import plugins
from hpc_cpd.errors import UserError
from hpc_cpd.tasks.families.base import Step, TaskSpec
from hpc_cpd.tasks.spaces import Data, shown, space_problem

REWARD_VERSION = "native"
LONGEST_SEARCH = 5_000
"""Steps of an episode that is played to see whether it reports success; of a longer one it is believed."""


class GymnasiumSimulator:
    """One environment made by ``gymnasium.make``; the goal index seeds the episode."""

    num_goals: int | None = None

    def __init__(self, environment: gymnasium.Env[Any, Any], seed: int) -> None:
        self._environment = environment
        self._seed = seed
        self._to_native = _to_native(environment.action_space)
        self._threshold = None if environment.spec is None else environment.spec.reward_threshold
        self._total_reward = 0.0

    def reset(self, goal_index: int) -> Data:
        self._total_reward = 0.0
        return self._environment.reset(seed=episode_seed(self._seed, goal_index))[0]

    def step(self, action: Any) -> Step:
        observation, reward, terminated, truncated, info = self._environment.step(self._to_native(action))
        self._total_reward += float(reward)
        success = success_flag(info)
        if success is None:
            # only at the end: a return that sinks below a negative threshold began above it
            ended = terminated or truncated
            success = ended and self._threshold is not None and self._total_reward >= self._threshold
        return Step(observation, float(reward), bool(terminated), bool(truncated), bool(success))

    def close(self) -> None:
        self._environment.close()


class GymnasiumFamily:
    """Gymnasium's environments: gymnasium/ID, or gymnasium/MODULE:ID where MODULE registers ID."""

    def names(self) -> list[str]:
        return sorted(gymnasium.registry)

    def describe(self, name: str) -> TaskSpec:
        return _describe(name)

    def make(self, name: str, num: int, seed: int) -> list[GymnasiumSimulator]:
        _describe(name)
        return [GymnasiumSimulator(_make(name), seed) for _ in range(num)]


plugin = GymnasiumFamily()


def episode_seed(seed: int, goal_index: int) -> int:
    """What ``reset(seed=)`` of the environment receives: a 32-bit number, other for another batch seed or index."""
    return int(np.random.SeedSequence([seed, goal_index]).generate_state(1)[0])


def success_flag(info: dict[str, Any]) -> Any:
    """What an environment says about success; None: nothing."""
    return info.get("is_success", info.get("success"))


@cache
def _describe(name: str) -> TaskSpec:
    with closing(_make(name)) as environment:
        spec: Any = environment.spec
        action = environment.action_space
        problem = space_problem(environment.observation_space) or space_problem(action)
        if problem is None and not _bounded(action):
            problem = f"its action {shown(action)} has no finite bounds to scale [-1, 1] to"
        if problem is None and spec.max_episode_steps is None:
            problem = "it has no time limit; register it with max_episode_steps"
        if problem is not None:
            raise UserError(f"task 'gymnasium/{name}' cannot be used: {problem}")
        versions = f"gymnasium {gymnasium.__version__}"
        if str(spec.entry_point).startswith("gymnasium.envs.mujoco"):
            versions += f", mujoco {metadata.version('mujoco')}"
        spaces = _task_space(environment.observation_space), _task_space(action, unit=True)
        succeeds = spec.reward_threshold is not None or _reports_success(environment)
        horizon = spec.max_episode_steps
        return TaskSpec(f"gymnasium/{name}", *spaces, horizon, REWARD_VERSION, versions, has_success=succeeds)


def _reports_success(environment: gymnasium.Env[Any, Any]) -> bool:
    """Whether an episode of random actions is told to succeed or not; some environments say so at its end only."""
    environment.action_space.seed(0)
    environment.reset(seed=0)
    for _ in range(LONGEST_SEARCH):
        _, _, terminated, truncated, info = environment.step(environment.action_space.sample())
        if success_flag(info) is not None or terminated or truncated:
            return success_flag(info) is not None
    return True


def _task_space(space: Space[Any], unit: bool = False) -> Space[Any]:
    """`space` with Boxes of floats as float32; their bounds are -1 and 1 if `unit`."""
    if isinstance(space, Dict):
        return Dict({key: _task_space(part, unit) for key, part in space.items()})
    if not isinstance(space, Box) or space.dtype.kind != "f":
        return space
    if unit:
        return Box(-1.0, 1.0, space.shape)
    with np.errstate(over="ignore"):  # the largest float64 stands for infinity
        return Box(space.low.astype(np.float32), space.high.astype(np.float32))


def _bounded(space: Space[Any]) -> bool:
    if isinstance(space, Dict):
        return all(map(_bounded, space.values()))
    return not isinstance(space, Box) or bool(np.isfinite(space.low).all() and np.isfinite(space.high).all())


def _to_native(space: Space[Any]) -> Callable[[Any], Any]:
    """What makes an action of the environment, which is in `space`, of one of the task."""
    if isinstance(space, Dict):
        parts = {key: _to_native(part) for key, part in space.items()}
        return lambda action: {key: part(action[key]) for key, part in parts.items()}
    if not isinstance(space, Box) or space.dtype.kind != "f":
        return lambda action: action
    dtype, low = space.dtype, space.low.astype(np.float64)
    if np.all(space.low == -1.0) and np.all(space.high == 1.0):
        return lambda action: action.astype(dtype)
    scale = (space.high.astype(np.float64) - low) / 2.0
    return lambda action: (low + (action.astype(np.float64) + 1.0) * scale).astype(dtype)


def _make(name: str) -> gymnasium.Env[Any, Any]:
    try:
        return gymnasium.make(name)
    except gymnasium.error.DependencyNotInstalled as error:
        raise UserError(f"task 'gymnasium/{name}' needs a package that is not installed: {error}") from error
    except gymnasium.error.UnregisteredEnv:
        hint = plugins.hint(name, gymnasium.registry, "gymnasium/").strip() or "register it, or correct its name"
        raise UserError(f"there is no task 'gymnasium/{name}'; {hint}") from None
    except (gymnasium.error.Error, ImportError) as error:  # an old version, a name that is none, an extra that lacks
        raise UserError(f"task 'gymnasium/{name}' cannot be made: {' '.join(str(error).split())}") from error
