"""The replay memory: a few episodes per task, different from each other and hard for the student.

A selection (`hpc_cpd.trajectories.selection`) orders a task's episodes, and they are kept in this order until the
budget of steps is used. A memory folder holds one shard per task, ``selection.json`` (which episodes, and why) and a
manifest, and is read back by `open_trajectories`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hpc_cpd import plugins
from hpc_cpd.randomness import numpy_generator
from hpc_cpd.run.publish import DONE, atomic_folder, is_done, mark_done, read_json, write_json
from hpc_cpd.settings import PluginSettings
from hpc_cpd.tasks.families.base import TaskSpec
from hpc_cpd.trajectories.schema import Episode, Origin
from hpc_cpd.trajectories.selection.base import Candidates, trajectory_features
from hpc_cpd.trajectories.shard import write_manifest, write_shard
from hpc_cpd.trajectories.store import TrajectoryStore, open_trajectories

SELECTION = "selection.json"
MOST_TRIED = 100
"""Made-up episodes among which a launch has a selection choose."""


class TaskMemory(NamedTuple):
    """What is kept of one task."""

    origin: Origin
    episodes: list[Episode]
    """in the order of selection"""
    record: dict[str, Any]
    """what `SELECTION` says of the task, plain JSON values"""


def select_memory(
    store: TrajectoryStore,
    task_id: str,
    errors: ArrayLike,
    budget_fraction: float,
    selection: PluginSettings,
    seed: int,
) -> TaskMemory:
    """Choose which episodes of a task are kept: at most `budget_fraction` of its steps, but one episode at least.

    `selection`: the settings of a plug-in of kind ``selections``, by which it is found.

    Without one, nothing would tell later stages of the task: a teacher that rarely succeeds may leave a few episodes.
    `errors`: the student's mean error on each episode of the task, float [n], in the order of
    `store.task_episodes(task_id)`. The choice is a pure function of the arguments.

    Raises UserError when a selection returns what is no order of the episodes, or nothing that fits.
    """
    episodes = [store.episode(number) for number in store.task_episodes(task_id)]
    lengths = np.array([len(episode) for episode in episodes], np.int64)
    budget = max(int(budget_fraction * lengths.sum()), int(lengths.min()))
    quality = episode_quality(errors)
    if len(quality) != len(episodes):
        raise ValueError(f"{len(quality)} errors were given for the {len(episodes)} episodes of {task_id}")
    rng = numpy_generator(seed, f"replay memory of {task_id}")

    def features() -> NDArray[np.float64]:
        return trajectory_features(episodes, *store.observation_statistics(task_id))

    candidates = Candidates(task_id, episodes, lengths, quality, budget, rng, features)
    chosen = candidates.choose(plugins.load("selections", selection.name)(selection))
    origin, kept = store.origins[task_id], [episodes[number] for number in chosen]
    record = {
        "task_id": task_id,
        "teacher_sha256": origin.teacher_sha256,
        "total_episodes": len(episodes),
        "total_steps": int(lengths.sum()),
        "budget_steps": budget,
        "kept_steps": int(lengths[chosen].sum()),
        "episodes": [
            {"episode_index": one.index, "goal_index": one.goal_index, "length": len(one), "quality": float(value)}
            for one, value in zip(kept, quality[chosen], strict=True)
        ],
    }
    return TaskMemory(origin, kept, record)


def try_selection(selection: PluginSettings, task: TaskSpec, episodes: int, budget_fraction: float) -> None:
    """Have a selection choose among made-up `episodes` of `task`, before a run has spent hours on real ones.

    A run keeps its selection from the first stage on, and it may be anybody's code. Raises UserError like
    `select_memory`, or one sentence for whatever else it raises.
    """
    draws = np.random.default_rng(0)

    def floats(steps: int, shape: Sequence[int] | None) -> NDArray[np.float32]:
        return draws.uniform(-1.0, 1.0, (steps, *(shape or ()))).astype(np.float32)

    made: list[Episode] = []
    for index in range(min(episodes, MOST_TRIED)):
        steps = 10 + index % 7
        seen, acted = floats(steps + 1, task.observation_space.shape), floats(steps, task.action_space.shape)
        success = np.arange(steps) == steps - 1
        made.append(Episode(seen[:-1], acted, acted, floats(steps, ()), success, seen[-1], index, index))
    origin = Origin(task.task_id, "", 0, task.reward_version, task.environment_version)
    store = TrajectoryStore({task.task_id: made}, {task.task_id: origin})
    errors, failing = draws.uniform(0.1, 1.0, len(made)), f"the selection '{selection.name}' fails in order()"
    page = "docs/extending/selections.md"
    plugins.ask(failing, page, select_memory, store, task.task_id, errors, budget_fraction, selection, 0)


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


def write_memory(folder: str | Path, tasks: Sequence[TaskMemory], **facts: Any) -> None:
    """Write a memory folder, whole or not at all: a shard per task, `SELECTION`, manifest and done-mark.

    `facts` (plain JSON values, for example method and seed) are stored in the selection. A task of which
    nothing is kept has no shard; a memory without any step is opened by `open_memory` alone.
    """
    with atomic_folder(Path(folder)) as temporary:
        for part, task in enumerate(tasks):
            write_shard(temporary, 0, part, task.origin, task.episodes)
        summary = {"tasks": len(tasks), "steps": sum(task.record["kept_steps"] for task in tasks)}
        write_json(temporary / SELECTION, {**facts, **summary, "memories": [task.record for task in tasks]})
        write_manifest(temporary)
        mark_done(temporary, summary)


def open_memory(folders: Sequence[str | Path], in_memory_gigabytes: float | None = None) -> TrajectoryStore | None:
    """Read memory folders together; None when nothing is kept in any (a budget of 0, or below one episode).

    Raises UserError like `open_trajectories`.
    """
    if any(not is_done(Path(folder)) or read_json(Path(folder) / DONE)["steps"] for folder in folders):
        return open_trajectories(folders, in_memory_gigabytes=in_memory_gigabytes)
    return None
