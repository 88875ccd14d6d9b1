"""A student can be the teacher: what it does is what the next student is asked for."""

from pathlib import Path

import numpy as np
import pytest

import hpc_cpd
from hpc_cpd.distributed.mpi import Communicator
from hpc_cpd.errors import UserError
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import is_done, read_json
from hpc_cpd.student.embeddings.one_hot import OneHotSettings
from hpc_cpd.student.network import Student
from hpc_cpd.student.policy import StudentParts, StudentPolicy, load_student, save_student
from hpc_cpd.student.task_inference import EpisodeStatistics
from hpc_cpd.teachers.collect import collect_trajectories
from hpc_cpd.teachers.sources.base import make_teacher
from tests.student.reference import small_shape
from tests.teachers.jobs import PENDULUM, tiny_run


@pytest.fixture
def student(tmp_path: Path) -> Path:
    shape = small_shape(0, observation_size=3, action_size=1, history=3)
    network = Student(shape, [[0, 1]], for_training=False, seed=5)
    vectors = {PENDULUM: np.ones(shape.task_vector_size, np.float32)}
    facts = {PENDULUM: EpisodeStatistics(200, np.ones((2, 3), np.float32))}
    parts = StudentParts(network.state_dict(), shape, [[0, 1]], vectors, facts, OneHotSettings())
    save_student(tmp_path / "joint", parts)
    return tmp_path / "joint"


def teach(folder: Path, *words: str) -> Run:
    run = tiny_run(folder, "teachers.source=student", "trajectories.success_only=false", *words)
    make_teacher(run, PENDULUM, Communicator(), lambda: False)
    return run


def test_a_student_teaches_what_it_does(student: Path, tmp_path: Path) -> None:
    run = teach(tmp_path / "run", f"teachers.source.folder={student}", "trajectories.action_noise=[0.0]")
    assert is_done(run.teacher(PENDULUM))
    assert read_json(run.teacher(PENDULUM) / "evaluation.json")["tasks"][PENDULUM]["episodes"] == 2
    collect_trajectories(run, PENDULUM, Communicator(), lambda: False)
    store = hpc_cpd.open_trajectories(run.trajectories(PENDULUM))
    policy: StudentPolicy = load_student(student)
    policy.reset(PENDULUM, 1)
    for step in range(20):  # the first episode, acted out again by the student itself
        np.testing.assert_allclose(policy.act(store.observations[step][None])[0], store.teacher_mean[step], atol=1e-6)
    assert np.abs(store.teacher_mean[:20]).max() > 0.01


def test_such_a_teacher_is_loaded_as_the_student_that_it_is(student: Path, tmp_path: Path) -> None:
    run = teach(tmp_path / "run", f"teachers.source.folder={student}")
    with pytest.raises(UserError, match=r"is a student; load it with load_student"):
        hpc_cpd.load_teacher(run.teacher(PENDULUM))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], r"teachers\.source\.folder.*folder of the student.* write teachers\.source\.folder=VALUE"),
        (["teachers.source.folder=/nowhere"], r"/nowhere is not a student folder"),
    ],
)
def test_a_student_that_is_not_there_is_one_sentence(words: list[str], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        teach(tmp_path / "run", *words)


def test_a_task_that_the_student_has_not_learnt_is_named(student: Path, tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", "teachers.source=student", f"teachers.source.folder={student}")
    with pytest.raises(UserError, match=r"has not learnt metaworld/reach-v3; it has learnt gymnasium/Pendulum-v1"):
        make_teacher(run, "metaworld/reach-v3", Communicator(), lambda: False)
    assert not run.teacher("metaworld/reach-v3").exists()
