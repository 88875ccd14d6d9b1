"""How the status of a run looks: in its place, as JSON, and watched."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from hpc_cpd.cluster.status import RunStatus, UnitStatus, snapshot
from hpc_cpd.cluster.units import TeacherUnit
from hpc_cpd.progress import News
from hpc_cpd.report.status_table import StatusTable, short_duration, watch
from hpc_cpd.run.lock import Lock
from hpc_cpd.run.paths import Run
from tests.cluster.half_done import (
    ONE,
    new_run,
    publish_all,
    publish_task,
    status_command,
    write_attempt,
    write_news,
)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return new_run(tmp_path / "run")


def drawn(status: RunStatus, width: int, watched: bool = False, height: int = 50) -> str:
    console = Console(file=io.StringIO(), width=width, height=height)
    console.print(StatusTable(status, watched), soft_wrap=not watched)
    return console.file.getvalue()  # type: ignore[attr-defined]


def example(run: Run) -> RunStatus:
    """Every column and state at once."""
    publish_task(run, ONE)
    status = snapshot(run)
    done, two, stage, three, last = status.units
    at_work = replace(
        two,
        state="running",
        job="1_1",
        node="gpu-[017-018]",
        restarts=2,
        progress=News("it", "", "phase 2", 900, 1500, 0.00166),
        steps_per_second=8.44,
        success=0.85,
        seconds_left=14280.0,
    )
    failed = replace(
        three, state="failed", error="OUT_OF_MEMORY: raise cluster.scheduler.memory_per_cpu", log="/logs/1_2_0_log.out"
    )
    waiting = replace(stage, state="waiting", reason="Dependency")
    return replace(status, scheduler="squeue", units=[done, at_work, waiting, failed, last])


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_its_place_and_loses_nothing(run, width):
    text = drawn(example(run), width)
    table = text.partition("\n\n")[0].splitlines()
    assert max(map(len, table[1:])) <= width
    words = " ".join(text.split())
    shown = "reach-v3 900/1500 8.4 steps/s 85% 3h58m gpu-[017-018] Dependency started /logs/1_2_0_log.out"
    for word in shown.split():
        assert word in words
    assert ("Speed" in text and "Time left" in text) == (width == 120)
    assert "- teacher metaworld/button-press-topdown-v3: OUT_OF_MEMORY: raise cluster.scheduler.memory_per_cpu" in text


@pytest.mark.parametrize("width", [60, 120])
def test_a_teacher_in_training_makes_rounds_and_no_steps(run, width):
    news = News("it", "", "ppo", 3, 40, counted="rounds")
    teacher = replace(snapshot(run).units[0], state="running", progress=news, steps_per_second=0.05)
    text = drawn(replace(snapshot(run), units=[teacher]), width)
    assert "0.05 rounds/s" in text and "steps" not in text.lower()


def test_a_success_that_some_old_tasks_stand_for_is_marked(run):
    stage = replace(snapshot(run).units[2], state="done", success=0.85, success_estimated=True)
    words = drawn(replace(snapshot(run), units=[stage]), 80).split()
    assert "~85%" in words and "85%" not in words


def test_columns_that_nobody_fills_are_not_shown(run):
    write_news(run.teacher(ONE), "cloning", 50, 3000, loss=0.1)
    write_attempt(run.teacher(ONE))
    with Lock(run.teacher(ONE), "the teacher"):
        heading = drawn(snapshot(run), 120).splitlines()[1]
    assert heading.split() == ["Task", "State", "Progress"]


def test_a_watched_table_fits_the_screen_and_leaves_out_what_is_dull(run):
    status = example(run)
    many = [UnitStatus(TeacherUnit(run, f"metaworld/t{index}"), "done") for index in range(500)]
    text = drawn(replace(status, units=many + status.units), 100, watched=True, height=24)
    lines = text.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 100
    assert "900/1500" in text and "and 502 more" in text and "t17" not in text


def test_a_thousand_errors_do_not_bury_the_counts(run):
    errors = [
        UnitStatus(TeacherUnit(run, f"metaworld/t{index}"), "failed", error="no", log="log") for index in range(1000)
    ]
    below = drawn(replace(snapshot(run), units=errors), 80).partition("\n\n")[2].splitlines()
    assert len(below) < 50 and "980 more" in " ".join(below)


def test_durations_are_short():
    words = [short_duration(seconds) for seconds in (-1, 45, 3500, 14280, 183600)]
    assert words == ["0s", "45s", "58m", "3h58m", "2d03h"]


def test_the_document_has_the_promised_keys_and_is_json(run):
    write_news(run.stage(1), "phase 1", 50, 2000, loss=float("nan"))
    printed = status_command(run.folder, "--json")
    document = json.loads(printed.stdout, parse_constant=pytest.fail)
    assert document.keys() == {"run", "scheduler", "units", "done", "total", "next", "notes"}
    keys = "unit state job reason node restarts failures progress steps_per_second success success_estimated"
    keys += " seconds_left error log"
    assert all(unit.keys() == set(keys.split()) for unit in document["units"])
    assert document["units"][2]["progress"] == {"phase": "phase 1", "step": 50, "total": 2000, "loss": None}
    described = status_command("--help").stdout
    assert all(re.search(rf"\b{key}\b", described) for key in [*document, *keys.split()])


# ---- watching


def test_watched_without_a_terminal_it_is_shown_once_per_change_until_all_is_done(run):
    steps: list[Callable[[], object]] = [
        lambda: None,
        lambda: publish_task(run, ONE),
        lambda: None,
        lambda: publish_all(run),
    ]

    def next_look() -> RunStatus:
        steps.pop(0)()
        return snapshot(run)

    console = Console(file=io.StringIO(), width=100)
    watch(next_look, console, as_json=True, every_seconds=0)
    shown = [json.loads(line)["done"]["teachers"] for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert shown == [0, 1, 3] and not steps
    printed = status_command(run.folder, "--watch")  # all is done: it returns at once
    assert printed.returncode == 0 and printed.stdout.count("3 of 3 teachers") == 1


def test_on_a_terminal_it_is_drawn_until_ctrl_c_which_is_no_error(run):
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests started in the background inherit that it is ignored
        os.execv(sys.executable, [sys.executable, "-m", "hpc_cpd.cli", "status", str(run.folder), "--watch"])
    seen = b""
    while b"Done:" not in seen:
        seen += os.read(terminal, 4096)
    os.write(terminal, b"\x03")
    while True:
        try:
            seen += os.read(terminal, 4096)
        except OSError:  # Linux: the other end has closed
            break
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert b"Traceback" not in seen and b"Aborted" not in seen
    os.close(terminal)
