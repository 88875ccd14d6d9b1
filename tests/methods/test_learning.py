"""What settings of learning do to a student, and what a method without a memory needs of earlier stages: nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from hpc_cpd.distill.finalize import _predictions
from hpc_cpd.losses import action_mean_error
from hpc_cpd.methods.base import Stage, method_of
from hpc_cpd.run.metrics_log import read_metrics
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import is_done, read_json, write_json
from hpc_cpd.student.policy import load_student
from hpc_cpd.trajectories.store import open_trajectories
from tests.distill.rank_forks import learn_on_forks
from tests.distill.synthetic import TASKS, make_run

FAILS, SUCCEEDS = TASKS[:2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Stage 1 in different settings, on one rank."""
    folder = tmp_path_factory.mktemp("runs")
    words = {
        "plain": ["distill.load_balancing_coefficient=0"],
        "balanced": ["distill.load_balancing_coefficient=1"],
        "weighted": ["distill.load_balancing_coefficient=0", "distill.task_weights=teacher_success"],
        "ewc": ["method=ewc"],
    }
    made = {name: make_run(folder / name, *said) for name, said in words.items()}
    for task, successes in ((FAILS, 0), (SUCCEEDS, 20)):
        record = {"tasks": {task: {"successes": successes, "episodes": 20}}}
        write_json(made["weighted"].teacher(task) / "evaluation.json", record)
    learn_on_forks(1, folder / "log", *((run.folder, 1) for run in made.values()))
    return made


def error(run: Run, task: str, student: str = "1/student") -> float:
    """The student's mean squared error on the recorded steps of a task."""
    store, policy = open_trajectories([run.trajectories(task)]), load_student(run.folder / "stages" / student)
    with torch.inference_mode():
        ((windows, predicted, _),) = _predictions(policy, store, np.arange(len(store)))
    valid = torch.tensor(windows["valid"])
    return float(action_mean_error(predicted, torch.tensor(windows["teacher_mean"]), valid)[valid].mean())


def test_the_load_balancing_loss_is_learnt(runs: dict[str, Run]) -> None:
    plain, balanced = (
        read_metrics(runs[name].stage(1) / "metrics.jsonl")[-1]["load_balancing_loss"] for name in ("plain", "balanced")
    )
    assert balanced - 1 < 0.5 * (plain - 1)  # it is one where experts are used alike


def test_a_task_whose_teacher_never_succeeds_is_not_learnt_where_success_is_the_weight(runs: dict[str, Run]) -> None:
    assert error(runs["weighted"], FAILS) > 2 * error(runs["plain"], FAILS)
    assert error(runs["weighted"], SUCCEEDS) < error(runs["plain"], SUCCEEDS)


@pytest.mark.parametrize("hardest", [0, 4, 9])
def test_the_memory_keeps_the_episode_that_the_student_errs_most_on(
    runs: dict[str, Run], hardest: int, tmp_path: Path
) -> None:
    """Of ten equally long ones, where there is room for one."""
    run = make_run(tmp_path / "run", "method.memory.budget_fraction=0.1")
    stage = Stage(run, run.config(), [TASKS[:2], TASKS[2:]], 1)
    new = open_trajectories([run.trajectories(task) for task in stage.tasks])
    errors = np.full(20, 0.1)
    errors[[new.task_episodes(task)[hardest] for task in stage.tasks]] = 1.0
    method_of(run.config()).keep_memory(stage, new, errors)
    memories = read_json(run.stage(1) / "memory" / "selection.json")["memories"]
    assert [[kept["episode_index"] for kept in memory["episodes"]] for memory in memories] == [[hardest], [hardest]]


def test_a_method_without_a_memory_keeps_none_and_reads_no_old_trajectories(
    runs: dict[str, Run], tmp_path: Path
) -> None:
    run = runs["ewc"]
    assert not (run.stage(1) / "memory").exists() and (runs["plain"].stage(1) / "memory").is_dir()
    for task in TASKS[:2]:
        shutil.rmtree(run.trajectories(task))
    learn_on_forks(1, tmp_path / "log", (run.folder, 2))
    assert is_done(run.stage(2)) and not (run.stage(2) / "memory").exists()
    assert list(load_student(run.stage(2) / "student").task_vectors) == TASKS
    for task in TASKS[2:]:
        assert error(run, task, "2/student") < 0.5 * error(run, task, "2/start")
