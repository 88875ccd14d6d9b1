"""What is told about a run that evaluates only some old tasks on its way (evaluation.old_tasks_per_stage)."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from rich.console import Console

from hpc_cpd.config import config_as_yaml, load_config
from hpc_cpd.evaluation.schedule import tasks_after
from hpc_cpd.report.comparison import compare
from hpc_cpd.report.comparison_page import build_comparison
from hpc_cpd.report.figures import COMPARISON_FIGURES, FIGURES
from hpc_cpd.report.page import build_report
from hpc_cpd.report.run_results import RunResults, read_results
from hpc_cpd.report.style import LIGHT
from hpc_cpd.report.table import print_table
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import read_json, write_json
from hpc_cpd.tasks.registry import run_plan
from tests.report.synthetic import synthetic_run
from tests.report.synthetic_sweep import synthetic_sweep


def forget(run: Run, count: int | None) -> Run:
    """Leave out of `run` what it would not have evaluated with evaluation.old_tasks_per_stage=`count`."""
    word = f"evaluation.old_tasks_per_stage={'null' if count is None else count}"
    run.config_file.write_text(config_as_yaml(load_config(run.config_file, [word])))
    config, plan = run.config(), run_plan(run)
    for path in run.folder.glob("stages/*/evaluation.json"):
        evaluation = read_json(path)
        due = tasks_after(config, plan, int(path.parent.name))
        write_json(path, evaluation | {"tasks": {task: evaluation["tasks"][task] for task in due}})
    return run


def results(folder: Path, count: int | None, finished: int | None = None) -> RunResults:
    return read_results(forget(synthetic_run(folder / f"{count}", "MT10", 2, finished), count))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_finished_run_has_the_numbers_of_one_that_evaluated_everything(tmp_path: Path, count: int) -> None:
    some, every = results(tmp_path, count), results(tmp_path, None)
    assert some.metrics is not None and every.metrics is not None
    for name in ("average_success", "recovery", "forgetting_mean", "forgetting_worst_task", "forward_transfer"):
        assert some.metrics[name] == every.metrics[name] is not None
    assert some.metrics["forgetting_from_best_mean"] is None and every.metrics["forgetting_from_best_mean"] is not None
    assert some.metrics["evaluated_by_stage"] == [2, 2 + min(count, 2), 2 + count, 2 + count, 10]
    assert every.notes == [] and every.partly == [False] * 5
    (note,) = some.notes
    assert f"After {3 if count < 2 else 2} of 5 finished stages" in note and f"old_tasks_per_stage={count}" in note
    assert "forgetting from the best is not known" in note
    assert ("there is no mean success" in note) == (count == 0) and ("estimated from a draw" in note) == (count > 0)
    means, full = some.metrics["success_by_stage"], every.metrics["success_by_stage"]
    assert [means[0], means[4]] == [full[0], full[4]]
    for stage in (3, 4):
        if not count:
            assert means[stage - 1] is None
            continue
        rates = dict(zip(some.tasks, some.matrix()[stage - 1], strict=True))
        old = [rates[task] for tasks in some.stages[: stage - 1] for task in tasks]
        new = sum(rates[task] for task in some.stages[stage - 1])
        assert means[stage - 1] == pytest.approx((new + len(old) * np.nanmean(old)) / (2 + len(old)))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_an_unfinished_run_has_no_means_over_the_tasks_that_happened_to_be_drawn(tmp_path: Path, count: int) -> None:
    some, every = results(tmp_path, count, finished=4), results(tmp_path, None, finished=4)
    assert some.metrics is not None and every.metrics is not None
    assert some.metrics["not_learnt"] == every.metrics["not_learnt"]
    for name in ("average_success", "recovery", "forgetting_mean", "forgetting_worst"):
        assert some.metrics[name] is None and every.metrics[name] is not None
    assert some.metrics["average_after_own_stage"] == every.metrics["average_after_own_stage"]
    assert sum(row["final"] is not None for row in some.rows) == 2 + count
    assert not any("left out" in note for note in some.notes)
    mean, error = some.metrics["success_by_stage"][3], some.metrics["success_by_stage_error"][3]
    told = some.notes[-1]
    assert f"After stage 4, {2 + count} of 8 tasks learnt were evaluated" in told
    assert (mean is None) == ("estimated" not in told) == (count == 0)
    assert (error is None) == ("standard error" not in told) == (count < 2)
    if mean is not None:
        assert f"{100 * mean:.1f}%" in told
    screen = StringIO()
    print_table(some.run, Console(file=screen, width=100))
    assert "not all tasks were evaluated" in screen.getvalue()
    page = build_report(some.run).read_text()
    assert page.count("not all tasks were evaluated yet") == 4 and ">None" not in page and ">nan" not in page
    assert told.replace("'", "&#x27;") in page
    compared = compare([some.run.folder])
    build_comparison(compared, tmp_path / "page")
    for name, draw in FIGURES.items():
        figure = draw(some, LIGHT)
        assert figure is not None or name == "forgetting"
        if figure is not None:
            figure.draw_without_rendering()


def test_a_task_that_was_due_and_is_missing_is_named_as_before(tmp_path: Path) -> None:
    run = forget(synthetic_run(tmp_path / "run", "MT10", 2, 4), 1)
    path = run.stage(4) / "evaluation.json"
    evaluation = read_json(path)
    gone = next(iter(evaluation["tasks"]))  # the old one that was drawn
    del evaluation["tasks"][gone]
    write_json(path, evaluation)
    facts = read_results(run)
    assert [note for note in facts.notes if "left out" in note] == [
        f"{gone} lacks an evaluation after its own or the last stage and is left out."
    ]


def test_a_former_last_stage_stays_exact_when_the_stream_goes_on(tmp_path: Path) -> None:
    run = forget(synthetic_run(tmp_path / "run", "MT10", 2, 4), 1)
    whole = results(tmp_path, None, finished=4)
    evaluated = read_json(whole.run.stage(3) / "evaluation.json")  # as when stage 3 was the last one
    write_json(run.stage(3) / "evaluation.json", evaluated)
    facts = read_results(run)
    assert facts.metrics is not None and whole.metrics is not None
    assert facts.partly == [False, True, False, True]
    assert facts.metrics["success_by_stage"][2] == whole.metrics["success_by_stage"][2]


def test_a_comparison_says_which_rows_are_estimated_and_draws_them_hollow(tmp_path: Path) -> None:
    sweep = synthetic_sweep(tmp_path / "sweep", "MT10", 2)
    for seed in (0, 1):
        forget(Run(sweep / "ours" / f"seed-{seed}"), 2)
    comparison = compare([sweep])
    ours, other = comparison.groups
    assert ours.metrics is not None and other.metrics is not None
    assert ours.metrics["average_success"] is not None and ours.metrics["forgetting_from_best_mean"] is None
    assert other.metrics["forgetting_from_best_mean"] is not None
    assert any(note.startswith("ours: After 2 of 5") for note in comparison.notes)
    assert any("old_tasks_per_stage), which their wall-clock" in note for note in comparison.notes)
    assert "evaluation.old_tasks_per_stage" in comparison.settings()
    figure = COMPARISON_FIGURES["success_by_stage"](comparison, LIGHT)
    assert figure is not None
    figure.draw_without_rendering()
    (ax,) = figure.axes
    background = to_hex(LIGHT.background)
    hollow = [line for line in ax.lines if to_hex(str(line.get_markerfacecolor())) == background]
    assert [list(line.get_xdata()) for line in hollow] == [[6, 8]]
    drawn = {line.get_label(): list(line.get_xdata()) for line in ax.lines}
    assert drawn["ours"] == drawn["other"] == [2, 4, 6, 8, 10]
    for seed in (0, 1):
        forget(Run(sweep / "ours" / f"seed-{seed}"), 0)
    figure = COMPARISON_FIGURES["success_by_stage"](compare([sweep]), LIGHT)
    assert figure is not None
    drawn = {line.get_label(): list(line.get_xdata()) for line in figure.axes[0].lines}
    assert drawn["ours"] == [2, 10] and drawn["other"] == [2, 4, 6, 8, 10]
