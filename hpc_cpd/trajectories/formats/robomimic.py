"""Exchange with robomimic and LIBERO: one HDF5 file, a group per demonstration.

Layout (robomimic.github.io/docs/datasets/overview.html): ``data/demo_<i>/{actions,rewards,dones}``,
``obs/<key>`` and ``next_obs/<key>``; attributes ``data.total``, ``data.env_args`` (JSON) and
``demo.num_samples``. Exported demonstrations carry what robomimic does not know (teacher_mean, success,
goal_index, episode_index) beside it, so that an export imports to the same episodes.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from gymnasium.spaces import Box
from numpy.typing import ArrayLike, NDArray

from hpc_cpd.errors import UserError
from hpc_cpd.run.publish import atomic_folder, mark_done, sha256, write_bytes
from hpc_cpd.tasks.families.base import TaskSpec
from hpc_cpd.tasks.registry import describe
from hpc_cpd.tasks.spaces import shown
from hpc_cpd.trajectories.schema import Episode, Origin
from hpc_cpd.trajectories.shard import MANIFEST, read_manifest, write_manifest, write_shard
from hpc_cpd.trajectories.store import open_trajectories

OBSERVATION_KEY = "state"
ROUNDING = 1e-5  # of float32 actions that were scaled
ActionRange = tuple[ArrayLike, ArrayLike] | None
ROBOMIMIC_GYM_TYPE = 2  # robomimic.envs.env_base.EnvType.GYM_TYPE


def export_robomimic(folder: str | Path, out: str | Path) -> int:
    """Write the trajectories of one task folder as a robomimic file, atomically; returns how many episodes.

    Raises UserError when the folder is not good, or holds more than one task or discrete actions.
    """
    store = open_trajectories(folder)
    if len(store.task_ids) != 1 or store.target != "teacher_mean":
        raise UserError(f"{folder} cannot be exported to robomimic: give the folder of one task of continuous actions")
    origin = store.origins[store.task_ids[0]]
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        data = file.create_group("data")
        data.attrs["total"] = len(store)
        environment = {"env_name": origin.task_id, "type": ROBOMIMIC_GYM_TYPE, "env_kwargs": {}}
        data.attrs["env_args"] = json.dumps(environment | {"env_version": origin.environment_version})
        for name in ("teacher_sha256", "seed", "reward_version", "environment_version"):
            data.attrs[name] = getattr(origin, name)
        for number in range(len(store.episodes)):
            _write_demo(data.create_group(f"demo_{number}"), store.episode(number))
    write_bytes(Path(out), buffer.getvalue())
    return len(store.episodes)


def import_trajectories(
    file: str | Path,
    task_id: str,
    out: str | Path,
    observation_keys: Sequence[str] | None = None,
    action_range: ActionRange = None,
) -> int:
    """Make the task folder `out` from a robomimic file, whole or not at all; returns how many episodes.

    An earlier task folder of `task_id` is replaced; any other folder that is not empty is refused.

    `observation_keys`: which ``obs/<key>`` make up the task's observation, in its order, for a file does not tell it;
    None is allowed where there is one key alone. Vectors are put side by side, an image stays what it is.
    `action_range`: the lowest and the highest action of the file (numbers, or [act] each), scaled to [-1, 1]; None: the
    actions lie in [-1, 1] already.

    Where the file lacks them: the target is the executed action, rewards are 0, a step with ``dones`` counts as success
    (a demonstration ends when it succeeded), and the final observation is ``next_obs`` or else the last observation
    again.

    Raises UserError naming the file and the demonstration when something else is missing, does not fit the spaces of
    the task, or leaves the range of actions by more than rounding.
    """
    path, target, spec = Path(file), Path(out), describe(task_id)
    if not path.is_file():
        raise UserError(f"there is no file {path}; give a robomimic HDF5 file")
    if not isinstance(spec.action_space, Box) or not isinstance(spec.observation_space, Box):
        raise UserError(
            f"{path} cannot be imported: {task_id} has observations {shown(spec.observation_space)} and actions "
            f"{shown(spec.action_space)}, but demonstrations are imported for Boxes alone"
        )
    if target.is_dir() and any(target.iterdir()) and _task_of(target) != task_id:
        raise UserError(
            f"{target} is not empty and no trajectories of {task_id}; give a folder of the task's own, such as "
            f"{target / task_id}"
        )
    source_hash = sha256(path)
    try:
        with h5py.File(path, "r", locking=False) as source:
            if not isinstance(source.get("data"), h5py.Group):
                raise UserError(f"{path} is not a robomimic file: it has no group 'data'")
            data = source["data"]
            names = sorted((name for name in data if name.startswith("demo_")), key=lambda name: (len(name), name))
            episodes = [
                _Demonstration(path, name, data[name], spec).read(number, observation_keys, action_range)
                for number, name in enumerate(names)
            ]
            facts = {"teacher_sha256": source_hash, "reward_version": "unknown", "environment_version": "unknown"}
            told = {name: str(data.attrs[name]) for name in facts if name in data.attrs}
            origin = Origin(task_id, seed=int(data.attrs.get("seed", 0)), **(facts | told))
    except PermissionError as error:
        raise UserError(f"{path} may not be read ({error.strerror}); ask its owner for permission") from None
    except (OSError, KeyError, RuntimeError) as error:
        raise UserError(f"{path} is damaged ({' '.join(str(error).split())}); fetch or export it again") from None
    if len({episode.index for episode in episodes}) != len(episodes):
        raise UserError(f"{path} cannot be imported: two demonstrations have the same attribute episode_index")
    if not episodes:
        raise UserError(f"{path} holds no demonstrations (groups data/demo_0, data/demo_1, ...)")
    with atomic_folder(target) as temporary:
        write_shard(temporary, 0, 0, origin, episodes)
        manifest = write_manifest(temporary, imported_from=path.name, imported_sha256=source_hash)
        mark_done(temporary, {"episodes": manifest["episodes"], "steps": manifest["steps"]})
    return len(episodes)


def _task_of(folder: Path) -> str | None:
    """The task whose trajectories `folder` holds; None: it is something else."""
    tasks = {shard["task_id"] for shard in read_manifest(folder)["shards"]} if (folder / MANIFEST).is_file() else set()
    return tasks.pop() if len(tasks) == 1 else None


def _write_demo(demo: h5py.Group, episode: Episode) -> None:
    dones = np.zeros(len(episode), np.int64)
    dones[-1] = 1
    following = np.concatenate([episode.observations[1:], episode.final_observation[None]])
    demo.attrs.update(num_samples=len(episode), goal_index=episode.goal_index, episode_index=episode.index)
    columns = {name: getattr(episode, name) for name in ("actions", "rewards", "teacher_mean", "success")}
    columns |= {f"obs/{OBSERVATION_KEY}": episode.observations, f"next_obs/{OBSERVATION_KEY}": following}
    for name, values in (columns | {"dones": dones}).items():
        demo.create_dataset(name, data=values, track_times=False)


class _Demonstration:
    """One group of a file, read for a task."""

    def __init__(self, path: Path, name: str, demo: h5py.Group, spec: TaskSpec) -> None:
        self._where = f"{path} cannot be imported: data/{name}"
        self._demo = demo
        self._spec = spec

    def read(self, number: int, keys: Sequence[str] | None, action_range: ActionRange) -> Episode:
        demo = self._demo
        if "actions" not in demo or not isinstance(demo.get("obs"), h5py.Group):
            raise self._refuse("has no 'actions' or no group 'obs'")
        keys = self._keys(keys)
        actions = self._actions(action_range)
        observations = self._observations(demo["obs"], keys)
        if len(actions) == 0 or len(actions) != len(observations):
            raise self._refuse(f"has {len(actions)} actions but {len(observations)} observations")
        following = self._observations(demo["next_obs"], keys) if "next_obs" in demo else observations
        dones = self._optional("dones", np.zeros(len(actions)))
        return Episode(
            observations=observations,
            actions=actions,
            teacher_mean=self._optional("teacher_mean", actions),
            rewards=self._optional("rewards", np.zeros(len(actions), np.float32)),
            success=self._optional("success", dones).astype(np.bool_),
            final_observation=following[-1],
            goal_index=int(demo.attrs.get("goal_index", -1)),
            index=int(demo.attrs.get("episode_index", number)),
        )

    def _keys(self, keys: Sequence[str] | None) -> Sequence[str]:
        present = {key: list(getattr(values, "shape", ())[1:]) for key, values in self._demo["obs"].items()}
        listed = ", ".join(f"{key} {shape}" for key, shape in present.items())
        if keys is None and len(present) > 1:
            raise self._refuse(
                f"has several observations ({listed}), and no order is told; name those of {self._spec.task_id} in its "
                f"order (together {shown(self._spec.observation_space)}), as in --observation-keys {','.join(present)}"
            )
        keys = list(present) if keys is None else keys
        missing = [key for key in keys if key not in present]
        if missing or not keys:
            raise self._refuse(f"has no observation {' or '.join(missing)}; it has {listed or 'none'}")
        return keys

    def _observations(self, group: h5py.Group, keys: Sequence[str]) -> NDArray[Any]:
        """[T, *observation shape]; uint8 where the task's are."""
        arrays = [self._numbers(group, key) for key in keys]
        parts = [array[:, None] if array.ndim == 1 else array for array in arrays]
        if len({len(part) for part in parts}) > 1:
            raise self._refuse(f"has observations of different lengths: {', '.join(keys)}")
        space, named = self._spec.observation_space, f"observations {', '.join(keys)}"
        if len(parts) > 1 and any(part.ndim > 2 for part in parts):
            raise self._refuse(f"has {named}, of which some are images; images are not flattened, name one alone")
        values = np.concatenate(parts, axis=1)
        if values.shape[1:] != space.shape or (space.dtype == np.uint8 and values.dtype != np.uint8):
            raise self._refuse(
                f"has {named} of together {values.dtype}{list(values.shape[1:])}, but {self._spec.task_id} observes "
                f"{shown(space)}"
            )
        return values.astype(space.dtype)

    def _actions(self, action_range: ActionRange) -> NDArray[np.float32]:
        """[T, act] in [-1, 1]."""
        values = told = self._numbers(self._demo, "actions")
        low, high = (-1.0, 1.0) if action_range is None else action_range
        if values.shape[1:] != self._spec.action_space.shape:
            raise self._refuse(
                f"has actions of shape {list(values.shape[1:])}, but those of {self._spec.task_id} are "
                f"{shown(self._spec.action_space)}"
            )
        if action_range is not None:
            least, most = np.asarray(low, np.float64), np.asarray(high, np.float64)
            values = 2.0 * (values.astype(np.float64) - least) / (most - least) - 1.0
        if np.abs(values).max(initial=0.0) > 1.0 + ROUNDING:
            raise self._refuse(
                f"has actions from {told.min():g} to {told.max():g}, outside [{low}, {high}]; name the range that "
                "stands for [-1, 1], as in --action-range LOW HIGH"
            )
        return np.clip(values, -1.0, 1.0).astype(np.float32)

    def _optional(self, key: str, otherwise: NDArray[Any]) -> NDArray[Any]:
        return self._numbers(self._demo, key) if key in self._demo else otherwise

    def _numbers(self, group: h5py.Group, key: str) -> NDArray[Any]:
        values = group[key]
        if not isinstance(values, h5py.Dataset) or values.ndim == 0 or values.dtype.kind not in "biuf":
            raise self._refuse(f"has a '{key}' that is not an array of numbers")
        return values[()]

    def _refuse(self, what: str) -> UserError:
        return UserError(f"{self._where} {what}")
