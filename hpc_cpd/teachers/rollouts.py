"""Episodes and environments that are pure functions of the seed, the task and their numbers.

A resumed run needs no generator's state, and ranks that share the work draw what one rank would have drawn. Recorded
episodes are played in blocks of BLOCK, episode i always in row i % BLOCK of a policy call of exactly BLOCK rows, so the
same bits come out whoever plays it.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any, NamedTuple

import numpy as np
from gymnasium.spaces import flatdim

from hpc_cpd.distributed.mpi import Communicator
from hpc_cpd.randomness import numpy_generator
from hpc_cpd.tasks.batch import UNBOUNDED_GOALS, BatchEnv
from hpc_cpd.tasks.policy import Policy
from hpc_cpd.tasks.registry import make_batch
from hpc_cpd.trajectories.schema import Episode

BLOCK = 8


def generator(seed: int, task_id: str, purpose: str, *indices: int) -> np.random.Generator:
    """A fresh generator for (`seed`, `task_id`, `purpose`, `indices`); the same arguments give the same numbers."""
    return numpy_generator(seed, f"{task_id}\n{purpose}", *indices)


class TrainingEnvironments:
    """`count` environments to learn a task in, whose goals depend on the seed and the number of the round.

    A seed has 50 goals; after so many `rounds` training moves on to those of another seed, so that it learns the task
    and not its goals. `purpose` keeps the goals apart from those of other work.
    """

    def __init__(self, task_id: str, seed: int, count: int, purpose: str = "goals", rounds: int = 20) -> None:
        self.task_id, self.seed, self.count, self.purpose, self.rounds = task_id, seed, count, purpose, rounds
        self._goal_set = -1
        self._envs: BatchEnv | None = None

    def of_round(self, number: int) -> BatchEnv:
        """The environments of round `number`. Reset them: what was played before must not matter."""
        goal_set = number // self.rounds
        if self._envs is None or goal_set != self._goal_set:
            self.close()
            goals = int(generator(self.seed, self.task_id, self.purpose, goal_set).integers(2**31))
            self._envs, self._goal_set = make_batch(self.task_id, self.count, goals), goal_set
        return self._envs

    def close(self) -> None:
        if self._envs is not None:
            self._envs.close()
            self._envs = None


class EpisodePlan(NamedTuple):
    """What decides a recorded episode, besides its number."""

    seed: int
    task_id: str
    purpose: str
    """Keeps the episodes of one kind of work apart from those of another."""
    action_noise: Sequence[float]
    """Standard deviations, one of them drawn per episode."""
    steps_after_success: int
    """An episode ends this many steps after its first success."""


def play_block(
    envs: BatchEnv, policy: Policy, plan: EpisodePlan, block: int, teacher: Policy | None = None
) -> list[Episode]:
    """Play the episodes of `block`, in order of their numbers, successful or not.

    `teacher`: whose actions are recorded as the target for what `policy` meets; None: those of `policy`.
    """
    horizon, goals = envs.task.horizon, envs.num_goals or UNBOUNDED_GOALS
    numbers = range(block * BLOCK, (block + 1) * BLOCK)
    noise = np.zeros((horizon, BLOCK, flatdim(envs.task.action_space)), np.float32)
    goal_index = np.zeros(BLOCK, np.int64)
    for row, number in enumerate(numbers):
        rng = generator(plan.seed, plan.task_id, plan.purpose, number)
        goal_index[row] = number % goals if envs.num_goals else rng.integers(goals)
        level = plan.action_noise[int(rng.integers(len(plan.action_noise)))]
        noise[:, row] = level * rng.standard_normal(noise[:, row].shape)

    observations, _ = envs.reset(options={"goal_index": goal_index})
    for one in (policy, teacher):
        if one is not None:
            one.reset(plan.task_id, BLOCK)
    active, lengths, succeeded_at = np.ones(BLOCK, np.bool_), np.zeros(BLOCK, np.int64), np.full(BLOCK, -1)
    steps: list[tuple[Any, ...]] = []
    while active.any():
        step = len(steps)
        mean = policy.act(observations)
        action = np.clip(mean + noise[step], -1.0, 1.0)
        target = mean if teacher is None else teacher.act(observations)
        following, reward, terminated, truncated, info = envs.step(action)
        floats = (np.asarray(values, np.float32) for values in (observations, action, target, reward))
        steps.append((*floats, info["success"]))
        observations = following
        lengths += active
        succeeded_at[active & info["success"] & (succeeded_at < 0)] = step
        finished = (succeeded_at >= 0) & (step - succeeded_at >= plan.steps_after_success)
        active &= ~(terminated | truncated | finished)
        envs.halt(~active)
    names = ("observations", "actions", "teacher_mean", "rewards", "success")
    columns: dict[str, Any] = dict(zip(names, map(np.array, zip(*steps, strict=True)), strict=True))
    return [
        Episode(
            **{name: column[: lengths[row], row].copy() for name, column in columns.items()},
            final_observation=observations[row].copy(),  # it stood still there since its own end
            goal_index=int(goal_index[row]),
            index=number,
        )
        for row, number in enumerate(numbers)
    ]


def keep_successes(
    wanted: int,
    limit: int,
    success_only: bool,
    play: Callable[[int], list[Episode]],
    keep: Callable[[list[Episode], int], None],
    stored: Container[int],
    communicator: Communicator,
) -> tuple[int, int]:
    """Keep the first `wanted` successful episodes (any episodes without `success_only`) of those below `limit`.

    Blocks are shared among the ranks round by round. A block of which anything is `stored` was kept before:
    it is not played again, and what is not stored of it had failed. After each round in which anything was
    played, every rank is called with `keep(its own kept episodes, how many all ranks have kept so far)`, also with
    none, in step with the others. What is kept does not depend on the number of ranks.

    Returns how many were kept, and how many episodes had to be played for them.
    """
    kept = 0
    for first in range(0, -(-limit // BLOCK), communicator.size):
        block = first + communicator.rank
        numbers = [number for number in range(block * BLOCK, (block + 1) * BLOCK) if number < limit]
        good = {number for number in numbers if number in stored}
        played: dict[int, Episode] = {}
        if numbers and not good:
            played = {episode.index: episode for episode in play(block)}
            good = {number for number in numbers if not success_only or played[number].success.any()}
        rounds = communicator.gather((bool(played), good))
        chosen = sorted(set().union(*(numbers for _, numbers in rounds)))[: wanted - kept]
        kept += len(chosen)
        if any(anything for anything, _ in rounds):
            keep([played[number] for number in chosen if number in played], kept)
        if kept == wanted:
            return kept, chosen[-1] + 1
    return kept, limit
