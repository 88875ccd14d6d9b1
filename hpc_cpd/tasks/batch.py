"""Many environments of one task, stepped together in this process.

Autoreset is disabled: an environment whose episode has ended stands still, at no cost, until it is reset.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space, create_empty_array
from numpy.typing import ArrayLike, NDArray

from hpc_cpd.tasks.families.base import Batch, TaskSpec
from hpc_cpd.tasks.spaces import checked_actions, mapped, write_rows

UNBOUNDED_GOALS = 2**31
"""How many goal indices there are where a task has no list of goals."""
_GOAL_DRAWS = 0x60A1
"""Keeps the generator of goal indices apart from others that are made from the same seed."""


class BatchEnv(VectorEnv[Any, Any, NDArray[Any]]):
    """A ``gymnasium.vector.VectorEnv`` over N environments of one task.

    Observations [N, *observation shape] have the dtype of the task's space (of a Dict: such an array per key). Actions
    [N, *action shape] of a Box are float32 in [-1, 1] (clipped to it), of a Discrete or MultiDiscrete int64.
    The same goal index and actions give the same bits, whatever was simulated before.
    """

    def __init__(self, task: TaskSpec, batch: Batch, seed: int) -> None:
        self.task = task
        self.num_envs = batch.num_envs
        self.metadata = {"autoreset_mode": AutoresetMode.DISABLED}
        self.single_observation_space = task.observation_space
        self.single_action_space = deepcopy(task.action_space)  # an environment of another seed samples other actions
        self.single_action_space.seed(seed)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._batch = batch
        self._draws = np.random.default_rng([seed, _GOAL_DRAWS])
        self._observations: Any = create_empty_array(task.observation_space, self.num_envs)
        self._active = np.zeros(self.num_envs, np.bool_)
        self._flags = np.zeros((3, self.num_envs), np.bool_)
        self._terminated, self._truncated, self._success = self._flags  # its rows
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

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin new episodes; returns observations [N, *observation shape] and ``{"goal_index": int64 [N]}``.

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
        limit = self.num_goals or UNBOUNDED_GOALS
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
            write_rows(self._observations, rows, self._batch.reset(rows, goals[rows]))
        self._goals[rows] = goals[rows]
        self._active[mask] = True
        self._flags[:, mask] = False
        self._steps[mask] = 0
        return mapped(np.copy, self._observations), {"goal_index": self._goals.copy()}

    def step(
        self, actions: Any
    ) -> tuple[Any, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """Advance every running environment by one step.

        Returns observations [N, *observation shape], rewards float64 [N], terminated bool [N], truncated bool [N] and
        ``{"success": bool [N], "active": bool [N], "goal_index": int64 [N]}``; ``active`` tells who was advanced.
        Further entries of the task's own info are float64 [N], 0 for one that stands still. One that stands still
        repeats its observation and flags with reward 0.

        Raises ValueError for actions of another shape, not finite or outside the space, RuntimeError before the first
        reset.
        """
        if np.any(self._goals < 0):
            raise RuntimeError("reset() every environment before the first step()")
        active = self._active.copy()
        array = checked_actions(self.single_action_space, actions, active, self.task.task_id)
        rewards = np.zeros(self.num_envs, np.float64)
        rows = np.flatnonzero(active)
        more: dict[str, NDArray[Any]] = {}
        if rows.size:
            result = self._batch.step(rows, array)
            write_rows(self._observations, rows, result.observations)
            rewards[rows] = result.rewards
            self._flags[:, rows] = result.terminated, result.truncated, result.success
            for word, values in result.info.items():
                more[word] = np.zeros(self.num_envs)
                more[word][rows] = values
        self._steps += active
        self._truncated |= active & (self._steps >= self.task.horizon)
        self._active &= ~(self._terminated | self._truncated)
        info = {**more, "success": self._success.copy(), "active": active, "goal_index": self._goals.copy()}
        observations = mapped(np.copy, self._observations)
        return observations, rewards, self._terminated.copy(), self._truncated.copy(), info

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
