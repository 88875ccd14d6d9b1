"""Which tasks are evaluated after a stage, and what their success says about all tasks learnt so far."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from hpc_cpd.config import load_config
from hpc_cpd.errors import UserError
from hpc_cpd.evaluation.schedule import mean_over_learnt, stage_success, tasks_after

PLAN = [[f"t/{stage}-{number}" for number in range(3)] for stage in range(1, 9)]
FEWER = [[task for tasks in PLAN[:6] for task in tasks], *PLAN[6:]]
NAN = float("nan")


def learnt(number: int) -> list[str]:
    return [task for tasks in PLAN[:number] for task in tasks]


def evaluated(number: int, count: object, seed: int = 0, plan: list[list[str]] = PLAN) -> list[str]:
    return tasks_after(load_config(None, [f"evaluation.old_tasks_per_stage={count}", f"seed={seed}"]), plan, number)


def test_all_tasks_are_evaluated_by_default_and_after_the_last_stage() -> None:
    for number in range(1, 9):
        assert evaluated(number, "null") == evaluated(number, 21) == learnt(number)
        assert evaluated(number, 0) == (PLAN[number - 1] if number < 8 else learnt(8))
    assert evaluated(8, 4) == learnt(8)
    assert evaluated(2, 4) == learnt(2)  # there are no more than three old ones


def test_a_stage_evaluates_its_own_tasks_and_as_many_old_ones_as_asked_in_the_order_of_learning() -> None:
    for number in range(3, 8):
        found = evaluated(number, 4)
        assert found[-3:] == PLAN[number - 1] and len(found) == 7
        assert sorted(found) == found and set(found) < set(learnt(number))


def test_the_draw_depends_on_seed_and_stage_alone() -> None:
    assert evaluated(6, 4) == evaluated(6, 4, plan=PLAN[:7])  # a stream that is longer draws the same
    assert len({tuple(evaluated(6, 4, seed)) for seed in range(20)}) > 15
    later, sooner = ([evaluated(k, 4, seed, plan) for seed in range(9)] for k, plan in ((7, PLAN), (2, FEWER)))
    assert later != sooner  # of the same old tasks


def test_every_old_task_is_drawn_equally_often() -> None:
    drawn = [task for seed in range(300) for task in evaluated(4, 3, seed)[:3]]
    counts = np.array([drawn.count(task) for task in learnt(3)])
    assert counts.sum() == 900 and abs(counts - 100).max() < 35  # 4 standard deviations


def test_fewer_than_none_is_refused_in_one_sentence() -> None:
    with pytest.raises(UserError, match=r"evaluation\.old_tasks_per_stage"):
        evaluated(2, -1)


def test_the_estimate_is_right_on_average_over_all_draws_and_so_is_its_error() -> None:
    new, old = np.array([1.0, 0.9]), np.array([0.2, 0.4, 0.9, 1.0, 0.55])
    found = []
    for chosen in combinations(range(5), 3):
        seen = np.full(5, NAN)
        seen[[*chosen]] = old[[*chosen]]
        found.append(mean_over_learnt(new, seen))
    means, errors = np.array(found).T
    truth = np.concatenate([new, old]).mean()
    assert means.mean() == pytest.approx(truth)
    assert (errors**2).mean() == pytest.approx(((means - truth) ** 2).mean())
    assert mean_over_learnt(new, old) == (pytest.approx(truth), 0.0)


def test_nothing_is_said_about_old_tasks_where_none_was_evaluated() -> None:
    new = np.array([1.0, 0.5])
    assert np.isnan(mean_over_learnt(new, np.full(3, NAN))).all()
    assert np.isnan(mean_over_learnt(np.array([NAN, 0.5]), np.ones(3))).all()
    assert np.isnan(mean_over_learnt(np.zeros(0), np.zeros(0))).all()
    assert mean_over_learnt(new, np.zeros(0)) == (0.75, 0.0)
    mean, error = mean_over_learnt(new, np.array([0.0, NAN]))
    assert mean == 0.375 and np.isnan(error)  # one task says nothing about how far they are apart


def test_the_success_of_a_stage_is_that_of_all_tasks_whatever_was_evaluated() -> None:
    records = {task: {"successes": n, "episodes": 4} for task, n in (("old", 2), ("new-1", 4), ("new-2", 4))}
    file = {"tasks": records, "new_tasks": ["new-1", "new-2"]}
    assert stage_success(file | {"tasks_learnt": 3}) == (pytest.approx(2.5 / 3), False)
    assert stage_success(file | {"tasks_learnt": 8}) == (pytest.approx(5 / 8), True)
    assert stage_success({"tasks": records}) == (pytest.approx(2.5 / 3), False)  # of an earlier version
    del records["old"]
    assert stage_success(file | {"tasks_learnt": 8}) == (None, False)
