"""Playing numbered episodes with action noise, until enough of them succeeded.

Attempt i is a pure function of (seed, task, purpose, i). Attempts are played in blocks of BLOCK, attempt i
always in row i % BLOCK of a policy call of exactly BLOCK rows, so the same bits come out whoever plays it.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hpc_cpd.distributed.mpi import Communicator
from hpc_cpd.tasks.batch import BatchEnv
from hpc_cpd.tasks.spaces import flat_size
from hpc_cpd.teachers.seeds import generator
from hpc_cpd.trajectories.schema import Episode

BLOCK = 8
UNBOUNDED_GOALS = 2**31


class Actor(Protocol):
    """Whoever acts: the scripted policy of a task, or a teacher."""

    def begin(self, rows: int) -> None:
        """New episodes begin in all `rows`."""

    def means(self, observations: NDArray[np.float32], active: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Noiseless actions float32 [rows, act] in [-1, 1]; rows that are not `active` do not matter."""


@dataclass(frozen=True)
class AttemptPlan:
    """What decides an attempt, besides its number."""

    seed: int
    task_id: str
    purpose: str
    """Keeps the attempts of one kind of work apart from those of another."""
    action_noise: Sequence[float]
    """Standard deviations, one of them drawn per attempt."""
    steps_after_success: int
    """An attempt ends this many steps after its first success."""


def play_block(
    envs: BatchEnv, actor: Actor, plan: AttemptPlan, block: int, teacher: Actor | None = None
) -> list[Episode]:
    """Play the attempts of `block`, in order of their numbers, successful or not.

    `teacher`: whose means are recorded at what `actor` meets; None: those of `actor`.
    """
    horizon, goals = envs.task.horizon, envs.num_goals or UNBOUNDED_GOALS
    numbers = range(block * BLOCK, (block + 1) * BLOCK)
    noise = np.zeros((horizon, BLOCK, flat_size(envs.task.action_space)), np.float32)
    goal_index = np.zeros(BLOCK, np.int64)
    for row, number in enumerate(numbers):
        rng = generator(plan.seed, plan.task_id, plan.purpose, number)
        goal_index[row] = number % goals if envs.num_goals else rng.integers(goals)
        level = plan.action_noise[int(rng.integers(len(plan.action_noise)))]
        noise[:, row] = level * rng.standard_normal(noise[:, row].shape)

    observations, _ = envs.reset(options={"goal_index": goal_index})
    active = np.ones(BLOCK, np.bool_)
    for one in (actor, teacher):
        if one is not None:
            one.begin(BLOCK)
    lengths = np.zeros(BLOCK, np.int64)
    succeeded_at = np.full(BLOCK, -1)
    seen, means, executed, rewards, success = [], [], [], [], []
    for step in range(horizon):
        if not active.any():
            break
        mean = actor.means(observations, active)
        action = np.clip(mean + noise[step], -1.0, 1.0)
        seen.append(observations)
        means.append(mean if teacher is None else teacher.means(observations, active))
        executed.append(action)
        observations, reward, terminated, truncated, info = envs.step(action)
        rewards.append(reward)
        success.append(info["success"])
        lengths += active
        succeeded_at[active & info["success"] & (succeeded_at < 0)] = step
        ended = terminated | truncated
        ended |= (succeeded_at >= 0) & (step - succeeded_at >= plan.steps_after_success)
        active &= ~ended
        envs.halt(~active)
    return [
        Episode(
            observations=np.array([rows[row] for rows in seen[: lengths[row]]], np.float32),
            actions=np.array([rows[row] for rows in executed[: lengths[row]]], np.float32),
            teacher_mean=np.array([rows[row] for rows in means[: lengths[row]]], np.float32),
            rewards=np.array([rows[row] for rows in rewards[: lengths[row]]], np.float32),
            success=np.array([rows[row] for rows in success[: lengths[row]]], np.bool_),
            final_observation=observations[row].copy(),  # it stood still there since its own end
            goal_index=int(goal_index[row]),
            index=number,
        )
        for row, number in enumerate(numbers)
    ]


def keep_successes(
    wanted: int,
    attempts: int,
    success_only: bool,
    play: Callable[[int], list[Episode]],
    keep: Callable[[list[Episode]], None],
    stored: Container[int],
    communicator: Communicator,
) -> tuple[int, int]:
    """Keep the first `wanted` successful attempts (any attempts without `success_only`) below `attempts`.

    Blocks are shared among the ranks round by round. A block of which anything is `stored` was kept before:
    it is not played again, and what is not stored of it had failed. After each round in which anything was
    played, every rank is called with `keep(its own kept episodes)`, also with none, in step with the others.
    What is kept does not depend on the number of ranks.

    Returns how many were kept, and how many attempts that took.
    """
    kept, last = 0, 0
    for first in range(0, -(-attempts // BLOCK), communicator.size):
        block = first + communicator.rank
        numbers = [number for number in range(block * BLOCK, (block + 1) * BLOCK) if number < attempts]
        good = {number for number in numbers if number in stored}
        played: dict[int, Episode] = {}
        if numbers and not good:
            played = {episode.index: episode for episode in play(block)}
            good = {number for number in numbers if not success_only or played[number].success.any()}
        rounds = communicator.gather((bool(played), good))
        chosen = sorted(set().union(*(numbers for _, numbers in rounds)))[: wanted - kept]
        kept += len(chosen)
        if any(anything for anything, _ in rounds):
            keep([played[number] for number in chosen if number in played])
        if kept == wanted:
            last = chosen[-1] + 1
            break
    else:
        last = attempts
    return kept, last
