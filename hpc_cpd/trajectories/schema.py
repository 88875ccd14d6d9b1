"""Shard schema v1: recorded episodes of one task in one HDF5 file.

Each actor rank writes its own files, ``shard-RRRR-NNNNN.h5`` (rank, part), so no file has two writers. A
shard appears under its name only when it is complete; what a killed writer leaves behind is a hidden
temporary file that no reader looks at. Layout (T steps, E episodes)::

    observations        float32 (images: uint8) [T, ...]    what the policy saw
    actions             float32 [T, act]                    what was executed; discrete tasks: int64 [T]
    teacher_mean        float32 [T, act]                    the target; discrete tasks: teacher_logits [T, A]
    rewards             float32 [T]
    success             bool [T]
    episode_offsets     int64 [E + 1]                       episode e is the steps offsets[e]:offsets[e + 1]
    final_observations  like observations [E, ...]          what the last action led to
    episode_index       int64 [E]                           number of the attempt, unique within a task
    attributes          schema_version, task_id, teacher_sha256, seed, goal_index [E], reward_version,
                        environment_version

The bytes of a shard are a function of its contents: no time stamps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_cpd.errors import UserError
from hpc_cpd.run.publish import is_done

SCHEMA_VERSION = 1
TARGETS = ("teacher_mean", "teacher_logits")
STEPWISE = ("observations", "actions", "teacher_mean", "rewards", "success")
"""The fields of `Episode` with a row per step; the column of `teacher_mean` is called like the target."""
TEXTS = ("task_id", "teacher_sha256", "reward_version", "environment_version")
ATTRIBUTES = (*TEXTS[:2], "seed", "goal_index", *TEXTS[2:])
KINDS = {
    "observations": ("float32", "uint8"),
    "final_observations": ("float32", "uint8"),
    "actions": ("float32", "int64"),
    "teacher_mean": ("float32",),
    "teacher_logits": ("float32",),
    "rewards": ("float32",),
    "success": ("bool",),
    "episode_offsets": ("int64",),
    "episode_index": ("int64",),
}


@dataclass(frozen=True, eq=False)
class Episode:
    """One recorded episode of T steps.

    `teacher_mean` is the target: action means [T, act]; or, where the origin's target is "teacher_logits" (discrete
    actions), logits [T, A]. `goal_index` is -1 where a task has no goals; `index` is the number of the
    attempt that made it.
    """

    observations: NDArray[Any]  # float32 (images: uint8) [T, ...]
    actions: NDArray[Any]  # float32 [T, act]; discrete: int64 [T]
    teacher_mean: NDArray[np.float32]  # [T, act]; discrete: [T, A]
    rewards: NDArray[np.float32]  # [T]
    success: NDArray[np.bool_]  # [T]
    final_observation: NDArray[Any]  # [...]
    goal_index: int
    index: int

    def __len__(self) -> int:
        return len(self.observations)


@dataclass(frozen=True)
class Origin:
    """Who recorded a shard, and where. All shards of one task must agree."""

    task_id: str
    teacher_sha256: str
    seed: int
    reward_version: str
    environment_version: str
    target: str = "teacher_mean"
    """What `Episode.teacher_mean` holds: "teacher_mean", or "teacher_logits" of a discrete task."""


def difference(one: Episode, other: Episode) -> str | None:
    """The first field of which two episodes have other numbers per step, and which; None: there is none."""
    for name in ("observations", "actions", "teacher_mean"):
        here, there = getattr(one, name), getattr(other, name)
        if here.shape[1:] != there.shape[1:] or here.dtype != there.dtype:
            return f"{name} {here.dtype}{list(here.shape[1:])}, not {there.dtype}{list(there.shape[1:])}"
    return None


def shard_contents(episodes: Sequence[Episode], origin: Origin) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Attributes and columns of the shard of `episodes`."""
    columns = {
        origin.target if name == "teacher_mean" else name: np.concatenate([getattr(one, name) for one in episodes])
        for name in STEPWISE
    }
    columns["episode_offsets"] = np.cumsum([0, *map(len, episodes)], dtype=np.int64)
    columns["final_observations"] = np.stack([episode.final_observation for episode in episodes])
    columns["episode_index"] = np.array([episode.index for episode in episodes], np.int64)
    goals = np.array([episode.goal_index for episode in episodes], np.int64)
    facts = vars(origin) | {"seed": np.int64(origin.seed), "goal_index": goals}
    return {name: facts[name] for name in ATTRIBUTES}, columns


