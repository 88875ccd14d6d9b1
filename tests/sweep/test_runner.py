"""In which order a sweep launches what, and what becomes of it when a launch fails. The launchers are stand-ins."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_cpd.cluster.ranks import Outcome
from hpc_cpd.run.publish import mark_done
from hpc_cpd.sweep import runner
from hpc_cpd.sweep.plan import read_sweep, shared_by

SWEEP = """
config: base.yaml
rows:
  one: {seeds: [0, 1]}
  two: {settings: {distill.phase1_steps: 3}}
  other: {settings: {trajectories.episodes: 3}}
"""


@pytest.fixture
def launched(tmp_path, monkeypatch):
    """Launches of a sweep: launched(code of a name that contains a word) -> exit code, [words of each launch]."""
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text("stream: {tasks: [metaworld/reach-v3]}\n")
    Path("s.yaml").write_text(SWEEP)
    sweep = read_sweep(Path("s.yaml"))
    kinds = {one.run.folder.name: one for one in shared_by(sweep, sweep.entries).values()}

    def run(where: str, failing: dict[str, int] | None = None):
        batches = []

        def stand_in(launches, at_once, stop, show):
            batches.append((at_once, [(launch.name, launch.argv) for launch in launches]))
            ended = []
            for launch in launches:
                code = (failing or {}).get(launch.name.split()[0].rstrip(","), 0)
                ended.append(Outcome(launch.name, code, "why"))
                if launch.name.startswith("teachers ") and code == 0:
                    kind = kinds[launch.name.split()[1]]
                    assert kind.run.folder.with_suffix(".yaml").is_file()
                    for folder in (kind.run.teacher("metaworld/reach-v3"), kind.run.trajectories("metaworld/reach-v3")):
                        mark_done(folder, {})
            return ended

        monkeypatch.setattr(runner, "supervise", stand_in)
        return runner.run_sweep(sweep, sweep.rows, where, 2), batches

    return run


def test_teachers_are_made_first_each_kind_once_and_the_rows_have_them(launched):
    code, ((alone, teachers), (at_once, rows)) = launched("local")
    assert code == 0 and (alone, at_once) == (1, 2)
    assert len(teachers) == 2 and [name for name, _ in rows] == [
        "one, seed 0",
        "two, seed 0",
        "other, seed 0",
        "one, seed 1",
    ]
    for name, words in rows:
        assert words[-2:] == ["--cluster", "local"] and "all" in words
        run = Path("runs/s") / name.split(",")[0] / f"seed-{name[-1]}"
        assert (run / "teachers/metaworld/reach-v3/DONE").is_file() and (run / "trajectories").is_symlink()
    _, (teachers, _) = launched("local")
    assert teachers[1] == []  # they are there


def test_on_slurm_the_teachers_are_waited_for_and_the_rows_submitted_one_after_the_other(launched):
    _, ((_, teachers), (at_once, rows)) = launched("slurm")
    assert all(words[-3:] == ["--cluster", "slurm", "--wait"] for _, words in teachers)
    assert at_once == 1 and all(words[-2:] == ["--cluster", "slurm"] and "--wait" not in words for _, words in rows)


def test_a_row_that_fails_is_told_with_its_exit_code_and_the_others_are_run(launched, capsys):
    code, (_, (_, rows)) = launched("local", {"two": 2})
    assert code == 2 and len(rows) == 4
    assert capsys.readouterr().err == "error: two, seed 0: why\n"
    assert launched("local", {"two": 2, "one": 1})[0] == 1


def test_rows_whose_teachers_failed_are_not_launched(launched, capsys):
    code, (_, (_, rows)) = launched("local", {"teachers": 2})
    assert code == 2 and rows == []
    assert capsys.readouterr().err.count("error: teachers ") == 2
