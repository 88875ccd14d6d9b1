"""Launchers side by side: how many at once, what they say, how they end, and that no signal is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from hpc_cpd.cluster.preemption import StopFlag
from hpc_cpd.cluster.schedulers.local import supervise
from hpc_cpd.cluster.units import StageUnit
from hpc_cpd.progress import Progress
from hpc_cpd.run.paths import Run
from hpc_cpd.sweep.runner import Launch

PYTHON_SAYS = "import sys, time; print('ready', flush=True); "


def launch(tmp_path: Path, name: str, program: str) -> Launch:
    return Launch(name, ["-c", PYTHON_SAYS + program], tmp_path / name / "logs" / "sweep.log")


def test_one_that_fails_is_told_in_its_own_words_and_the_others_go_on(tmp_path):
    told = "print('error: the disk is full', file=sys.stderr); sys.exit(2)"
    crash = "raise ValueError('why')"
    killed = "import os; os.kill(os.getpid(), 9)"
    stopped = "print('stopped: somebody asked', file=sys.stderr); sys.exit(3)"
    launches = [launch(tmp_path, name, p) for name, p in zip("abcde", (told, crash, killed, stopped, ""), strict=True)]
    ended = {one.name: one for one in supervise(launches, 1, StopFlag(), lambda name, line: None)}
    assert {name: one.code for name, one in ended.items()} == {"a": 2, "b": 1, "c": 1, "d": 3, "e": 0}
    assert ended["a"].sentence == "the disk is full" and ended["d"].sentence == "somebody asked"
    assert "exit code 1" in ended["b"].sentence and "ValueError: why" in ended["b"].sentence
    assert "killed by SIGKILL" in ended["c"].sentence and str(launches[2].log) in ended["c"].sentence


def test_an_old_error_in_the_log_is_not_taken_for_a_new_one(tmp_path):
    one = launch(tmp_path, "a", "sys.exit(1)")
    one.log.parent.mkdir(parents=True)
    one.log.write_text("error: long ago\n")
    (ended,) = supervise([one], 1, StopFlag(), lambda name, line: None)
    assert "long ago" not in ended.sentence and one.log.read_text().startswith("error: long ago\nready")


def test_at_most_so_many_run_at_once(tmp_path):
    program = "time.sleep(0.6)"
    launches = [launch(tmp_path, name, program) for name in "abcd"]
    running, most = 0, 0

    def show(name: str, line: str) -> None:
        nonlocal running, most
        running += line.startswith("begins") - line.startswith("done")
        most = max(most, running)

    assert len(supervise(launches, 2, StopFlag(), show)) == 4
    assert most == 2 and running == 0


@pytest.mark.slow
def test_each_thing_that_a_unit_does_is_shown_once(tmp_path):
    run = Run(tmp_path)
    program = (
        "from pathlib import Path; from hpc_cpd.progress import Progress\n"
        f"one, two = (Progress('it', 0, folder=Path({str(tmp_path)!r}) / 'stages' / n) for n in '12')\n"
        "for what, say in (('phase 1', one), ('phase 1', one), ('phase 1', two), ('evaluating', two)):\n"
        "    say.update('text', phase=what, step=1, loss=0.5); print('noise', flush=True); time.sleep(1.5)"
    )
    units = [StageUnit(run, 1), StageUnit(run, 2)]
    Progress("it", folder=units[1].folder).update("old news")
    shown: list[str] = []
    one = replace(launch(tmp_path, "a", program), units=units)
    supervise([one], 1, StopFlag(), lambda name, line: shown.append(line))
    assert shown[1:-1] == ["stage 1: phase 1", "stage 2: phase 1", "stage 2: evaluating"]


def test_a_signal_reaches_every_launcher_and_none_is_started_after_it(tmp_path):
    program = (
        "import signal; signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))\n"
        "from pathlib import Path; from hpc_cpd.progress import Progress\n"
        "Progress('it', folder=Path(sys.argv[1])).update('ready'); time.sleep(60)"
    )
    units = {name: StageUnit(Run(tmp_path / name), 1) for name in "abc"}
    launches = [
        Launch(name, ["-c", PYTHON_SAYS + program, str(unit.folder)], tmp_path / f"{name}.log", units=[unit])
        for name, unit in units.items()
    ]
    stop, ready = StopFlag(), set()

    def show(name: str, line: str) -> None:
        if "ready" in line:
            ready.add(name)
        if len(ready) == 2 and not stop():
            stop._note(signal.SIGTERM, None)

    began = time.monotonic()
    ended = supervise(launches, 2, stop, show)
    assert sorted((one.name, one.code) for one in ended) == [("a", 3), ("b", 3)]
    assert time.monotonic() - began < 30


def test_launchers_of_a_killed_sweep_die_with_it(tmp_path):
    log = tmp_path / "log"
    program = (
        "from pathlib import Path; from hpc_cpd.sweep.runner import Launch\n"
        "from hpc_cpd.cluster.preemption import StopFlag; from hpc_cpd.cluster.schedulers.local import supervise\n"
        "argv = ['-c', 'import os, time; print(os.getpid(), flush=True); time.sleep(60)']\n"
        f"supervise([Launch('a', argv, Path({str(log)!r}))], 1, StopFlag(), lambda name, line: None)"
    )
    sweep = subprocess.Popen([sys.executable, "-c", program])
    end = time.monotonic() + 60
    while not log.is_file() or not log.read_text().endswith("\n"):
        assert time.monotonic() < end
        time.sleep(0.05)
    pid = int(log.read_text())
    os.kill(pid, 0)
    sweep.kill()
    sweep.wait()
    end = time.monotonic() + 10
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():
        assert time.monotonic() < end
        time.sleep(0.05)
