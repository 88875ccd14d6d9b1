"""The replay memory: a few episodes per task, different from each other and hard for the student.

An episode becomes one feature vector; a determinantal point process with quality-weighted rows picks
episodes greedily until the budget of steps is used. A memory folder holds one shard per task,
``selection.json`` (which episodes, and why) and a manifest, and is read back by `open_trajectories`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hpc_cpd.run.publish import atomic_folder, is_done, load_done, mark_done, write_json
from hpc_cpd.settings import PluginSettings
from hpc_cpd.trajectories.schema import Episode, Origin
from hpc_cpd.trajectories.selection.dpp import greedy_map
from hpc_cpd.trajectories.shard import ShardWriter, write_manifest
from hpc_cpd.trajectories.store import TrajectoryStore, open_trajectories

SELECTION = "selection.json"


@dataclass(frozen=True, eq=False)
class TaskMemory:
    """What is kept of one task."""

    origin: Origin
    episodes: list[Episode]  # in the order of selection
    quality: list[float]  # of the kept episodes
    total_episodes: int
    total_steps: int
    budget_steps: int


def select_memory(
    store: TrajectoryStore,
    task_id: str,
    errors: ArrayLike,
    budget_fraction: float,
    selection: PluginSettings,
    seed: int,
) -> TaskMemory:
    """Choose which episodes of a task are kept: at most `budget_fraction` of its steps, but one episode at least.

    Without one, nothing would tell later stages of the task: a teacher that rarely succeeds may leave a few episodes.
    `errors`: the student's mean error on each episode of the task, float [n], in the order of
    `store.task_episodes(task_id)`. The choice is a pure function of the arguments.
    """
    episodes = [store.episode(number) for number in store.task_episodes(task_id)]
    lengths = np.array([len(episode) for episode in episodes], np.int64)
    budget = max(int(budget_fraction * lengths.sum()), int(lengths.min()))
    quality = episode_quality(errors)
    if len(quality) != len(episodes):
        raise ValueError(f"{len(quality)} errors were given for the {len(episodes)} episodes of {task_id}")
    key = int.from_bytes(hashlib.sha256(task_id.encode()).digest()[:4], "big")
    features = trajectory_features(episodes, *store.observation_statistics(task_id))
    rng = np.random.default_rng([seed, key])
    chosen = select_episodes(features, quality, lengths, budget, selection.name, rng)
    return TaskMemory(
        origin=store.origins[task_id],
        episodes=[episodes[number] for number in chosen],
        quality=[float(quality[number]) for number in chosen],
        total_episodes=len(episodes),
        total_steps=int(lengths.sum()),
        budget_steps=budget,
    )


def episode_quality(errors: ArrayLike) -> NDArray[np.float64]:
    """Qualities in [0.5, 2] from non-negative errors [n]: the square root of error over mean error.

    Bounded, so that priority orders similar episodes without outvoting diversity, and one episode that
    cannot be learnt does not decide everything.
    """
    values = np.asarray(errors, np.float64)
    if values.ndim != 1 or not np.isfinite(values).all() or (values < 0).any():
        raise ValueError("errors must be a vector of finite numbers, none negative")
    mean = values.mean() if len(values) else 0.0
    if mean == 0.0:
        return np.ones(len(values))
    return np.clip(np.sqrt(values / mean), 0.5, 2.0)


def trajectory_features(
    episodes: Sequence[Episode], mean: ArrayLike, std: ArrayLike, landmarks: int = 8, max_features: int = 512
) -> NDArray[np.float64]:
    """One row of length one per episode, float64 [N, D].

    An episode is described by `landmarks` evenly spaced observations (normalised by `mean` and `std` of
    observations), the final one (where the goal was reached), and the mean action between landmarks; more
    than `max_features` numbers are folded by a count sketch (arXiv 0902.2206), which keeps inner products
    in expectation. The rows are centred over the episodes and scaled to mean square norm one, and a
    constant is appended, so that an ordinary episode counts as ordinary rather than as noise.
    """
    centre = np.asarray(mean, np.float64)
    spread = np.asarray(std, np.float64)
    scale = np.where(spread > 1e-6, spread, 1.0)  # numbers that never change say nothing
    rows = [_describe(episode, centre, scale, landmarks, max_features) for episode in episodes]
    if not rows:
        return np.zeros((0, 1))
    raw = np.stack(rows)
    raw = raw - raw.mean(axis=0)
    norm = np.sqrt((raw * raw).sum(axis=1).mean())
    features = np.column_stack([raw / norm if norm > 0 else raw, np.ones(len(raw))])
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def select_episodes(
    features: ArrayLike,
    quality: ArrayLike,
    lengths: ArrayLike,
    budget_steps: int,
    method: str,
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """Rows kept under a budget of steps, in the order of selection: int64 [<= N].

    "dpp" takes the greedy MAP order of the rows `features` [N, D], scaled by `quality` [N] and by the
    inverse square root of `lengths` [N] (steps are what the budget counts), and when the rank of those is
    used up, starts another round on the rest; "uniform" takes a random order from `rng`. The order is
    followed until the next episode does not fit. Episodes that alone are longer than the budget do not
    take part: whatever fits is better than an empty memory.

    Measured on five Meta-World tasks (100 scripted episodes each, budgets of 6 to 12%): kernel regression
    on the kept steps predicts the teacher on all steps with 0.80 times the error of a uniform choice
    (geometric mean); without the length it was 1.16 times, as the oddest episodes are the longest.
    """
    sizes = np.asarray(lengths, np.int64)
    fitting = np.flatnonzero(sizes <= budget_steps)
    if method == "uniform":
        order = rng.permutation(fitting)
    elif method == "dpp":
        weights = np.asarray(quality, np.float64) / np.sqrt(sizes)
        rows = np.asarray(features, np.float64) * weights[:, None]
        order = _diverse_order(rows, sizes, fitting, budget_steps)
    else:
        raise ValueError(f"method must be 'dpp' or 'uniform', not {method!r}")
    chosen: list[int] = []
    used = 0
    for number in order:
        if used + sizes[number] > budget_steps:
            break
        chosen.append(int(number))
        used += int(sizes[number])
    return np.array(chosen, np.int64)


def write_memory(folder: str | Path, tasks: Sequence[TaskMemory], **facts: Any) -> None:
    """Write a memory folder, whole or not at all: a shard per task, `SELECTION`, manifest and done-mark.

    `facts` (plain JSON values, for example method and seed) are stored in the selection. A task of which
    nothing is kept has no shard; a memory without any step is opened by `open_memory` alone.
    """
    with atomic_folder(Path(folder)) as temporary:
        listed = []
        for part, task in enumerate(tasks):
            origin = task.origin
            writer = ShardWriter(
                temporary,
                0,
                part,
                origin.task_id,
                origin.teacher_sha256,
                origin.seed,
                origin.reward_version,
                origin.environment_version,
                origin.target,
            )
            for episode in task.episodes:
                writer.add(episode)
            writer.close()
            listed.append(_selection(task))
        summary = {"tasks": len(tasks), "steps": sum(memory["kept_steps"] for memory in listed)}
        write_json(temporary / SELECTION, {**facts, **summary, "memories": listed})
        write_manifest(temporary)
        mark_done(temporary, summary)


def open_memory(folders: Sequence[str | Path], in_memory_gigabytes: float | None = None) -> TrajectoryStore | None:
    """Read memory folders together; None when nothing is kept in any (a budget of 0, or below one episode).

    Raises UserError like `open_trajectories`.
    """
    if any(not is_done(Path(folder)) or load_done(Path(folder))["steps"] for folder in folders):
        return open_trajectories(folders, in_memory_gigabytes=in_memory_gigabytes)
    return None


def _selection(task: TaskMemory) -> dict[str, Any]:
    kept = [
        {"episode_index": episode.index, "goal_index": episode.goal_index, "length": len(episode), "quality": quality}
        for episode, quality in zip(task.episodes, task.quality, strict=True)
    ]
    return {
        "task_id": task.origin.task_id,
        "teacher_sha256": task.origin.teacher_sha256,
        "total_episodes": task.total_episodes,
        "total_steps": task.total_steps,
        "budget_steps": task.budget_steps,
        "kept_steps": sum(map(len, task.episodes)),
        "episodes": kept,
    }


def _diverse_order(
    rows: NDArray[np.float64], sizes: NDArray[np.int64], fitting: NDArray[np.int64], budget_steps: int
) -> NDArray[np.int64]:
    """The numbers in `fitting`; of `rows` nothing is left: a row of zeros is never picked, and no copy is needed."""
    rest = fitting
    rows[np.setdiff1d(np.arange(len(rows)), rest)] = 0.0
    order: list[NDArray[np.int64]] = []
    total = 0
    while len(rest) and total <= budget_steps:
        picks = greedy_map(rows, len(rest))
        if not len(picks):  # nothing but zeros: nothing tells them apart
            picks = rest
        order.append(picks)
        total += int(sizes[picks].sum())
        rows[picks] = 0.0
        rest = np.setdiff1d(rest, picks)
    return np.concatenate(order) if order else np.zeros(0, np.int64)


def _describe(
    episode: Episode, mean: NDArray[np.float64], scale: NDArray[np.float64], landmarks: int, max_features: int
) -> NDArray[np.float64]:
    steps = np.linspace(0, len(episode) - 1, landmarks).round().astype(np.int64)
    observations = (episode.observations[steps].astype(np.float64) - mean) / scale
    final = (episode.final_observation.astype(np.float64) - mean) / scale
    starts = np.arange(landmarks) * len(episode) // landmarks
    counts = np.maximum(np.diff(starts, append=len(episode)), 1)  # an episode may have fewer steps than landmarks
    actions = np.add.reduceat(episode.actions.astype(np.float64), starts, axis=0) / counts[:, None]
    numbers = np.concatenate([observations.ravel(), final.ravel(), actions.ravel()])
    if len(numbers) <= max_features:
        return numbers
    sketch = np.random.default_rng([len(numbers), max_features])  # the same folding for every episode
    bins = sketch.integers(max_features, size=len(numbers))
    signs = sketch.integers(2, size=len(numbers)) * 2 - 1
    folded = np.zeros(max_features)
    np.add.at(folded, bins, signs * numbers)
    return folded
