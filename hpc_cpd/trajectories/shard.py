"""Writing, reading and listing shards (the layout is in `schema`)."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from hpc_cpd.errors import UserError
from hpc_cpd.run.publish import read_json, sha256, write_bytes, write_json
from hpc_cpd.trajectories import schema
from hpc_cpd.trajectories.schema import KINDS, SCHEMA_VERSION, STEPWISE, TARGETS, Episode, Origin, broken

MANIFEST = "manifest.json"
SHARD_NAME = re.compile(r"shard-(\d{4})-(\d{5})\.h5")


def write_shard(folder: str | Path, rank: int, part: int, origin: Origin, episodes: Iterable[Episode]) -> Path | None:
    """Write `episodes` as one shard (temporary name, fsync, rename) and return its path; None if there are none.

    Left-overs of a killed writer of the same rank and part are removed. Raises FileExistsError when that part is there
    already (take `next_part`), and UserError when shapes of the episodes disagree or one holds NaN or infinity.
    """
    if origin.target not in TARGETS:
        raise ValueError(f"target must be one of {TARGETS}, not {origin.target!r}")
    path = Path(folder) / f"shard-{rank:04d}-{part:05d}.h5"
    if not SHARD_NAME.fullmatch(path.name):
        raise ValueError(f"rank {rank} or part {part} does not fit into the name of a shard")
    if path.exists():
        raise FileExistsError(f"{path} is already closed")
    for orphan in path.parent.glob(f".{path.name}.*.tmp"):
        orphan.unlink(missing_ok=True)
    held: dict[int, Episode] = {}
    for episode in episodes:
        now = _canonical(episode, origin.target)
        problem = schema.shard_problem(*schema.shard_contents([now], origin), None) if len(now) else "has no steps"
        if problem is None and held and (other := schema.difference(now, next(iter(held.values())))):
            problem = f"has {other} as those before"
        if problem:
            raise UserError(
                f"episode {episode.index} of {origin.task_id} cannot be recorded: it {problem}; "
                "check the teacher and the environment that made it"
            )
        if now.index in held:
            raise ValueError(f"episode {now.index} is there twice for {path}")
        held[now.index] = now
    if not held:
        return None
    write_bytes(path, encode_shard([*held.values()], origin))
    return path


def encode_shard(episodes: Sequence[Episode], origin: Origin) -> bytes:
    """The bytes of a shard. Built in memory: HDF5 must not meet a full disk half way through a file."""
    buffer = io.BytesIO()
    # v110: the older format limits an attribute (goal_index) to 64 KiB
    with h5py.File(buffer, "w", libver=("v110", "v110")) as file:
        attributes, columns = schema.shard_contents(episodes, origin)
        for name, values in columns.items():
            file.create_dataset(name, data=values, track_times=False)
        file.attrs.update(schema_version=SCHEMA_VERSION, **attributes)
    return buffer.getvalue()


def load_shard(path: str | Path, task_id: str | None = None, mapped: bool = False) -> tuple[Origin, list[Episode]]:
    """Origin and episodes (in file order) of a shard, every check made.

    `mapped`: what has a row per step stays in the file, which must not be written to (a closed shard never is).

    Raises UserError naming the shard when it is missing, truncated, of another schema version or task (`task_id`; None:
    any), or when shapes, offsets or numbers in it are wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise broken(path, "is missing")
    try:
        # locking: many shared file systems refuse it, and a closed shard is never written to again
        with h5py.File(path, "r", locking=False) as file:
            attributes = dict(file.attrs)
            version = attributes.get("schema_version", "none")
            if not np.array_equal(version, SCHEMA_VERSION):
                raise broken(path, f"has schema version {version}, but this version reads {SCHEMA_VERSION}")
            columns = {name: _read_column(path, file, name, mapped) for name in KINDS if name in file}
    except PermissionError as error:
        raise UserError(f"{path} may not be read ({error.strerror}); ask its owner for permission") from None
    except (OSError, KeyError, RuntimeError) as error:
        raise broken(path, f"is truncated or damaged ({' '.join(str(error).split())})") from None
    if problem := schema.shard_problem(attributes, columns, task_id):
        raise broken(path, problem)
    target = next(name for name in TARGETS if name in columns)
    facts: dict[str, Any] = {name: attributes[name] for name in schema.TEXTS}
    by_step: dict[str, Any] = {name: columns[target if name == "teacher_mean" else name] for name in STEPWISE}
    episodes = [
        Episode(
            **{name: values[start:stop] for name, values in by_step.items()},
            final_observation=columns["final_observations"][number],
            goal_index=int(attributes["goal_index"][number]),
            index=int(columns["episode_index"][number]),
        )
        for number, (start, stop) in enumerate(itertools.pairwise(columns["episode_offsets"]))
    ]
    return Origin(**facts, seed=int(attributes["seed"]), target=target), episodes


def closed_shards(folder: str | Path) -> list[Path]:
    """The complete shards of a folder by name; hidden temporary files are not among them."""
    paths = Path(folder).iterdir() if Path(folder).is_dir() else ()
    return sorted(path for path in paths if SHARD_NAME.fullmatch(path.name))


