"""A comparison says of each row what the reports of its runs say, for any runs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from hpc_cpd.errors import UserError
from hpc_cpd.report.comparison import SWEEP_FILE, cells, compare, headings, print_comparison, write_sweep_file
from hpc_cpd.report.comparison_page import build_comparison, results_page, write_results
from hpc_cpd.report.run_results import read_results
from hpc_cpd.report.table import percent
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import DONE, read_json, write_json
from hpc_cpd.sweep.plan import read_sweep
from tests.report.synthetic import EPISODES, synthetic_run
from tests.report.synthetic_sweep import SECONDS, synthetic_sweep
from tests.report.test_report import Links

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sweep; tests only read it."""
    return synthetic_sweep(tmp_path_factory.mktemp("sweep") / "made-up")


@pytest.fixture
def own(sweep: Path, tmp_path: Path) -> Path:
    """The same, to break."""
    return Path(shutil.copytree(sweep, tmp_path / "made-up", symlinks=True))


def test_a_row_of_one_run_has_the_numbers_of_its_report(sweep):
    folder = sweep / "other" / "seed-0"
    (group,) = compare([folder]).groups
    alone = read_results(Run(folder)).metrics
    assert {key: value for key, value in group.metrics.items() if key != "per_task"} == alone


def test_a_row_of_two_seeds_has_their_mean_and_an_interval_over_both(sweep):
    ours, other = compare([sweep]).groups
    means = [read_results(Run(sweep / "ours" / f"seed-{seed}")).metrics["average_success"] for seed in (0, 1)]
    assert ours.metrics["average_success"] == pytest.approx(sum(means) / 2) and means[0] > means[1]
    low, high = ours.metrics["intervals"]["average_success"]
    assert low <= min(means) + 0.02 and high >= max(means) - 0.02  # the seeds are drawn again too
    assert other.metrics["seeds"] == 1 and ours.metrics["seeds"] == 2
    assert ours.seconds == other.seconds == 2 * SECONDS


def test_the_seconds_of_a_run_are_unknown_when_those_of_a_stage_are(own):
    (own / "ours" / "seed-1" / "stages" / "2" / "attempt.json").unlink()
    ours, other = compare([own]).groups
    assert ours.seconds is None and other.seconds == 2 * SECONDS


def test_shared_teachers_count_their_episodes_once(own):
    def width() -> float:
        low, high = compare([own]).groups[0].metrics["intervals"]["teacher_success"]
        return high - low

    together = width()
    for seed in (0, 1):  # the same rates, each with teachers of its own: twice the episodes
        link = own / "ours" / f"seed-{seed}" / "teachers"
        link.unlink()
        shutil.copytree(own / "shared" / "abc" / "teachers", link)
    assert width() < 0.85 * together


def test_only_finished_runs_count_and_the_others_are_named(own):
    (own / "ours" / "seed-1" / "stages" / "2" / DONE).unlink()
    comparison = compare([own])
    alone = read_results(Run(own / "ours" / "seed-0")).metrics
    assert comparison.groups[0].metrics["average_success"] == alone["average_success"]
    assert comparison.notes[0] == "ours: 1 of 2 runs are finished (seed 1: 1 of 2 stages)."
    shutil.rmtree(own / "other")
    assert compare([own]).groups[1].metrics is None


def test_success_of_a_student_that_is_not_told_its_task_is_a_column_of_its_own(own):
    told = read_results(Run(own / "other" / "seed-0"))
    assert compare([own]).groups[1].untold is None
    assert "Task not told" not in headings(compare([own]))
    stage = told.run.stage(len(told.stages))
    evaluation = read_json(stage / "evaluation.json")
    for number, record in enumerate(evaluation["tasks"].values()):
        record["successes"] = record["episodes"] if number else 0
    write_json(stage / "evaluation_inferred.json", evaluation)
    comparison = compare([own])
    place = headings(comparison).index("Task not told")
    rows = [cells(comparison, group)[place] for group in comparison.groups]
    assert rows[0] == ("-", "")
    assert rows[1] == ("90%", "90.0 to 90.0%")  # nine of ten tasks, each for sure


def test_rows_that_are_not_begun_are_named_and_take_no_room(own):
    shutil.rmtree(own / "other")
    comparison = compare([own])
    assert comparison.notes[-1] == "No results yet: other."
    screen = StringIO()
    print_comparison(comparison, Console(file=screen, width=160))
    assert "ours" in screen.getvalue() and "other" not in screen.getvalue()


def test_the_page_shows_every_row_setting_and_command_and_opens_without_a_network(own, tmp_path):
    page = build_comparison(compare([own]), tmp_path / "page")
    text = page.read_text()
    links = Links()
    links.feed(text)
    assert links.open == [] and not re.search(r"https?:|//cdn|<script|@import|url\(", text)
    for address in links.addresses:
        if not address.startswith(("#", "data:")):
            assert (page.parent / address).exists(), address
    for name in ("success_by_stage", "forgetting", "final_success"):
        assert f"{name}.png" in text and f"{name}-dark.png" in text
    assert "<td>method.freeze_shared_layers</td><td>true</td><td>false</td>" in text
    assert "hpc-cpd sweep x.yaml --only other" in text and "ours | teaches" in text
    numbers = read_json(page.parent / "metrics.json")
    assert numbers["settings"] == {"method.freeze_shared_layers": {"ours": True, "other": False}}
    assert [row["seeds_finished"] for row in numbers["rows"]] == [[0, 1], [0]]


