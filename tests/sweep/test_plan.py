"""A sweep's file becomes runs of the ordinary launcher, or one sentence that says what is wrong with it."""

from __future__ import annotations

import os
import shlex
import signal
from pathlib import Path

import pytest

from hpc_cpd.config import load_config
from hpc_cpd.errors import StopRequested, UserError
from hpc_cpd.launch import _parser
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import mark_done
from hpc_cpd.sweep.plan import choose, link, read_sweep, shared_by
from hpc_cpd.sweep.publish import publish_sweep
from hpc_cpd.sweep.runner import finished, note_rows, run_sweep

GOOD = """
name: two
config: configs/base.yaml
settings: {evaluation.episodes: 7}
rows:
  ours: {seeds: [3, 1], teaches: "It works."}
  hot: {settings: {distill.learning_rate: 0.00001, stream.tasks: [metaworld/reach-v3, metaworld/push-v3]}}
  longer: {settings: {trajectories.episodes: 9}, config: configs/base.yaml}
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a sweep's file into the working directory, which holds configs/base.yaml."""
    monkeypatch.chdir(tmp_path)
    Path("configs").mkdir()
    Path("configs/base.yaml").write_text("name: base\nstream: {tasks: [metaworld/push-v3, metaworld/reach-v3]}\n")

    def write(text: str = GOOD) -> Path:
        Path("sweep.yaml").write_text(text)
        return Path("sweep.yaml")

    return write


def test_every_command_makes_the_run_with_just_these_settings(write):
    sweep = read_sweep(write())
    assert [entry.name for entry in sweep.entries] == ["ours, seed 3", "ours, seed 1", "hot, seed 0", "longer, seed 0"]
    for entry in sweep.entries:
        words = shlex.split(shlex.join(entry.command))
        assert words[:3] == ["python", "-m", "hpc_cpd.launch"]
        arguments = _parser().parse_intermixed_args(words[3:])
        assert load_config(arguments.config, arguments.settings) == entry.config
        assert Path(arguments.run) == Path("runs/two") / entry.row / f"seed-{entry.seed}"
    hot = sweep.entries[2].config
    assert (hot.seed, hot.evaluation.episodes, hot.distill.learning_rate) == (0, 7, 1e-5)


def test_rows_share_teachers_if_and_only_if_they_ask_for_the_same(write):
    sweep = read_sweep(write())
    shared = shared_by(sweep, sweep.entries)
    ours, again, hot, longer = (shared[entry.name] for entry in sweep.entries)
    assert ours is again is hot and longer.run.folder != ours.run.folder  # neither seed nor order nor distill matter
    assert ours.config.seed == 0 or ours.config.seed == sweep.data_seed
    assert (ours.config.evaluation.episodes, longer.config.trajectories.episodes) == (7, 9)
    first = ours.run.folder
    sweep = read_sweep(write(GOOD.replace("  ours:", "  new: {settings: {teachers.ranks: 5}}\n  ours:")))
    assert {s.run.folder for n, s in shared_by(sweep, sweep.entries).items() if n != "longer, seed 0"} == {first}


def test_links_are_relative_and_a_run_with_other_data_is_refused(write):
    sweep = read_sweep(write())
    entry = sweep.entries[0]
    shared = shared_by(sweep, [entry])[entry.name]
    for _ in range(2):
        link(entry, shared)
    assert os.readlink(entry.run.folder / "teachers") == f"../../shared/{shared.run.folder.name}/teachers"
    other = shared_by(sweep, sweep.entries)["longer, seed 0"]
    link(entry, other)  # nothing was learnt yet
    assert other.run.folder.name in os.readlink(entry.run.folder / "trajectories")
    entry.run.open(entry.config, {})
    with pytest.raises(UserError, match="not the teachers that the sweep asks for"):
        link(entry, shared)
    assert other.run.folder.name in os.readlink(entry.run.folder / "teachers")


def test_a_run_is_finished_when_all_stages_are_and_the_settings_are_the_same(write):
    entry = read_sweep(write()).entries[0]
    entry.run.open(entry.config, {})
    assert not finished(entry)
    mark_done(entry.run.stage(1), {})
    assert finished(entry)
    changed = read_sweep(write(GOOD.replace("evaluation.episodes: 7", "evaluation.episodes: 8"))).entries[0]
    assert not finished(changed)