def next_part(folder: str | Path, rank: int) -> int:
    """The first part that `rank` has not closed yet."""
    names = (SHARD_NAME.fullmatch(path.name) for path in closed_shards(folder))
    return 1 + max((int(name[2]) for name in names if name and int(name[1]) == rank), default=-1)


def write_manifest(folder: str | Path, **facts: Any) -> dict[str, Any]:
    """List every closed shard in ``manifest.json`` (atomic) and remove what killed writers left behind.

    `facts` (plain JSON values) are stored beside it. Call it when all writers have closed.
    Returns what was written. Raises UserError when a shard is broken or an episode is there twice.
    """
    folder = Path(folder)
    for orphan in folder.glob(".shard-*.tmp"):
        orphan.unlink(missing_ok=True)
    shards: list[dict[str, Any]] = []
    seen: dict[tuple[str, int], Path] = {}
    for path in closed_shards(folder):
        origin, episodes = load_shard(path)
        refuse_repeats(path, origin, episodes, seen)
        shards.append(
            {
                "file": path.name,
                "task_id": origin.task_id,
                "sha256": sha256(path),
                "episodes": len(episodes),
                "steps": sum(map(len, episodes)),
                "success": sum(bool(episode.success.any()) for episode in episodes),
            }
        )
    totals = {key: sum(entry[key] for entry in shards) for key in ("episodes", "steps", "success")}
    tasks = list(dict.fromkeys(entry["task_id"] for entry in shards))
    manifest = {**facts, "schema_version": SCHEMA_VERSION, "tasks": tasks, **totals, "shards": shards}
    write_json(folder / MANIFEST, manifest)
    return manifest


def refuse_repeats(path: Path, origin: Origin, episodes: list[Episode], seen: dict[tuple[str, int], Path]) -> None:
    """Raises UserError for an episode of the shard `path` that is in `seen` already; adds the others to it."""
    for episode in episodes:
        first = seen.setdefault((origin.task_id, episode.index), path)
        if first != path:
            raise broken(path, f"holds episode {episode.index} of {origin.task_id}, as {first.name} does")


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """What `write_manifest` wrote. Raises UserError when it is missing, damaged or of another version."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise broken(path, "is missing")
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("schema_version") != SCHEMA_VERSION:
        raise broken(path, f"is not a manifest of schema version {SCHEMA_VERSION}")
    shards = manifest.get("shards")
    keys = {"file", "task_id", "sha256", "episodes", "steps", "success"}
    whole = isinstance(shards, list) and all(
        isinstance(entry, dict) and keys <= entry.keys() and SHARD_NAME.fullmatch(str(entry["file"]))
        for entry in shards
    )
    if not whole:
        raise broken(path, "does not list its shards")
    return manifest


def check_listed(
    folder: Path, entry: dict[str, Any], task_id: str | None = None, mapped: bool = False
) -> tuple[Origin, list[Episode]]:
    """Read one shard of a manifest and hold it against its `entry`. Raises UserError naming the shard."""
    path = folder / entry["file"]
    if not path.is_file():
        raise broken(path, f"is missing, but {MANIFEST} lists it")
    # first the bytes, so that HDF5 never has to make sense of a damaged file
    if sha256(path) != entry["sha256"]:
        raise broken(path, f"does not have the sha256 that {MANIFEST} recorded: it was changed or damaged")
    origin, episodes = load_shard(path, task_id, mapped)
    if (len(episodes), sum(map(len, episodes))) != (entry["episodes"], entry["steps"]):
        raise broken(path, f"holds other numbers of episodes and steps than {MANIFEST} says")
    return origin, episodes


def _canonical(episode: Episode, target: str) -> Episode:
    """The episode in the types of a shard."""
    discrete = target == "teacher_logits" and np.asarray(episode.actions).dtype.kind in "iu"
    types = {"actions": np.int64 if discrete else np.float32, "success": np.bool_}

    def converted(name: str) -> NDArray[Any]:
        values = np.asarray(getattr(episode, name))
        image = values.dtype == np.uint8 and name in ("observations", "final_observation")
        return np.asarray(values, np.uint8 if image else types.get(name, np.float32))

    arrays: dict[str, Any] = {name: converted(name) for name in (*STEPWISE, "final_observation")}
    return Episode(**arrays, goal_index=int(episode.goal_index), index=int(episode.index))


def _read_column(path: Path, file: h5py.File, name: str, mapped: bool) -> NDArray[Any]:
    dataset = file[name]
    if not isinstance(dataset, h5py.Dataset) or str(dataset.dtype) not in KINDS[name]:
        raise broken(path, f"has a '{name}' that is not {' or '.join(KINDS[name])}")
    offset = dataset.id.get_offset()  # None where another tool has packed the column into chunks
    if mapped and offset is not None and name in (*STEPWISE, *TARGETS):
        # a view of the map: np.memmap itself takes long to slice
        return np.asarray(np.memmap(path, dataset.dtype, "r", offset, dataset.shape))
    return dataset[()]
