"""A student scores the same through our batched path and through the stock environment."""

from __future__ import annotations

import gymnasium
import metaworld
import pytest

import hpc_cpd
from hpc_cpd.evaluate.rollouts import evaluate_policy
from hpc_cpd.run import Run
from tests.journey.conftest import TASKS

EPISODES, SEED = 6, 10_000


@pytest.mark.parametrize("task_id", TASKS[:3])
def test_the_student_scores_the_same_on_the_stock_environment(small_run: Run, task_id: str) -> None:
    student = hpc_cpd.load_student(small_run.stage(2) / "student")
    batched = evaluate_policy(student, task_id, EPISODES, SEED)
    name = task_id.removeprefix("metaworld/")
    goals = metaworld.MT1(name, seed=SEED).train_tasks
    environment = gymnasium.make("Meta-World/MT1", env_name=name, seed=SEED)
    for result in batched:
        environment.unwrapped.set_task(goals[result.goal_index])  # type: ignore[attr-defined]
        student.reset(task_id, 1)
        # the wrapper draws another goal at reset, so the environment below it is reset
        observation, _ = environment.unwrapped.reset()
        steps = None
        for step in range(1, 501):
            action = student.act(observation[None].astype("float32"))[0]
            observation, _, _, _, info = environment.unwrapped.step(action)
            if info["success"]:
                steps = step
                break
        assert (steps is not None) == result.success
        assert steps == result.steps_to_success
    environment.close()
