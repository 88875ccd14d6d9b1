import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpc_cpd.distributed.mpi import Communicator
from hpc_cpd.errors import StopRequested
from hpc_cpd.evaluation.rollouts import EpisodeResult, evaluate_policy
from hpc_cpd.run.metrics_log import read_metrics
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import is_done, read_json
from hpc_cpd.teachers import publish
from hpc_cpd.teachers.collect import collect_trajectories
from hpc_cpd.teachers.policy import TeacherPolicy, load_teacher
from hpc_cpd.teachers.sources.base import make_teacher
from hpc_cpd.trajectories.schema import Episode, Origin
from hpc_cpd.trajectories.shard import write_shard
from tests.teachers import rank
from tests.teachers.jobs import PENDULUM, REACH, launch, teacher_files, tiny_run, until_done

RANK = Path(rank.__file__)
SCRATCH = ("teachers.start=scratch", "trajectories.success_only=false")
"""For the pendulum, which reports no success."""


def _train(run: Run, task_id: str, stop: Callable[[], bool] = lambda: False) -> None:
    make_teacher(run, task_id, Communicator(), stop)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("undisturbed")
    runs = {REACH: tiny_run(folder / "warm"), PENDULUM: tiny_run(folder / "scratch", *SCRATCH)}
    for task_id, run in runs.items():
        _train(run, task_id)
    return runs


@pytest.mark.slow
@pytest.mark.parametrize(("task_id", "stop_after"), [(REACH, 2), (PENDULUM, 1)])
def test_a_teacher_that_was_stopped_again_and_again_is_the_same_bit_for_bit(
    tmp_path: Path, undisturbed: dict[str, Run], task_id: str, stop_after: int
) -> None:
    run = tiny_run(tmp_path, *(SCRATCH if task_id == PENDULUM else ()))
    launches = until_done(lambda stop: _train(run, task_id, stop), stop_after)
    assert launches >= 3
    assert teacher_files(run, task_id) == teacher_files(undisturbed[task_id], task_id)


def test_a_job_of_two_ranks_that_was_killed_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    killed, whole = tiny_run(tmp_path / "killed"), tiny_run(tmp_path / "whole")
    for boundary in (3, 2, 2):  # before the third checkpoint of cloning, the first of PPO, and the second
        job = launch(2, RANK, killed.folder, REACH, 2, "--only", "train", "--die-at", boundary)
        assert job.returncode not in (0, 1, 2), job.stderr
        assert not is_done(killed.teacher(REACH))
    for run in (killed, whole):
        job = launch(2, RANK, run.folder, REACH, 2, "--only", "train")
        assert job.returncode == 0, job.stderr
        assert ("goes on after step 61" in job.stdout) == (run is killed)
    assert teacher_files(killed, REACH) == teacher_files(whole, REACH)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    tmp_path: Path, undisturbed: dict[str, Run], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny_run(tmp_path, *SCRATCH)
    for _ in range(2):
        with pytest.raises(StopRequested):
            _train(run, PENDULUM, lambda: True)
    _, newest = sorted((run.teacher(PENDULUM) / "checkpoints").iterdir())
    tensors = newest / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-4])
    _train(run, PENDULUM)
    assert f"{newest} is passed over: its weights are damaged" in capsys.readouterr().err
    assert teacher_files(run, PENDULUM) == teacher_files(undisturbed[PENDULUM], PENDULUM)


def test_a_published_teacher_is_left_alone(undisturbed: dict[str, Run], monkeypatch: pytest.MonkeyPatch) -> None:
    run = undisturbed[REACH]
    folder = run.teacher(REACH)
    assert not (folder / "checkpoints").exists()
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}
    monkeypatch.setattr(publish, "evaluate_policy", None)
    _train(run, REACH, lambda: True)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()} == before


def test_what_is_published_says_how_it_came_about(undisturbed: dict[str, Run]) -> None:
    folder = undisturbed[REACH].teacher(REACH)
    evaluation = json.loads((folder / "evaluation.json").read_text())
    config = undisturbed[REACH].config()
    record = evaluation["tasks"][REACH]
    assert (evaluation["stage"], evaluation["seed"], evaluation["episodes_per_task"]) == (0, 10_000, 2)
    assert record["episodes"] == 2
    results = evaluate_policy(load_teacher(folder), REACH, 2, config.evaluation.seed)
    assert record["successes"] == sum(result.success for result in results)
    description = json.loads((folder / "policy.json").read_text())
    assert description["provenance"]["reward_version"] and description["provenance"]["start"] == "demonstrations"
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["phase"] for line in lines] == ["start"] * 2 + ["evaluation"] + ["improve", "evaluation"] * 3
    assert [line["step"] for line in lines] == [50, 60, 60, 61, 61, 62, 62, 63, 63]


