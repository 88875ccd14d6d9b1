"""Exchange with robomimic and LIBERO: one HDF5 file, a group per demonstration.

Layout (robomimic.github.io/docs/datasets/overview.html): ``data/demo_<i>/{actions,rewards,dones}``,
``obs/<key>`` and ``next_obs/<key>``; attributes ``data.total``, ``data.env_args`` (JSON) and
``demo.num_samples``. Exported demonstrations carry what robomimic does not know (teacher_mean, success,
goal_index, episode_index) beside it, so that an export imports to the same episodes.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from hpc_cpd.errors import UserError
from hpc_cpd.run.publish import atomic_folder, mark_done, sha256, write_bytes
from hpc_cpd.trajectories.schema import Episode, Origin
from hpc_cpd.trajectories.shard import MANIFEST, ShardWriter, read_manifest, write_manifest
from hpc_cpd.trajectories.store import open_trajectories

OBSERVATION_KEY = "state"
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
        data.attrs["env_args"] = json.dumps(
            {
                "env_name": origin.task_id,
                "type": ROBOMIMIC_GYM_TYPE,
                "env_kwargs": {},
                "env_version": origin.environment_version,
            }
        )
        for name in ("teacher_sha256", "seed", "reward_version", "environment_version"):
            data.attrs[name] = getattr(origin, name)
        for number in range(len(store.episodes)):
            _write_demo(data.create_group(f"demo_{number}"), store.episode(number))
    write_bytes(Path(out), buffer.getvalue())
    return len(store.episodes)


def import_robomimic(
    file: str | Path, task_id: str, folder: str | Path, observation_keys: list[str] | None = None
) -> int:
    """Make the task folder `folder` from a robomimic file, whole or not at all; returns how many episodes.

    An earlier task folder of `task_id` is replaced; any other folder that is not empty is refused.

    Observations are ``obs/<key>`` side by side, for `observation_keys` in the order given (None: all, by
    name). Where the file lacks them: the target is the executed action, rewards are 0, a step with
    ``dones`` counts as success (a demonstration ends when it succeeded), and the final observation is
    ``next_obs`` or else the last observation again.

    Raises UserError naming the file and the demonstration when something else is missing or wrong.
    """
    path = Path(file)
    if not path.is_file():
        raise UserError(f"there is no file {path}; give a robomimic HDF5 file")
    target = Path(folder)
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
                _read_demo(path, name, data[name], number, observation_keys) for number, name in enumerate(names)
            ]
            origin = _read_origin(data.attrs, task_id, source_hash)
    except PermissionError as error:
        raise UserError(f"{path} may not be read ({error.strerror}); ask its owner for permission") from None
    except (OSError, KeyError, RuntimeError) as error:
        raise UserError(f"{path} is damaged ({' '.join(str(error).split())}); fetch or export it again") from None
    if len({episode.index for episode in episodes}) != len(episodes):
        raise UserError(f"{path} cannot be imported: two demonstrations have the same attribute episode_index")
    if not episodes:
        raise UserError(f"{path} holds no demonstrations (groups data/demo_0, data/demo_1, ...)")
    with atomic_folder(target) as temporary:
        writer = ShardWriter(
            temporary,
            0,
            0,
            task_id,
            origin.teacher_sha256,
            origin.seed,
            origin.reward_version,
            origin.environment_version,
        )
        for episode in episodes:
            writer.add(episode)
        writer.close()
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
    demo.attrs["num_samples"] = len(episode)
    demo.attrs["goal_index"] = episode.goal_index
    demo.attrs["episode_index"] = episode.index
    for name, values in {
        "actions": episode.actions,
        "rewards": episode.rewards,
        "dones": dones,
        f"obs/{OBSERVATION_KEY}": episode.observations,
        f"next_obs/{OBSERVATION_KEY}": following,
        "teacher_mean": episode.teacher_mean,
        "success": episode.success,
    }.items():
        demo.create_dataset(name, data=values, track_times=False)


def _read_demo(path: Path, name: str, demo: h5py.Group, number: int, keys: list[str] | None) -> Episode:
    def refuse(what: str) -> UserError:
        return UserError(f"{path} cannot be imported: data/{name} {what}")

    def numbers(group: h5py.Group, key: str) -> NDArray[Any]:
        values = group[key]
        if not isinstance(values, h5py.Dataset) or values.ndim == 0 or values.dtype.kind not in "biuf":
            raise refuse(f"has a '{key}' that is not an array of numbers")
        return values[()]

    def side_by_side(group: h5py.Group) -> NDArray[Any]:
        values = [numbers(group, key) for key in wanted]
        if len(values) == 1:
            return values[0]
        return np.concatenate([np.asarray(value, np.float32).reshape(len(value), -1) for value in values], axis=1)

    if "actions" not in demo or not isinstance(demo.get("obs"), h5py.Group):
        raise refuse("has no 'actions' or no group 'obs'")
    wanted = sorted(demo["obs"]) if keys is None else keys
    missing = [key for key in wanted if key not in demo["obs"]]
    if missing or not wanted:
        raise refuse(f"has no observation {' or '.join(missing)}; it has {', '.join(sorted(demo['obs']))}")
    lengths = {key: len(numbers(demo["obs"], key)) for key in wanted}
    actions = numbers(demo, "actions").astype(np.float32)
    steps = len(actions)
    if steps == 0 or any(length != steps for length in lengths.values()):
        raise refuse(f"has {steps} actions but {lengths} observations")
    observations = side_by_side(demo["obs"])
    following = side_by_side(demo["next_obs"]) if "next_obs" in demo else observations
    dones = numbers(demo, "dones") if "dones" in demo else np.zeros(steps)
    return Episode(
        observations=observations,
        actions=actions,
        teacher_mean=numbers(demo, "teacher_mean") if "teacher_mean" in demo else actions,
        rewards=numbers(demo, "rewards") if "rewards" in demo else np.zeros(steps, np.float32),
        success=(numbers(demo, "success") if "success" in demo else dones).astype(np.bool_),
        final_observation=following[-1],
        goal_index=int(demo.attrs.get("goal_index", -1)),
        index=int(demo.attrs.get("episode_index", number)),
    )


def _read_origin(attributes: Any, task_id: str, source_hash: str) -> Origin:
    return Origin(
        task_id,
        str(attributes.get("teacher_sha256", source_hash)),
        int(attributes.get("seed", 0)),
        str(attributes.get("reward_version", "unknown")),
        str(attributes.get("environment_version", "unknown")),
    )
