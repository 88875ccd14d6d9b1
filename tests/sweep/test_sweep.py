"""A tiny sweep with everything behind it: killed, run again, left alone when it is done, published, compared.

One sweep goes through all tests of this file, in order.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpc_cpd.run.publish import is_done, read_json

ROOT = Path(__file__).parents[2]
TASKS = ["metaworld/reach-v3", "metaworld/drawer-close-v3"]
CONFIG = """
name: tiny
checkpoint_every_seconds: 1
stream: {tasks: [metaworld/reach-v3, metaworld/drawer-close-v3], tasks_per_stage: 2}
teachers: {source: zoo, ranks: 1}
trajectories: {episodes: 2}
student:
  width: 8
  backbone: {heads: 2}
  expert_hidden: 8
  history: 2
  task_embedding: {gradient_steps: 5, width: 8, size: 4, window: 2, windows_per_task: 2}
method: {memory: {budget_fraction: 0.6}}
distill: {ranks: 1, phase1_steps: 5, phase2_steps: 5, batch_size: 8}
evaluation: {episodes: 1, forward_transfer: false}
"""
SWEEP = """
name: pair
config: tiny.yaml
rows:
  wide: {teaches: "Nothing: the numbers are too small."}
  narrow: {seeds: [1], settings: {student.expert_hidden: 4}}
"""
DATA = [f"{part}/{task}" for part in ("teachers", "trajectories") for task in TASKS]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "tiny.yaml").write_text(CONFIG)
    (folder / "pair.yaml").write_text(SWEEP)
    return folder


def start(home: Path, *words: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "hpc_cpd.cli", *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=home, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def door(home: Path, *words: str, expected: int = 0) -> str:
    process = start(home, *words)
    output = process.communicate(timeout=500)[0]
    assert process.returncode == expected and "Traceback" not in output, output
    return output


def times(home: Path, *parts: str) -> dict[str, int]:
    """When each file below the folders of the sweep was last written, logs and pages aside."""
    skipped = {"logs", "report"}
    paths = [path for part in parts for path in (home / "runs" / "pair" / part).rglob("*") if path.is_file()]
    return {str(path): path.stat().st_mtime_ns for path in paths if not skipped & {*path.parts}}


def test_a_dry_run_shows_every_run_and_writes_nothing(home):
    output = door(home, "sweep", "pair.yaml", "--dry-run")
    assert "--run runs/pair/wide/seed-0 seed=0" in output
    assert "--run runs/pair/narrow/seed-1 seed=1 student.expert_hidden=4" in output
    assert len(re.findall("--stage teachers", output)) == 1
    assert sorted(path.name for path in home.iterdir()) == ["pair.yaml", "tiny.yaml"]


@pytest.mark.slow
def test_killed_and_run_again_it_makes_the_teachers_once_and_every_row(home):
    process = start(home, "sweep", "pair.yaml", "--cluster", "local", "--at-once", "2")
    wait_for(home, "runs/pair/*/seed-*/stages/1/lock.json", process)
    process.kill()
    process.wait()
    (shared,) = (path for path in (home / "runs/pair/shared").iterdir() if path.is_dir())
    assert all(is_done(shared / part) for part in DATA)
    made = times(home, "shared")

    output = door(home, "sweep", "pair.yaml", "--cluster", "local", "--at-once", "2")
    assert times(home, "shared") == made and "teachers" not in output.replace("teachers and", "")
    for run in (home / "runs/pair/wide/seed-0", home / "runs/pair/narrow/seed-1"):
        assert is_done(run / "stages" / "1")
        for part in ("teachers", "trajectories"):
            assert (run / part).is_symlink() and (run / part).resolve() == (shared / part).resolve()
    assert re.search(r"wide +1 +\d+%", output) and re.search(r"narrow +1 +\d+%", output)
    numbers = read_json(home / "runs/pair/report/metrics.json")
    assert numbers["settings"] == {"student.expert_hidden": {"wide": 8, "narrow": 4}}
    assert all(row["wall_clock_seconds"] > 0 for row in numbers["rows"])


def test_run_again_nothing_is_redone_and_one_row_alone_may_be_asked_for(home):
    before = times(home, "wide", "narrow", "shared")
    output = door(home, "sweep", "pair.yaml", "--cluster", "local", "--only", "narrow")
    assert "1 of 1 runs done, 0 to do" in output and "begins" not in output
    assert times(home, "wide", "narrow", "shared") == before


def test_a_row_that_now_asks_for_something_else_is_refused_in_the_launchers_words(home):
    (home / "pair.yaml").write_text(SWEEP.replace("expert_hidden: 4", "expert_hidden: 6"))
    output = door(home, "sweep", "pair.yaml", "--cluster", "local", expected=2)
    (home / "pair.yaml").write_text(SWEEP)
    words = " ".join(output.split())
    assert "error: narrow, seed 1: runs/pair/narrow/seed-1 was made with other settings: student.expert_hidden" in words
    assert "wide, seed 0:" not in output


def test_what_is_published_is_small_compares_the_same_and_makes_the_page(home):
    output = door(home, "sweep", "pair.yaml", "--publish", "docs/results")
    assert "Runs copied: 2. Page: docs/results.md" in output
    first = (home / "docs/results.md").read_bytes()
    assert b"**wide**: Nothing: the numbers are too small." in first
    files = [path for path in (home / "docs").rglob("*") if path.is_file()]
    assert all(path.suffix in (".json", ".yaml", ".png", ".md") or path.name == "DONE" for path in files)
    assert not any(str(home).encode() in path.read_bytes() for path in files if path.name != "provenance.json")
    door(home, "report", "docs/results/pair", "--out", "published")
    numbers = [read_json(home / at / "metrics.json")["rows"] for at in ("published", "runs/pair/report")]
    for rows in numbers:
        for row in rows:
            row["wall_clock_seconds"] = round(row["wall_clock_seconds"], 3)
    assert numbers[0] == numbers[1]
    door(home, "results")
    assert (home / "docs/results.md").read_bytes() == first


def test_a_run_that_was_made_apart_is_not_published_as_one_of_the_sweep(home):
    teachers = home / "runs/pair/wide/seed-0/teachers"
    target = os.readlink(teachers)
    teachers.unlink()
    shutil.copytree(teachers.parent / target, teachers)
    before = times(home, "../../docs")
    output = door(home, "sweep", "pair.yaml", "--publish", "docs/results", expected=2)
    assert "wide/seed-0/teachers is not the teachers that the sweep asks for" in " ".join(output.split())
    assert times(home, "../../docs") == before
    shutil.rmtree(teachers)
    teachers.symlink_to(target)


def wait_for(home: Path, pattern: str, process: subprocess.Popen[str]) -> Path:
    end = time.monotonic() + 400
    while not (found := sorted(home.glob(pattern))):
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            pytest.fail(process.communicate()[0])
        time.sleep(0.02)
    return found[0]
