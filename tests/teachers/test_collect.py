import shutil
from pathlib import Path

import numpy as np
import pytest

from hpc_cpd.distributed.mpi import Communicator
from hpc_cpd.errors import StopRequested, UserError
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import is_done, read_json
from hpc_cpd.tasks.registry import make_batch
from hpc_cpd.teachers.collect import collect_trajectories
from hpc_cpd.teachers.policy import TeacherPolicy, load_teacher
from hpc_cpd.teachers.rollouts import BLOCK
from hpc_cpd.teachers.sources.base import make_teacher
from hpc_cpd.trajectories.schema import Episode
from hpc_cpd.trajectories.shard import closed_shards, load_shard
from hpc_cpd.trajectories.store import verify_folder
from tests.teachers import rank
from tests.teachers.jobs import PENDULUM, REACH, launch, tiny_run, until_done

RANK = Path(rank.__file__)
BASKETBALL = "metaworld/basketball-v3"
"""Nobody succeeds at it by accident."""
NOISE = "trajectories.action_noise=[0.0,1.5]"
"""Noise enough that some attempts of the half-taught teacher succeed and some do not."""


pytestmark = pytest.mark.slow  # they train a teacher and play it


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A teacher that succeeds now and then, and its trajectories by one rank."""
    run = tiny_run(
        tmp_path_factory.mktemp("collect"),
        NOISE,
        "trajectories.episodes=12",
        "teachers.start.episodes=8",
        "teachers.start.gradient_steps=150",
        "teachers.algorithm.iterations=0",
    )
    make_teacher(run, REACH, Communicator(), lambda: False)
    collect_trajectories(run, REACH, Communicator(), lambda: False)
    return run


def _copy(run: Run, folder: Path) -> Run:
    """The same run without its trajectories."""
    shutil.copytree(run.folder, folder, ignore=shutil.ignore_patterns("trajectories"))
    return Run(folder)


def _episodes(run: Run, task_id: str = REACH) -> list[Episode]:
    shards = closed_shards(run.trajectories(task_id))
    return sorted((episode for path in shards for episode in load_shard(path, task_id)[1]), key=lambda e: e.index)


def _assert_same(one: list[Episode], other: list[Episode]) -> None:
    assert [episode.index for episode in one] == [episode.index for episode in other]
    for mine, theirs in zip(one, other, strict=True):
        for name in ("observations", "actions", "teacher_mean", "rewards", "success", "final_observation"):
            assert np.array_equal(getattr(mine, name), getattr(theirs, name)), (mine.index, name)
        assert mine.goal_index == theirs.goal_index


def test_the_first_successes_in_order_are_kept(teacher: Run) -> None:
    episodes = _episodes(teacher)
    manifest = read_json(teacher.trajectories(REACH) / "manifest.json")
    assert len(episodes) == manifest["episodes"] == 12
    assert all(episode.success.any() for episode in episodes)
    indices = [episode.index for episode in episodes]
    assert len(set(indices)) == 12 and manifest["attempts"] == max(indices) + 1
    assert 12 < manifest["attempts"] < 48, "this test needs a teacher that sometimes fails"
    assert manifest["complete"] and is_done(teacher.trajectories(REACH))
    assert verify_folder(teacher.trajectories(REACH)) == []


def test_an_episode_ends_some_steps_after_its_first_success(teacher: Run) -> None:
    after = teacher.config().trajectories.steps_after_success
    for episode in _episodes(teacher):
        first = int(np.argmax(episode.success))
        assert len(episode) == min(first + 1 + after, 500)
        assert not episode.success[:first].any()


def test_what_is_recorded_is_what_happened(teacher: Run) -> None:
    """Replaying the executed actions on the goal gives the observations; the targets are the teacher's own."""
    episode = _episodes(teacher)[-1]
    envs = make_batch(REACH, 1, teacher.config().seed)
    observation, _ = envs.reset(options={"goal_index": np.array([episode.goal_index])})
    for step in range(len(episode)):
        assert np.array_equal(observation[0], episode.observations[step])
        observation, reward, _, _, info = envs.step(episode.actions[step][None])
        assert np.float32(reward[0]) == episode.rewards[step]
        assert info["success"][0] == episode.success[step]
    assert np.array_equal(observation[0], episode.final_observation)
    means = load_teacher(teacher.teacher(REACH)).act(episode.observations)
    assert np.allclose(means, episode.teacher_mean, atol=1e-5)
    noisy = [np.abs(e.actions - e.teacher_mean).max() > 0.1 for e in _episodes(teacher)]
    assert any(noisy) and not all(noisy)


