"""Launchers side by side: how many at once, what they say, how they end, and that no signal is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from hpc_cpd.cluster.preemption import StopFlag
from hpc_cpd.sweep.launches import Launch, run_launches

PYTHON_SAYS = "import sys, time; print('ready', flush=True); "


def launch(tmp_path: Path, name: str, program: str) -> Launch:
    return Launch(name, ["-c", PYTHON_SAYS + program], tmp_path / name / "logs" / "sweep.log")


def test_one_that_fails_is_told_in_its_own_words_and_the_others_go_on(tmp_path):
    told = "print('error: the disk is full', file=sys.stderr); sys.exit(2)"
    crash = "raise ValueError('why')"
    killed = "import os; os.kill(os.getpid(), 9)"
    stopped = "print('stopped: somebody asked', file=sys.stderr); sys.exit(3)"
    launches = [launch(tmp_path, name, p) for name, p in zip("abcde", (told, crash, killed, stopped, ""), strict=True)]
    ended = {one.launch.name: one for one in run_launches(launches, 1, StopFlag(), lambda name, line: None)}
    assert {name: one.code for name, one in ended.items()} == {"a": 2, "b": 1, "c": 1, "d": 3, "e": 0}
    assert ended["a"].sentence == "the disk is full" and ended["d"].sentence == "somebody asked"
    assert "exit code 1" in ended["b"].sentence and "ValueError: why" in ended["b"].sentence
    assert "killed by SIGKILL" in ended["c"].sentence and str(launches[2].log) in ended["c"].sentence


def test_an_old_error_in_the_log_is_not_taken_for_a_new_one(tmp_path):
    one = launch(tmp_path, "a", "sys.exit(1)")
    one.log.parent.mkdir(parents=True)
    one.log.write_text("error: long ago\n")
    (ended,) = run_launches([one], 1, StopFlag(), lambda name, line: None)
    assert "long ago" not in ended.sentence and one.log.read_text().startswith("error: long ago\nready")


def test_at_most_so_many_run_at_once(tmp_path):
    program = "time.sleep(0.6)"
    launches = [launch(tmp_path, name, program) for name in "abcd"]
    running, most = 0, 0

    def show(name: str, line: str) -> None:
        nonlocal running, most
        running += line.startswith("begins") - line.startswith("done")
        most = max(most, running)

    assert len(run_launches(launches, 2, StopFlag(), show)) == 4
    assert most == 2 and running == 0


def test_only_lines_that_say_something_new_are_shown(tmp_path):
    lines = [
        "stage 1: step 5/9 loss 0.5",
        "stage 1: step 6/9 loss 0.4",
        "stage 2: step 1/9 loss 0.1",
        "noise",
        "Task: x",
    ]
    shown: list[str] = []
    program = "".join(f"print({line!r}); " for line in lines)
    run_launches([launch(tmp_path, "a", program)], 1, StopFlag(), lambda name, line: shown.append(line))
    assert shown[1:-1] == [lines[0], lines[2]]


def test_a_signal_reaches_every_launcher_and_none_is_started_after_it(tmp_path):
    program = (
        "import signal; signal.signal(signal.SIGTERM, lambda *_: sys.exit(3)); "
        "print('stage 1: ready', flush=True); time.sleep(60)"
    )
    launches = [launch(tmp_path, name, program) for name in "abc"]
    stop, ready = StopFlag(), set()

    def show(name: str, line: str) -> None:
        if "ready" in line:
            ready.add(name)
        if len(ready) == 2 and not stop():
            stop._note(signal.SIGTERM, None)

    began = time.monotonic()
    ended = run_launches(launches, 2, stop, show)
    assert sorted((one.launch.name, one.code) for one in ended) == [("a", 3), ("b", 3)]
    assert time.monotonic() - began < 30


def test_launchers_of_a_killed_sweep_die_with_it(tmp_path):
    program = (
        "import sys; from pathlib import Path; from hpc_cpd.sweep.launches import Launch, run_launches\n"
        "from hpc_cpd.cluster.preemption import StopFlag\n"
        "words = ['-c', 'import os, time; print(\"stage\", os.getpid(), \": x\", flush=True); time.sleep(60)']\n"
        f"launch = Launch('a', words, Path({str(tmp_path)!r}) / 'log')\n"
        "run_launches([launch], 1, StopFlag(), lambda name, line: print(line, flush=True))"
    )
    sweep = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    threading.Timer(60, sweep.kill).start()
    assert sweep.stdout is not None
    line = next(line for line in sweep.stdout if line.startswith("stage"))
    pid = int(line.split()[1])
    os.kill(pid, 0)
    sweep.kill()
    sweep.wait()
    end = time.monotonic() + 10
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():
        assert time.monotonic() < end
        time.sleep(0.05)
