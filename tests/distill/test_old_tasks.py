"""A stage before the last evaluates a draw of the old tasks, the same one however often it is begun."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hpc_cpd.distill.validation import lengthens
from hpc_cpd.evaluation.schedule import tasks_after
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import DONE, read_json
from hpc_cpd.tasks.registry import run_plan
from tests.distill.ranks import finish, in_turn, start_ranks
from tests.distill.synthetic import TASKS, make_run, synthetic_config

FILES = ("evaluation.json", "evaluation_inferred.json")
WORDS = ("stream.tasks_per_stage=1", "evaluation.old_tasks_per_stage=1", "evaluation.infer_task=true")
QUICK = ("distill.phase1_steps=2", "distill.phase2_steps=2", "distill.warmup_steps=0")
SHORT = f"stream.tasks=[{','.join(TASKS[:3])}]"


def evaluations(run: Run, stage: int) -> list[dict[str, Any]]:
    return [read_json(run.stage(stage) / name) for name in FILES]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Three stages of one task; the stream can go on with a fourth."""
    run = make_run(tmp_path_factory.mktemp("old_tasks") / "run", *WORDS, *QUICK, SHORT)
    finish(start_ranks(1, *in_turn(*((run.folder, stage) for stage in (1, 2, 3)))))
    return run


def test_both_evaluations_of_a_stage_are_of_the_tasks_that_are_due_and_say_what_they_stand_for(run: Run) -> None:
    assert [list(one["tasks"]) for one in evaluations(run, 2)] == [TASKS[:2]] * 2
    assert [list(one["tasks"]) for one in evaluations(run, 3)] == [TASKS[:3]] * 2, "the last stage evaluates all"
    for stage in (1, 2, 3):
        routing = read_json(run.stage(stage) / "routing.json")["tasks"]
        for one in evaluations(run, stage):
            assert list(one["tasks"]) == list(routing)
            assert (one["new_tasks"], one["tasks_learnt"]) == ([TASKS[stage - 1]], stage)


def test_a_stage_that_goes_on_evaluates_the_same_tasks_and_a_longer_stream_keeps_what_is_there(run: Run) -> None:
    """The former last stage keeps its evaluation of all tasks; begun again, it is one on the way."""
    before = [(run.stage(3) / name).read_bytes() for name in FILES]
    longer = synthetic_config(*WORDS, *QUICK)
    assert lengthens(run.config(), longer)
    run.open(longer, {}, longer=True)
    finish(start_ranks(1, *in_turn((run.folder, 3), (run.folder, 4))))
    assert [(run.stage(3) / name).read_bytes() for name in FILES] == before
    assert [list(one["tasks"]) for one in evaluations(run, 4)] == [TASKS] * 2
    for name in (*FILES, DONE):
        (run.stage(3) / name).unlink()
    finish(start_ranks(1, run.folder, 3))
    due = tasks_after(run.config(), run_plan(run), 3)
    assert len(due) == 2 and due[1] == TASKS[2]
    assert [list(one["tasks"]) for one in evaluations(run, 3)] == [due] * 2
    for one, former in zip(evaluations(run, 3), map(json.loads, before), strict=True):
        assert one["tasks"] == {task: former["tasks"][task] for task in due}
