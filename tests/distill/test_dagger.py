"""The student plays, its teachers answer, and phase 3 learns from that."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from hpc_cpd.cli import verify
from hpc_cpd.distill.dagger import FIRST_INDEX, open_new
from hpc_cpd.distill.finalize import _predictions
from hpc_cpd.errors import UserError
from hpc_cpd.methods.base import Stage
from hpc_cpd.run.metrics_log import read_metrics
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import is_done, mark_done, sha256
from hpc_cpd.student.policy import load_student
from hpc_cpd.tasks.registry import describe
from hpc_cpd.teachers.policy import TeacherPolicy, load_teacher, save_teacher
from hpc_cpd.teachers.sources.student import weights_of
from hpc_cpd.trajectories.store import TrajectoryStore, open_trajectories
from tests.distill.ranks import finish, start_ranks
from tests.distill.synthetic import OBSERVATION_SIZE, TASKS, make_run, record_task

TASK, EPISODES = TASKS[0], 10
WORDS = (
    f"method.dagger.episodes={EPISODES}",
    "method.dagger.steps=40",
    "stream.tasks_per_stage=1",
    "method.memory.budget_fraction=0.5",
)
STOP_IN_PHASE_3 = 30 + 20 + 20  # looks at `stop`: one per step, and some between two tasks


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Stage 1 on two ranks, which were asked to stop in phase 3."""
    run = make_run(tmp_path_factory.mktemp("stopped") / "run", *WORDS)
    teacher = TeacherPolicy(TASK, OBSERVATION_SIZE, 4, (32,), rng=np.random.default_rng(1))
    for folder in (run.teacher(TASK), run.trajectories(TASK)):
        shutil.rmtree(folder)
    save_teacher(run.teacher(TASK), teacher, {})
    mark_done(run.teacher(TASK), {})
    weights = sha256(weights_of(run.teacher(TASK)))
    record_task(run, TASK, 0, teacher=weights, environment=describe(TASK).environment_version)
    finish(start_ranks(2, run.folder, 1, STOP_IN_PHASE_3), expected=3)
    return run


@pytest.fixture(scope="module")
def finished(stopped: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same, played again and finished by one rank."""
    run = Run(shutil.copytree(stopped.folder, tmp_path_factory.mktemp("finished") / "run"))
    shutil.rmtree(run.stage(1) / "dagger")
    finish(start_ranks(1, run.folder, 1))
    return run


def answered(run: Run) -> TrajectoryStore:
    return open_trajectories(run.dagger(1, TASK), [TASK])


def error_at(student: Path, store: TrajectoryStore) -> float:
    with torch.inference_mode():
        parts = [
            (predicted - torch.tensor(windows["teacher_mean"]))[torch.tensor(windows["valid"])]
            for windows, predicted, _ in _predictions(load_student(student), store, np.arange(len(store)))
        ]
    return float(torch.cat(parts).square().mean())


def test_the_student_acts_and_the_teacher_answers(stopped: Run) -> None:
    store, teacher, draft = (
        answered(stopped),
        load_teacher(stopped.teacher(TASK)),
        load_student(stopped.stage(1) / "draft"),
    )
    assert [span.index - FIRST_INDEX for span in store.episodes] == list(range(EPISODES))
    assert np.allclose(store.teacher_mean, teacher.act(store.observations), atol=1e-5)
    draft.reset(TASK, 1)
    episode = store.episode(EPISODES - 1)
    for observation, action in zip(episode.observations[:20], episode.actions, strict=False):
        assert np.allclose(draft.act(observation[None])[0], action, atol=1e-4)
    assert np.abs(store.actions - store.teacher_mean).mean() > 0.05


def test_whoever_plays_records_the_same(stopped: Run, finished: Run) -> None:
    one, two = answered(stopped), answered(finished)
    for name in ("observations", "actions", "teacher_mean"):
        assert np.array_equal(getattr(one, name), getattr(two, name)), name


def test_phase_3_teaches_what_was_answered(stopped: Run, finished: Run) -> None:
    assert not (stopped.stage(1) / "student").exists()
    assert [record["phase"] for record in read_metrics(finished.stage(1) / "metrics.jsonl")] == [1, 2, 3]
    draft, student = stopped.stage(1) / "draft", finished.stage(1) / "student"
    assert error_at(student, answered(finished)) < 0.5 * error_at(draft, answered(finished))


def test_answered_episodes_count_among_the_data_of_the_stage(finished: Run) -> None:
    recorded = open_trajectories(finished.trajectories(TASK), [TASK])
    assert len(open_new(Stage(finished, finished.config(), [[task] for task in TASKS], 1))) == len(recorded) + len(
        answered(finished)
    )
    assert is_done(finished.stage(1)) and not (finished.stage(1) / "draft").exists()
    with pytest.raises(UserError, match="1 DAgger folders"):  # damaged: other tasks' teachers are stand-ins
        verify(finished.folder)