def test_a_sweep_that_is_asked_to_stop_before_it_begins_starts_nothing(write, monkeypatch):
    sweep = read_sweep(write())
    monkeypatch.setattr("hpc_cpd.sweep.runner.StopFlag.install", lambda flag: flag._note(signal.SIGTERM, None) or flag)
    with pytest.raises(StopRequested, match="the same command goes on"):
        run_sweep(sweep, sweep.rows, "local", 1)
    assert not list(Path("runs/two").rglob("sweep.log")) and not Path("runs/two/lock.json").exists()


def test_a_sweep_is_not_put_into_a_run(write):
    sweep = read_sweep(write())
    Run(sweep.folder).open(sweep.entries[0].config, {})
    with pytest.raises(UserError, match="is a run, so no sweep can be there"):
        run_sweep(sweep, sweep.rows, "local", 1)


def test_the_note_beside_the_runs_has_every_row_and_its_words(write):
    sweep = read_sweep(write())
    note_rows(sweep)
    before = Path("runs/two/sweep.json").stat().st_mtime_ns
    note_rows(sweep)
    text = Path("runs/two/sweep.json").read_text()
    assert Path("runs/two/sweep.json").stat().st_mtime_ns == before
    assert "It works." in text and "hpc-cpd sweep sweep.yaml --only ours" in text


def test_nothing_is_published_before_a_run_is_finished(write):
    sweep = read_sweep(write())
    with pytest.raises(UserError, match=r"no run of sweep\.yaml is finished"):
        publish_sweep(sweep, sweep.rows, Path("docs/results"))
    assert not Path("docs").exists() and not Run("runs/two").folder.exists()


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (("seeds: [3, 1]", "seed: [3, 1]"), "unknown setting 'rows.ours.seed'; did you mean 'rows.ours.seeds'?"),
        (("settings: {ev", "setings: {ev"), "unknown setting 'setings'; did you mean 'settings'?"),
        (
            ("distill.learning_rate", "distill.learning_rat"),
            "rows.hot: unknown setting 'distill.learning_rat'; did you",
        ),
        (("distill.learning_rate: 0.00001", "seed: 4"), "'rows.hot.settings.seed' is no setting of a row"),
        (("distill.learning_rate: 0.00001", "distill: {ranks: 1}"), "'rows.hot.settings.distill' is a group"),
        (
            ("[3, 1]", "[3, 3]"),
            "'rows.ours.seeds' (different whole numbers from 0, such as [0, 1, 2]): value error, one is there twice",
        ),
        (
            ("[3, 1]", "3"),
            "'rows.ours.seeds' (different whole numbers from 0, such as [0, 1, 2]): input should be a valid list",
        ),
        (
            ("config: configs/base.yaml\nset", "config: configs/bas.yaml\nset"),
            "there is no config file configs/bas.yaml",
        ),
        (("config: configs/base.yaml\nset", "set"), "'rows.ours' has no config"),
        (("  hot:", "  shared:"), "a row cannot be called 'shared'"),
        (("  hot:", "  a/b:"), "'rows.a/b.[key]': string should match pattern"),
        (('It works."', 'It works.", title: 5'), "'rows.ours.title': input should be a valid string, but it is 5"),
        (("[3, 1]", "[3, true]"), "input should be a valid integer, but it is True"),
        (("[3, 1]", "[]"), "should have at least 1 item"),
        (("rows:", "row:"), "unknown setting 'row'; did you mean 'rows'?"),
        (("{evaluation.episodes: 7}", "7"), "'settings': input should be a valid dictionary, but it is 7"),
        (("name: two", "name: [two"), "is not valid YAML"),
    ],
)
def test_a_mistake_is_one_sentence_with_the_file_and_the_key(write, wrong, sentence):
    assert wrong[0] in GOOD
    with pytest.raises(UserError) as caught:
        read_sweep(write(GOOD.replace(wrong[0], wrong[1], 1)))
    assert "sweep.yaml" in str(caught.value) and sentence in str(caught.value) and "\n" not in str(caught.value)
    assert not Path("runs").exists()


def test_an_unknown_row_is_named_with_the_nearest(write):
    sweep = read_sweep(write())
    assert [row.name for row in choose(sweep, ["hot"])] == ["hot"] and len(choose(sweep, [])) == 3
    with pytest.raises(UserError, match="no row 'our'; did you mean 'ours'"):
        choose(sweep, ["our"])


SWEEPS = sorted((Path(__file__).parents[2] / "configs" / "sweeps").glob("*.yaml"))


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_every_sweep_of_the_repository_is_valid_says_what_it_is_and_repeats_no_row(file):
    sweep = read_sweep(file)
    assert sweep.name == file.stem and file.read_text().startswith("# ")
    settings = [entry.config.model_dump_json() for entry in sweep.entries]
    assert len(set(settings)) == len(settings) >= 4
