"""The continual-learning numbers are those of their definitions."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_cpd.evaluation.metrics import continual_metrics, newcombe, wilson

NAN = float("nan")

# Three stages, four tasks: two of stage 1, one each of stages 2 and 3.
STAGES = [1, 1, 2, 3]
SUCCESS = [
    [1.0, 0.8, NAN, NAN],
    [0.9, 0.9, 0.5, NAN],
    [0.6, 0.8, 0.6, 0.7],
]
TEACHER = [1.0, 0.8, 0.0, 1.0]
UNTRAINED = [0.1, 0.0, 0.0, 0.2]
BEFORE = [NAN, NAN, 0.3, 0.1]


def test_numbers_worked_out_by_hand() -> None:
    m = continual_metrics(SUCCESS, STAGES, TEACHER, before=BEFORE, untrained=UNTRAINED)
    assert m["stages"] == 3 and m["tasks"] == 4
    assert m["average_success"] == pytest.approx((0.6 + 0.8 + 0.6 + 0.7) / 4)
    assert m["average_after_own_stage"] == pytest.approx((1.0 + 0.8 + 0.5 + 0.7) / 4)
    assert m["teacher_success"] == pytest.approx(2.8 / 4)
    assert m["recovery"] == pytest.approx((0.6 + 1.0 + 0.7) / 3)
    assert m["recovery_of_means"] == pytest.approx(2.7 / 2.8)
    assert m["recovery_excluded"] == [2]
    assert [row["forgetting"] for row in m["per_task"]] == [0.4, 0.0, -0.1, None]
    assert m["forgetting_mean"] == pytest.approx(0.1)
    assert m["backward_transfer"] == pytest.approx(-0.1)
    assert (m["forgetting_worst"], m["forgetting_worst_task"]) == (0.4, 0)
    assert [row["forgetting_from_best"] for row in m["per_task"]] == [0.4, 0.1, -0.1, None]
    assert m["forgetting_from_best_mean"] == pytest.approx(0.4 / 3)
    assert m["forward_transfer"] == pytest.approx((0 + 0 + 0.3 - 0.1) / 4)
    assert m["forward_transfer_later_stages"] == pytest.approx((0.3 - 0.1) / 2)
    assert m["success_by_stage"] == pytest.approx([0.9, 2.3 / 3, 2.7 / 4])
    assert m["intervals"] == {} and m["not_learnt"] == []


def test_plain_call_needs_only_three_arguments() -> None:
    m = continual_metrics(np.array(SUCCESS), np.array(STAGES), np.array(TEACHER))
    assert m["forward_transfer"] is None and m["average_success"] == pytest.approx(0.675)
    json.dumps(m, allow_nan=False)


def test_zero_shot_is_read_from_the_matrix_when_it_stands_there() -> None:
    full = [[1.0, 0.4], [0.9, 0.8]]
    m = continual_metrics(full, [1, 2], [1, 1], untrained=[0.0, 0.1])
    assert m["per_task"][1]["before"] == 0.4
    assert m["forward_transfer_later_stages"] == pytest.approx(0.3)
    assert m["forward_transfer"] == pytest.approx(0.15)


def test_one_stage_has_nothing_to_forget() -> None:
    m = continual_metrics([[0.5, 1.0]], [1, 1], [1.0, 1.0], episodes=20, teacher_episodes=20)
    for name in ("forgetting_mean", "forgetting_worst", "forgetting_worst_task", "backward_transfer"):
        assert m[name] is None
    assert m["intervals"]["forgetting_mean"] is None
    assert m["average_success"] == m["recovery"] == 0.75


def test_unfinished_run_counts_only_what_was_learnt() -> None:
    m = continual_metrics(SUCCESS[:2], STAGES, TEACHER)
    assert m["not_learnt"] == [3] and m["tasks"] == 3
    assert m["average_success"] == pytest.approx(2.3 / 3)
    assert m["per_task"][3]["final"] is None and m["per_task"][3]["teacher"] == 1.0
    assert [row["forgetting"] for row in m["per_task"]] == [0.1, -0.1, None, None]


def test_unknown_teachers_are_listed_and_left_out() -> None:
    m = continual_metrics([[0.5, 1.0]], [1, 1], [NAN, 1.0])
    assert m["teacher_unknown"] == [0]
    assert m["recovery"] == m["recovery_of_means"] == 1.0
    assert continual_metrics([[0.5]], [1], [0.0])["recovery"] is None


def test_seeds_are_averaged_and_widen_the_intervals() -> None:
    good, bad = [[1.0, 1.0]], [[0.0, 0.0]]
    m = continual_metrics([good, bad], [1, 1], [1, 1], episodes=20)
    assert m["seeds"] == 2 and m["average_success"] == 0.5
    assert m["intervals"]["average_success"] == [0.0, 1.0]
    same = continual_metrics([good, good], [1, 1], [1, 1], episodes=20)
    assert same["intervals"]["average_success"] == [1.0, 1.0]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (([[0.5, 1.2]], [1, 1], [1, 1]), "lie in"),
        (([[0.5, NAN]], [1, 1], [1, 1]), r"tasks \[1\] lack"),
        (([[0.5, 0.5]], [1], [1, 1]), "stages must be 2 integers"),
        (([[0.5, 0.5]], [0, 1], [1, 1]), "from 1"),
        (([[0.5, 0.5]], [1, 1], [1, 1, 1]), "teacher has shape"),
        (([0.5, 0.5], [1, 1], [1, 1]), "shape"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: tuple, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        continual_metrics(*arguments)


@st.composite
def histories(draw: st.DrawFn) -> dict:
    stages = draw(st.lists(st.integers(1, 4), min_size=1, max_size=6))
    last = draw(st.integers(1, max(stages)))
    counts = st.integers(0, 20)
    width = len(stages)
    rows = draw(st.lists(st.lists(counts, min_size=width, max_size=width), min_size=last, max_size=last))
    success = np.array(rows) / 20
    for j, stage in enumerate(stages):
        success[: min(stage, last) - 1, j] = NAN
    if not any(stage <= last for stage in stages):
        stages[0] = 1
        success[:, 0] = draw(counts) / 20
    rates = st.lists(counts.map(lambda k: k / 20), min_size=width, max_size=width)
    return {
        "success": success,
        "stages": np.array(stages),
        "teacher": np.array(draw(rates)),
        "before": np.array(draw(rates)),
        "untrained": np.array(draw(rates)),
    }


NAMES = (
    *("average_success", "recovery", "recovery_of_means", "forgetting_mean", "forgetting_worst"),
    *("forgetting_from_best_mean", "backward_transfer", "forward_transfer", "forward_transfer_later_stages"),
)


@settings(max_examples=60, deadline=None)
@given(histories(), st.randoms())
def test_order_of_tasks_does_not_matter(history: dict, random) -> None:
    order = list(range(len(history["stages"])))
    random.shuffle(order)
    shuffled = {name: values[..., order] for name, values in history.items()}
    one, two = continual_metrics(**history), continual_metrics(**shuffled)
    for name in NAMES:
        assert one[name] == (pytest.approx(two[name]) if two[name] is not None else None), name
    assert [one["per_task"][j]["final"] for j in order] == [row["final"] for row in two["per_task"]]


@settings(max_examples=60, deadline=None)
@given(histories())
def test_bounds_and_relations_hold(history: dict) -> None:
    m = continual_metrics(**history, episodes=20, teacher_episodes=20, resamples=50)
    assert 0 <= m["average_success"] <= 1
    assert min(row["final"] for row in m["per_task"] if row["final"] is not None) <= m["average_success"]
    if m["forgetting_mean"] is None:
        assert m["backward_transfer"] is None and m["forgetting_worst"] is None
    else:
        assert -1 <= m["forgetting_mean"] <= m["forgetting_worst"] <= 1
        assert m["backward_transfer"] == -m["forgetting_mean"]
        assert m["forgetting_from_best_mean"] >= m["forgetting_mean"] - 1e-9
        worst = m["per_task"][m["forgetting_worst_task"]]
        assert worst["forgetting"] == m["forgetting_worst"] and worst["stage"] < m["stages"]
    for row in m["per_task"]:
        for name in ("final", "teacher", "after_own_stage", "forgetting"):
            if row.get(f"{name}_interval"):
                low, high = row[f"{name}_interval"]
                assert low <= row[name] + 1e-9 and row[name] <= high + 1e-9
    json.dumps(m, allow_nan=False)


def test_bootstrap_is_repeatable_and_covers_as_promised() -> None:
    truth, tasks, episodes, trials = 0.8, 10, 20, 150
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(trials):
        seen = rng.binomial(episodes, truth, size=(1, tasks)) / episodes
        m = continual_metrics(seen, [1] * tasks, [1.0] * tasks, episodes=episodes, resamples=400)
        low, high = m["intervals"]["average_success"]
        inside += low <= truth <= high
    assert 0.88 <= inside / trials <= 0.99
    again = continual_metrics(seen, [1] * tasks, [1.0] * tasks, episodes=episodes, resamples=400)
    assert again == m


def test_score_intervals_are_the_published_ones() -> None:
    # Newcombe 1998 (Statistics in Medicine 17, 857 and 873), method 3 without and method 10.
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert newcombe(56 / 70, 70, 48 / 80, 80) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert newcombe(10 / 10, 10, 0 / 10, 10) == pytest.approx((0.6075, 1.0), abs=5e-5)


# Four stages of one task; after the third, task 0 was evaluated and task 1 was not.
HOLES = [
    [0.9, NAN, NAN, NAN],
    [1.0, 0.8, NAN, NAN],
    [0.7, NAN, 1.0, NAN],
    [0.6, 0.5, 0.9, 1.0],
]
FULL = [*HOLES[:2], [0.7, 0.3, 1.0, NAN], HOLES[3]]


def test_a_task_that_was_not_evaluated_on_the_way_changes_nothing_but_the_way() -> None:
    more = {"episodes": 20, "teacher_episodes": 20, "resamples": 300}
    holes, full = (continual_metrics(rates, [1, 2, 3, 4], [1, 1, 1, 1], **more) for rates in (HOLES, FULL))
    assert holes["success_by_stage"] == pytest.approx([0.9, 0.9, (1.0 + 2 * 0.7) / 3, 0.75])
    assert full["success_by_stage"][2] == pytest.approx(2.0 / 3)
    assert holes["success_by_stage_error"] == [0.0, 0.0, None, 0.0] and full["success_by_stage_error"] == [0.0] * 4
    assert holes["evaluated_by_stage"] == [1, 2, 2, 4] and full["evaluated_by_stage"] == [1, 2, 3, 4]
    assert [row["forgetting_from_best"] for row in holes["per_task"]] == [0.4, None, 0.1, None]
    assert [row["forgetting_from_best_interval"] is None for row in holes["per_task"]] == [False, True, False, True]
    best = {key for key in holes if key.startswith("forgetting_from_best")}
    assert len(best) == 3 and all(holes[key] is None and full[key] is not None for key in best)
    assert holes["intervals"]["forgetting_from_best_mean"] is holes["intervals"]["forgetting_from_best_worst"] is None
    the_way = {*best, "intervals", "per_task", "success_by_stage", "success_by_stage_error", "evaluated_by_stage"}
    assert {key: holes[key] for key in holes.keys() - the_way} == {key: full[key] for key in full.keys() - the_way}
    for name in holes["intervals"].keys() - best:
        assert holes["intervals"][name] == pytest.approx(full["intervals"][name], abs=0.06)  # other random numbers
    rows = ([{k: v for k, v in row.items() if "best" not in k} for row in m["per_task"]] for m in (holes, full))
    assert next(rows) == next(rows)


def test_means_over_all_tasks_are_unknown_while_some_were_not_evaluated_after_the_last_stage() -> None:
    m = continual_metrics(HOLES[:3], [1, 2, 3, 4], [1, 1, 1, 1], episodes=20, resamples=50)
    unknown = ("average_success", "recovery", "recovery_of_means", "forgetting_mean", "forgetting_worst")
    for name in (*unknown, "forgetting_from_best_mean", "backward_transfer"):
        assert m[name] is None and m["intervals"].get(name) is None, name
    assert m["average_after_own_stage"] == pytest.approx(0.9) and m["intervals"]["average_after_own_stage"]
    assert [row["final"] for row in m["per_task"]] == [0.7, None, 1.0, None]
    assert [row["forgetting"] for row in m["per_task"]] == [0.2, None, None, None]
    assert m["tasks"] == 3 and m["not_learnt"] == [3]
    json.dumps(m, allow_nan=False)


def test_each_seed_has_tasks_of_its_own_behind_the_mean_success_of_a_stage() -> None:
    other = [*HOLES[:2], [NAN, 0.3, 1.0, NAN], HOLES[3]]
    m = continual_metrics([HOLES, other], [1, 2, 3, 4], [1, 1, 1, 1], episodes=20, resamples=50)
    assert m["success_by_stage"][2] == pytest.approx(((1.0 + 2 * 0.7) / 3 + (1.0 + 2 * 0.3) / 3) / 2)
    assert m["evaluated_by_stage"] == [1, 2, 2, 4]
    assert [row["forgetting_from_best"] for row in m["per_task"]] == [None, None, 0.1, None]
    json.dumps(m, allow_nan=False)
