"""The store: one canonical order, windows that stay inside episodes, draws that follow from the seed."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hpc_cpd
from hpc_cpd.errors import UserError
from hpc_cpd.trajectories.store import MappedColumn, TrajectoryStore, open_trajectories, verify_folder
from tests.trajectories.recorded import (
    TASK,
    assert_same_episode,
    make_discrete,
    make_episode,
    publish,
    write_folder,
    write_shard,
)

OTHER = "metaworld/push-v3"


def _store(lengths_by_task: dict[str, list[int]]) -> TrajectoryStore:
    return TrajectoryStore(
        {
            task: [make_episode(100 * number + n, steps) for n, steps in enumerate(lengths)]
            for number, (task, lengths) in enumerate(lengths_by_task.items())
        }
    )


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(places=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=12), data=st.data())
def test_the_order_does_not_depend_on_who_recorded_what(tmp_path, places, data):
    shutil.rmtree(tmp_path / "t", ignore_errors=True)
    for rank, part in set(places):
        numbers = [number for number, place in enumerate(places) if place == (rank, part)]
        mixed = data.draw(st.permutations(numbers))
        write_shard(tmp_path / "t", [make_episode(n, 2 + n) for n in mixed], rank, part)
    publish(tmp_path / "t")
    store = hpc_cpd.open_trajectories(tmp_path / "t")
    assert [span.index for span in store.episodes] == list(range(len(places)))
    for number in range(len(places)):
        assert_same_episode(store.episode(number), make_episode(number, 2 + number))
    assert len(store) == sum(2 + n for n in range(len(places)))


def test_tasks_come_in_the_order_given(tmp_path):
    write_folder(tmp_path / "a", [make_episode(1)], TASK)
    write_folder(tmp_path / "b", [make_episode(0)], OTHER)
    forward = open_trajectories([tmp_path / "a", tmp_path / "b"])
    backward = open_trajectories([str(tmp_path / "b"), str(tmp_path / "a")])
    assert (forward.task_ids, backward.task_ids) == ([TASK, OTHER], [OTHER, TASK])
    assert (forward.steps(OTHER), backward.steps(OTHER)) == (slice(5, 10), slice(0, 5))
    np.testing.assert_array_equal(forward.observations[5:], backward.observations[:5])
    assert forward.task_episodes(OTHER) == [1]
    with pytest.raises(UserError, match=r"no trajectories of metaworld/door-open-v3 were opened"):
        forward.steps("metaworld/door-open-v3")


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=4), min_size=1, max_size=3),
    length=st.integers(1, 9),
    seed=st.integers(0, 99),
    balance=st.booleans(),
)
def test_a_window_is_a_piece_of_one_episode_and_then_its_last_step(lengths, length, seed, balance):
    store = _store({f"t/{number}": steps for number, steps in enumerate(lengths)})
    starts = store.draw_windows(16, np.random.default_rng(seed), balance)
    windows = store.gather(starts, length)
    assert windows["observations"].shape == (16, length, 3)
    assert windows["actions"].shape == windows["teacher_mean"].shape == (16, length, 2)
    assert windows["valid"].dtype == np.bool_
    for row, start in enumerate(starts):
        span = next(span for span in store.episodes if span.start <= start < span.start + span.length)
        assert windows["task_index"][row] == span.task
        inside = min(length, span.start + span.length - start)
        assert windows["valid"][row].tolist() == [True] * inside + [False] * (length - inside)
        for name in ("observations", "actions", "teacher_mean"):
            values = getattr(store, name)
            np.testing.assert_array_equal(windows[name][row, :inside], values[start : start + inside])
            assert (windows[name][row, inside:] == values[span.start + span.length - 1]).all()


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=4), min_size=1, max_size=3),
    length=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_a_history_ends_at_its_step_and_begins_no_earlier_than_its_episode(lengths, length, seed):
    store = _store({f"t/{number}": steps for number, steps in enumerate(lengths)})
    now = store.draw_windows(16, np.random.default_rng(seed))
    histories = store.gather_histories(now, length)
    for row, step in enumerate(now):
        span = next(span for span in store.episodes if span.start <= step < span.start + span.length)
        seen = min(length, step - span.start + 1)
        assert histories["task_index"][row] == span.task
        assert histories["valid"][row].tolist() == [place == seen - 1 for place in range(length)]
        for name in ("observations", "teacher_mean"):
            values = getattr(store, name)
            np.testing.assert_array_equal(histories[name][row, :seen], values[step - seen + 1 : step + 1])
            assert (histories[name][row, seen:] == values[step]).all()


def test_trajectories_that_stay_in_their_files_are_the_same(tmp_path):
    write_folder(tmp_path / "a", [make_episode(n, 3 + n) for n in range(6)], TASK)
    write_folder(tmp_path / "b", [make_episode(9 - n, 2 + n) for n in range(3)], OTHER)
    folders = [tmp_path / "a", tmp_path / "b"]
    size = sum(path.stat().st_size for folder in folders for path in folder.glob("*.h5")) / 1e9
    read, mapped = open_trajectories(folders, None, 1.01 * size), open_trajectories(folders, None, 0.99 * size)
    assert (read.mapped, mapped.mapped) == (False, True)
    assert len(read) == len(mapped) and read.episodes == mapped.episodes
    for name in ("observations", "actions", "teacher_mean", "rewards", "success"):
        column = getattr(mapped, name)
        assert isinstance(column, MappedColumn) and (column.dtype, column.shape) == (
            getattr(read, name).dtype,
            getattr(read, name).shape,
        )
        for start in range(len(read)):
            for stop in (start, start + 1, start + 7, len(read)):
                np.testing.assert_array_equal(column[start:stop], getattr(read, name)[start:stop])
    steps = np.arange(len(read))
    for gathered in ("gather", "gather_histories"):
        one, other = (getattr(store, gathered)(steps, 4) for store in (read, mapped))
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
    for task in (None, TASK, OTHER):
        for one, other in zip(read.observation_statistics(task), mapped.observation_statistics(task), strict=True):
            np.testing.assert_array_equal(one, other)
    for number in range(len(read.episodes)):
        assert_same_episode(mapped.episode(number), read.episode(number))


def test_statistics_do_not_depend_on_how_many_steps_are_held_at_once(monkeypatch):
    store = _store({TASK: [50, 7], OTHER: [13]})
    whole = store.observations.astype(np.float64)
    for pieces in (1, 7, 64, 70):
        monkeypatch.setattr("hpc_cpd.trajectories.store.STATISTICS_STEPS", pieces)
        mean, deviation = store.observation_statistics()
        np.testing.assert_allclose(mean, whole.mean(axis=0), rtol=1e-6)
        np.testing.assert_allclose(deviation, whole.std(axis=0), rtol=1e-6)


def test_gathered_windows_are_copies():
    store = _store({TASK: [5]})
    before = store.observations.copy()
    store.gather(np.array([0]), 3)["observations"][:] = 0.0
    np.testing.assert_array_equal(store.observations, before)


def test_slices_of_ranks_make_up_the_global_batch():
    store = _store({TASK: [5, 9], OTHER: [20]})
    starts = store.draw_windows(12, np.random.default_rng([4, 2]), True)
    whole = store.sample_windows(12, 4, np.random.default_rng([4, 2]), True)
    for rank in range(3):
        mine = store.gather(starts[rank::3], 4)
        for name, values in mine.items():
            np.testing.assert_array_equal(values, whole[name][rank::3])


def test_draws_are_uniform_over_steps_or_over_tasks():
    store = _store({TASK: [10], OTHER: [60, 20]})
    draws = store.draw_windows(40_000, np.random.default_rng(0))
    share = np.bincount(draws, minlength=90) / 40_000
    np.testing.assert_allclose(share, 1 / 90, atol=0.003)
    balanced = store.draw_windows(40_000, np.random.default_rng(0), balance_tasks=True)
    share = np.bincount(balanced, minlength=90) / 40_000
    np.testing.assert_allclose(share[:10], 1 / 20, atol=0.006)
    np.testing.assert_allclose(share[10:], 1 / 160, atol=0.003)


def test_statistics_are_those_of_a_task_computed_in_float64():
    far = 5000.0  # in float32 the squares of such numbers lose the variance
    store = TrajectoryStore(
        {TASK: [make_episode(0, 4000, offset=far)], OTHER: [make_episode(1, 50)]},
    )
    mean, std = store.observation_statistics(TASK)
    assert (mean.dtype, std.dtype, mean.shape) == (np.float32, np.float32, (3,))
    exact = store.observations[:4000].astype(np.float64)
    np.testing.assert_allclose(mean, exact.mean(axis=0), rtol=1e-7)
    np.testing.assert_allclose(std, exact.std(axis=0), rtol=1e-6)
    everything = store.observation_statistics()[0]
    np.testing.assert_allclose(everything, store.observations.astype(np.float64).mean(axis=0), rtol=1e-7)


def test_episode_means_are_taken_over_each_episode():
    store = _store({TASK: [2, 3], OTHER: [4]})
    np.testing.assert_allclose(store.episode_means(np.arange(9)), [0.5, 3.0, 6.5])


def test_unfinished_trajectories_are_not_read(tmp_path):
    write_shard(tmp_path / "t", [make_episode(0)])
    with pytest.raises(UserError, match="not finished"):
        open_trajectories(tmp_path / "t")
    with pytest.raises(UserError, match="missing"):
        open_trajectories(tmp_path / "nothing")
    write_folder(tmp_path / "run" / TASK, [make_episode(0)])
    with pytest.raises(UserError, match=f"open {tmp_path / 'run' / TASK}"):
        open_trajectories(tmp_path / "run")


def test_an_unfinished_task_of_a_run_names_the_command(tmp_path):
    (tmp_path / "config.yaml").write_text("schema_version: 1\n")
    with pytest.raises(UserError, match=f"run python -m hpc_cpd.launch --stage teachers --run {tmp_path}$"):
        open_trajectories(tmp_path / "trajectories" / TASK)


def test_different_sizes_types_or_teachers_do_not_mix(tmp_path):
    write_folder(tmp_path / "a", [make_episode(0)], TASK)
    write_folder(tmp_path / "b", [make_episode(0, observation_size=4)], OTHER)
    write_folder(tmp_path / "c", [make_episode(1)], TASK, teacher_sha256="beef")
    discrete = dataclasses.replace(make_episode(0), actions=np.zeros(5, np.int64))
    write_folder(tmp_path / "d", [discrete], OTHER, target="teacher_logits")
    with pytest.raises(UserError, match="observations"):
        open_trajectories([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(UserError, match="another teacher"):
        open_trajectories([tmp_path / "a", tmp_path / "c"])
    with pytest.raises(UserError, match="twice"):
        open_trajectories([tmp_path / "a", tmp_path / "a"])
    with pytest.raises(UserError, match="discrete"):
        open_trajectories([tmp_path / "a", tmp_path / "d"])


def test_discrete_actions_are_read_as_they_are(tmp_path):
    write_folder(tmp_path / "d", [make_discrete(0)], OTHER, target="teacher_logits")
    store = open_trajectories(tmp_path / "d")
    assert store.gather(np.array([0]), 2)["actions"].dtype == np.int64
    assert store.target == "teacher_logits"


def _folder(tmp_path):
    folder = tmp_path / "t"
    write_shard(folder, [make_episode(0, 50)], rank=0)
    write_shard(folder, [make_episode(1, 50)], rank=1)
    publish(folder)
    return folder


def test_a_good_folder_has_no_problems(tmp_path):
    folder = _folder(tmp_path)
    (folder / ".shard-0000-00001.h5.ab.tmp").write_bytes(b"half")
    assert verify_folder(folder, TASK) == []
    open_trajectories(folder).verify()


@pytest.mark.parametrize("position", [0, 100, 2000, -1])
def test_one_flipped_bit_is_found_on_opening_and_on_verifying(tmp_path, position):
    folder = _folder(tmp_path)
    store = open_trajectories(folder)
    path = folder / "shard-0001-00000.h5"
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))
    (problem,) = verify_folder(folder, TASK)
    assert str(path) in problem
    assert "sha256" in problem
    with pytest.raises(UserError, match=r"shard-0001-00000\.h5"):
        open_trajectories(folder)
    with pytest.raises(UserError, match=r"shard-0001-00000\.h5"):
        store.verify()


def test_every_broken_shard_is_listed(tmp_path):
    folder = _folder(tmp_path)
    (folder / "shard-0000-00000.h5").unlink()
    (folder / "shard-0001-00000.h5").write_bytes(b"")
    write_shard(folder, [make_episode(2)], rank=2)
    first, second, third = verify_folder(folder, TASK)
    assert "shard-0000-00000.h5 is missing" in first
    assert "shard-0001-00000.h5" in second
    assert "shard-0002-00000.h5 is not listed" in third


def test_a_folder_of_another_task_is_a_problem(tmp_path):
    folder = _folder(tmp_path)
    assert all("not on metaworld/push-v3" in problem for problem in verify_folder(folder, OTHER))
    assert len(verify_folder(folder, OTHER)) == 2


@pytest.mark.parametrize("change", ["drop", "damage", "version", "list", "path", "count"])
def test_a_wrong_manifest_is_a_problem(tmp_path, change):
    folder = _folder(tmp_path)
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    if change == "drop":
        os.unlink(path)
    elif change == "damage":
        path.write_text(path.read_text()[:40])
    else:
        if change == "version":
            manifest["schema_version"] = 9
        elif change == "list":
            del manifest["shards"][0]["sha256"]
        elif change == "path":
            manifest["shards"][0]["file"] = "../shard-0000-00000.h5"
        else:
            manifest["shards"][0]["steps"] = 51
        path.write_text(json.dumps(manifest))
    assert len(verify_folder(folder, TASK)) == 1
    with pytest.raises(UserError, match=r"manifest\.json"):
        open_trajectories(folder)
