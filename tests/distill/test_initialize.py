"""How a stage begins: vectors of tasks."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from hpc_cpd.distill.initialize import initialize_stage
from hpc_cpd.methods.base import Stage, method_of
from hpc_cpd.student.policy import load_student_parts
from hpc_cpd.trajectories.memory import open_memory
from hpc_cpd.trajectories.store import open_trajectories
from tests.distill.synthetic import TASKS, make_run


def test_one_hot_vectors_keep_their_places_when_a_task_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "student.task_embedding=one_hot")
    for stage, plan in ((1, [TASKS[:2], TASKS[2:]]), (2, [TASKS[:2], TASKS[3:]])):
        new = open_trajectories([run.trajectories(task) for task in plan[stage - 1]])
        config = run.config()
        initialize_stage(Stage(run, config, plan, stage), method_of(config), new, None)
        shutil.copytree(run.stage(stage) / "start", run.stage(stage) / "student")
    vectors = load_student_parts(run.stage(2) / "start").task_vectors
    assert list(vectors) == [*TASKS[:2], *TASKS[3:]]
    places = {task: int(vector.argmax()) for task, vector in vectors.items()}
    assert places == {task: TASKS.index(task) for task in vectors}
    assert all(np.sort(vector).tolist() == [0.0] * (len(TASKS) - 1) + [1.0] for vector in vectors.values())


def test_a_memory_keeps_one_episode_of_a_task_at_least(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "method.memory.budget_fraction=0.05")  # half of an episode: ten of one length
    store = open_trajectories([run.trajectories(task) for task in TASKS[:2]])
    config = run.config()
    method_of(config).keep_memory(Stage(run, config, [TASKS[:2], TASKS[2:]], 1), store, np.ones(20))
    memory = open_memory([run.stage(1) / "memory"])
    assert memory is not None and [len(memory.task_episodes(task)) for task in TASKS[:2]] == [1, 1]
