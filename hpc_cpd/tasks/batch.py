"""Many environments of one task, stepped together in this process.

Autoreset is disabled: an environment whose episode has ended stands still, at no cost, until it is reset.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import ArrayLike, NDArray

from hpc_cpd.tasks.family import Batch, TaskSpec

_UNBOUNDED = 2**31
_GOAL_DRAWS = 0x60A1
"""Keeps the generator of goal indices apart from others that are made from the same seed."""

Floats = NDArray[np.float32]


class BatchEnv(VectorEnv[Floats, Floats, NDArray[Any]]):
    """A ``gymnasium.vector.VectorEnv`` over N environments of one task.

    Observations are float32 [N, observation_size], actions float32 [N, action_size] in [-1, 1] (clipped to it).
    The same goal index and actions give the same bits, whatever was simulated before.
    """

    def __init__(self, task: TaskSpec, batch: Batch, seed: int) -> None:
        self.task = task
        self.seed = seed
        self.num_envs = batch.num_envs
        self.metadata = {"autoreset_mode": AutoresetMode.DISABLED}
        self.single_observation_space = Box(-np.inf, np.inf, (task.observation_size,), np.float32)
        self.single_action_space = Box(-1.0, 1.0, (task.action_size,), np.float32, seed=seed)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._batch = batch
        self._draws = np.random.default_rng([seed, _GOAL_DRAWS])
        self._observations = np.zeros((self.num_envs, task.observation_size), np.float32)
        self._active = np.zeros(self.num_envs, np.bool_)
        self._terminated = np.zeros(self.num_envs, np.bool_)
        self._truncated = np.zeros(self.num_envs, np.bool_)
        self._success = np.zeros(self.num_envs, np.bool_)
        self._goals = np.full(self.num_envs, -1, np.int64)
        self._steps = np.zeros(self.num_envs, np.int64)

    @property
    def num_goals(self) -> int | None:
        """How many goals the task has under this seed; None: every index in [0, 2**31) is one."""
        return self._batch.num_goals

    @property
    def active(self) -> NDArray[np.bool_]:
        """bool [N]: whose episode is still running."""
        return self._active.copy()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Floats, dict[str, Any]]:
        """Begin new episodes; returns observations float32 [N, obs] and ``{"goal_index": int64 [N]}``.

        `seed` restarts the drawing of goal indices; it does not change the set of goals. Options:
        ``goal_index`` (int [N]) names the goals; ``reset_mask`` (bool [N]) resets only these environments,
        the others go on undisturbed.

        Raises ValueError: an unknown option, a wrong shape, or a goal index out of range.
        """
        if seed is not None:
            self._draws = np.random.default_rng([seed, _GOAL_DRAWS])
        options = {} if options is None else options
        unknown = set(options) - {"goal_index", "reset_mask"}
        if unknown:
            raise ValueError(f"unknown reset option {sorted(unknown)[0]!r}; known: goal_index, reset_mask")
        limit = self.num_goals or _UNBOUNDED
        mask = self._mask(options.get("reset_mask", np.ones(self.num_envs, np.bool_)), "reset_mask")
        if "goal_index" in options:
            goals = np.asarray(options["goal_index"])
            if goals.shape != (self.num_envs,) or not np.issubdtype(goals.dtype, np.integer):
                raise ValueError(f"goal_index must be integers of shape [{self.num_envs}], but is {goals!r}")
            if np.any((goals[mask] < 0) | (goals[mask] >= limit)):
                raise ValueError(f"goal_index must lie in [0, {limit}), but is {goals!r}")
        else:
            goals = self._draws.integers(limit, size=self.num_envs)
        rows = np.flatnonzero(mask)
        if rows.size:
            self._observations[rows] = self._batch.reset(rows, goals[rows])
        self._goals[rows] = goals[rows]
        self._active[mask] = True
        self._terminated[mask] = False
        self._truncated[mask] = False
        self._success[mask] = False
        self._steps[mask] = 0
        return self._observations.copy(), {"goal_index": self._goals.copy()}

    def step(
        self, actions: ArrayLike
    ) -> tuple[Floats, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """Advance every running environment by one step.

        Returns observations float32 [N, obs], rewards float64 [N], terminated bool [N], truncated bool [N] and
        ``{"success": bool [N], "active": bool [N], "goal_index": int64 [N]}``; ``active`` tells who was advanced.
        Further entries of the task's own info are float64 [N], 0 for one that stands still. One that stands still
        repeats its observation and flags with reward 0.

        Raises ValueError for actions of another shape or not finite, RuntimeError before the first reset.
        """
        array = np.asarray(actions, np.float32)
        if array.shape != (self.num_envs, self.task.action_size):
            raise ValueError(f"actions must be [{self.num_envs}, {self.task.action_size}], but are {array.shape}")
        if np.any(self._goals < 0):
            raise RuntimeError("reset() every environment before the first step()")
        active = self._active.copy()
        # MuJoCo answers a NaN by silently restarting the simulation
        if not np.isfinite(array[active]).all():
            raise ValueError(f"an action for {self.task.task_id} is not finite")
        array = np.clip(array, -1.0, 1.0)
        rewards = np.zeros(self.num_envs, np.float64)
        rows = np.flatnonzero(active)
        more: dict[str, NDArray[Any]] = {}
        if rows.size:
            result = self._batch.step(rows, array)
            self._observations[rows] = result.observations
            rewards[rows] = result.rewards
            self._terminated[rows] = result.terminated
            self._truncated[rows] = result.truncated
            self._success[rows] = result.success
            for word, values in result.info.items():
                more[word] = np.zeros(self.num_envs)
                more[word][rows] = values
        self._steps += active
        self._truncated |= active & (self._steps >= self.task.horizon)
        self._active &= ~(self._terminated | self._truncated)
        info = {**more, "success": self._success.copy(), "active": active, "goal_index": self._goals.copy()}
        return self._observations.copy(), rewards, self._terminated.copy(), self._truncated.copy(), info

    def halt(self, mask: ArrayLike) -> None:
        """End the episodes in `mask` (bool [N]): they stand still until they are reset."""
        self._active &= ~self._mask(mask, "halt mask")

    def close_extras(self, **kwargs: Any) -> None:
        """Close the simulators."""
        self._batch.close()

    def _mask(self, value: Any, name: str) -> NDArray[np.bool_]:
        mask = np.asarray(value)
        if mask.shape != (self.num_envs,) or mask.dtype != np.bool_:
            raise ValueError(f"{name} must be bool of shape [{self.num_envs}], but is {mask!r}")
        return mask
