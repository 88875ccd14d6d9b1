"""Several launchers side by side on this machine, each a process of its own with a log.

A signal to the sweep reaches the sweep alone, which passes it on: every launcher then saves and leaves, as if it had
been asked itself. Launchers of a killed sweep are killed by the kernel, and end their ranks.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc_cpd.cluster.preemption import STOP_SIGNALS, StopFlag
from hpc_cpd.cluster.schedulers.local import tethered
from hpc_cpd.errors import EXIT_DONE, EXIT_FAULT, EXIT_STOPPED

POLL_SECONDS = 0.1
LAST_LINES = 15
_TOLD = re.compile(r"(stage|teacher|trajectories|caretaker|\d+ teachers?)\b.*:")
_NUMBERS = re.compile(r"[-+]?\d[\d.,e+-]*")
Show = Callable[[str, str], None]
"""(name of the launch, one line)"""


@dataclass(frozen=True)
class Launch:
    """A launcher to start. `words`: those after ``python``; `threads`: of each rank, None: the launcher decides."""

    name: str
    words: Sequence[str]
    log: Path
    threads: int | None = None


@dataclass(frozen=True)
class Ended:
    """How a launcher ended: its exit code, and its sentence if it was not done."""

    launch: Launch
    code: int
    sentence: str = ""


class _Running:
    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.began = time.monotonic()
        launch.log.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if launch.threads is not None:
            environment.setdefault("OMP_NUM_THREADS", str(launch.threads))
        with open(launch.log, "ab") as log:
            self._from = self._position = log.tell()
            self.process = subprocess.Popen(
                tethered([sys.executable, *launch.words]),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._said = ""

    def news(self) -> list[str]:
        """Lines that tell something else than the line before, and not the same with other numbers."""
        with open(self.launch.log, "rb") as file:
            file.seek(self._position)
            text = file.read()
        text = text[: text.rfind(b"\n") + 1]
        self._position += len(text)
        lines = []
        for line in map(str.strip, text.decode(errors="replace").splitlines()):
            unit, _, rest = line.partition(": ")
            said = f"{unit}: {_NUMBERS.sub('#', rest)}"
            if _TOLD.match(line) and said != self._said:
                self._said = said
                lines.append(line)
        return lines

    def end(self, code: int, stop: StopFlag) -> Ended:
        if code == EXIT_DONE:
            return Ended(self.launch, code)
        if stop() and (code == EXIT_STOPPED or -code in STOP_SIGNALS):  # a signal may come before it can catch any
            return Ended(self.launch, EXIT_STOPPED)
        with open(self.launch.log, "rb") as file:
            file.seek(self._from)
            text = "\n" + file.read().decode(errors="replace").strip()
        _, found, sentence = text.rpartition("\nstopped: " if code == EXIT_STOPPED else "\nerror: ")
        if not found:
            shown = "\n".join(f"    {line}" for line in text.splitlines()[-LAST_LINES:])
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            sentence = f"its launcher {how}; its log {self.launch.log} ends with\n{shown}"
        return Ended(self.launch, EXIT_FAULT if code < 0 else code, sentence)


def run_launches(launches: Sequence[Launch], at_once: int, stop: StopFlag, show: Show) -> list[Ended]:
    """Run `launches`, at most `at_once` at a time; return how those that were started ended.

    One that fails does not disturb the others. Once `stop` is set no other is started, and each signal is passed on:
    the first makes them save and leave, a second Ctrl-C kills their ranks.
    """
    waiting, running, ended = list(launches), list[_Running](), list[Ended]()
    passed_on = 0
    try:
        while waiting or running:
            if stop():
                waiting.clear()
            while waiting and len(running) < at_once:
                running.append(_Running(waiting.pop(0)))
                show(running[-1].launch.name, f"begins; its log: {running[-1].launch.log}")
            if stop.count > passed_on and stop.last is not None:
                passed_on = stop.count
                for one in running:
                    if one.process.poll() is None:
                        one.process.send_signal(stop.last)
            for one in list(running):
                code = one.process.poll()
                for line in one.news():
                    show(one.launch.name, line)
                if code is not None:
                    running.remove(one)
                    ended.append(one.end(code, stop))
                    show(one.launch.name, _farewell(ended[-1], time.monotonic() - one.began))
            if running:
                time.sleep(POLL_SECONDS)
    finally:
        for one in running:
            one.process.kill()
            one.process.wait()
    return ended


def _farewell(end: Ended, seconds: float) -> str:
    word = {EXIT_DONE: "done", EXIT_STOPPED: "stopped, saved"}.get(end.code, "failed")
    return f"{word} after {seconds:.0f} s"
