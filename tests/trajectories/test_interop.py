"""Exchange with robomimic: an export imports to the same episodes, and foreign files import by the rules."""

from __future__ import annotations

import json

import h5py
import numpy as np
import pytest
from typer.testing import CliRunner

from hpc_cpd.cli import app
from hpc_cpd.errors import UserError
from hpc_cpd.trajectories.formats.robomimic import export_robomimic, import_trajectories
from hpc_cpd.trajectories.store import open_trajectories, verify_folder
from tests.trajectories.recorded import assert_same_episode, make_discrete, make_episode, write_folder

TASK, KEYS = "gymnasium/Pendulum-v1", ["a", "b"]


def test_an_export_imports_to_the_same_episodes(tmp_path):
    episodes = [make_episode(number, 3 + number, action_size=1) for number in (2, 5, 11, 40)] + [
        make_episode(n, 4, action_size=1) for n in range(50, 60)
    ]
    write_folder(tmp_path / "a", episodes, TASK)
    assert export_robomimic(tmp_path / "a", tmp_path / "a.hdf5") == 14
    assert import_trajectories(tmp_path / "a.hdf5", TASK, tmp_path / "b") == 14
    assert verify_folder(tmp_path / "b", TASK) == []
    back = open_trajectories(tmp_path / "b")
    assert back.origins == open_trajectories(tmp_path / "a").origins
    for number, episode in enumerate(episodes):
        assert_same_episode(back.episode(number), episode)


def test_the_export_has_the_layout_of_robomimic(tmp_path):
    episode = make_episode(3, 6)
    write_folder(tmp_path / "a", [episode, make_episode(9, 2)])
    export_robomimic(tmp_path / "a", tmp_path / "a.hdf5")
    with h5py.File(tmp_path / "a.hdf5") as file:
        data = file["data"]
        assert data.attrs["total"] == 8
        assert {"env_name", "type", "env_kwargs"} <= json.loads(data.attrs["env_args"]).keys()
        demo = data["demo_0"]
        assert demo.attrs["num_samples"] == 6
        assert demo["dones"][:].tolist() == [0, 0, 0, 0, 0, 1]
        np.testing.assert_array_equal(demo["obs/state"], episode.observations)
        np.testing.assert_array_equal(demo["next_obs/state"][:-1], episode.observations[1:])
        np.testing.assert_array_equal(demo["next_obs/state"][-1], episode.final_observation)
        np.testing.assert_array_equal(demo["actions"], episode.actions)


def _foreign(path, change=None):
    with h5py.File(path, "w") as file:
        for number in range(11):
            demo = file.create_group(f"data/demo_{number}")
            demo["actions"] = np.full((4, 1), number / 20)  # float64, as robomimic writes them
            demo["rewards"] = np.array([0.0, 0.0, 0.0, 1.0])
            demo["dones"] = np.array([0, 0, 1, 1])
            demo["obs/b"] = np.full((4, 2), 2.0)
            demo["obs/a"] = np.full((4, 1), 1.0)
            demo["next_obs/b"] = np.full((4, 2), 4.0)
            demo["next_obs/a"] = np.full((4, 1), 3.0)
        if change:
            change(file["data/demo_10"])
    return path


def test_a_foreign_file_is_imported_by_the_rules(tmp_path):
    import_trajectories(_foreign(tmp_path / "f.hdf5"), TASK, tmp_path / "t", ["a", "b"])
    store = open_trajectories(tmp_path / "t")
    assert len(store.episodes) == 11
    for number in (0, 2, 10):  # demo_10 comes after demo_2
        episode = store.episode(number)
        assert episode.observations[0].tolist() == [1.0, 2.0, 2.0]
        assert episode.final_observation.tolist() == [3.0, 4.0, 4.0]
        np.testing.assert_array_equal(episode.actions, np.full((4, 1), number / 20, np.float32))
        np.testing.assert_array_equal(episode.teacher_mean, episode.actions)
        assert episode.success.tolist() == [False, False, True, True]
        assert episode.goal_index == -1


def test_observations_are_put_side_by_side_in_the_order_that_is_told(tmp_path):
    import_trajectories(_foreign(tmp_path / "f.hdf5"), TASK, tmp_path / "t", ["b", "a"])
    assert open_trajectories(tmp_path / "t").observations[0].tolist() == [2.0, 2.0, 1.0]


def test_an_order_that_is_not_told_is_asked_for_and_sizes_are_those_of_the_task(tmp_path):
    file = _foreign(tmp_path / "f.hdf5")
    with pytest.raises(UserError, match=r"several observations \(a \[1\], b \[2\]\).*--observation-keys a,b"):
        import_trajectories(file, TASK, tmp_path / "t")
    with pytest.raises(
        UserError, match=r"observations b of together float64\[2\], but gymnasium/Pendulum-v1 observes Bo"
    ):
        import_trajectories(file, TASK, tmp_path / "t", ["b"])
    with pytest.raises(UserError, match=r"has actions of shape \[1\], but those of metaworld/reach-v3 are Box \[4\]"):
        import_trajectories(file, "metaworld/reach-v3", tmp_path / "t", ["a", "b"])
    with pytest.raises(UserError, match="for Boxes alone"):
        import_trajectories(file, "gymnasium/CartPole-v1", tmp_path / "t", ["a", "b"])
    assert not (tmp_path / "t").exists()


