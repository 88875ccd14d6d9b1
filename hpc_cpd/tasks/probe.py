"""What a launch finds out about its tasks before anything is written: whether they can be simulated and learnt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hpc_cpd.errors import UserError
from hpc_cpd.settings import Config
from hpc_cpd.tasks.registry import PAGE, ask, describe, environments, family_of
from hpc_cpd.tasks.spaces import mapped, shown

if TYPE_CHECKING:
    from gymnasium import Space


def check_tasks(plan: Sequence[Sequence[str]], config: Config) -> None:
    """Check the tasks of all stages of `plan` (`registry.run_plan`) together.

    Raises UserError naming a task: nothing can learn from its spaces, they differ from those of the others, it never
    succeeds while only successes are kept, or its family makes a mistake (`probe`).
    """
    from gymnasium.spaces import Box

    specs = [describe(task) for tasks in plan for task in tasks]
    first = specs[0]
    for spec in specs:
        for word, space in (("observations", spec.observation_space), ("actions", spec.action_space)):
            if not isinstance(space, Box) or len(space.shape) != 1 or space.dtype != np.float32:
                raise UserError(
                    f"stream.tasks: {spec.task_id} has {word} {shown(space)}, and nothing here learns from those yet: "
                    "observations and actions must each be a Box of float32 numbers in one dimension; such a task can "
                    "be listed and stepped (hpc_cpd.make_batch)"
                )
        if _told(spec) != _told(first):
            raise UserError(
                f"stream.tasks: {first.task_id} has {_told(first)}, but {spec.task_id} has {_told(spec)}; one student "
                "acts in all tasks of a stream, so their shapes must be the same"
            )
        if config.trajectories.success_only and not spec.has_success:
            raise UserError(
                f"stream.tasks: {spec.task_id} never reports success (for a Gymnasium task: it has neither "
                "info['is_success'] nor a reward_threshold), so no episode would be kept; set "
                "trajectories.success_only=false"
            )
    for spec in specs:
        probe(spec.task_id)


def probe(task_id: str) -> None:
    """Make one environment of a task, reset it, take one step, and hold what comes back against the description.

    Nothing is made for a family that says ``trusted = True``. Raises UserError, one sentence for any mistake.
    """
    from gymnasium.utils.env_checker import data_equivalence

    spec, family = describe(task_id), family_of(task_id)[0]
    if getattr(family, "trusted", False):
        return
    batch = ask(environments, "make", task_id, task_id, 1, 0)
    row, goal = np.zeros(1, np.int64), np.zeros(1, np.int64)

    def refuse(problem: str) -> UserError:
        return UserError(f"task '{task_id}' cannot be used: {problem}; see {PAGE}")

    try:
        goals = ask(lambda: batch.num_goals, "num_goals", task_id)
        if goals is not None and not (isinstance(goals, int) and goals > 0):
            raise refuse(f"num_goals must be None or a number from 1, but is {goals!r}")
        begun = ask(batch.reset, "reset", task_id, row, goal)
        if problem := _misfit(begun, spec.observation_space):
            raise refuse(f"reset() returns an observation {problem}")
        begun = mapped(np.copy, begun)
        spec.action_space.seed(0)
        action = mapped(lambda values: np.asarray(values)[None], spec.action_space.sample())
        steps = ask(batch.step, "step", task_id, row, action)
        if problem := _misfit(steps.observations, spec.observation_space):
            raise refuse(f"step() returns an observation {problem}")
        if not np.issubdtype(np.asarray(steps.rewards).dtype, np.number) or not np.isfinite(steps.rewards).all():
            raise refuse(f"step() returns the reward {_first(steps.rewards)}, which is no finite number")
        for word in ("terminated", "truncated", "success"):
            if np.asarray(getattr(steps, word)).dtype != np.bool_:
                raise refuse(f"step() must return {word} as a bool, but returns {_first(getattr(steps, word))}")
        again = ask(batch.reset, "reset", task_id, row, goal)
        if not data_equivalence(mapped(np.asarray, again), begun, exact=True):
            raise refuse("the same goal does not begin with the same observation twice; draw from the seed and goal")
    finally:
        ask(batch.close, "close", task_id)


def _told(spec: Any) -> str:
    return f"observations {shown(spec.observation_space)} and actions {shown(spec.action_space)}"


def _first(values: Any) -> str:
    return f"{np.asarray(values)[0]!r:.80}"


def _misfit(batch: Any, space: Space[Any], key: str = "") -> str | None:
    """How observations of one environment differ from `space`; None: they fit. Bounds of floats are not looked at."""
    from gymnasium.spaces import Box, Dict

    if isinstance(space, Dict):
        if not isinstance(batch, dict) or batch.keys() != space.keys():
            return f"{key}that is not a dict with the keys {', '.join(space)}"
        return next((found for name in space if (found := _misfit(batch[name], space[name], f"'{name}' "))), None)
    values = np.asarray(batch)
    if values.shape[1:] != space.shape or not np.can_cast(values.dtype, np.dtype(space.dtype), "same_kind"):
        return f"{key}of {values.dtype}{list(values.shape[1:])}, but its space is {shown(space)}"
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        return f"{key}that holds NaN or infinity"
    if not isinstance(space, Box) and not space.contains(values[0].astype(space.dtype)):
        return f"{key}{_first(values)}, which is not in its space {shown(space)}"
    return None