def test_two_ranks_keep_the_same_episodes_and_a_killed_job_goes_on(teacher: Run, tmp_path: Path) -> None:
    run = _copy(teacher, tmp_path / "two")
    job = launch(2, RANK, run.folder, REACH, 2, "--only", "collect", "--die-at", 2)
    assert job.returncode != 0 and not is_done(run.trajectories(REACH))
    before = {path: path.read_bytes() for path in closed_shards(run.trajectories(REACH))}
    assert before, "the job must have closed a shard before it was killed"
    job = launch(2, RANK, run.folder, REACH, 2, "--only", "collect")
    assert job.returncode == 0, job.stderr
    assert {path: path.read_bytes() for path in before} == before
    _assert_same(_episodes(run), _episodes(teacher))


def test_a_stopped_collection_goes_on_and_plays_no_stored_attempt_again(
    teacher: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _copy(teacher, tmp_path / "stopped")
    launches = until_done(lambda stop: collect_trajectories(run, REACH, Communicator(), stop), 1)
    assert launches > 1
    _assert_same(_episodes(run), _episodes(teacher))
    (run.trajectories(REACH) / "DONE").unlink()

    def never(*_: object) -> None:
        raise AssertionError("an attempt was played again")

    stored = {episode.index // BLOCK for episode in _episodes(run)}
    assert stored == set(range(1 + max(stored))), "this test needs a success in every block"
    monkeypatch.setattr(TeacherPolicy, "act", never)
    collect_trajectories(run, REACH, Communicator(), lambda: False)
    _assert_same(_episodes(run), _episodes(teacher))


def test_published_trajectories_are_left_alone(teacher: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TeacherPolicy, "act", None)
    collect_trajectories(teacher, REACH, Communicator(), lambda: True)


def test_shards_of_another_teacher_are_refused(teacher: Run, tmp_path: Path) -> None:
    run = _copy(teacher, tmp_path / "other")
    with pytest.raises(StopRequested):
        collect_trajectories(run, REACH, Communicator(), lambda: True)
    assert closed_shards(run.trajectories(REACH))
    other = _copy(teacher, tmp_path / "again")
    shutil.rmtree(other.teacher(REACH))
    shutil.copytree(run.trajectories(REACH), other.trajectories(REACH))
    changed = tiny_run(tmp_path / "changed", "teachers.algorithm.iterations=0", NOISE)
    make_teacher(changed, REACH, Communicator(), lambda: False)
    shutil.copytree(changed.teacher(REACH), other.teacher(REACH))
    with pytest.raises(UserError, match="was recorded by another teacher"):
        collect_trajectories(other, REACH, Communicator(), lambda: False)


def test_the_teacher_must_be_published_first(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no published teacher"):
        collect_trajectories(tiny_run(tmp_path), REACH, Communicator(), lambda: False)


def test_a_task_without_successes_keeps_all_or_says_what_to_set(tmp_path: Path) -> None:
    scratch = ("teachers.start=scratch", "teachers.algorithm.iterations=0", "trajectories.max_attempts_factor=1")
    failing = tiny_run(tmp_path / "failing", *scratch)
    make_teacher(failing, BASKETBALL, Communicator(), lambda: False)
    with pytest.raises(UserError, match=r"never succeeded in 5 episodes.*trajectories\.success_only=false"):
        collect_trajectories(failing, BASKETBALL, Communicator(), lambda: False)
    keeping = tiny_run(tmp_path / "keeping", *scratch, "trajectories.success_only=false")
    make_teacher(keeping, PENDULUM, Communicator(), lambda: False)
    collect_trajectories(keeping, PENDULUM, Communicator(), lambda: False)
    episodes = _episodes(keeping, PENDULUM)
    assert [(episode.index, len(episode)) for episode in episodes] == [(number, 200) for number in range(5)]
    origin, _ = load_shard(closed_shards(keeping.trajectories(PENDULUM))[0])
    assert origin.teacher_sha256 == read_json(keeping.teacher(PENDULUM) / "policy.json")["sha256"]
