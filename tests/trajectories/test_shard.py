"""Shards: what is written is what is read, a kill leaves nothing half, and damage is named."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpc_cpd.errors import UserError
from hpc_cpd.run.publish import mark_done, read_json, sha256
from hpc_cpd.trajectories import shard
from hpc_cpd.trajectories.schema import SCHEMA_VERSION, Origin
from hpc_cpd.trajectories.shard import (
    closed_shards,
    load_shard,
    next_part,
    write_manifest,
)
from tests.trajectories.recorded import TASK, assert_same_episode, make_discrete, make_episode, write_shard


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), sizes=st.tuples(st.integers(1, 5), st.integers(1, 4))
)
def test_what_is_written_is_read_back_to_the_bit(tmp_path, lengths, sizes):
    shutil.rmtree(tmp_path / "t", ignore_errors=True)
    episodes = [make_episode(number, steps, *sizes) for number, steps in enumerate(lengths)]
    path = write_shard(tmp_path / "t", episodes)
    for written, read in zip(episodes, load_shard(path, TASK)[1], strict=True):
        assert_same_episode(written, read)


def test_the_layout_is_schema_version_1(tmp_path):
    path = write_shard(tmp_path, [make_episode(4, 5), make_episode(7, 3)], rank=2, part=31)
    assert path.name == "shard-0002-00031.h5"
    with h5py.File(path) as file:
        assert {name: (str(file[name].dtype), file[name].shape) for name in file} == {
            "observations": ("float32", (8, 3)),
            "actions": ("float32", (8, 2)),
            "teacher_mean": ("float32", (8, 2)),
            "rewards": ("float32", (8,)),
            "success": ("bool", (8,)),
            "episode_offsets": ("int64", (3,)),
            "final_observations": ("float32", (2, 3)),
            "episode_index": ("int64", (2,)),
        }
        assert file["episode_offsets"][:].tolist() == [0, 5, 8]
        assert file["episode_index"][:].tolist() == [4, 7]
        attributes = dict(file.attrs)
    assert attributes.pop("goal_index").tolist() == [4, 7]
    assert attributes == {
        "schema_version": 1,
        "task_id": TASK,
        "teacher_sha256": "cafe",
        "seed": 3,
        "reward_version": "v2",
        "environment_version": "3.1.1",
    }


def test_pictures_and_discrete_actions_keep_their_types(tmp_path):
    episodes = [make_discrete(0), make_discrete(1, 3)]
    origin, read = load_shard(write_shard(tmp_path, episodes, target="teacher_logits"))
    assert origin.target == "teacher_logits"
    for episode, back in zip(episodes, read, strict=True):
        assert (back.observations.dtype, back.actions.dtype) == (np.uint8, np.int64)
        assert_same_episode(episode, back)


@pytest.mark.parametrize(
    "actions", [np.full(5, 3), np.full(5, -1), np.full(5, 0.5), np.zeros((5, 1), np.int64)], ids=str
)
def test_discrete_actions_that_are_none_are_refused(tmp_path, actions):
    with pytest.raises(UserError, match="action"):
        write_shard(tmp_path, [dataclasses.replace(make_discrete(0), actions=actions)], target="teacher_logits")


def test_bytes_depend_on_contents_alone(tmp_path):
    paths = [write_shard(tmp_path / name, [make_episode(0), make_episode(1)]) for name in "ab"]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_a_shard_may_hold_more_episodes_than_an_old_hdf5_attribute(tmp_path):
    episode = make_episode(0, 1, 1, 1)
    path = write_shard(tmp_path, [dataclasses.replace(episode, goal_index=n, index=n) for n in range(9000)])
    assert [e.goal_index for e in load_shard(path)[1]] == list(range(9000))


ARRAYS = ("observations", "actions", "teacher_mean", "rewards", "success", "final_observation")


def test_float64_is_stored_as_float32(tmp_path):
    wide = {name: getattr(make_episode(0), name).astype(np.float64) for name in ARRAYS}
    path = write_shard(tmp_path, [dataclasses.replace(make_episode(0), **wide)])
    assert_same_episode(load_shard(path)[1][0], make_episode(0))


def test_a_shard_without_episodes_leaves_no_file(tmp_path):
    assert shard.write_shard(tmp_path, 0, 0, Origin(TASK, "", 0, "", ""), []) is None
    assert list(tmp_path.iterdir()) == []


def test_a_closed_part_is_never_overwritten(tmp_path):
    path = write_shard(tmp_path, [make_episode(0)], rank=1)
    before = path.read_bytes()
    with pytest.raises(FileExistsError):
        write_shard(tmp_path, [make_episode(0)], rank=1)
    assert path.read_bytes() == before
    assert (next_part(tmp_path, 1), next_part(tmp_path, 0)) == (1, 0)


def test_a_killed_writer_leaves_only_a_hidden_file_that_the_next_writer_removes(tmp_path):
    script = (
        "import os, signal, sys; from pathlib import Path; sys.path.insert(0, sys.argv[2])\n"
        "from tests.trajectories.recorded import make_episode, write_shard\n"
        "os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)\n"  # die between write and rename
        "write_shard(Path(sys.argv[1]), [make_episode(0)])\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path), str(Path(__file__).parent)], check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".")
    assert closed_shards(tmp_path) == []
    assert next_part(tmp_path, 0) == 0
    write_shard(tmp_path, [make_episode(0)])
    assert os.listdir(tmp_path) == ["shard-0000-00000.h5"]


def test_the_manifest_removes_what_killed_writers_of_other_ranks_left(tmp_path):
    write_shard(tmp_path, [make_episode(0)])
    (tmp_path / ".shard-0007-00000.h5.beef.tmp").write_bytes(b"half")
    write_manifest(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["manifest.json", "shard-0000-00000.h5"]


def test_the_manifest_counts_and_hashes_every_shard(tmp_path):
    failed = dataclasses.replace(make_episode(2, 4), success=np.zeros(4, bool))
    first = write_shard(tmp_path, [make_episode(0, 5)], rank=1)
    second = write_shard(tmp_path, [make_episode(1, 6), failed], rank=0)
    write_manifest(tmp_path, attempts=9)
    assert read_json(tmp_path / "manifest.json") == {
        "attempts": 9,
        "schema_version": SCHEMA_VERSION,
        "tasks": [TASK],
        "episodes": 3,
        "steps": 15,
        "success": 2,
        "shards": [
            {"file": second.name, "task_id": TASK, "sha256": sha256(second), "episodes": 2, "steps": 10, "success": 1},
            {"file": first.name, "task_id": TASK, "sha256": sha256(first), "episodes": 1, "steps": 5, "success": 1},
        ],
    }


def test_an_episode_recorded_by_two_ranks_is_refused(tmp_path):
    write_shard(tmp_path, [make_episode(5)], rank=0)
    write_shard(tmp_path, [make_episode(5)], rank=1)
    with pytest.raises(UserError, match=r"shard-0001-00000\.h5 holds episode 5"):
        write_manifest(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("observations", np.full((5, 3), np.nan, np.float32), "NaN"),
        ("teacher_mean", np.full((5, 2), np.inf, np.float32), "NaN or infinity"),
        ("actions", np.zeros((4, 2), np.float32), r"'actions' of shape \(4, 2\), but 5 observations"),
        ("teacher_mean", np.zeros((5, 3), np.float32), "teacher_mean"),
        ("final_observation", np.zeros(2, np.float32), "final_observation"),
        ("observations", np.zeros((5, 9), np.float32), "final_observation"),
    ],
)
def test_a_broken_episode_is_refused_before_it_is_written(tmp_path, name, value, named):
    with pytest.raises(UserError, match=named):
        write_shard(tmp_path, [dataclasses.replace(make_episode(0), **{name: value})])
    assert list(tmp_path.iterdir()) == []


def test_episodes_of_different_sizes_do_not_mix(tmp_path):
    with pytest.raises(UserError, match="observations"):
        write_shard(tmp_path, [make_episode(0), make_episode(1, observation_size=4)])


def _edit(path: Path, change) -> None:
    with h5py.File(path, "r+") as file:
        change(file)


def _replace(name: str, values: np.ndarray):
    def change(file: h5py.File) -> None:
        del file[name]
        file[name] = values

    return change


DAMAGE = {
    "another schema version": (lambda f: f.attrs.modify("schema_version", 2), "schema version 2"),
    "no schema version": (lambda f: f.attrs.__delitem__("schema_version"), "schema version none"),
    "a missing dataset": (lambda f: f.__delitem__("rewards"), "lacks rewards"),
    "a missing target": (lambda f: f.__delitem__("teacher_mean"), "lacks teacher_mean"),
    "a missing attribute": (lambda f: f.attrs.__delitem__("reward_version"), "lacks reward_version"),
    "a seed that is text": (lambda f: f.attrs.__setitem__("seed", "three"), "wrong types"),
    "another type": (_replace("actions", np.zeros((8, 2))), "'actions' that is not float32"),
    "a group for a dataset": (lambda f: (f.__delitem__("success"), f.create_group("success")), "'success'"),
    "short rewards": (_replace("rewards", np.zeros(7, np.float32)), "'rewards'"),
    "targets of another width": (_replace("teacher_mean", np.zeros((8, 3), np.float32)), "different shapes"),
    "offsets past the end": (_replace("episode_offsets", np.array([0, 5, 9])), "episode_offsets"),
    "offsets that go back": (_replace("episode_offsets", np.array([0, 9, 8])), "episode_offsets"),
    "an empty episode": (_replace("episode_offsets", np.array([0, 8, 8])), "episode_offsets"),
    "offsets that skip the start": (_replace("episode_offsets", np.array([1, 5, 8])), "episode_offsets"),
    "an episode too few": (_replace("episode_offsets", np.array([0, 8])), "1 episodes"),
    "an index twice": (_replace("episode_index", np.array([4, 4])), "episode_index twice"),
    "NaN": (_replace("teacher_mean", np.full((8, 2), np.nan, np.float32)), "NaN or infinity in 'teacher_mean'"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_wrong_shard_is_named_with_what_is_wrong(tmp_path, damage):
    change, sentence = DAMAGE[damage]
    path = write_shard(tmp_path, [make_episode(4, 5), make_episode(7, 3)])
    load_shard(path, TASK)[1]
    _edit(path, change)
    with pytest.raises(UserError) as error:
        load_shard(path, TASK)[1]
    assert str(path) in str(error.value)
    assert sentence in str(error.value)


def test_a_shard_of_another_task_is_refused(tmp_path):
    path = write_shard(tmp_path, [make_episode(0)], task_id="metaworld/push-v3")
    with pytest.raises(UserError, match="was recorded on metaworld/push-v3, not on metaworld/reach-v3"):
        load_shard(path, TASK)[1]


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_shard_is_refused(tmp_path, kept):
    path = write_shard(tmp_path, [make_episode(0, 400)])
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(UserError, match=r"shard-0000-00000\.h5 is truncated or damaged"):
        load_shard(path, TASK)[1]


def test_the_sentence_holds_the_command_that_makes_the_shard_again(tmp_path):
    run = tmp_path / "runs" / "x"
    (run / "trajectories").mkdir(parents=True)
    (run / "config.yaml").write_text("schema_version: 1\n")
    task = run / "trajectories" / TASK
    path = write_shard(task, [make_episode(0)])
    path.write_bytes(b"")
    command = f"run python -m hpc_cpd.launch --stage teachers --run {run}"
    with pytest.raises(UserError) as error:  # not published: the collection goes on after the other shards
        load_shard(path)[1]
    assert str(error.value).endswith(f"delete {path} and {command}")
    mark_done(task, {})
    with pytest.raises(UserError) as error:  # published: nothing is made again while DONE stands
        load_shard(path)[1]
    assert str(error.value).endswith(f"delete {task} and {command}")
    memory = write_shard(run / "stages" / "2" / "memory", [make_episode(0)])
    memory.write_bytes(b"")
    with pytest.raises(UserError) as error:
        load_shard(memory)[1]
    assert str(error.value).endswith(
        f"delete {run / 'stages' / '2'} and run python -m hpc_cpd.launch --stage 2 --run {run}"
    )
