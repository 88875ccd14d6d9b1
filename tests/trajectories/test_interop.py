"""Exchange with robomimic: an export imports to the same episodes, and foreign files import by the rules."""

from __future__ import annotations

import json

import h5py
import numpy as np
import pytest

from hpc_cpd.errors import UserError
from hpc_cpd.trajectories.formats.robomimic import export_robomimic, import_robomimic
from hpc_cpd.trajectories.store import open_trajectories, verify_folder
from tests.trajectories.recorded import TASK, assert_same_episode, make_episode, write_folder


def test_an_export_imports_to_the_same_episodes(tmp_path):
    episodes = [make_episode(number, 3 + number) for number in (2, 5, 11, 40)] + [
        make_episode(n, 4) for n in range(50, 60)
    ]
    write_folder(tmp_path / "a", episodes)
    assert export_robomimic(tmp_path / "a", tmp_path / "a.hdf5") == 14
    assert import_robomimic(tmp_path / "a.hdf5", TASK, tmp_path / "b") == 14
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
            demo["actions"] = np.full((4, 2), number / 20)  # float64, as robomimic writes them
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
    import_robomimic(_foreign(tmp_path / "f.hdf5"), TASK, tmp_path / "t")
    store = open_trajectories(tmp_path / "t")
    assert len(store.episodes) == 11
    for number in (0, 2, 10):  # demo_10 comes after demo_2
        episode = store.episode(number)
        assert episode.observations[0].tolist() == [1.0, 2.0, 2.0]
        assert episode.final_observation.tolist() == [3.0, 4.0, 4.0]
        np.testing.assert_array_equal(episode.actions, np.full((4, 2), number / 20, np.float32))
        np.testing.assert_array_equal(episode.teacher_mean, episode.actions)
        assert episode.success.tolist() == [False, False, True, True]
        assert episode.goal_index == -1


def test_observation_keys_choose_and_order(tmp_path):
    import_robomimic(_foreign(tmp_path / "f.hdf5"), TASK, tmp_path / "t", observation_keys=["b"])
    assert open_trajectories(tmp_path / "t").observations.shape == (44, 2)
    import_robomimic(tmp_path / "f.hdf5", TASK, tmp_path / "t", observation_keys=["b", "a"])
    assert open_trajectories(tmp_path / "t").observations[0].tolist() == [2.0, 2.0, 1.0]


def test_only_an_earlier_import_of_the_same_task_is_replaced(tmp_path):
    file = _foreign(tmp_path / "f.hdf5")
    thesis = tmp_path / "home" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    with pytest.raises(UserError, match="home is not empty"):
        import_robomimic(file, TASK, thesis.parent)
    assert thesis.read_text() == "years of work"
    import_robomimic(file, TASK, tmp_path / "t")
    with pytest.raises(UserError, match="no trajectories of metaworld/push-v3"):
        import_robomimic(file, "metaworld/push-v3", tmp_path / "t")
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
        import_robomimic(path, TASK, tmp_path / "t", observation_keys=["a", "b"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.hdf5"]


def test_a_file_that_is_not_robomimic_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        import_robomimic(tmp_path / "none.hdf5", TASK, tmp_path / "t")
    (tmp_path / "text.hdf5").write_text("hello")
    with pytest.raises(UserError, match="damaged"):
        import_robomimic(tmp_path / "text.hdf5", TASK, tmp_path / "t")
    with h5py.File(tmp_path / "other.hdf5", "w") as file:
        file["x"] = 1
    with pytest.raises(UserError, match="no group 'data'"):
        import_robomimic(tmp_path / "other.hdf5", TASK, tmp_path / "t")


def test_only_one_task_of_continuous_actions_is_exported(tmp_path):
    write_folder(tmp_path / "a", [make_episode(0)], target="teacher_logits")
    with pytest.raises(UserError, match="continuous"):
        export_robomimic(tmp_path / "a", tmp_path / "a.hdf5")
    assert not (tmp_path / "a.hdf5").exists()