def test_images_are_not_flattened(tmp_path):
    file = _foreign(tmp_path / "f.hdf5")
    with h5py.File(file, "a") as opened:
        for demo in opened["data"].values():
            demo["obs/picture"] = np.zeros((4, 8, 8, 3), np.uint8)
    with pytest.raises(UserError, match="images are not flattened"):
        import_trajectories(file, TASK, tmp_path / "t", ["a", "picture"])
    with pytest.raises(UserError, match=r"uint8\[8, 8, 3\], but gymnasium/Pendulum-v1 observes Box \[3\]"):
        import_trajectories(file, TASK, tmp_path / "t", ["picture"])


@pytest.mark.parametrize(("largest", "accepted"), [(1.0 + 1e-6, True), (1.1, False), (7.0, False)])
def test_actions_outside_the_range_are_refused_but_rounding_is_not(tmp_path, largest, accepted):
    file = _foreign(tmp_path / "f.hdf5", lambda demo: demo["actions"].__setitem__(2, largest))
    if accepted:
        import_trajectories(file, TASK, tmp_path / "t", ["a", "b"])
        assert open_trajectories(tmp_path / "t").actions.max() == 1.0
    else:
        with pytest.raises(UserError, match=rf"demo_10 has actions from 0.5 to {largest:g}, outside .*--action-range"):
            import_trajectories(file, TASK, tmp_path / "t", ["a", "b"])


def test_a_range_that_is_told_is_scaled_to_ours(tmp_path):
    file = _foreign(tmp_path / "f.hdf5", lambda demo: demo["actions"].__setitem__(slice(None), [[-5], [0], [5], [10]]))
    import_trajectories(file, TASK, tmp_path / "t", ["a", "b"], (-5, 10))
    store = open_trajectories(tmp_path / "t")
    np.testing.assert_allclose(store.episode(10).actions[:, 0], [-1, -1 / 3, 1 / 3, 1], rtol=1e-6)
    with pytest.raises(UserError, match=r"outside \[-5, 9\]"):
        import_trajectories(file, TASK, tmp_path / "t", ["a", "b"], (-5, 9))


def test_only_an_earlier_import_of_the_same_task_is_replaced(tmp_path):
    file = _foreign(tmp_path / "f.hdf5")
    thesis = tmp_path / "home" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    with pytest.raises(UserError, match="home is not empty"):
        import_trajectories(file, TASK, thesis.parent, KEYS)
    assert thesis.read_text() == "years of work"
    import_trajectories(file, TASK, tmp_path / "t", KEYS)
    with pytest.raises(UserError, match="no trajectories of gymnasium/Mount"):
        import_trajectories(file, "gymnasium/MountainCarContinuous-v0", tmp_path / "t", KEYS)
    assert open_trajectories(tmp_path / "t").task_ids == [TASK]


WRONG = {
    "no actions": lambda demo: demo.__delitem__("actions"),
    "no observations": lambda demo: demo.__delitem__("obs"),
    "fewer observations": lambda demo: (demo.__delitem__("obs/a"), demo.__setitem__("obs/a", np.zeros((3, 1)))),
    "text for actions": lambda demo: (demo.__delitem__("actions"), demo.__setitem__("actions", ["a"] * 4)),
    "a missing key": lambda demo: demo.__delitem__("obs/a"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_demonstration_is_named_and_nothing_is_left(tmp_path, wrong):
    path = _foreign(tmp_path / "f.hdf5", WRONG[wrong])
    with pytest.raises(UserError, match=r"f\.hdf5 .*demo_10"):
        import_trajectories(path, TASK, tmp_path / "t", KEYS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.hdf5"]


def test_a_file_that_is_not_robomimic_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        import_trajectories(tmp_path / "none.hdf5", TASK, tmp_path / "t")
    (tmp_path / "text.hdf5").write_text("hello")
    with pytest.raises(UserError, match="damaged"):
        import_trajectories(tmp_path / "text.hdf5", TASK, tmp_path / "t")
    with h5py.File(tmp_path / "other.hdf5", "w") as file:
        file["x"] = 1
    with pytest.raises(UserError, match="no group 'data'"):
        import_trajectories(tmp_path / "other.hdf5", TASK, tmp_path / "t")


def test_only_one_task_of_continuous_actions_is_exported(tmp_path):
    write_folder(tmp_path / "a", [make_discrete(0)], target="teacher_logits")
    with pytest.raises(UserError, match="continuous"):
        export_robomimic(tmp_path / "a", tmp_path / "a.hdf5")
    assert not (tmp_path / "a.hdf5").exists()


def test_the_command_writes_a_folder_of_task_folders(tmp_path):
    file = _foreign(tmp_path / "f.hdf5", lambda demo: demo["actions"].__setitem__(0, -4.0))
    words = ["import", str(file), TASK, "--out", str(tmp_path / "out")]
    refused = CliRunner().invoke(app, words)
    assert isinstance(refused.exception, UserError)
    done = CliRunner().invoke(app, [*words, "--observation-keys", "b,a", "--action-range", "-4", "4"])
    assert done.exit_code == 0 and "Episodes: 11." in done.output
    store = open_trajectories(tmp_path / "out" / TASK)
    assert store.observations[0].tolist() == [2.0, 2.0, 1.0] and store.episode(10).actions[0] == -1.0