def test_the_names_and_sentences_of_rows_cannot_become_markup(own, tmp_path):
    evil = "<script>alert(1)<!--"
    rows = read_json(own / SWEEP_FILE)["rows"]
    (own / "other").rename(own / evil)
    other = rows.pop("other") | {"title": evil, "teaches": evil, "command": evil}
    write_sweep_file(own, "made-up", rows | {evil: other})
    text = build_comparison(compare([own]), tmp_path / "page").read_text()
    assert "<script" not in text and "<!--" not in text
    escaped = "&lt;script&gt;alert(1)&lt;!--"
    for place in (
        f"<td>{escaped}<small>{escaped}</small></td>",
        f"<b>{escaped}</b>: {escaped}",
        f"# {escaped}\n{escaped}",
    ):
        assert place in text


def test_runs_of_different_tasks_stand_on_one_page_and_it_says_so(sweep, tmp_path):
    few = synthetic_run(tmp_path / "few", ["metaworld/reach-v3", "gymnasium/Pendulum-v1"], 1)
    comparison = compare([sweep, few.folder])
    assert "The rows have different tasks, so their means are over different tasks." in comparison.notes
    assert len(comparison.tasks) == 11
    text = build_comparison(comparison, tmp_path / "page").read_text()
    assert "few" in text
    screen = StringIO()
    print_comparison(comparison, Console(file=screen, width=160))
    assert re.search(r"ours +2 +\d", screen.getvalue()) and re.search(r"few +1 +\d", screen.getvalue())


def test_runs_of_one_name_are_told_apart_by_their_folders_and_none_may_be_named_twice(sweep):
    comparison = compare([sweep / "ours" / "seed-0", sweep / "other" / "seed-0"])
    assert [group.name for group in comparison.groups] == ["ours/seed-0", "other/seed-0"]
    with pytest.raises(UserError, match="named twice"):
        compare([sweep / "ours" / "seed-0", sweep / "ours" / "seed-0"])


def test_rows_of_one_name_that_have_no_run_yet_do_not_clash(own, tmp_path):
    for sweep in (own, Path(shutil.copytree(own, tmp_path / "again", symlinks=True))):
        shutil.rmtree(sweep / "other")
    names = [group.name for group in compare([own, tmp_path / "again"]).begun]
    assert len(set(names)) == 2 and all(name.endswith("/ours/seed-0") for name in names)


def test_what_the_numbers_of_a_row_leave_out_is_said(own):
    run = Run(own / "other" / "seed-0")
    path = run.teacher(read_results(run).tasks[0]) / "evaluation.json"
    evaluation = read_json(path)
    next(iter(evaluation["tasks"].values()))["successes"] = 0
    write_json(path, evaluation)
    assert any(note.startswith("other: The teachers of") and "leaves them out" in note for note in compare([own]).notes)


def test_where_nothing_is_forgotten_no_task_is_named(own):
    comparison = compare([own])
    group, place = comparison.groups[0], headings(comparison).index("Worst forgetting")
    assert group.metrics["forgetting_worst"] > 0 and cells(comparison, group)[place][1]
    group.metrics["forgetting_worst"] = 0.0
    assert cells(comparison, group)[place] == ("0 pp", "")


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path} is not a run folder"):
        compare([tmp_path])


def test_the_page_of_results_has_the_same_bytes_for_the_same_files(own):
    results = own.parent
    first = write_results(results).read_bytes()
    pictures = {path: path.read_bytes() for path in own.glob("*.png")}
    assert write_results(results).read_bytes() == first and len(pictures) == 2
    assert all(path.read_bytes() == data for path, data in pictures.items())
    text = first.decode()
    success = compare([own]).groups[0].metrics["average_success"]
    assert f"| ours | 2 | {percent(success)} (" in text and f"{EPISODES} episodes per task" in text
    assert "- **ours**: ours | teaches" in text and "x86-64, 2 cores. Commit: `0123abc`" in text
    assert "hpc-cpd evaluate runs/made-up/ours/seed-0 --stage 2 --episodes 50 --seed 123" in text
    for picture in re.findall(r"\]\(([^)]+\.png)\)", text):
        assert (results.parent / picture).is_file()


def test_a_changed_number_changes_the_page(own):
    before = results_page(own.parent)
    path = own / "other" / "seed-0" / "stages" / "2" / "evaluation.json"
    evaluation = read_json(path)
    next(iter(evaluation["tasks"].values()))["successes"] = 3
    path.write_text(json.dumps(evaluation))
    assert results_page(own.parent) != before


def test_the_committed_page_of_results_is_what_the_command_makes():
    folder = ROOT / "docs" / "results"
    if not folder.is_dir():
        pytest.skip("no results are committed yet")
    assert folder.with_name("results.md").read_text() == results_page(folder), "run: hpc-cpd results"


@pytest.mark.parametrize("name", sorted(path.parent.name for path in (ROOT / "docs" / "results").glob("*/sweep.json")))
def test_what_is_said_of_published_rows_is_what_their_sweep_says_today(name):
    said = {row.name: (row.title, row.teaches) for row in read_sweep(ROOT / f"configs/sweeps/{name}.yaml").rows}
    rows = read_json(ROOT / "docs" / "results" / name / "sweep.json")["rows"]
    published = {row: (values["title"], values["teaches"]) for row, values in rows.items()}
    assert published == said, f"run: hpc-cpd sweep configs/sweeps/{name}.yaml --publish docs/results"


def test_a_comparison_does_not_import_torch(sweep, tmp_path):
    program = (
        "import sys; from pathlib import Path\n"
        "from hpc_cpd.report.comparison import compare; from hpc_cpd.report.comparison_page import build_comparison\n"
        f"build_comparison(compare([Path({str(sweep)!r})]), Path({str(tmp_path)!r}))\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