@pytest.mark.slow
def test_a_training_says_where_it_is_in_a_file(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    told = []

    def stop() -> bool:
        told.append(read_json(run.teacher(REACH) / "progress.json"))
        return False

    _train(run, REACH, stop)
    assert (told[0]["phase"], told[0]["step"], told[0]["counted"]) == ("start", 0, "steps")
    place = [told[-1][key] for key in ("phase", "step", "total", "counted")]
    assert place == ["ppo", 3, 3, "rounds"]
    collect_trajectories(run, REACH, Communicator(), lambda: False)
    last = read_json(run.teacher(REACH) / "progress.json")
    assert (last["phase"], last["total"], last["counted"]) == ("recording", 5, "episodes")


class _Examiner:
    """Gives the policies it is shown the marks of a list, whatever they can do."""

    def __init__(self, successes: Sequence[int], returns: Sequence[float] | None = None) -> None:
        self.successes = list(successes)
        self.returns = list(returns or [0.0] * len(self.successes))
        self.seen: list[dict[str, np.ndarray]] = []
        self.seeds: list[int] = []

    def __call__(
        self, policy: TeacherPolicy, task_id: str, episodes: int, seed: int, indices: list[int]
    ) -> list[EpisodeResult]:
        number = min(len(self.seen), len(self.successes) - 1)
        self.seeds.append(seed)
        self.seen.append({name: value.numpy() for name, value in policy.tensors().items()})
        return [
            EpisodeResult(i, i, i < self.successes[number], self.returns[number], 5 if i < 2 else None, 9)
            for i in indices
        ]


Examined = Callable[..., _Examiner]


@pytest.fixture
def examined(monkeypatch: pytest.MonkeyPatch) -> Examined:
    """Train a teacher under the examiner that is asked for with (run, task, successes, returns)."""

    def train(run: Run, task_id: str, *marks: Sequence[Any] | None) -> _Examiner:
        examiner = _Examiner(*marks)
        monkeypatch.setattr(publish, "evaluate_policy", examiner)
        _train(run, task_id)
        return examiner

    return train


@pytest.mark.parametrize(
    ("successes", "returns", "best"),
    [
        ([1, 2, 0], None, 1),
        ([1, 1, 1], [1.0, 2.0, 3.0], 0),  # a tie keeps the earlier
        ([0, 0, 0], [-9.0, -7.0, -8.0], 1),  # without any success, more reward
    ],
)
def test_the_published_teacher_is_the_best_evaluated(
    tmp_path: Path, examined: Examined, successes: list[int], returns: list[float] | None, best: int
) -> None:
    run = tiny_run(tmp_path, *SCRATCH)
    examiner = examined(run, PENDULUM, successes, returns)
    assert len(examiner.seen) == 4  # three while training, and the published one on the final goals
    published = load_teacher(run.teacher(PENDULUM)).tensors()
    for name, value in published.items():
        assert np.array_equal(value.numpy(), examiner.seen[best][name])
    assert not np.array_equal(examiner.seen[0]["critic.0.weight"], examiner.seen[1]["critic.0.weight"])


def test_training_ends_when_the_target_is_reached_twice_in_a_row(tmp_path: Path, examined: Examined) -> None:
    run = tiny_run(tmp_path, *SCRATCH, "teachers.algorithm.iterations=9", "teachers.source.target_success=0.6")
    examiner = examined(run, PENDULUM, [2, 1, 2, 3, 3])
    assert len(examiner.seen) == 5
    done = json.loads((run.teacher(PENDULUM) / "DONE").read_text())
    assert done["environment_steps"] == 4 * 90


def test_a_teacher_is_chosen_on_other_goals_than_those_it_is_compared_on(tmp_path: Path, examined: Examined) -> None:
    run = tiny_run(tmp_path, "teachers.source.target_success=0.6", "teachers.algorithm.iterations=1")
    *chosen_on, compared_on = examined(run, REACH, [2, 1, 0, 0]).seeds
    assert compared_on == run.config().evaluation.seed
    assert len(chosen_on) == 3 and compared_on not in chosen_on
    assert chosen_on[0] != chosen_on[1]  # a success is confirmed on yet other goals


def test_after_a_warm_start_the_critic_learns_first_and_the_policy_does_not_move(
    tmp_path: Path, examined: Examined
) -> None:
    run = tiny_run(tmp_path, "teachers.start.critic_only_rounds=2")
    examiner = examined(run, REACH, [0, 0, 0, 0])
    clone, first, second, third = examiner.seen[:4]
    acts = [name for name in clone if not name.startswith("critic")]
    assert all(np.array_equal(clone[name], second[name]) for name in acts)
    assert not np.array_equal(clone["critic.0.weight"], first["critic.0.weight"])
    assert not np.array_equal(clone["actor.0.weight"], third["actor.0.weight"])
    assert np.array_equal(clone["normaliser_mean"], third["normaliser_mean"])
    start = run.config().teachers.start.model_dump()
    assert np.allclose(clone["log_std"], start["initial_log_std"])


def test_no_iterations_publish_the_warm_start(tmp_path: Path, examined: Examined) -> None:
    run = tiny_run(tmp_path, "teachers.algorithm.iterations=0")
    examiner = examined(run, REACH, [1, 1])
    assert len(examiner.seen) == 2


def test_a_clone_can_be_made_of_a_users_trajectories(tmp_path: Path, undisturbed: dict[str, Run]) -> None:
    folder = tmp_path / "given" / PENDULUM
    rng = np.random.default_rng(0)
    seen = rng.normal(size=(40, 3)).astype(np.float32)
    target = np.clip(seen[:, :1], -1, 1)
    episode = Episode(seen, -target, target, np.zeros(40), np.zeros(40, bool), seen[0], 0, 0)
    write_shard(folder, 0, 0, Origin(PENDULUM, "", 0, "native", "gymnasium"), [episode])
    given = f"teachers.start.folder={tmp_path / 'given'}"
    steps = ("teachers.start.gradient_steps=600", "teachers.start.batch_size=4")
    words = ("teachers.algorithm.iterations=0", "trajectories.success_only=false")
    run = tiny_run(tmp_path / "run", given, *words, *steps)
    _train(run, PENDULUM)
    acted = load_teacher(run.teacher(PENDULUM)).act(seen)  # batches of 4, so each must have drawn other samples
    assert np.abs(acted - target).mean() < 0.1
