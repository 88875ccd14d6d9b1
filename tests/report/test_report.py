"""A report says what the files of a run say, opens without a network, and survives an unfinished run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from matplotlib.text import Text
from rich.console import Console

from hpc_cpd.errors import UserError
from hpc_cpd.evaluation.metrics import wilson
from hpc_cpd.report.figures import FIGURES
from hpc_cpd.report.page import build_report
from hpc_cpd.report.run_results import read_results
from hpc_cpd.report.style import DARK, LIGHT
from hpc_cpd.report.table import percent, points, print_table
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import DONE, read_json, write_json
from tests.report.synthetic import synthetic_run

MakeRun = Callable[..., Run]
PUSH = "metaworld/push-v3"


class Links(HTMLParser):
    """Collects every address of a page, and the open tags, to see that they close."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("href", "src", "srcset")]
        if tag not in ("meta", "link", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Make a run in a fresh folder: make_run(tasks, tasks per stage, finished stages)."""
    return lambda *arguments: synthetic_run(tmp_path / "made-up", *arguments)


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run with its report; tests only read it."""
    run = synthetic_run(tmp_path_factory.mktemp("reported") / "made-up", "MT10", 5)
    build_report(run)
    return run


def test_numbers_of_the_report_are_those_of_the_files(reported: Run) -> None:
    run = reported
    report = read_json(run.report / "metrics.json")
    last = read_json(run.stage(2) / "evaluation.json")["tasks"]
    first = read_json(run.stage(1) / "evaluation.json")["tasks"]
    rates = [record["successes"] / record["episodes"] for record in last.values()]
    lost = [(first[task]["successes"] - last[task]["successes"]) / 20 for task in first]
    assert report["metrics"]["average_success"] == pytest.approx(sum(rates) / len(rates))
    assert report["metrics"]["forgetting_mean"] == pytest.approx(sum(lost) / len(lost))
    worst = report["metrics"]["forgetting_worst_task"]
    assert (first[worst]["successes"] - last[worst]["successes"]) / 20 == pytest.approx(max(lost))
    before = read_json(run.stage(2) / "evaluation_before.json")["before"]
    zero_shot = [record["successes"] / 20 for record in before.values()]
    assert report["metrics"]["forward_transfer_later_stages"] == pytest.approx(sum(zero_shot) / len(zero_shot))
    row = next(row for row in report["rows"] if row["task"] == PUSH)
    assert row["final"] == pytest.approx(last[PUSH]["successes"] / 20) and row["stage"] == 1
    teacher = read_json(run.teacher(PUSH) / "evaluation.json")["tasks"][PUSH]
    assert row["teacher"] == pytest.approx(teacher["successes"] / 20)
    page = (run.report / "index.html").read_text()
    assert percent(report["metrics"]["average_success"]) in page
    assert report["memory"]["1"]["share"] == pytest.approx(778 / 10_000)
    assert report["notes"] == []


def test_page_opens_from_disk_without_a_network(reported: Run) -> None:
    run, page = reported, reported.report / "index.html"
    text = page.read_text()
    links = Links()
    links.feed(text)
    assert links.open == []
    assert not re.search(r"https?:|//cdn|<script|@import|url\(", text)
    pictures = [address for address in links.addresses if address.endswith(".png")]
    assert {f"{name}.png" for name in FIGURES} | {f"{name}-dark.png" for name in FIGURES} == set(pictures)
    for address in links.addresses:
        if not address.startswith(("#", "data:")):
            assert (page.parent / address).is_file(), address
    anchors = {address[1:] for address in links.addresses if address.startswith("#")}
    assert all(f'id="{anchor}"' in text for anchor in anchors)
    assert f"--config {run.folder}/config.yaml" in text and "git checkout 0123abc" in text
    assert "tasks_per_stage: 5" in text


def test_text_from_a_run_cannot_become_markup(make_run: MakeRun) -> None:
    run = make_run([PUSH], 1)
    evil = "<img src=x onerror=alert(1)>"
    write_json(run.provenance_file, {evil: evil, "commit": "abc; rm -rf /", "versions": {evil: evil}})
    text = build_report(run).read_text()
    assert "<img src=x" not in text and "&lt;img src=x" in text
    assert "git checkout abc" not in text


def test_the_name_of_a_task_cannot_become_markup(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = read_results(make_run([PUSH], 1))
    facts.rows[0]["task"] = "<script>alert(1)</script>"  # as a task family of somebody else's may call it
    monkeypatch.setattr("hpc_cpd.report.page.read_results", lambda run: facts)
    text = build_report(facts.run).read_text()
    assert "<script" not in text and "<td>&lt;script&gt;alert(1)&lt;/script&gt;</td>" in text


@pytest.mark.parametrize("finished", [0, 1])
def test_unfinished_run_has_a_report_that_says_so(make_run: MakeRun, finished: int) -> None:
    run = make_run("MT10", 5, finished)
    text = build_report(run).read_text()
    report = read_json(run.report / "metrics.json")
    assert report["stages_finished"] == finished and report["stages_planned"] == 2
    assert any("finished" in note for note in report["notes"])
    assert all(note in text for note in report["notes"] if "'" not in note)
    assert (run.report / "success_matrix.png").is_file() == (finished > 0)
    assert not (run.report / "forgetting.png").exists(), "after one stage there is nothing to forget"
    assert len(report["rows"]) == 10 and report["rows"][9]["final"] is None


def test_a_teacher_that_never_succeeded_shows_its_return(make_run: MakeRun) -> None:
    run = make_run("MT10", 5)
    path = run.teacher(PUSH) / "metrics.jsonl"
    lines = [{**json.loads(line), "success": 0.0} for line in path.read_text().splitlines()]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    facts = read_results(run)
    figure = FIGURES["teacher_curves"](facts, LIGHT)
    assert figure is not None
    drawn = {ax.get_title(loc="left"): ax.lines[0].get_ydata() for ax in figure.axes if ax.get_visible()}
    returns = [line["mean_return"] for line in lines if line["phase"] == "evaluation"]
    assert list(drawn["push-v3: return"]) == returns
    assert max(drawn["reach-v3"]) <= 1


def test_teachers_that_were_never_improved_have_no_curve(make_run: MakeRun) -> None:
    run = make_run(["metaworld/reach-v3", PUSH], 2)
    for task in ("metaworld/reach-v3", PUSH):
        path = run.teacher(task) / "metrics.jsonl"
        lines = [{**json.loads(line), "environment_steps": 0} for line in path.read_text().splitlines()]
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert FIGURES["teacher_curves"](read_results(run), LIGHT) is None


def test_stage_without_done_mark_is_not_read(make_run: MakeRun) -> None:
    run = make_run("MT10", 5)
    (run.stage(2) / DONE).unlink()
    (run.teacher(PUSH) / DONE).unlink()
    facts = read_results(run)
    assert len(facts.evaluations) == 1 and PUSH not in facts.teachers
    assert set(facts.stage_curves()) == {1} and PUSH not in facts.teacher_curves()
    assert facts.metrics is not None and facts.metrics["teacher_unknown"] == [PUSH]


def test_absent_files_are_skipped_and_named(make_run: MakeRun) -> None:
    run = make_run(["metaworld/reach-v3", PUSH], 1)
    run.provenance_file.unlink()
    for name in ("evaluation_before.json", "routing.json", "metrics.jsonl", "memory/selection.json"):
        (run.stage(2) / name).unlink()
    build_report(run)
    report = read_json(run.report / "metrics.json")
    assert any("provenance.json" in note for note in report["notes"])
    assert any("evaluation_before.json" in note for note in report["notes"])
    assert not (run.report / "routing.png").exists()
    assert (run.report / "stage_curves.png").is_file()


def test_run_of_uncommitted_source_is_named(make_run: MakeRun) -> None:
    run = make_run([PUSH], 1)
    assert read_results(run).notes == []
    write_json(run.provenance_file, {**read_json(run.provenance_file), "uncommitted_changes": True})
    assert any("no commit" in note for note in read_results(run).notes)


def test_teacher_measured_on_other_goals_is_named(make_run: MakeRun) -> None:
    run = make_run("MT10", 5)
    path = run.teacher(PUSH) / "evaluation.json"
    write_json(path, {**read_json(path), "seed": 3})
    assert any(PUSH in note and "other goals" in note for note in read_results(run).notes)


def test_damaged_file_is_one_sentence(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run([PUSH], 1)
    path = run.stage(1) / "evaluation.json"
    whole = read_json(path)
    whole["tasks"][PUSH]["successes"] = 21
    write_json(path, whole)
    with pytest.raises(UserError, match=r"evaluation\.json is damaged"):
        build_report(run)
    path.write_text('{"tasks": {')
    with pytest.raises(UserError, match=r"evaluation\.json is damaged"):
        build_report(run)
    with pytest.raises(UserError, match="not a run folder"):
        print_table(Run(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [
        ("evaluation.json", {"tasks": [1]}, "'tasks'"),
        ("evaluation_before.json", {"before": [1]}, "'before'"),
        ("evaluation.json", {"tasks": {PUSH: {"successes": 1, "episodes": 20, "goals": 21}}}, "goals"),
        ("memory/selection.json", {"memories": [{"kept_steps": "x"}]}, "whole numbers"),
        ("memory/selection.json", {"memories": []}, "budget_fraction"),
    ],
)
def test_a_file_of_the_wrong_form_is_named(make_run: MakeRun, name: str, value: object, word: str) -> None:
    run = make_run([PUSH], 1)
    write_json(run.stage(1) / name, value)
    with pytest.raises(UserError, match=f"{name} is damaged.*{word}"):
        build_report(run)


def test_wall_clock_that_is_no_number_is_unknown(make_run: MakeRun) -> None:
    run = make_run([PUSH], 1)
    write_json(run.stage(1) / "attempt.json", {"number": 1, "started": "x", "ended": 2.0})
    assert read_results(run).wall_clock() == {1: None}


def test_episodes_on_goals_that_were_played_before_do_not_narrow_an_interval(make_run: MakeRun) -> None:
    run = make_run([PUSH], 1)
    path = run.stage(1) / "evaluation.json"
    record = read_json(path)["tasks"][PUSH] | {"successes": 10, "episodes": 20}
    low = {}
    for goals in (20, 10):
        write_json(path, {"tasks": {PUSH: record | {"goals": goals}}})
        low[goals] = read_results(run).rows[0]["final_interval"][0]
    assert [low[goals] for goals in (10, 20)] == pytest.approx([wilson(0.5, goals)[0] for goals in (10, 20)])


def test_old_pictures_do_not_outlive_their_numbers(make_run: MakeRun) -> None:
    run = make_run(["metaworld/reach-v3", PUSH], 1)
    build_report(run)
    (run.stage(2) / DONE).unlink()
    build_report(run)
    assert not (run.report / "forgetting.png").exists()
    assert "forgetting.png" not in (run.report / "index.html").read_text()


def test_same_run_gives_the_same_report(reported: Run) -> None:
    run = reported
    before = {path.name: path.read_bytes() for path in run.report.iterdir()}
    build_report(run)
    assert {path.name: path.read_bytes() for path in run.report.iterdir()} == before


@pytest.mark.slow
@pytest.mark.parametrize("tasks, per_stage", [("MT50", 5), ("MT50", 1), (["metaworld/push-v3"], 1)])
def test_pictures_fit_any_number_of_tasks(make_run: MakeRun, tasks: Any, per_stage: int) -> None:
    facts = read_results(make_run(tasks, per_stage))
    for name in ("success_matrix", "teacher_and_student", "routing", "stage_curves"):
        figure = FIGURES[name](facts, LIGHT)
        assert figure is not None
        figure.draw_without_rendering()
        width, height = figure.get_size_inches()
        for ax in figure.axes:
            left, right = ax.get_xlim()
            shown = [label for label in ax.get_xticklabels() if left <= label.get_position()[0] <= right]
            for label in [*ax.get_yticklabels(), *shown]:
                box = label.get_window_extent()
                assert box.x0 >= -1 and box.x1 <= width * figure.dpi + 1, (name, label.get_text())
            boxes = [label.get_window_extent() for label in ax.get_yticklabels() if name != "stage_curves"]
            boxes.sort(key=lambda box: box.y0)
            assert all(a.y1 <= b.y0 + 2 for a, b in pairwise(boxes)), name
        assert height < 20


def test_dark_picture_is_dark_and_light_is_light(reported: Run) -> None:
    run = reported
    for name in FIGURES:
        light, dark = (imread(run.report / f"{name}{theme.suffix}.png") for theme in (LIGHT, DARK))
        assert light[0, 0, :3].mean() > 0.9 > 0.2 > dark[0, 0, :3].mean()
        assert light.shape == dark.shape
        for theme in (LIGHT, DARK):
            figure = FIGURES[name](read_results(run), theme)
            assert figure is not None
            numbers = {text for ax in figure.axes for text in ax.texts}  # these stand on tiles, not on the page
            for text in set(figure.findobj(Text)) - numbers:
                if text.get_text():
                    contrast = abs(np.mean(to_rgb(text.get_color())) - np.mean(to_rgb(theme.background)))
                    assert contrast > 0.35, (theme.name, text.get_text())


def test_final_table_lists_tasks_in_order_of_learning(reported: Run) -> None:
    run = reported
    rows = read_results(run).rows
    assert [row["stage"] for row in rows] == [1] * 5 + [2] * 5
    assert {"task", "teacher", "after_own_stage", "final", "forgetting"} <= set(rows[0])
    text = StringIO()
    print_table(run, Console(file=text, width=80))
    printed = text.getvalue()
    assert "reach-v3" in printed and "Forgetting" in printed and "At the end" in printed
    assert printed.index("reach-v3") < printed.index("window-close-v3")
    lines = [line for line in printed.splitlines() if line.strip().startswith("push-v3")]
    assert lines[0].split()[1:5] == ["1", *(percent(rows[1][key]) for key in ("teacher", "after_own_stage", "final"))]
    assert (percent(0.945), percent(1.0), percent(None)) == ("94.5%", "100%", "-")
    assert (points(-0.05), points(0.05, signed=True), points(-0.0001)) == ("-5 pp", "+5 pp", "0 pp")


def test_report_does_not_import_torch(make_run: MakeRun) -> None:
    run = make_run([PUSH], 1)
    code = (
        "import sys; from pathlib import Path; from hpc_cpd.run.paths import Run\n"
        "from hpc_cpd.report.table import print_table; print_table(Run(sys.argv[1]))\n"
        "assert 'matplotlib' not in sys.modules, 'the table alone needs no pictures'\n"
        "from hpc_cpd.report.page import build_report; build_report(Run(sys.argv[1]))\n"
        "import json; print(json.dumps([m for m in ('torch', 'metaworld', 'mujoco', 'deepspeed') if m in sys.modules]))"
    )
    answer = subprocess.run([sys.executable, "-c", code, str(run.folder)], capture_output=True, text=True, check=True)
    assert json.loads(answer.stdout.splitlines()[-1]) == []
