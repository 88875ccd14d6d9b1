"""Any Gymnasium environment with a flat Box observation and a Box action: ``gymnasium/<id>``.

Actions in [-1, 1] are mapped linearly onto the environment's own bounds. Success is what the environment reports as
``info["is_success"]`` or ``info["success"]``; if it reports neither, an episode succeeds at its last step when its
return has reached the ``reward_threshold`` of the environment's registration; without one it never does.
"""

from __future__ import annotations

import difflib
from functools import cache
from importlib import metadata
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box
from numpy.typing import NDArray

from hpc_cpd.errors import UserError
from hpc_cpd.tasks.family import Step, TaskSpec

REWARD_VERSION = "native"


class GymnasiumSimulator:
    """One environment made by ``gymnasium.make``; the goal index seeds the episode."""

    num_goals: int | None = None

    def __init__(self, environment: gymnasium.Env[Any, Any], seed: int) -> None:
        self._environment = environment
        self._seed = seed
        space = environment.action_space
        assert isinstance(space, Box)
        self._low = space.low.astype(np.float64)
        self._scale = (space.high.astype(np.float64) - self._low) / 2.0
        self._unit = bool(np.all(space.low == -1.0) and np.all(space.high == 1.0))
        self._dtype = space.dtype
        self._threshold = None if environment.spec is None else environment.spec.reward_threshold
        self._total_reward = 0.0

    def reset(self, goal_index: int) -> NDArray[Any]:
        self._total_reward = 0.0
        observation: NDArray[Any] = self._environment.reset(seed=episode_seed(self._seed, goal_index))[0]
        return observation

    def step(self, action: NDArray[np.float32]) -> Step:
        native = action if self._unit else self._low + (action.astype(np.float64) + 1.0) * self._scale
        observation, reward, terminated, truncated, info = self._environment.step(native.astype(self._dtype))
        self._total_reward += float(reward)
        flag = info.get("is_success", info.get("success"))
        if flag is not None:
            success = bool(flag)
        else:
            # only at the end: a return that sinks below a negative threshold began above it
            ended = terminated or truncated
            success = bool(ended and self._threshold is not None and self._total_reward >= self._threshold)
        return Step(observation, float(reward), bool(terminated), bool(truncated), success)

    def close(self) -> None:
        self._environment.close()


class GymnasiumFamily:
    """The tasks ``gymnasium/...``."""

    def names(self) -> list[str]:
        return sorted(gymnasium.registry)

    def describe(self, name: str) -> TaskSpec:
        return _describe(name)

    def make(self, name: str, num: int, seed: int) -> list[GymnasiumSimulator]:
        _describe(name)
        return [GymnasiumSimulator(_make(name), seed) for _ in range(num)]


family = GymnasiumFamily()


def episode_seed(seed: int, goal_index: int) -> int:
    """What ``reset(seed=)`` of the environment receives: a 32-bit number, other for another batch seed or index."""
    return int(np.random.SeedSequence([seed, goal_index]).generate_state(1)[0])


@cache
def _describe(name: str) -> TaskSpec:
    environment = _make(name)
    try:
        observation, action, spec = environment.observation_space, environment.action_space, environment.spec
        problem = None
        if not isinstance(observation, Box) or len(observation.shape) != 1:
            problem = f"its observation is {observation}, but a flat Box is needed; flatten it in a family of your own"
        elif not isinstance(action, Box) or len(action.shape) != 1:
            problem = f"its action is {action}, but a flat Box (continuous control) is needed"
        elif not np.all(np.isfinite(action.low) & np.isfinite(action.high)):
            problem = f"its action {action} has no finite bounds to scale [-1, 1] to"
        elif spec is None or spec.max_episode_steps is None:
            problem = "it has no time limit; register it with max_episode_steps"
        if problem is not None:
            raise UserError(f"task 'gymnasium/{name}' cannot be used: {problem}")
        assert observation.shape is not None and action.shape is not None and spec is not None
        assert spec.max_episode_steps is not None
        versions = f"gymnasium {gymnasium.__version__}"
        if str(spec.entry_point).startswith("gymnasium.envs.mujoco"):
            versions += f", mujoco {metadata.version('mujoco')}"
        return TaskSpec(
            f"gymnasium/{name}",
            observation.shape[0],
            action.shape[0],
            spec.max_episode_steps,
            REWARD_VERSION,
            versions,
        )
    finally:
        environment.close()


def _make(name: str) -> gymnasium.Env[Any, Any]:
    try:
        return gymnasium.make(name)
    except gymnasium.error.DependencyNotInstalled as error:
        raise UserError(f"task 'gymnasium/{name}' needs a package that is not installed: {error}") from error
    except gymnasium.error.UnregisteredEnv:
        near = difflib.get_close_matches(name, list(gymnasium.registry), n=1)
        hint = f"did you mean 'gymnasium/{near[0]}'?" if near else "register it, or correct its name"
        raise UserError(f"there is no task 'gymnasium/{name}'; {hint}") from None
    except (gymnasium.error.Error, ImportError) as error:  # an old version, a name that is none, an extra that lacks
        raise UserError(f"task 'gymnasium/{name}' cannot be made: {' '.join(str(error).split())}") from error