def shard_problem(attributes: dict[str, Any], columns: dict[str, NDArray[Any]], task_id: str | None) -> str | None:
    """What is wrong with the contents of a shard; None: nothing."""
    targets = [name for name in TARGETS if name in columns]
    missing = [name for name in ATTRIBUTES if name not in attributes]
    missing += [name for name in KINDS if name not in columns and name not in TARGETS]
    missing += [] if targets else ["teacher_mean"]
    if missing:
        return f"lacks {', '.join(missing)}"
    if not all(isinstance(attributes[name], str) for name in TEXTS) or not isinstance(attributes["seed"], np.integer):
        return f"has attributes of wrong types ({', '.join(TEXTS)}: text; seed: integer)"
    if task_id is not None and attributes["task_id"] != task_id:
        return f"was recorded on {attributes['task_id']}, not on {task_id}"
    steps = len(columns["observations"]) if columns["observations"].ndim else -1
    for name in (*(name for name in STEPWISE if name not in TARGETS), *targets):
        flat = name in ("rewards", "success")
        if columns[name].ndim == 0 or (flat and columns[name].ndim > 1) or len(columns[name]) != steps:
            return f"has '{name}' of shape {columns[name].shape}, but {steps} observations"
    offsets = columns["episode_offsets"]
    if offsets.ndim != 1 or len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != steps or (np.diff(offsets) < 1).any():
        return f"has episode_offsets that do not cut its {steps} steps into episodes"
    episodes = len(offsets) - 1
    for name in ("final_observations", "episode_index", "goal_index"):
        values = np.asarray(attributes[name] if name == "goal_index" else columns[name])
        shape = columns["observations"].shape[1:] if name == "final_observations" else ()
        if values.shape != (episodes, *shape) or (not shape and values.dtype != np.int64):
            return f"has {name} {values.dtype}{list(values.shape)}, but {episodes} episodes"
    if len(np.unique(columns["episode_index"])) != episodes:
        return "holds an episode_index twice"
    if problem := _target_problem(targets[0], columns["actions"], columns[targets[0]]):
        return f"has {problem}"
    for name, values in columns.items():
        if values.dtype == np.float32 and not np.isfinite(values).all():
            return f"holds NaN or infinity in '{name}'"
    return None


def _target_problem(target: str, actions: NDArray[Any], values: NDArray[Any]) -> str | None:
    """What is wrong with actions and a target of as many steps; None: nothing."""
    found = f"actions {actions.dtype}{list(actions.shape)} and {target} {list(values.shape)}"
    if target == "teacher_mean":
        if actions.ndim != 2 or actions.shape != values.shape or actions.dtype != np.float32:
            return f"{found} of different shapes"
    elif actions.ndim != 1 or values.ndim != 2 or actions.dtype != np.int64:
        return f"{found}, which must be int64[T] and [T, A]"
    elif len(actions) and not 0 <= actions.min() <= actions.max() < values.shape[1]:
        return f"an action that is none of the {values.shape[1]} that its teacher_logits know"
    return None


def broken(path: Path, what: str) -> UserError:
    """One sentence: the file, what is wrong with it, and the command that makes it again."""
    for parent in path.parents:
        run = parent.parent
        if parent.name not in ("trajectories", "stages") or not (run / "config.yaml").is_file():
            continue
        if parent.name == "stages":
            stage = path.relative_to(parent).parts[0]
            delete = parent / stage
        else:
            stage, delete = "teachers", path.parent if is_done(path.parent) else path
        first = f"delete {delete} and " if delete.exists() else ""
        return UserError(f"{path} {what}; {first}run python -m hpc_cpd.launch --stage {stage} --run {run}")
    again = f"delete {path.parent} and record or import it again" if path.parent.exists() else "record or import it"
    return UserError(f"{path} {what}; {again}")
